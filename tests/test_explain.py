"""A step looked into, against numbers worked out by hand; and the history of a run."""

import math
import re

import matplotlib.image
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt
from puretrain.cli import main
from puretrain.errors import ConfigurationError, StructureError
from puretrain.explain import draw_explanations, read_explanations
from puretrain.tree import tree_equal, tree_map, tree_stack


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias[2:4] = -100.0  # two units that no input wakes
    return model


MODEL = network()
APPLY, PARAMS, BUFFERS = pt.functional(MODEL)
BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def loss(params, buffers, batch, key):
    x, y = batch
    return cross_entropy(APPLY(params, buffers, x)[0], y)


def start(loss=loss, **options):
    optimizer = pt.optim.sgd(0.1)
    state = pt.TrainState.create(PARAMS, BUFFERS, optimizer, key=pt.random.key(0))
    return state, pt.train_step(loss, optimizer, **options)


def test_norms_are_those_of_plain_torch():
    state, step = start()
    before = tree_map(torch.clone, state)
    hooks = len(torch.nn.modules.module._global_forward_hooks)
    found = pt.explain(step, state, BATCH)
    assert tree_equal(state, before)
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks
    model = network()
    value = cross_entropy(model(BATCH[0]), BATCH[1])
    value.backward()
    assert found.loss == value.item()
    assert found.step == 0
    for leaf, (name, parameter) in zip(found.leaves, model.named_parameters(), strict=True):
        assert (leaf.path, leaf.shape) == (name, tuple(parameter.shape))
        assert leaf.parameter == pytest.approx(parameter.norm().item(), rel=1e-6)
        assert leaf.gradient == pytest.approx(parameter.grad.norm().item(), rel=1e-6)
        assert leaf.update == pytest.approx(0.1 * leaf.gradient, rel=1e-4)
        assert leaf.ratio == pytest.approx(leaf.update / leaf.parameter)
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert found.gradient == pytest.approx(total, rel=1e-6)
    assert found.nonfinite is None
    assert found.notes == ()


def test_dead_units_are_counted():
    state, step = start()
    first, relu, last = pt.explain(step, state, BATCH).activations
    assert (first.name, first.units, first.dead) == ("0 (Linear)", 6, None)
    hidden = MODEL[1](MODEL[0](BATCH[0]))
    assert relu.name == "1 (ReLU)"
    assert (relu.units, relu.dead) == (6, int((hidden == 0).all(0).sum()))
    assert relu.dead >= 2
    assert relu.rms == pytest.approx(hidden.square().mean().sqrt().item(), rel=1e-5)
    assert last.name == "2 (Linear)"


def test_a_channel_of_an_image_is_a_unit():
    apply, params, buffers = pt.functional(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()))
    params = params | {"0.bias": torch.tensor([0.0, -100.0, 0.0])}
    optimizer = pt.optim.sgd(0.1)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = pt.train_step(lambda p, b, x, key: apply(p, b, x)[0].sum(), optimizer)
    relu = pt.explain(step, state, torch.rand(2, 1, 6, 6)).activations[1]
    assert relu.units == 3
    assert relu.dead >= 1


def poisoned(tree, path):
    return tree | {path: torch.full_like(tree[path], math.nan)}


def test_the_first_value_that_is_not_finite():
    state, step = start()
    x, y = BATCH
    bad = state.replace(params=poisoned(state.params, "2.weight"))
    assert pt.explain(step, bad, BATCH).nonfinite == "params/2.weight"
    assert pt.explain(step, state, (x * math.inf, y)).nonfinite == "batch/0"
    large = state.replace(params=tree_map(lambda leaf: leaf * 10, state.params))
    assert pt.explain(step, large, (x.sign() * 3e38, y)).nonfinite == "activations/0 (Linear)"
    _, of_root = start(lambda p, b, batch, key: (p["0.weight"] - p["0.weight"]).sqrt().sum())
    assert pt.explain(of_root, state, BATCH).nonfinite == "gradients/0.weight"
    _, of_log = start(lambda p, b, batch, key: (p["0.weight"].sum() * 0).log())
    assert pt.explain(of_log, state, BATCH).nonfinite == "loss"
    huge = pt.optim.sgd(1e38)
    found = pt.explain(pt.train_step(loss, huge), state, (x * 1e3, y))
    assert found.nonfinite == "after/params/0.weight"


def test_a_step_that_raises_is_explained_up_to_there():
    state, step = start(lambda p, b, batch, key: (p["0.weight"].sum() * 0).log(), nonfinite="raise")
    found = pt.explain(step, state, BATCH)
    assert found.nonfinite == "loss"
    assert found.update is None
    assert "the step raised: step 0: the loss is not finite" in found.notes[0]


