"""Ensembles: each member against its own separate run, and what is done with many members."""

import csv
import io
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt
from puretrain.cli import main
from puretrain.errors import (
    ConfigurationError,
    LossError,
    NonFiniteError,
    OptimizerError,
    StructureError,
    TransformError,
)
from puretrain.loop import Event
from puretrain.tree import tree_diff, tree_equal, tree_index, tree_leaves, tree_map

MEMBERS = 4


@pytest.fixture(autouse=True)
def one_thread():
    """With several, torch cuts a batched kernel's work at other places than a single one's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OddNoise(nn.Module):
    """Draws in several ways."""

    def forward(self, x):
        noise = torch.randn(x.shape[-1]) + torch.rand_like(x) + torch.randint(3, (x.shape[0], 1))
        kept = torch.bernoulli(torch.full_like(x, 0.7))
        return (x + 0.1 * noise)[:, torch.randperm(x.shape[-1])] * kept


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(7, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(1))[0][:, -1])


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 3)),
    "dropout": lambda: nn.Sequential(
        nn.Linear(7, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    ),
    "noise": lambda: nn.Sequential(nn.Linear(7, 16), OddNoise(), nn.ReLU(), nn.Linear(16, 3)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(7, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    ),
    "recurrent": Recurrent,
}


def batch_of(seed, size=11):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 7, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def setting(network, optimizer, keyed=False):
    """The loss of a member, and the function that makes its first state."""
    apply, _, _ = pt.functional(NETWORKS[network]())

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, buffers = apply(params, buffers, x, **({"key": key} if keyed else {}))
        return cross_entropy(logits, y), pt.Aux(buffers, {"right": (logits.argmax(1) == y).sum()})

    def init(key):
        _, params, buffers = pt.functional(NETWORKS[network]())
        return pt.TrainState.create(params, buffers, optimizer, key=key)

    return loss, init


def separate(init, loss, optimizer, keys, batches, each=lambda i, state: state, **options):
    """Each member's own run."""
    step = pt.train_step(loss, optimizer, **options)
    runs = []
    for i, key in enumerate(keys):
        with pt.random.scope(key):
            state = each(i, init(key))
        for batch in batches:
            state = step(state, batch)
        runs.append(state)
    return runs


# What a batched kernel computes in another order than a single one: the loss, a mean over the
# batch. No parameter depends on its bits.
ROUNDED = {"metrics/loss"}


def assert_same_runs(state, runs, tolerance=None):
    for i, alone in enumerate(runs):
        own = pt.member(state, i)
        if tolerance is None:
            differing = [d for d in tree_diff(own, alone) if d.path not in ROUNDED]
            assert not differing, (i, differing)
        torch.testing.assert_close(
            tree_leaves(own), tree_leaves(alone), rtol=tolerance or 1e-6, atol=tolerance or 1e-6
        )


