"""The learning rate range test: what it records, where it ends, and that nothing moves."""

import json
import math

import numpy as np
import pytest
import torch

import puretrain as pt
from puretrain.cli import main
from puretrain.errors import ConfigurationError, OptimizerError
from puretrain.tree import tree_digest

X = torch.linspace(-1, 1, 48).reshape(16, 3)
Y = X @ torch.tensor([1.0, -2.0, 3.0]) + torch.linspace(0, 9, 16).sin()


def loss(params, buffers, batch, key):
    x, y = batch
    return ((x @ params["w"] - y) ** 2).mean()


def made(make=pt.optim.sgd, accumulate=1, function=loss, **arguments):
    optimizer = pt.optim.inject_hyperparams(make)(lr=0.1, **arguments)
    state = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))
    return state, pt.train_step(function, optimizer, accumulate=accumulate)


def data(size=4):
    return pt.batches((X, Y), size, shuffle=True, seed=1)


def test_the_points_are_those_of_a_loop_in_plain_torch():
    state, step = made(momentum=0.5)
    test = pt.lr_find(state, step, data(16), min_lr=1e-4, max_lr=0.3, updates=30)
    w = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.5)
    order = pt.fit(state, step, data(16), steps=30, observers=[])  # the batches are all the same
    assert int(order.step) == 30
    raw, smoothed, mean = [], [], 0.0
    for i in range(30):
        optimizer.param_groups[0]["lr"] = 1e-4 * 3000 ** (i / 29)
        optimizer.zero_grad()
        value = loss({"w": w}, None, (X, Y), None)
        value.backward()
        optimizer.step()
        raw.append(value.item())
        mean = 0.98 * mean + 0.02 * raw[-1]
        smoothed.append(mean / (1 - 0.98 ** (i + 1)))
    assert test.raw == pytest.approx(raw, rel=1e-4)
    assert test.loss == pytest.approx(smoothed, rel=1e-4)
    assert test.lr == pytest.approx([1e-4 * 3000 ** (i / 29) for i in range(30)])
    assert not test.diverged
    assert test.results == {"lr": list(test.lr), "loss": list(test.loss)}
    chosen = np.gradient(np.array(test.loss[10:-1])).argmin() + 10
    assert test.suggestion() == test.lr[chosen]
    assert test.suggestion(3, 5) == test.lr[np.gradient(np.array(test.loss[3:-5])).argmin() + 3]


def test_nothing_moves():
    state, step = made(pt.optim.adam)
    state = pt.fit(state, step, data(), steps=6)  # in the middle of an epoch, made by steps
    before, generator = tree_digest(state), torch.get_rng_state()
    first = pt.lr_find(state, step, data(), updates=20)
    assert tree_digest(state) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert pt.lr_find(state, step, data(), updates=20) == first
    undisturbed = pt.fit(pt.fit(*made(pt.optim.adam), data(), steps=6), step, data(), steps=12)
    assert tree_digest(pt.fit(state, step, data(), steps=12)) == tree_digest(undisturbed)


def test_a_run_that_was_stopped_can_be_tested():
    state, step = made()
    stopped = state.replace(stop=torch.tensor(True))
    assert len(pt.lr_find(stopped, step, data(), updates=5).lr) == 5


def test_it_ends_where_the_loss_diverges():
    state, step = made()
    test = pt.lr_find(state, step, data(), min_lr=1e-3, max_lr=100.0)
    assert test.diverged
    assert 10 < len(test.lr) < 100
    best = min(test.loss)
    assert test.loss[-1] > 4 * best
    assert all(x <= 4 * best for x in test.loss[:-1])
    assert test.suggestion() < test.lr[-1]
    on = pt.lr_find(state, step, data(), min_lr=1e-3, max_lr=100.0, stop_factor=None)
    assert on.loss[: len(test.loss)] == test.loss
    assert len(on.lr) > len(test.lr)


@pytest.mark.parametrize("stop_factor", [4.0, None])
def test_nan_ends_it(stop_factor):
    def rising(params, buffers, batch, key):
        return (5 - params["w"].sum()).sqrt()

    state, step = made(function=rising)
    test = pt.lr_find(state, step, data(), stop_factor=stop_factor, min_lr=1.0, max_lr=2.0)
    assert test.diverged
    assert len(test.lr) == len(test.loss) == len(test.raw) < 100
    assert not math.isfinite(test.raw[-1])
    assert test.suggestion() is None


@pytest.mark.parametrize("size", [4, 8])  # 4 and 2 batches an epoch: with groups of 3, flushed
def test_accumulated_batches_are_one_point(size):
    state, step = made(accumulate=3)
    test = pt.lr_find(state, step, data(size), updates=12, mode="linear", max_lr=0.1)
    assert len(test.lr) == 12
    assert test.lr == pytest.approx(np.linspace(1e-8, 0.1, 12))
    seen = []
    pt.fit(
        state.replace(opt_state=pt.optim.set_hyperparams(state.opt_state, lr=1e-8)),
        step, data(size), epochs=1,
        observers=[lambda s, e: seen.append((e.kind, int(s.updates), float(s.metrics["loss"])))
                   if e.kind == "step" else None],
    )  # fmt: skip
    first = [value for _, _, value in seen][:3]
    assert test.raw[0] == pytest.approx(sum(first) / len(first))


