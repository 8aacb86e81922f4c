"""Reducers: their values against torch's own and by hand, their purity, and exact resuming."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

import puretrain as pt
from puretrain.errors import (
    ConfigurationError,
    DonatedStateError,
    NonFiniteError,
    OptimizerError,
    StructureError,
)
from puretrain.loop import Event
from puretrain.reducers import (
    REASONS,
    averaged,
    best_k,
    early_stopping,
    ema,
    lr_monitor,
    nan_guard,
    reduce_on_plateau,
    swa,
)
from puretrain.tree import FrozenDict, tree_digest, tree_equal, tree_map

ALL = {
    "ema": lambda: ema(0.9),
    "ema, every, warmup": lambda: ema(0.9, every=2, warmup=True, buffers=False),
    "swa by epochs": lambda: swa(start_epoch=1),
    "swa by steps": lambda: swa(start_step=3, every=4),
    "early_stopping": lambda: early_stopping("val/loss", patience=2, min_delta=0.01),
    "reduce_on_plateau": lambda: reduce_on_plateau("train/loss", patience=0, factor=0.5),
    "best_k": lambda: best_k("val/loss", k=2),
    "best_k of steps": lambda: best_k("loss", k=3),
    "lr_monitor": lr_monitor,
    "nan_guard": lambda: nan_guard("params"),
}


def network():
    with pt.random.scope(pt.random.key(1)):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def training(optimizer=None, accumulate=1):
    """The arguments of fit for a small run of 5 batches an epoch, the last one smaller."""
    apply, params, buffers = pt.functional(network())
    with pt.random.scope(pt.random.key(2)):
        data = torch.randn(18, 4), torch.randint(3, (18,))

    def loss(params, buffers, batch, key):
        logits, buffers = apply(params, buffers, batch[0])
        return cross_entropy(logits, batch[1]), pt.Aux(buffers)

    def evaluate(params, buffers, batch, key):
        return {"loss": cross_entropy(apply(params, buffers, batch[0], train=False)[0], batch[1])}

    if optimizer is None:
        optimizer = pt.optim.inject_hyperparams(pt.optim.adamw)(lr=0.05)
    return {
        "state": pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(3)),
        "step": pt.train_step(loss, optimizer, accumulate=accumulate),
        "batches": pt.batches(data, 4, shuffle=True, seed=4),
        "validation": pt.Validation(pt.eval_step(evaluate), pt.batches(data, 9)),
    }


def prepared(reducer, **fields):
    fields = {"params": FrozenDict(w=torch.zeros(1))} | fields
    params = fields.pop("params")
    return pt.prepare(pt.TrainState.create(params, key=pt.random.key(0), **fields), [reducer])


def validate(reducer, state, values, name="val/loss"):
    """The states after validations with these values, after steps 1, 2, …."""
    states = []
    for step, value in enumerate(values, start=1):
        event = Event("validation", 0, step, {name: torch.tensor(value, dtype=torch.float64)})
        state = reducer.reduce(state, event)
        states.append(state)
    return states


# ── What holds for each ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cut", [7, 10])  # in the middle of an epoch, and at its end
def test_a_resumed_run_ends_like_an_undisturbed_one(name, cut, tmp_path):
    run = training()
    whole = pt.fit(**run, reducers=[ALL[name]()], steps=17)
    saved = []

    def save(state, event):
        if event.kind == "step" and event.step == cut:
            pt.save(tmp_path / "half.ckpt", state)
            saved.append(tree_digest(state))

    pt.fit(**run, reducers=[ALL[name]()], observers=[save], steps=12)
    # A template without the memories gives plain frozen dicts in their place.
    for like in (run["state"], pt.prepare(run["state"], [ALL[name]()])):
        half = pt.load(tmp_path / "half.ckpt", like=like)
        assert tree_digest(half) == saved[0]
        end = pt.fit(**{**run, "state": half}, reducers=[ALL[name]()], steps=17)
        assert tree_digest(end) == tree_digest(whole)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["step", "validation", "epoch_end"])
def test_a_reducer_is_pure(name, kind):
    reducer = ALL[name]()
    run = training()
    state = pt.fit(**run, reducers=[reducer], steps=7)
    batch = torch.ones(4, 4), torch.tensor([0, 1, 2, 0])
    state = run["step"](state, batch)
    metrics = {
        "step": state.metrics,
        "validation": {"val/loss": torch.tensor(1e3)},
        "epoch_end": {"train/loss": torch.tensor(1e3)},
    }[kind]
    if kind not in reducer.on:
        return
    event = Event(kind, 1, 8, metrics)
    before = tree_digest(state)
    first, second = reducer.reduce(state, event), reducer.reduce(state, event)
    assert tree_digest(state) == before
    assert tree_equal(first, second)
    assert type(first) is type(state)
    given = tree_map(torch.clone, state)
    donated = reducer.reduce(given, event._replace(donate=True))
    assert tree_equal(donated, first)


@pytest.mark.parametrize("reducer", [ema(0.5), swa(start_step=1)], ids=["ema", "swa"])
def test_fit_leaves_the_callers_average_alone(reducer):
    run = training()
    state = pt.fit(**run, reducers=[reducer], steps=4)
    before = tree_digest(state)
    pt.fit(**{**run, "state": state}, reducers=[reducer], steps=8)
    assert tree_digest(state) == before


@pytest.mark.parametrize("plain", [False, True])
def test_a_lease_protects_an_average_through_prepare(plain):
    run, reducer = training(), ema(0.5)
    state = pt.fit(**run, reducers=[reducer], steps=4)
    if plain:  # as a checkpoint read without a template has it
        memory = state.reducers["ema"]
        fields = FrozenDict({name: getattr(memory, name) for name in memory._names})
        state = state.replace(reducers=FrozenDict(ema=fields))
    before = tree_digest(state)
    prepared = pt.prepare(state, [reducer]).replace(updates=torch.tensor(9))
    with pt.lease(state):
        moved = reducer.reduce(prepared, Event("step", 0, 9, donate=True))
    assert tree_digest(state) == before
    assert not tree_equal(moved.reducers["ema"].params, state.params)


def test_a_reducer_without_its_memory_says_so():
    state = pt.TrainState.create({"w": torch.zeros(1)}, key=pt.random.key(0))
    with pytest.raises(ConfigurationError, match=r"'ema'.*prepare\(state, reducers\)"):
        ema(0.5).reduce(state, Event("step", 0, 1))


# ── Averages ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reducer", "function"),
    [
        (ema(0.8, name="average"), get_ema_multi_avg_fn(0.8)),
        (swa(start_step=1, name="average"), get_swa_multi_avg_fn()),
    ],
    ids=["ema", "swa"],
)
def test_averages_equal_torchs_bit_for_bit(reducer, function):
    theirs, steps = [], 0

    def follow(state, event):
        nonlocal steps
        current = [*state.params.values(), *state.buffers.values()]
        current = [x.clone() for x in current if x.is_floating_point()]
        if event.kind == "fit_start":
            theirs.extend(current)
        elif event.kind == "step":
            if steps == 0 and reducer.on == ("step",):
                theirs[:] = current  # the first of a mean
            else:
                function(theirs, current, steps)
            steps += 1
            view = averaged(state, "average")
            ours = [*view.params.values(), *view.buffers.values()]
            ours = [x for x in ours if x.is_floating_point()]
            assert tree_equal(ours, theirs)

    pt.fit(**training(), reducers=[reducer], observers=[follow], steps=12)
    assert steps == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ema_moves_once_an_update(accumulate):
    expected = None

    def follow(state, event):
        nonlocal expected
        w = state.params["0.weight"].clone()
        if event.kind == "fit_start":
            expected = updates = 0, w
        updates, average = expected
        if int(state.updates) > updates:  # also by the flush at the end of an epoch
            expected = int(state.updates), average + 0.25 * (w - average)

    end = pt.fit(
        **training(accumulate=accumulate), reducers=[ema(0.75)], observers=[follow], epochs=2
    )
    assert int(end.reducers["ema"].count) == int(end.updates) == (10 if accumulate == 1 else 6)
    torch.testing.assert_close(averaged(end).params["0.weight"], expected[1])


def test_ema_with_warmup_and_every():
    reducer = ema(0.3, warmup=True, every=2)
    state = prepared(reducer, params={"w": torch.tensor([0.0, 8.0])})
    expected, n = torch.tensor([0.0, 8.0]), 0
    for update in range(1, 9):
        w = torch.full((2,), float(update))
        state = state.replace(updates=torch.tensor(update), params=FrozenDict(w=w))
        state = reducer.reduce(state, Event("step", 0, update))
        if update % 2 == 0:
            kept = min(0.3, (1 + n) / (10 + n))
            expected, n = kept * expected + (1 - kept) * w, n + 1
        torch.testing.assert_close(state.reducers["ema"].params["w"], expected)
    assert int(state.reducers["ema"].count) == n == 4


def test_swa_is_the_mean_of_the_ends_of_epochs():
    parts = []

    def collect(state, event):
        if event.kind == "epoch_end" and event.epoch in (1, 3, 5):
            parts.append(state.params["3.bias"].double().clone())

    end = pt.fit(
        **training(), reducers=[swa(start_epoch=1, every=2)], observers=[collect], epochs=7
    )
    assert int(end.reducers["swa"].count) == len(parts) == 3
    mean = torch.stack(parts).mean(0)
    torch.testing.assert_close(
        averaged(end, "swa").params["3.bias"].double(), mean, atol=1e-6, rtol=0
    )


def test_averaged_replaces_and_integers_are_copied():
    end = pt.fit(**training(), reducers=[ema(0.5)], steps=6)
    view = averaged(end)
    assert not torch.equal(view.params["0.weight"], end.params["0.weight"])
    assert not torch.equal(view.buffers["1.running_mean"], end.buffers["1.running_mean"])
    assert int(view.buffers["1.num_batches_tracked"]) == 6
    assert tree_equal(view.opt_state, end.opt_state)
    only_params = averaged(pt.fit(**training(), reducers=[ema(0.5, buffers=False)], steps=6))
    assert torch.equal(only_params.buffers["1.running_mean"], end.buffers["1.running_mean"])
    assert tree_equal(only_params.params, view.params)


def test_averaged_without_an_average_names_what_there_is():
    state = prepared(swa(start_step=5))
    with pytest.raises(ConfigurationError, match="no average named 'ema'.*are: swa"):
        averaged(state)
    with pytest.raises(ConfigurationError, match="'swa' has averaged nothing yet, at step 0"):
        averaged(state, "swa")
    other = prepared(best_k("loss", name="ema"))
    with pytest.raises(ConfigurationError, match="no average named 'ema'"):
        averaged(other)


def test_an_average_in_place_gives_up_its_memory_unless_it_is_leased():
    reducer = ema(0.5)
    old = prepared(reducer).replace(updates=torch.tensor(1), params=FrozenDict(w=torch.ones(1)))
    event = Event("step", 0, 1, donate=True)
    with pt.lease(old):
        out_of_place = reducer.reduce(old, event)
        assert old.reducers["ema"].params["w"].item() == 0.0
    memory = old.reducers["ema"]
    storage = memory.params["w"].data_ptr()
    in_place = reducer.reduce(old, event)
    assert in_place.reducers["ema"].params["w"].data_ptr() == storage
    assert tree_equal(in_place, out_of_place)
    with pytest.raises(DonatedStateError, match="moved its average"):
        _ = memory.params


def test_an_average_of_other_parameters_is_refused():
    reducer = ema(0.5)
    state = prepared(reducer).replace(updates=torch.tensor(1), params=FrozenDict(v=torch.ones(1)))
    with pytest.raises(StructureError, match="average 'ema'"):
        reducer.reduce(state, Event("step", 0, 1))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ema(1.0),
        lambda: ema(-0.1),
        lambda: ema(0.9, every=0),
        swa,
        lambda: swa(start_epoch=1, start_step=1),
        lambda: swa(start_step=-1),
        lambda: early_stopping("loss", mode="auto"),
        lambda: early_stopping("loss", patience=-1),
        lambda: early_stopping("loss", min_delta=-1.0),
        lambda: early_stopping("loss", min_delta=math.nan),
        lambda: reduce_on_plateau("loss", factor=1.0),
        lambda: reduce_on_plateau("loss", threshold_mode="relative"),
        lambda: best_k("loss", 0),
        lambda: nan_guard("gradients"),
        lambda: nan_guard(action="ignore"),
        lambda: lr_monitor(every=0),
    ],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        wrong()


# ── Stopping ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "values", "stops_at", "reason"),
    [
        ({"patience": 3}, [5, 4, 4, 4, 4, 4], 5, 1),
        ({"patience": 3}, [5, 4, 4, 4, 3, 3, 3, 3], 8, 1),
        ({"patience": 1}, [5, 4, 3], None, 0),
        ({"patience": 0}, [5, 5], 2, 1),
        ({"patience": 2, "min_delta": 0.5}, [5, 4.5, 4.5], 3, 1),
        ({"patience": 2, "min_delta": 0.5}, [5, 4.25, 3.5, 2.75], None, 0),
        ({"patience": 2, "mode": "max"}, [1, 2, 2, 1], 4, 1),
        ({"patience": 2, "mode": "max", "min_delta": 1.0}, [1, 2, 1.5], 3, 1),
        ({"stopping_threshold": 1}, [3, 2, 1, 0.5], 4, 3),
        ({"stopping_threshold": 0.9, "mode": "max"}, [0.5, 0.95], 2, 3),
        ({"divergence_threshold": 10}, [9, 10, 11], 3, 4),
        ({"divergence_threshold": 0.1, "mode": "max"}, [0.5, 0.05], 2, 4),
        ({}, [1, math.nan], 2, 2),
        ({}, [1, -math.inf], 2, 2),
        ({"check_finite": False, "patience": 2}, [1, math.nan, math.nan], 3, 1),
    ],
)
def test_early_stopping(options, values, stops_at, reason):
    reducer = early_stopping("val/loss", **options)
    states = validate(reducer, prepared(reducer), [float(value) for value in values])
    stopped = next((i for i, state in enumerate(states, start=1) if bool(state.stop)), None)
    assert stopped == stops_at
    if stopped is not None:
        memory = states[stopped - 1].reducers["early_stopping"]
        assert (int(memory.stopped), int(memory.reason)) == (stopped, reason)
        assert reason < len(REASONS)


def test_early_stopping_ends_the_run_and_it_stays_ended():
    run = training()
    rising = pt.Validation(lambda state, batch: {"loss": state.step.double()}, [torch.zeros(1)])
    run["validation"] = rising
    end = pt.fit(**run, reducers=[early_stopping("val/loss", patience=2)], epochs=50)
    assert int(end.step) == 15
    again = pt.fit(
        **{**run, "state": end}, reducers=[early_stopping("val/loss", patience=2)], epochs=50
    )
    assert tree_equal(end, again)


@pytest.mark.parametrize("make", [early_stopping, best_k, reduce_on_plateau])
@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("val/los", r"'val/los'.*validation after step 5; there are: .*val/loss"),
        ("train/acc", r"'train/acc'.*epoch end after step 5; there are: .*train/loss"),
        ("los", r"'los'.*epoch end after step 5; there are: .*loss"),
    ],
)
def test_a_missing_metric_is_an_error_where_it_should_be(make, monitor, message):
    with pytest.raises(ConfigurationError, match=message):
        pt.fit(**training(), reducers=[make(monitor)], epochs=2)


def test_a_metric_may_come_late_but_not_without_a_word():
    run = training()
    run["validation"] = run["validation"]._replace(every_epochs=2)
    with pytest.warns(UserWarning, match="'val/loss'.*first epoch"):
        end = pt.fit(**run, reducers=[early_stopping("val/loss")], epochs=4)
    assert int(end.reducers["early_stopping"].checks) == 2


def test_a_metric_of_several_numbers_is_refused():
    reducer = early_stopping("val/m")
    event = Event("validation", 0, 1, {"val/m": torch.zeros(2)})
    with pytest.raises(ConfigurationError, match=r"'val/m'.*shape \(2,\)"):
        reducer.reduce(prepared(reducer), event)


@pytest.mark.parametrize("action", ["raise", "stop"])
def test_nan_guard(action):
    def loss(params, buffers, batch, key):
        return (params["b"] * batch).sum() + params["a"].sum()

    optimizer = pt.optim.sgd(lr=1.0)
    state = pt.TrainState.create(
        {"a": torch.zeros(2), "b": torch.zeros(3)}, None, optimizer, key=pt.random.key(0)
    )
    run = {
        "state": state,
        "step": pt.train_step(loss, optimizer),
        "batches": [torch.tensor(x) for x in (1.0, 2.0, math.inf, 3.0, 4.0)],
        "epochs": 1,
    }
    # At step 3 the gradient is infinite, but the loss is 0 * inf: both look at once, or the
    # guard of the parameters at the next step that it looks at.
    for guard, where, step in (
        (nan_guard(action=action), "metrics/loss", 3),
        (nan_guard("params", every=4, action=action), "metrics/loss", 4),
    ):
        if action == "raise":
            with pytest.raises(NonFiniteError, match=f"after step {step} .*{where}"):
                pt.fit(**run, reducers=[guard])
        else:
            assert int(pt.fit(**run, reducers=[guard]).step) == step
    bad = state.replace(params=state.params | {"b": torch.tensor([0.0, math.nan, 0.0])})
    event = Event("step", 0, 1, {"loss": torch.tensor(0.0)})
    assert nan_guard().reduce(bad, event) is bad
    with pytest.raises(NonFiniteError, match="params/b"):
        nan_guard("params").reduce(bad, event)
    huge = state.replace(params=FrozenDict(a=torch.full((9,), 3e38)))
    assert nan_guard("params").reduce(huge, event) is huge


# ── Hyper-parameters ──────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([3.0, 2.0, 1.9999, 1.5, 1.4, 1.0, 0.0, -1.0, math.nan]), max_size=25),
    st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["min", "max"]),
            "factor": st.sampled_from([0.1, 0.5]),
            "patience": st.integers(0, 3),
            "threshold": st.sampled_from([1e-4, 0.2]),
            "threshold_mode": st.sampled_from(["rel", "abs"]),
            "cooldown": st.integers(0, 2),
            "min_lr": st.sampled_from([0.0, 0.01]),
            "eps": st.sampled_from([1e-8, 0.03]),
        }
    ),
)
def test_reduce_on_plateau_gives_torchs_learning_rates(values, options):
    weight = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **options)
    reducer = reduce_on_plateau("val/loss", **options)
    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1)
    state = pt.TrainState.create({"w": torch.zeros(1)}, None, optimizer, key=pt.random.key(0))
    states = validate(reducer, pt.prepare(state, [reducer]), values)
    for value, state in zip(values, states, strict=True):
        scheduler.step(value)
        (ours,) = pt.optim.get_hyperparams(state.opt_state).values()
        assert float(ours) == theirs.param_groups[0]["lr"]


def test_reduce_on_plateau_acts_on_the_next_step():
    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=1.0)
    step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
    state = pt.TrainState.create({"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
    reducer = reduce_on_plateau(
        "train/loss", patience=0, factor=0.5, threshold=1e9, threshold_mode="abs"
    )
    end = pt.fit(state, step, [torch.tensor(-1.0)] * 2, reducers=[reducer], epochs=3)
    assert end.params["w"].item() == 2 * 1.0 + 2 * 1.0 + 2 * 0.5


def test_lr_monitor_shows_what_was_used():
    seen = []

    def look(state, event):
        if event.kind == "step":
            seen.append({k: float(v) for k, v in state.metrics.items() if k != "loss"})

    run = training(pt.optim.inject_hyperparams(pt.optim.sgd)(lr=lambda n: 1.0 / (n + 1)))
    end = pt.fit(**run, reducers=[lr_monitor(every=2)], observers=[look], steps=4)
    assert [shown.get("lr") for shown in seen] == [None, 1 / 2, None, 1 / 4]
    assert "lr" not in end.epoch_metrics


def test_reduce_on_plateau_refuses_a_schedule_before_the_first_step():
    seen = []
    run = training(pt.optim.inject_hyperparams(pt.optim.sgd)(lr=pt.optim.cosine(0.1, 100)))
    with pytest.raises(OptimizerError, match="lr follows a schedule"):
        pt.fit(
            **run,
            reducers=[reduce_on_plateau("train/loss")],
            observers=[lambda state, event: seen.append(event)],
            epochs=1,
        )
    assert seen == []


def test_lr_monitor_names_the_part_of_the_optimizer_first():
    clip = pt.optim.inject_hyperparams(pt.optim.clip_by_global_norm)(max_norm=1.0)
    sgd = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.25)
    end = pt.fit(**training(pt.optim.chain(clip, sgd)), reducers=[lr_monitor()], steps=1)
    shown = {name: float(value) for name, value in end.metrics.items() if name != "loss"}
    assert shown == {"0/max_norm": 1.0, "1/lr": 0.25}


@pytest.mark.parametrize("make", [lr_monitor, lambda: reduce_on_plateau("loss")])
def test_without_injected_hyperparameters_the_error_says_how(make):
    with pytest.raises(ConfigurationError, match="inject_hyperparams"):
        pt.fit(**training(pt.optim.sgd(lr=0.1)), reducers=[make()], steps=1)


# ── Which states to keep ──────────────────────────────────────────────────────────────────────────


@settings(max_examples=80)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf]), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from(["min", "max"]),
)
def test_best_k_is_the_stable_sort(values, k, mode):
    reducer = best_k("val/loss", k, mode=mode)
    end = validate(reducer, prepared(reducer), values)[-1].reducers["best_k"]
    numbered = [(v, step) for step, v in enumerate(values, start=1) if not math.isnan(v)]
    sign = 1 if mode == "min" else -1
    expected = sorted(numbered, key=lambda pair: (sign * pair[0], pair[1]))[:k]
    assert end.steps.tolist() == [step for _, step in expected] + [-1] * (k - len(expected))
    assert end.scores.tolist()[: len(expected)] == [value for value, _ in expected]


def test_best_k_counts_a_step_once():
    reducer = best_k("val/loss", 2)
    state = validate(reducer, prepared(reducer), [3.0, 2.0])[-1]
    again = reducer.reduce(state, Event("validation", 0, 2, {"val/loss": torch.tensor(4.0)}))
    assert again.reducers["best_k"].steps.tolist() == [1, 2]
    assert again.reducers["best_k"].scores.tolist() == [3.0, 4.0]