OPTIMIZERS = {
    "adamw": lambda: pt.optim.adamw(pt.optim.cosine(0.02, 20)),
    "momentum": lambda: pt.optim.sgd(0.1, momentum=0.9, nesterov=True),
    "clipped": lambda: pt.optim.chain(pt.optim.clip_by_global_norm(0.1), pt.optim.adam(0.01)),
    "lamb": lambda: pt.optim.lamb(0.01),
    "groups": lambda: pt.optim.multi_transform(
        {"**weight": pt.optim.muon(0.01), "**": pt.optim.sgd(0.1)}
    ),
    "of torch": lambda: pt.optim.from_torch(torch.optim.Adam, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", ["mlp", "dropout"])
def test_each_member_is_its_own_run_to_the_bit(network, optimizer):
    optimizer = OPTIMIZERS[optimizer]()
    loss, init = setting(network, optimizer)
    keys = pt.random.split(pt.random.key(0), MEMBERS)
    state = pt.ensemble(init, keys)
    step = pt.ensemble_step(loss, optimizer)
    batches = [batch_of(n) for n in range(8)]
    runs = separate(init, loss, optimizer, keys, batches)
    generator = torch.get_rng_state()
    for n, batch in enumerate(batches):
        state = step(state, batch, donate=n % 3 > 0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_runs(state, runs)
    assert len({float(x) for x in state.metrics["loss"]}) == MEMBERS


@pytest.mark.parametrize("keyed", [False, True])
def test_each_member_draws_what_it_would_draw_alone(keyed):
    optimizer = pt.optim.sgd(0.1)
    loss, init = setting("noise", optimizer, keyed)
    keys = pt.random.split(pt.random.key(1), MEMBERS)
    state, step = pt.ensemble(init, keys), pt.ensemble_step(loss, optimizer)
    batches = [batch_of(n) for n in range(3)]
    for batch in batches:
        state = step(state, batch)
    assert_same_runs(state, separate(init, loss, optimizer, keys, batches), tolerance=1e-6)


@pytest.mark.parametrize("network", ["batch norm", "convolution"])
def test_other_layers_round_otherwise_but_agree(network):
    optimizer = pt.optim.sgd(0.1, momentum=0.9)
    loss, init = setting(network, optimizer)
    keys = pt.random.split(pt.random.key(2), MEMBERS)
    state, step = pt.ensemble(init, keys), pt.ensemble_step(loss, optimizer)
    batches = [batch_of(n) for n in range(10)]
    for batch in batches:
        state = step(state, batch, donate=True)
    assert_same_runs(state, separate(init, loss, optimizer, keys, batches), tolerance=2e-6)
    if network == "batch norm":
        assert not torch.equal(*state.buffers["1.running_mean"][:2])


@pytest.mark.parametrize("network", ["batch norm", "noise", "recurrent"])
def test_members_one_after_the_other_are_equal_to_the_bit(network):
    optimizer = pt.optim.adamw(0.01)
    loss, init = setting(network, optimizer)
    keys = pt.random.split(pt.random.key(3), 3)
    state, step = pt.ensemble(init, keys), pt.ensemble_step(loss, optimizer, vectorize=False)
    batches = [batch_of(n) for n in range(3)]
    for batch in batches:
        state = step(state, batch)
    assert_same_runs(state, separate(init, loss, optimizer, keys, batches))


def test_a_layer_without_a_rule_for_vmap_says_so():
    optimizer = pt.optim.sgd(0.1)
    loss, init = setting("recurrent", optimizer)
    state = pt.ensemble(init, pt.random.split(pt.random.key(0), 2))
    with pytest.raises(TransformError, match=r"lstm is an nn.LSTM.*vectorize=False"):
        pt.ensemble_step(loss, optimizer)(state, batch_of(0))


def test_a_sweep_of_hyperparameters():
    rates, decays = [0.1, 0.01, 0.01, 0.001], [0.0, 0.1, 0.1, 0.5]
    make = pt.optim.inject_hyperparams(pt.optim.adamw)
    optimizer = make(lr=1.0, weight_decay=0.0)
    loss, init = setting("dropout", optimizer)
    keys = pt.random.split(pt.random.key(0), MEMBERS)
    state = pt.ensemble(init, keys, lr=rates, weight_decay=torch.tensor(decays))
    step = pt.ensemble_step(loss, optimizer)
    batches = [batch_of(n) for n in range(6)]
    for n, batch in enumerate(batches):
        state = step(state, batch, donate=n > 0)
    for i in range(MEMBERS):  # optimizers that know nothing of injection
        plain = pt.optim.adamw(rates[i], weight_decay=float(torch.tensor(decays)[i]))
        loss, init = setting("dropout", plain)
        (alone,) = separate(init, loss, plain, keys[i : i + 1], batches)
        assert tree_equal(pt.member(state, i).params, alone.params)
    assert pt.optim.get_hyperparams(state.opt_state)["lr"].tolist() == rates


def test_a_batch_for_each_member():
    optimizer = pt.optim.adamw(0.01)
    loss, init = setting("mlp", optimizer)
    keys = pt.random.split(pt.random.key(0), 3)
    state, step = pt.ensemble(init, keys), pt.ensemble_step(loss, optimizer, batches="separate")
    own = [[batch_of(10 * i + n) for n in range(4)] for i in range(3)]
    for n in range(4):
        state = step(state, pt.tree.tree_stack([batches[n] for batches in own]))
    for i in range(3):
        (alone,) = separate(init, loss, optimizer, keys[i : i + 1], own[i])
        assert tree_equal(pt.member(state, i).params, alone.params)
    with pytest.raises(StructureError, match="an axis of the 3 members"):
        step(state, batch_of(0))


def test_bfloat16_autocast():
    optimizer = pt.optim.sgd(0.1)
    loss, init = setting("mlp", optimizer)
    keys = pt.random.split(pt.random.key(0), 2)
    state = pt.ensemble(init, keys)
    state = pt.ensemble_step(loss, optimizer, precision="bf16")(state, batch_of(0))
    runs = separate(init, loss, optimizer, keys, [batch_of(0)], precision="bf16")
    assert_same_runs(state, runs, tolerance=1e-2)


@pytest.mark.parametrize("network", ["mlp", "batch norm"])
def test_a_compiled_step_agrees(network):
    torch.compiler.reset()
    optimizer = pt.optim.sgd(0.1, momentum=0.9)
    loss, init = setting(network, optimizer)
    keys = pt.random.split(pt.random.key(0), MEMBERS)
    state = pt.ensemble(init, keys)
    step = pt.ensemble_step(loss, optimizer, draws=False, compile="aot_eager")
    batches = [batch_of(n) for n in range(3)]
    for batch in batches:
        state = step(state, batch, donate=True)
    runs = separate(init, loss, optimizer, keys, batches, draws=False)
    assert_same_runs(state, runs, tolerance=2e-6)
    if network == "mlp":  # a loss that returns nothing besides

        def alone(params, buffers, batch, key):
            return loss(params, buffers, batch, key)[0]

        step = pt.ensemble_step(alone, optimizer, draws=False, compile="eager")
        plain = pt.ensemble_step(alone, optimizer, draws=False)
        torch.testing.assert_close(
            tree_leaves(step(state, batch_of(5))), tree_leaves(plain(state, batch_of(5)))
        )
    torch.compiler.reset()


def test_donating_gives_up_the_state_and_its_parts():
    optimizer = pt.optim.lamb(0.01)
    loss, init = setting("mlp", optimizer)
    step = pt.ensemble_step(loss, optimizer)
    state = step(pt.ensemble(init, pt.random.split(pt.random.key(0), 2)), batch_of(0))
    params, opt_state = state.params, state.opt_state
    kept = step(state, batch_of(1))
    again = step(state, batch_of(1), donate=True)
    assert tree_equal(kept, again)
    for given_up in (lambda: state.params, lambda: params["0.weight"], lambda: opt_state.count):
        with pytest.raises(pt.errors.DonatedStateError):
            given_up()


# ── Losses that are not finite ────────────────────────────────────────────────────────────────────


def nonfinite_setting():
    optimizer = pt.optim.adamw(0.1)

    def loss(params, buffers, batch, key):
        value = ((params["w"] - batch) ** 2).sum()
        return value, pt.Aux({"seen": buffers["seen"] + 1})

    def init(key):
        return pt.TrainState.create(
            {"w": torch.ones(())}, {"seen": torch.tensor(0.0)}, optimizer, key=key
        )

    state = pt.ensemble(init, pt.random.split(pt.random.key(0), 3))
    batch = torch.tensor([[1.0, 2, 3], [math.nan, 2, 3], [4, 5, 6]])
    return loss, optimizer, state, batch


def test_skipping_is_each_members_own_business():
    loss, optimizer, state, batch = nonfinite_setting()
    step = pt.ensemble_step(loss, optimizer, nonfinite="skip", batches="separate")
    after = step(state, batch)
    assert after.skipped.tolist() == [0, 1, 0]
    assert after.buffers["seen"].tolist() == [1, 0, 1]
    assert after.opt_state.count.tolist() == [1, 0, 1]
    assert tree_equal(pt.member(after, 1).params, pt.member(state, 1).params)
    alone = pt.train_step(loss, optimizer)
    for i in (0, 2):
        assert tree_equal(
            pt.member(after, i).opt_state, alone(pt.member(state, i), batch[i]).opt_state
        )


def test_raising_names_the_members():
    loss, optimizer, state, batch = nonfinite_setting()
    step = pt.ensemble_step(loss, optimizer, nonfinite="raise", batches="separate")
    with pytest.raises(NonFiniteError, match="step 0: the loss or a gradient of member 1 is not"):
        step(state, batch, donate=True)
    after = step(state.replace(stopped=torch.tensor([-1, 0, -1])), batch)  # it takes no part
    assert after.opt_state.count.tolist() == [1, 0, 1]


# ── Through the loop ──────────────────────────────────────────────────────────────────────────────


def data(size=44, seed=5):
    return batch_of(seed, size)


def evaluation(network):
    apply, _, _ = pt.functional(NETWORKS[network]())

    def outputs(params, buffers, batch, key):
        return apply(params, buffers, batch[0], train=False)[0]

    def metrics(logits, batch):
        return {
            "loss": cross_entropy(logits, batch[1]),
            "accuracy": pt.metrics.Accuracy.of(logits, batch[1]),
        }

    return outputs, metrics


def looped(network, optimizer, **hyperparameters):
    loss, init = setting(network, optimizer)
    keys = pt.random.split(pt.random.key(7), MEMBERS)
    state = pt.ensemble(init, keys, **hyperparameters)
    outputs, metrics = evaluation(network)
    arguments = {
        "batches": pt.batches(data(), 11, shuffle=True, seed=1),
        "validation": pt.Validation(
            pt.ensemble_eval_step(outputs, metrics), pt.batches(data(seed=6), 20)
        ),
    }
    return state, pt.ensemble_step(loss, optimizer), arguments


def test_early_stopping_of_each_member_is_that_of_its_own_run():
    make = pt.optim.inject_hyperparams(pt.optim.adamw)
    optimizer = make(lr=1.0)
    rates = [0.1, 0.03, 0.01, 3.0]
    state, step, arguments = looped("dropout", optimizer, lr=rates)
    stopping = pt.early_stopping("val/loss", patience=2)
    first = state
    state = pt.fit(state, step, **arguments, epochs=12, reducers=[pt.per_member(stopping)])
    loss, _ = setting("dropout", optimizer)
    outputs, metrics = evaluation("dropout")
    alone_step = pt.eval_step(lambda p, b, batch, key: metrics(outputs(p, b, batch, key), batch))
    arguments["validation"] = arguments["validation"]._replace(step=alone_step)
    for i in range(MEMBERS):
        alone = pt.fit(
            pt.member(first, i),
            pt.train_step(loss, optimizer),
            **arguments,
            epochs=12,
            reducers=[stopping],
        )
        own = pt.member(state, i)
        for field in ("params", "opt_state", "buffers", "key", "step", "stop"):
            assert tree_equal(getattr(own, field), getattr(alone, field)), (i, field)
        memory, expected = own.reducers["early_stopping"], alone.reducers["early_stopping"]
        for field in ("waited", "checks", "stopped", "reason"):
            assert torch.equal(getattr(memory, field), getattr(expected, field)), (i, field)
        torch.testing.assert_close(memory.best, expected.best)
    assert len(set(state.stopped.tolist())) > 1  # they did not stop together


def test_the_run_ends_with_the_last_member():
    state, step, arguments = looped("mlp", pt.optim.sgd(1e-9))
    stopping = pt.per_member(pt.early_stopping("val/loss", patience=1, min_delta=1.0))
    state = pt.fit(state, step, **arguments, epochs=50, reducers=[stopping])
    assert bool(state.stop)
    assert state.stopped.tolist() == [8] * MEMBERS
    assert int(state.step) == 8


def test_a_reducer_for_one_run_says_how_to_apply_it_to_members():
    state, step, arguments = looped("mlp", pt.optim.sgd(0.1))
    with pytest.raises(ConfigurationError, match=r"puretrain.per_member\(reducer\)"):
        pt.fit(state, step, **arguments, epochs=1, reducers=[pt.early_stopping("val/loss")])


def test_the_learning_rate_of_each_member_follows_its_own_plateau():
    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=1.0)
    state, step, arguments = looped("mlp", optimizer, lr=[0.1, 0.1, 1e-9, 1e-9])
    plateau = pt.reduce_on_plateau(
        "train/loss", patience=0, threshold=1e-3, threshold_mode="abs", eps=0.0
    )
    state = pt.fit(
        state, step, **arguments, epochs=3, reducers=[pt.per_member(plateau), pt.lr_monitor()]
    )
    lr = pt.optim.get_hyperparams(state.opt_state)["lr"]
    assert lr[0] == lr[1] == 0.1
    assert lr[2] == lr[3] == pytest.approx(1e-11)
    assert state.metrics["lr"].shape == (MEMBERS,)


def test_a_reducer_of_members_may_not_change_what_they_share():
    state = pt.ensemble(
        lambda key: pt.TrainState.create({"w": torch.ones(())}, key=key),
        pt.random.split(pt.random.key(0), 2),
    )
    reducer = pt.per_member(lambda state, event: state.replace(validated=state.step + 1))
    with pytest.raises(StructureError, match="changes validated"):
        reducer.reduce(state, Event("validation", 0, 0))


def every_reducer():
    return [
        pt.ema(0.9),
        pt.per_member(pt.early_stopping("val/loss", patience=2)),
        pt.per_member(pt.best_k("val/loss", 2)),
        pt.population("val/loss", perturb={"lr": (0.8, 1.25)}, every=2),
        pt.lr_monitor(),
    ]


def test_a_saved_and_loaded_ensemble_continues_to_the_bit(tmp_path):
    optimizer = pt.optim.inject_hyperparams(pt.optim.adamw)(lr=0.01)
    state, step, arguments = looped("dropout", optimizer, lr=[0.01, 0.02, 0.05, 0.1])
    straight = pt.fit(state, step, **arguments, epochs=6, reducers=every_reducer())
    half = pt.fit(state, step, **arguments, steps=10, reducers=every_reducer())
    pt.save(tmp_path / "half.ckpt", half)
    loaded = pt.load(tmp_path / "half.ckpt", like=state)
    assert isinstance(loaded, pt.EnsembleState)
    assert tree_equal(loaded.params, half.params)
    resumed = pt.fit(loaded, step, **arguments, epochs=6, reducers=every_reducer())
    assert tree_equal(resumed, straight)
    assert straight.reducers["population"].copies.sum() > 0


def test_one_member_is_saved_and_goes_on_alone(tmp_path):
    optimizer = pt.optim.adamw(0.01)
    loss, init = setting("dropout", optimizer)
    keys = pt.random.split(pt.random.key(0), 3)
    state, step = pt.ensemble(init, keys), pt.ensemble_step(loss, optimizer)
    for n in range(3):
        state = step(state, batch_of(n))
    pt.save(tmp_path / "one.ckpt", pt.member(state, 2))
    alone = pt.load(tmp_path / "one.ckpt", like=init(keys[0]))
    assert type(alone) is pt.TrainState
    after = pt.train_step(loss, optimizer)(alone, batch_of(3))
    together = step(state, batch_of(3))
    assert tree_equal(after.params, pt.member(together, 2).params)


def test_an_average_of_an_ensemble_is_that_of_each_member():
    optimizer = pt.optim.adamw(0.01)
    state, step, arguments = looped("mlp", optimizer)
    arguments["validation"] = None
    first = state
    state = pt.fit(state, step, **arguments, epochs=1, reducers=[pt.ema(0.9)])
    loss, _ = setting("mlp", optimizer)
    for i in range(MEMBERS):
        alone = pt.fit(
            pt.member(first, i),
            pt.train_step(loss, optimizer),
            **arguments,
            epochs=1,
            reducers=[pt.ema(0.9)],
        )
        average = pt.averaged(alone).params
        torch.testing.assert_close(
            dict(pt.member(pt.averaged(state), i).params), dict(average), rtol=1e-6, atol=1e-7
        )


PROGRAM = """
import torch
import puretrain as pt

apply, _, _ = pt.functional(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5)))


def loss(params, buffers, batch, key):
    return apply(params, buffers, batch)[0].square().mean()


def run(directory):
    optimizer = pt.optim.adamw(0.01)

    def init(key):
        return pt.TrainState.create(
            {"0.weight": torch.rand(2, 3), "0.bias": torch.rand(2)}, None, optimizer, key=key
        )

    return pt.Run(
        state=pt.ensemble(init, pt.random.split(pt.random.key(0), 3)),
        step=pt.ensemble_step(loss, optimizer),
        batches=pt.batches(torch.arange(24.0).reshape(8, 3) / 24, 2, shuffle=True),
        epochs=3,
        reducers=[pt.per_member(pt.early_stopping("train/loss", patience=1))],
        observers=[pt.journal(directory, every=2), pt.checkpoints(directory, every=4)],
        directory=directory,
    )
"""


def test_a_run_is_journaled_and_lived_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    program, directory = tmp_path / "many.py", tmp_path / "run"
    program.write_text(PROGRAM)
    assert main(["fit", str(program), f"--directory={directory}"]) == 0
    metrics = pt.open_run(directory).metrics()
    assert {"loss/mean", "loss/std", "loss/0", "loss/2"} <= set(metrics)
    assert main(["replay", str(directory)]) == 0
    assert "12" in capsys.readouterr().out
    sys.modules.pop("many", None)


# ── What observers show ───────────────────────────────────────────────────────────────────────────


def test_observers_show_each_member_and_the_spread(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    optimizer = pt.optim.sgd(0.1)
    state, step, arguments = looped("mlp", optimizer)
    shown = io.StringIO()
    observers = [
        pt.tensorboard(tmp_path / "tb", every=1),
        pt.csv_log(tmp_path / "log.csv", every=1),
        pt.progress(file=shown),
    ]
    state = pt.fit(state, step, **arguments, epochs=1, observers=observers)
    losses = state.metrics["loss"].double()
    reader = EventAccumulator(str(tmp_path / "tb"))
    reader.Reload()
    for i in range(MEMBERS):
        assert reader.Scalars(f"loss/{i}")[-1].value == pytest.approx(float(losses[i]))
    assert reader.Scalars("loss/mean")[-1].value == pytest.approx(float(losses.mean()))
    assert reader.Scalars("loss/std")[-1].value == pytest.approx(float(losses.std()))
    assert {"val/loss/0", "val/loss/mean", "val/ensemble/loss", "train/loss/std"} <= set(
        reader.Tags()["scalars"]
    )
    with (tmp_path / "log.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["event"] == "step"][-1]
    assert float(last["loss/3"]) == float(losses[3])
    (line,) = [line for line in shown.getvalue().splitlines() if line.startswith("step 4")]
    assert "val/loss " in line
    assert "±" in line


def test_what_is_not_finite_is_counted_and_left_out_of_the_spread():
    state = pt.ensemble(
        lambda key: pt.TrainState.create({"w": torch.ones(())}, key=key),
        pt.random.split(pt.random.key(0), 3),
    )
    shown = io.StringIO()
    metrics = {"a": torch.tensor([1.0, 3.0, math.nan]), "b": torch.ones(2), "c": torch.tensor(0.5)}
    pt.progress(file=shown)(state, Event("validation", 0, 7, metrics))
    assert shown.getvalue() == "step 7  a 2±1.4!1  c 0.5\n"


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def test_evaluation_of_members_and_of_their_common_prediction():
    state, _, arguments = looped("dropout", pt.optim.sgd(0.1))
    outputs, metrics = evaluation("dropout")
    found = pt.evaluate(state, arguments["validation"].step, arguments["validation"].batches)
    x, y = data(seed=6)
    logits = []
    for i in range(MEMBERS):
        one = pt.member(state, i)
        logits.append(outputs(one.params, one.buffers, (x, y), None))
        assert float(found["accuracy"][i]) == pytest.approx(
            float((logits[i].argmax(1) == y).double().mean())
        )
        assert float(found["loss"][i]) == pytest.approx(
            float(cross_entropy(logits[i], y)), rel=1e-5
        )
    vote = torch.stack(logits).softmax(-1).mean(0)
    nll = -vote[torch.arange(len(y)), y].log().mean()
    assert float(found["ensemble/loss"]) == pytest.approx(float(nll), rel=1e-5)
    right = (vote.argmax(1) == y).double().mean()
    assert float(found["ensemble/accuracy"]) == pytest.approx(float(right))


def test_evaluation_with_metrics_alone_and_one_member_after_the_other():
    optimizer = pt.optim.sgd(0.1)
    _, init = setting("recurrent", optimizer)
    state = pt.ensemble(init, pt.random.split(pt.random.key(0), 2))
    outputs, metrics = evaluation("recurrent")
    step = pt.ensemble_eval_step(
        lambda p, b, batch, key: metrics(outputs(p, b, batch, key), batch), vectorize=False
    )
    found = step(state, batch_of(0))
    assert [*found] == ["loss", "accuracy"]
    assert found["loss"].shape == (2,)
    with pytest.raises(LossError, match="the metrics of a member are a Tensor"):
        pt.ensemble_eval_step(lambda p, b, batch, key: p["head.bias"])(state, batch_of(0))


# ── A population ──────────────────────────────────────────────────────────────────────────────────


def population_state(members=8):
    optimizer = pt.optim.inject_hyperparams(pt.optim.adam)(lr=0.1)
    _, init = setting("batch norm", optimizer)
    return pt.ensemble(
        init, pt.random.split(pt.random.key(0), members), lr=torch.arange(1.0, members + 1)
    )


def test_the_worst_become_copies_of_the_best():
    average = pt.ema(0.5)
    reducer = pt.population("val/loss", fraction=0.25, perturb={"lr": (0.5, 2.0)})
    state = pt.prepare(population_state(), [reducer, average])
    state = state.replace(updates=state.updates + 1)
    state = average.reduce(state, Event("step", 0, 1))
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, math.nan, 0.2, 0.6, 0.4])
    event = Event("validation", 0, 5, {"val/loss": scores})
    after = reducer.reduce(state, event)
    memory = after.reducers["population"]
    assert memory.copies.tolist() == [0, 0, 1, 0, 1, 0, 0, 0]
    lr = pt.optim.get_hyperparams(after.opt_state)["lr"]
    for i in range(8):
        parent = int(memory.parents[i])
        assert (parent in (1, 5)) is (i in (2, 4))
        source = parent if parent >= 0 else i
        for field in ("params", "buffers"):
            assert tree_equal(
                tree_index(getattr(after, field), i), tree_index(getattr(state, field), source)
            )
        own = tree_index(after.reducers["ema"].params, i)
        assert tree_equal(own, tree_index(state.reducers["ema"].params, source))
        times = float(lr[i]) / (source + 1)
        assert times in ((0.5, 2.0) if parent >= 0 else (1.0,))
    assert torch.equal(after.key, state.key)
    assert tree_equal(reducer.reduce(state, event), after)  # a function of its arguments
    assert not torch.equal(after.opt_state.inner.exp_avg["0.weight"].sum(), torch.tensor(1.0))


def test_the_highest_are_the_best_of_a_population_that_climbs():
    reducer = pt.population("val/accuracy", mode="max", fraction=0.5, every=2)
    state = pt.prepare(population_state(4), [reducer])
    event = Event("validation", 0, 5, {"val/accuracy": torch.tensor([0.1, 0.8, 0.2, 0.9])})
    once = reducer.reduce(state, event)
    assert once.reducers["population"].copies.sum() == 0  # every second check
    parents = reducer.reduce(once, event).reducers["population"].parents.tolist()
    assert parents[1] == parents[3] == -1
    assert {parents[0], parents[2]} <= {1, 3}


def test_what_a_population_refuses():
    with pytest.raises(ConfigurationError, match="at most a half"):
        pt.population("loss", fraction=0.6)
    with pytest.raises(ConfigurationError, match="factors above 0"):
        pt.population("loss", perturb={"lr": (0.0,)})
    with pytest.raises(OptimizerError, match="no hyper-parameter 'momentum'"):
        pt.prepare(population_state(), [pt.population("loss", perturb={"momentum": (0.9,)})])
    reducer = pt.population("loss")
    state = pt.prepare(population_state(), [reducer])
    with pytest.raises(ConfigurationError, match="not one value for each of the 8 members"):
        reducer.reduce(state, Event("validation", 0, 5, {"loss": torch.tensor(1.0)}))


# ── Members ───────────────────────────────────────────────────────────────────────────────────────


def test_some_members_in_another_order():
    state = population_state(4)
    some = pt.select_members(state, [3, 0, 3])
    assert some.members == 3
    for i, source in enumerate((3, 0, 3)):
        assert tree_equal(pt.member(some, i), pt.member(state, source))
    with pytest.raises(StructureError, match="numbers from 0 to 3"):
        pt.select_members(state, [4])
    with pytest.raises(StructureError, match="no member 4"):
        pt.member(state, 4)
    with pytest.raises(StructureError, match="not the state of an ensemble"):
        pt.member(pt.member(state, 0), 0)


def test_ranking_puts_what_is_not_a_number_last():
    scores = torch.tensor([math.nan, 0.5, math.inf, 0.5, -1.0])
    assert pt.ranking(scores).tolist() == [4, 1, 3, 2, 0]
    assert pt.ranking(scores, "max").tolist() == [2, 1, 3, 4, 0]


def test_what_an_ensemble_is_not_made_of():
    keys = pt.random.split(pt.random.key(0), 2)
    optimizer = pt.optim.sgd(0.1)
    _, init = setting("mlp", optimizer)
    with pytest.raises(StructureError, match="keys are int64 of shape"):
        pt.ensemble(init, pt.random.key(0))
    with pytest.raises(StructureError, match="lr has 3 values, but there are 2 members"):
        pt.ensemble(init, keys, lr=[1.0, 2.0, 3.0])
    with pytest.raises(OptimizerError, match="inject_hyperparams"):
        pt.ensemble(init, keys, lr=[1.0, 2.0])
    with pytest.raises(StructureError, match="one member"):
        pt.ensemble(lambda key: 1, keys)
    steps = iter(range(2))
    with pytest.raises(StructureError, match="go through the data together"):
        pt.ensemble(lambda key: init(key).replace(step=torch.tensor(next(steps))), keys)


def test_what_a_step_of_an_ensemble_refuses():
    optimizer = pt.optim.sgd(0.1)
    loss, init = setting("mlp", optimizer)
    with pytest.raises(ConfigurationError, match="precision is one of"):
        pt.ensemble_step(loss, optimizer, precision="16")
    with pytest.raises(ConfigurationError, match="compile goes with draws=False"):
        pt.ensemble_step(loss, optimizer, compile=True)
    with pytest.raises(OptimizerError, match="optimizer is an Optimizer"):
        pt.ensemble_step(loss, 0.1)
    keys = pt.random.split(pt.random.key(0), 2)
    state = pt.ensemble(init, keys)
    step = pt.ensemble_step(loss, optimizer)
    with pytest.raises(StructureError, match="make one with puretrain.ensemble"):
        step(init(keys[0]), batch_of(0))
    with pytest.raises(TransformError, match="use torch.func.vmap"):
        torch.func.vmap(step, (None, 0))(state, tree_map(lambda x: x.unsqueeze(0), batch_of(0)))
    with pytest.raises(LossError, match="of a member returns the loss"):
        pt.ensemble_step(lambda p, b, batch, key: p["0.bias"], optimizer)(state, batch_of(0))