def test_skipped_batches_do_not_make_it_endless():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1)
    state = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))

    def function(params, buffers, batch, key):
        return loss({"w": Bad.apply(params["w"])}, buffers, batch, key)

    step = pt.train_step(function, optimizer, nonfinite="skip")
    test = pt.lr_find(state, step, data())
    assert test.lr == ()
    assert test.suggestion() is None


def test_the_hyperparameter_can_have_another_place():
    sgd = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1)
    optimizer = pt.optim.chain(pt.optim.clip_by_global_norm(1.0), sgd)
    state = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))
    test = pt.lr_find(state, pt.train_step(loss, optimizer), data(), updates=5, hyperparameter="lr")
    assert len(test.lr) == 5


def test_what_cannot_be_tested_is_refused():
    optimizer = pt.optim.sgd(0.1)
    state = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))
    with pytest.raises(OptimizerError, match="inject_hyperparams"):
        pt.lr_find(state, pt.train_step(loss, optimizer), data())
    scheduled = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=pt.optim.cosine(0.1, 10))
    state = pt.TrainState.create({"w": torch.zeros(3)}, None, scheduled, key=pt.random.key(0))
    with pytest.raises(OptimizerError, match="follows a schedule"):
        pt.lr_find(state, pt.train_step(loss, scheduled), data())
    state, step = made()
    for wrong in ({"mode": "log"}, {"updates": 1}, {"min_lr": 0.0}, {"min_lr": 2.0},
                  {"stop_factor": 1.0}, {"smoothing": 1.0}):  # fmt: skip
        with pytest.raises(ConfigurationError):
            pt.lr_find(state, step, data(), **wrong)


def test_a_step_without_a_loss_is_refused():
    state, step = made()

    def silent(state, batch, *, donate=False):
        after = step(state, batch, donate=donate)
        return after.replace(metrics={"other": after.metrics["loss"]})

    with pytest.raises(ConfigurationError, match="records the metric 'loss'.*gave: other"):
        pt.lr_find(state, silent, data())


def test_a_chart_of_too_few_points_says_so():
    state, step = made(function=lambda params, *_: params["w"].sum() * math.nan)
    assert "fewer than two finite losses" in pt.lr_find(state, step, data()).chart()


def test_plot_and_chart(tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    state, step = made()
    test = pt.lr_find(state, step, data(), min_lr=1e-3, max_lr=100.0)
    figure = test.plot(suggest=True)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    curve, point = axes.lines
    assert list(curve.get_ydata()) == list(test.loss)
    assert list(point.get_xdata()) == [test.suggestion()]
    lines = test.chart().splitlines()
    assert len(lines) == 16
    assert all(len(line) <= 80 for line in lines)
    assert sum(line.count("◆") for line in lines) == 1
    # where the mark stands says which learning rate it is
    (row,) = [line for line in lines if "◆" in line]
    place = (row.index("◆") - 10) / 69
    span = math.log(test.lr[-1] / test.lr[0])
    assert test.lr[0] * math.exp(place * span) == pytest.approx(test.suggestion(), rel=0.1)
    assert "nothing to draw" in pt.RangeTest((), (), (), "linear", True).chart()


PROGRAM = """
import torch, puretrain as pt

def run(optimizer="injected", seed=0):
    make = pt.optim.inject_hyperparams(pt.optim.sgd) if optimizer == "injected" else pt.optim.sgd
    optimizer = make(lr=0.1)
    print("made")
    return pt.Run(
        state=pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer,
                                   key=pt.random.key(seed)),
        step=pt.train_step(lambda p, b, x, key: ((x - p["w"]) ** 2).mean(), optimizer),
        batches=pt.batches(torch.arange(24.0).reshape(8, 3).sin(), 2, shuffle=True),
        epochs=1,
        directory="runs/none",
    )
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    assert main(["lr-find", "program.py", "--min", "1e-3", "--max", "1e4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["diverged"]
    assert len(found["lr"]) == len(found["loss"]) == len(found["raw"])
    assert main(["lr-find", "program.py:run", "--min", "1e-3", "--max", "1e4"]) == 0
    text = capsys.readouterr().out
    assert f"suggestion  lr {found['suggestion']:.4g}" in text
    assert max(map(len, text.splitlines())) <= 80
    assert not (tmp_path / "runs").exists()
    assert main(["lr-find", "program.py", "--updates", "5", "--linear"]) == 0
    assert "suggestion  none" in capsys.readouterr().out
    assert main(["lr-find", "program.py", "--set", "optimizer=plain"]) == 2
    assert "inject_hyperparams" in capsys.readouterr().err