def test_through_wrappers_and_compilers_and_of_no_step_of_ours():
    state, step = start()

    def half(state, batch):
        return step(state, tuple(part[:4] for part in batch))

    found = pt.explain(half, state, BATCH)
    expected = pt.explain(step, state, tuple(part[:4] for part in BATCH))
    assert found == expected
    assert found.gradient != pt.explain(step, state, BATCH).gradient
    compiled = pt.compiled(step, backend="eager")
    assert pt.explain(compiled, state, BATCH) == pt.explain(step, state, BATCH)
    assert compiled.report().eager == 1
    assert compiled.report().graphs == ()
    other = pt.explain(lambda state, batch: state.replace(step=state.step + 1), state, BATCH)
    assert other.loss is None
    assert other.leaves[0].gradient is None
    assert other.leaves[0].update == 0.0
    assert "not made by train_step" in other.notes[0]
    both = pt.explain(lambda state, batch: step(step(state, batch), batch), state, BATCH)
    assert both.notes == ("the step evaluates 2 losses; shown is the last",)
    many = tree_stack([state, state])
    together = torch.func.vmap(step, (0, None), randomness="same")
    assert "inside of a transform" in pt.explain(together, many, BATCH).notes[0]
    with pytest.raises(StructureError, match="a step, a TrainState and a batch"):
        pt.explain(step, BATCH, state)


def test_the_table():
    state, step = start()
    text = str(pt.explain(step, state, BATCH))
    assert re.search(r"^step 0: loss [0-9.]+, gradient [0-9.]+, parameters", text)
    assert re.search(r"^0\.weight +6×4 +[0-9.]+ +[0-9.]+", text, flags=re.MULTILINE)
    assert re.search(r"^1 \(ReLU\) +[0-9.]+ +[2-6]/6$", text, flags=re.MULTILINE)
    assert "not finite: none" in text


# ── The history of a run ──────────────────────────────────────────────────────────────────────────


def fitted(path, steps, state=None, every=2):
    begin, step = start()
    observers = [pt.explanations(path, step, every=every)]
    return pt.fit(state or begin, step, [BATCH] * 4, steps=steps, observers=observers)


def test_a_history_is_what_explain_says(tmp_path):
    path = tmp_path / "deep" / "explained.jsonl"
    state = fitted(path, 8)
    assert tree_equal(state, pt.fit(*start(), [BATCH] * 4, steps=8))
    columns = read_explanations(path)
    assert columns["step"] == [2, 4, 6, 8]
    _, step = start()
    last = pt.explain(step, state, BATCH)
    assert columns["loss"][-1] == pytest.approx(last.loss)
    assert columns["gradient"][-1] == last.gradient
    assert columns["ratio/2.weight"][-1] == last.leaves[2].ratio
    assert columns["dead/1 (ReLU)"][-1] == last.activations[1].dead / 6
    whole = path.read_text()
    path.unlink()
    fitted(path, 8, state=fitted(path, 5))
    assert path.read_text() == whole


def test_a_history_is_drawn(tmp_path, capsys):
    path = tmp_path / "explained.jsonl"
    fitted(path, 8)
    assert main(["explain", str(path)]) == 0
    assert "explained.svg" in capsys.readouterr().out
    drawing = (tmp_path / "explained.svg").read_text()
    for text in ("update / parameter", "0.weight", "share of dead units", "1 (ReLU)"):
        assert text in drawing
    assert main(["explain", str(path), "--output", str(tmp_path / "a.png"), "--json"]) == 0
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.std() > 0.1
    columns = read_explanations(path)
    draw_explanations({name: column[:1] for name, column in columns.items()}, tmp_path / "b.svg")
    with pytest.raises(ConfigurationError, match="nothing to draw"):
        draw_explanations({name: [] for name in columns}, tmp_path / "c.svg")
    with pytest.raises(ConfigurationError, match="can't be written"):
        draw_explanations(columns, tmp_path / "no" / "c.svg")


def test_what_is_no_history_says_so(tmp_path):
    path = tmp_path / "other.jsonl"
    with pytest.raises(ConfigurationError, match="can't be read"):
        read_explanations(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(ConfigurationError, match="line 1: this was not written by"):
        read_explanations(path)


FILE = """
import math
import torch
import puretrain as pt

def run(start=0.0):
    optimizer = pt.optim.sgd(0.1)
    params = {"w": torch.full((3,), float(start))}
    return pt.Run(
        state=pt.TrainState.create(params, None, optimizer, key=pt.random.key(0)),
        step=pt.train_step(lambda p, b, x, key: (p["w"] * x).sum(), optimizer),
        batches=pt.batches(torch.ones(4, 3), 2),
        epochs=1,
    )
"""


def test_the_command_explains_a_file(tmp_path, capsys):
    path = tmp_path / "train_me.py"
    path.write_text(FILE)
    assert main(["explain", str(path)]) == 0
    out = capsys.readouterr().out
    assert "step 0: loss 0, gradient 3.464" in out
    assert re.search(r"^w +3 +0 +3.464", out, flags=re.MULTILINE)
    assert main(["explain", str(path), "--set", "start=1e999", "--json"]) == 1
    assert '"nonfinite": "params/w"' in capsys.readouterr().out
