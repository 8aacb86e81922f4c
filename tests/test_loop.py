"""The loop: the order of its events, resuming from any of them, signals, and what it refuses."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt
from puretrain.errors import (
    ConfigurationError,
    DataError,
    DonatedStateError,
    StructureError,
)
from puretrain.loop import Event
from puretrain.tree import FrozenDict, tree_diff, tree_digest, tree_equal, tree_map

SAMPLES, BATCH = 11, 4  # three batches an epoch, the last one of three samples


def data():
    with pt.random.scope(pt.random.key(2)):
        return torch.randn(SAMPLES, 4), torch.randint(3, (SAMPLES,))


def run(accumulate=1, batches=None, **validation):
    """The arguments of fit for a network with BatchNorm and dropout."""
    with pt.random.scope(pt.random.key(1)):
        model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)
        )
    apply, params, buffers = pt.functional(model)
    x, y = data()

    def loss(params, buffers, batch, key):
        logits, buffers = apply(params, buffers, batch[0])
        metrics = {"seen": pt.metrics.Count.of(len(batch[1])), "noise": torch.rand(())}
        return cross_entropy(logits, batch[1]), pt.Aux(buffers, metrics)

    def evaluate(params, buffers, batch, key):
        return {"loss": cross_entropy(apply(params, buffers, batch[0], train=False)[0], batch[1])}

    optimizer = pt.optim.adamw(lr=0.05)
    return {
        "state": pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(3)),
        "step": pt.train_step(loss, optimizer, accumulate=accumulate),
        "batches": pt.batches((x, y), BATCH, shuffle=True, seed=4) if batches is None else batches,
        "validation": pt.Validation(
            pt.eval_step(evaluate), pt.batches((x, y), 6), **(validation or {})
        ),
    }


def counting(**fields):
    """A run that adds up its batches in params['w']: the arguments of fit but the batches."""
    optimizer = pt.optim.sgd(lr=1.0)
    step = pt.train_step(
        lambda params, buffers, batch, key: -(params["w"] * batch).sum(), optimizer
    )
    params = {"w": torch.zeros(())}
    state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0), **fields)
    return {"state": state, "step": step}


def listing(events):
    return [f"{event.kind} {event.epoch} {event.step}" for event in events]


class Log:
    """An observer that notes events."""

    def __init__(self):
        self.events = []
        self.closed = 0

    def __call__(self, state, event):
        self.events.append(event)

    def close(self):
        self.closed += 1


# ── The order of things ───────────────────────────────────────────────────────────────────────────


def test_the_events_of_a_run_in_order():
    log = Log()
    pt.fit(**run(), epochs=2, observers=[log])
    assert listing(log.events) == [
        "fit_start 0 0",
        "epoch_start 0 0",
        "step 0 1",
        "step 0 2",
        "step 0 3",
        "validation 0 3",
        "epoch_end 0 3",
        "epoch_start 1 3",
        "step 1 4",
        "step 1 5",
        "step 1 6",
        "validation 1 6",
        "epoch_end 1 6",
        "fit_end 2 6",
    ]
    assert log.closed == 1


def test_what_an_event_says():
    log = Log()
    pt.fit(**run(), steps=4, observers=[log])
    steps = [event for event in log.events if event.kind == "step"]
    assert [(e.size, e.position, e.total, e.limit) for e in steps] == [
        (4, 1, 3, 4),
        (4, 2, 3, 4),
        (3, 3, 3, 4),
        (4, 1, 3, 4),
    ]
    assert {e.kind: sorted(e.metrics) for e in log.events} == {
        "fit_start": [],
        "epoch_start": [],
        "step": ["loss", "noise", "seen"],
        "validation": ["val/loss"],
        "epoch_end": ["train/loss", "train/noise", "train/seen"],
        "fit_end": [],
    }


def test_a_run_by_steps_ends_in_the_middle_of_an_epoch_and_goes_on():
    log, second = Log(), Log()
    arguments = run()
    half = pt.fit(**arguments, steps=4, epochs=2, observers=[log])
    assert listing(log.events)[-3:] == ["epoch_start 1 3", "step 1 4", "fit_end 1 4"]
    whole = pt.fit(**{**arguments, "state": half}, steps=9, epochs=2, observers=[second])
    assert listing(second.events) == [
        "fit_start 1 4",
        "step 1 5",
        "step 1 6",
        "validation 1 6",
        "epoch_end 1 6",
        "fit_end 2 6",
    ]
    assert [e.position for e in second.events if e.kind == "step"] == [2, 3]
    assert tree_equal(whole, pt.fit(**arguments, epochs=2))
    assert tree_equal(pt.fit(**{**arguments, "state": whole}, epochs=2), whole)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": 2}, [2, 4, 6, 8, 10, 12]),
        ({"every": 3}, [3, 6, 9, 12]),  # at the end of an epoch only once
        ({"every": 5}, [5, 10]),
        ({"every_epochs": 2}, [6, 12]),
        ({"every_epochs": 3}, [9]),
        ({"limit": 1}, [3, 6, 9, 12]),
    ],
)
def test_when_validation_is_due(options, expected):
    log = Log()
    arguments = run(**options)
    pt.fit(**arguments, epochs=4, observers=[log])
    assert [e.step for e in log.events if e.kind == "validation"] == expected


@pytest.mark.parametrize("argument", ["every", "every_epochs"])
def test_a_validation_that_is_never_due_is_refused(argument):
    with pytest.raises(ConfigurationError, match=f"^Validation: {argument} is a whole number from"):
        pt.fit(**run(**{argument: 0}), epochs=1)


def test_validation_is_evaluate_on_the_state_of_its_event():
    seen = []

    def look(state, event):
        if event.kind == "validation":
            arguments = run()["validation"]
            alone = pt.evaluate(state, arguments.step, arguments.batches, limit=1)
            seen.append((event.metrics["held/loss"], alone["loss"]))

    pt.fit(**run(prefix="held/", limit=1, every=2), steps=4, observers=[look])
    assert len(seen) == 2
    assert tree_equal(*zip(*seen, strict=True))


def test_reducers_come_in_order_and_before_the_observers():
    calls = []

    def reducer(name):
        def reduce(state, event):
            calls.append((name, event.kind))
            return state.replace(extra=FrozenDict(last=name))

        return reduce

    class Extended(pt.TrainState):
        extra: FrozenDict

    def observer(state, event):
        calls.append(("observer", event.kind))
        if event.kind == "step":
            assert state.extra["last"] == "second"

    arguments = counting()
    fields = {name: getattr(arguments["state"], name) for name in arguments["state"]._names}
    arguments["state"] = Extended(**fields, extra=FrozenDict(last="none"))
    end = pt.fit(
        **arguments,
        batches=[torch.ones(())],
        epochs=1,
        reducers=[reducer("first"), reducer("second")],
        observers=[observer],
    )
    assert type(end) is Extended
    assert calls == [
        ("observer", "fit_start"),
        ("observer", "epoch_start"),
        *((name, "step") for name in ("first", "second", "observer")),
        *((name, "epoch_end") for name in ("first", "second", "observer")),
        ("observer", "fit_end"),
    ]


def test_a_reducer_sees_the_kinds_that_it_wants():
    seen = []

    def note(state, event):
        seen.append(event.kind)
        return state

    pt.fit(**run(), epochs=1, reducers=[pt.Reducer(note, on=("epoch_end", "validation"))])
    assert seen == ["validation", "epoch_end"]


def test_a_reducer_stops_the_run_after_the_step():
    log = Log()

    def stop(state, event):
        return state.replace(stop=torch.tensor(event.step == 5))

    end = pt.fit(**run(), epochs=9, reducers=[stop], observers=[log])
    assert listing(log.events)[-2:] == ["step 1 5", "fit_end 1 5"]
    again = pt.fit(**{**run(), "state": end}, epochs=9, reducers=[stop])
    assert tree_equal(end, again)


def test_what_an_observer_returns_or_keeps_does_not_matter():
    kept = []

    def keep(state, event):
        if event.kind == "step" and event.step == 2:
            kept.append((pt.lease(state), state, tree_digest(state)))
        elif event.kind == "step" and event.step == 3:
            kept.append((None, state, None))
        return "nonsense"

    with_it = pt.fit(**run(), epochs=2, reducers=[pt.ema(0.5)], observers=[keep])
    assert tree_equal(with_it, pt.fit(**run(), epochs=2, reducers=[pt.ema(0.5)]))
    (_, leased, digest), (_, other, _) = kept
    assert tree_digest(leased) == digest
    with pytest.raises(DonatedStateError):
        _ = other.params["0.weight"]


# ── Agreement ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("donate", [False, True])
def test_the_loop_equals_a_fold_by_hand_bit_for_bit(accumulate, donate):
    arguments = run(accumulate=accumulate)
    state, step, source = (arguments[name] for name in ("state", "step", "batches"))
    reducer = pt.ema(0.5)
    state, sums = pt.prepare(state, [reducer]), []
    for epoch in range(3):
        losses = []
        for read in source.read(pt.Cursor(epoch=torch.tensor(epoch))):
            state = step(state, read.batch)
            losses.append((state.metrics["loss"].double() * read.size, read.size))
            state = reducer.reduce(state, Event("step", epoch, int(state.step)))
        state = reducer.reduce(step.flush(state), Event("epoch_end", epoch, int(state.step)))
        sums.append(sum(loss for loss, _ in losses) / sum(size for _, size in losses))
    means = []

    def note(state, event):
        if event.kind == "epoch_end":
            means.append(event.metrics["train/loss"])

    given = tree_map(torch.clone, arguments["state"])
    looped = pt.fit(
        **{**arguments, "state": given},
        epochs=3,
        reducers=[reducer],
        observers=[note],
        donate=donate,
    )
    for name in ("params", "opt_state", "buffers", "step", "updates", "reducers", "metrics"):
        assert tree_diff(getattr(looped, name), getattr(state, name)) == []
    assert tree_equal(means, sums)
    if not donate:
        assert tree_equal(given, arguments["state"])


def test_fit_leaves_its_state_alone_even_if_no_step_updates_at_first():
    def loss(params, buffers, batch, key):
        return (params["w"] * batch).sum()

    optimizer = pt.optim.sgd(lr=1.0, momentum=0.5)
    state = pt.TrainState.create({"w": torch.ones(2)}, None, optimizer, key=pt.random.key(0))
    step = pt.train_step(loss, optimizer, nonfinite="skip")
    source = [torch.tensor(x) for x in (float("nan"), float("inf"), 1.0, 2.0)]
    start = pt.fit(state, step, source, steps=3)  # its tensors were made by a step
    before = [tree_digest(state), tree_digest(start)]
    end = pt.fit(state, step, source, steps=4)
    assert int(end.skipped) == 2
    assert tree_equal(pt.fit(start, step, source, steps=4), end)
    assert [tree_digest(state), tree_digest(start)] == before


def without_donate(step):
    def wrapper(state, batch):
        return step(state, batch)

    return wrapper


def test_a_step_without_donate_will_do():
    arguments = run()
    whole = pt.fit(**arguments, epochs=2)
    step = arguments["step"]
    assert tree_equal(pt.fit(**{**arguments, "step": without_donate(step)}, epochs=2), whole)


def test_means_of_an_epoch_are_weighted_by_the_size_of_the_batches():
    seen = {}

    def loss(params, buffers, batch, key):
        metrics = {
            "mean": batch.mean(),
            "largest": pt.metrics.Max.of(batch),
            "half": batch.mean().half(),
            "number": torch.tensor(len(batch)),
        }
        return (params["w"] * batch).mean(), pt.Aux(metrics=metrics)

    def look(state, event):
        if event.kind == "epoch_end":
            seen.update(event.metrics)
        elif event.kind == "step" and event.position == 2:
            partial.append(pt.metrics.compute_all(state.epoch_metrics)["mean"].item())

    partial = []
    optimizer = pt.optim.sgd(lr=0.0)
    state = pt.TrainState.create({"w": torch.ones(())}, None, optimizer, key=pt.random.key(0))
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    pt.fit(state, pt.train_step(loss, optimizer), pt.batches(values, 2), epochs=1, observers=[look])
    assert seen["train/mean"].item() == seen["train/half"].item() == values.double().mean().item()
    assert seen["train/loss"].item() == values.double().mean().item()
    assert seen["train/largest"].item() == 10.0
    assert seen["train/number"].item() == (2 * 2 + 2 * 2 + 1 * 1) / 5
    assert partial == [1.5]
    assert all(value.dtype == torch.float64 for value in seen.values())


def test_an_ensemble_passes_through():
    """A step that trains several members with vmap; one of them alone ends the same."""
    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1)
    x, y = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(9.0)

    def loss(params, buffers, batch, key):
        return ((batch[0] @ params["w"] - batch[1]) ** 2).mean()

    single = pt.train_step(loss, optimizer, draws=False)
    rates = torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64)

    def step(state, batch):
        def member(params, opt_state):
            new = single(state.replace(params=params, opt_state=opt_state), batch)
            return new.params, new.opt_state, new.metrics

        params, opt_state, metrics = torch.func.vmap(member)(state.params, state.opt_state)
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, metrics=metrics
        )

    def alone(rate):
        state = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))
        opt_state = pt.optim.set_hyperparams(state.opt_state, lr=rate)
        return state.replace(opt_state=opt_state)

    members = [alone(rate) for rate in rates]
    together = members[0].replace(
        params=pt.tree.tree_stack([m.params for m in members]),
        opt_state=pt.tree.tree_stack([m.opt_state for m in members]),
    )
    means = []

    def look(state, event):
        if event.kind == "epoch_end":
            means.append(event.metrics["train/loss"])

    source = pt.batches((x, y), 4, shuffle=True)
    observers = [look, pt.progress(enabled=True, file=open(os.devnull, "w"))]  # noqa: SIM115
    end = pt.fit(together, step, source, epochs=2, reducers=[pt.ema(0.5)], observers=observers)
    for i, member in enumerate(members):
        alone_means = len(means)
        expected = pt.fit(member, single, source, epochs=2, observers=[look])
        torch.testing.assert_close(end.params["w"][i], expected.params["w"])
        torch.testing.assert_close(means[1][i], means[alone_means + 1])
    message = r"state.step has the shape \(3,\).*puretrain.ensemble_step"
    with pytest.raises(StructureError, match=message):
        pt.fit(pt.tree.tree_stack(members), step, source, epochs=1)


# ── Going on ──────────────────────────────────────────────────────────────────────────────────────


class Counter:
    """A stream of batches that keeps its own place."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        x, y = data()
        while self.place < 3:
            self.place += 1
            rows = slice(BATCH * (self.place - 1), BATCH * self.place)
            yield x[rows], y[rows]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def stream(epoch):
    """A stream that can't be put to a place, and whose length nobody knows."""
    x, y = data()
    for i in range(3):
        yield x[BATCH * i : BATCH * (i + 1)] + epoch, y[BATCH * i : BATCH * (i + 1)]


@pytest.mark.filterwarnings("ignore::puretrain.data.DataWarning")
@pytest.mark.parametrize(
    ("source", "options", "limits"),
    [
        (None, {"every": 2}, {"epochs": 3}),
        (None, {}, {"steps": 8}),
        (None, {"every_epochs": 2}, {"epochs": 9}),  # stopped by a reducer
        (Counter, {"every": 3}, {"epochs": 3}),
        (lambda: stream, {}, {"epochs": 3}),
        (lambda: [*stream(0)], {"every": 2}, {"epochs": 3, "steps": 7}),
    ],
    ids=["arrays", "steps", "stopped", "stateful", "function", "list"],
)
def test_a_run_goes_on_from_any_state_that_an_observer_has_seen(source, options, limits, tmp_path):
    def arguments():
        made = run(2, source and source(), **options)
        stop = pt.early_stopping("train/seen", patience=4, mode="max")  # never gets better
        return {**made, **limits, "reducers": [pt.ema(0.5), stop]}

    events, files = [], []

    def keep(state, event):
        files.append(tmp_path / f"{len(files)}.ckpt")
        pt.save(files[-1], state)
        events.append(event)

    whole = pt.fit(**arguments(), observers=[keep])
    assert {event.kind for event in events} >= {"step", "validation", "epoch_end", "fit_end"}
    like = arguments()["state"]
    for i, (event, file) in enumerate(zip(events, files, strict=True)):
        log = Log()
        state = pt.load(file, like=like)
        end = pt.fit(**{**arguments(), "state": state}, observers=[log])
        assert tree_diff(end, whole) == [], f"gone on from {event.kind} after step {event.step}"
        rest = events[i + 1 :] if event.kind != "fit_end" else [event]
        if event.kind == "epoch_start":  # it has not begun to read, so this comes again
            rest = [event, *rest]
        assert listing(log.events[1:]) == listing(rest)
        said = [{k: v.tolist() for k, v in pt.metrics.compute_all(e.metrics).items()} for e in rest]
        again = [pt.metrics.compute_all(e.metrics).items() for e in log.events[1:]]
        assert [{k: v.tolist() for k, v in items} for items in again] == said
        positions = [e.position for e in log.events if e.kind == "step"]
        assert positions == [e.position for e in rest if e.kind == "step"]


def test_a_mean_of_the_epoch_that_the_step_does_not_report_is_refused(tmp_path):
    def save(state, event):
        if event.kind == "step" and event.step == 3:
            pt.save(tmp_path / "a.ckpt", state)

    pt.fit(**run(), epochs=1, observers=[save])
    arguments = run()
    arguments["state"] = pt.load(tmp_path / "a.ckpt", like=arguments["state"])
    step = arguments["step"]

    @functools.wraps(step)
    def silent(state, batch, *, donate=False):
        new = step(state, batch, donate=donate)
        return new.replace(metrics=FrozenDict(loss=new.metrics["loss"]))

    with pytest.raises(StructureError, match="metric 'seen'.*reports only loss"):
        pt.fit(**{**arguments, "step": silent}, epochs=2)


# ── Sources ───────────────────────────────────────────────────────────────────────────────────────


def test_an_endless_stream_is_read_until_the_steps_are_done():
    def endless():
        value = 0.0
        while True:
            value += 1.0
            yield torch.tensor(value)

    log = Log()
    end = pt.fit(**counting(), batches=lambda epoch: endless(), steps=100, observers=[log])
    assert end.params["w"].item() == 5050.0
    assert [e.kind for e in log.events] == ["fit_start", "epoch_start", *["step"] * 100, "fit_end"]
    assert (log.events[-2].position, log.events[-2].total) == (100, None)


def test_iterables_of_ready_batches():
    values = [torch.tensor(x) for x in (1.0, 2.0, 3.0)]
    for source in (values, tuple_loader(values), lambda epoch: iter(values)):
        end = pt.fit(**counting(), batches=source, epochs=2)
        assert end.params["w"].item() == 12.0
        assert int(end.cursor.epoch) == 2


def tuple_loader(values):
    return torch.utils.data.DataLoader(values, batch_size=None)


def test_batches_with_texts_of_any_length():
    source = [{"x": torch.ones(2), "text": ["a", "b"]}, {"x": torch.ones(3), "text": ["c"]}]
    optimizer = pt.optim.sgd(lr=1.0)
    step = pt.train_step(lambda p, b, batch, key: -(p["w"] * batch["x"]).sum(), optimizer)
    end = pt.fit(counting()["state"], step, source, epochs=1)
    assert end.params["w"].item() == 5.0


# ── Evaluate and predict ──────────────────────────────────────────────────────────────────────────


def test_evaluate_is_weighted_and_leaves_the_state_alone():
    state = pt.TrainState.create({"w": torch.tensor(2.0)}, key=pt.random.key(0))
    before = tree_digest(state)

    def function(params, buffers, batch, key):
        assert not torch.is_grad_enabled()
        return {
            "mean": (params["w"] * batch).mean(),
            "draw": torch.rand(()),
            "hits": pt.metrics.Accuracy.of(batch.long(), torch.zeros(len(batch)).long()),
        }

    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    source = pt.batches(values, 2)
    generator = torch.get_rng_state()
    found = pt.evaluate(state, pt.eval_step(function), source)
    assert found["mean"].item() == 2.0 * values.double().mean().item()
    assert found["hits"].item() == 0.2
    assert tree_equal(found, pt.evaluate(state, pt.eval_step(function), source))
    assert torch.equal(torch.get_rng_state(), generator)
    assert tree_digest(state) == before
    limited = pt.evaluate(state, pt.eval_step(function), source, limit=2)
    assert limited["mean"].item() == 2.0 * 1.5


def test_predict_puts_the_outputs_together_in_order():
    state = pt.TrainState.create({"w": torch.tensor(2.0)}, key=pt.random.key(0))
    x = torch.arange(7.0)

    def function(params, buffers, batch, key):
        return {"double": params["w"] * batch, "noise": torch.rand(len(batch), 2)}

    found = pt.predict(state, function, pt.batches(x, 3))
    assert torch.equal(found["double"], 2 * x)
    assert found["noise"].shape == (7, 2)
    assert len(found["noise"].unique()) == 14  # each batch draws its own
    assert tree_equal(found, pt.predict(state, function, pt.batches(x, 3)))
    assert len(pt.predict(state, function, pt.batches(x, 3), limit=2)["double"]) == 6

    def uneven(params, buffers, batch, key):
        return {"a": batch} if len(batch) == 3 else {"b": batch}

    with pytest.raises(StructureError, match="a is in the output for the first batch.*batch 3"):
        pt.predict(state, uneven, pt.batches(x, 3))


@pytest.mark.parametrize("use", [pt.evaluate, pt.predict])
def test_nothing_to_evaluate(use):
    state = pt.TrainState.create({}, key=pt.random.key(0))
    with pytest.raises(DataError, match="nothing"):
        use(state, lambda *arguments: {}, lambda epoch: iter(()))


# ── Signals ───────────────────────────────────────────────────────────────────────────────────────

PROGRAM = textwrap.dedent("""
    import signal, sys, time, torch
    import puretrain as pt
    sys.path.insert(0, sys.argv[1])
    from test_loop import run

    place, blocking = sys.argv[2], sys.argv[3] == "block"
    arguments = run(every=2)
    step = arguments["step"]

    def slow(state, batch, *, donate=False):
        if blocking and int(state.step) == 3:
            print("blocked", flush=True)
            time.sleep(100)
        return step(state, batch, donate=donate)

    class Tell:
        def __call__(self, state, event):
            if event.kind == "interrupt":
                pt.save(place, state)
            print(event.kind, event.step, flush=True)
            if event.kind == "step":
                time.sleep(0.02)

        def close(self):
            print("closed", flush=True)

    pt.fit(**{**arguments, "step": slow}, steps=10_000, observers=[Tell()])
""")


def start(place, mode="run"):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(place), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(pt.__file__).parents[1])},
    )


def read_until(process, line):
    lines = []
    for found in process.stdout:
        lines.append(found.strip())
        if lines[-1] == line:
            return lines
    raise AssertionError(f"it ended before {line!r}: {lines}, {process.stderr.read()}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_with_a_state_to_go_on_from(number, code, tmp_path):
    process = start(tmp_path / "last.ckpt")
    read_until(process, "step 5")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == ""  # no traceback
    lines = out.split("\n")[:-1]
    assert lines[-1] == "closed"
    kind, last = lines[-2].split()
    assert kind == "interrupt"
    state = pt.load(tmp_path / "last.ckpt", like=run()["state"])
    assert int(state.step) == int(last) < 10_000
    steps = int(last) + 4
    end = pt.fit(**{**run(every=2), "state": state}, steps=steps)
    assert tree_equal(end, pt.fit(**run(every=2), steps=steps))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = start(tmp_path / "last.ckpt", "block")
    read_until(process, "blocked")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)  # it waits for the step
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert out == "closed\n"
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("where", ["step", "validation", "epoch_end", "in validation"])
def test_an_interrupted_run_goes_on_from_its_state(where):
    arguments = run(every=3)
    if where == "in validation":
        inner = arguments["validation"].step

        def interrupted(state, batch):
            os.kill(os.getpid(), signal.SIGTERM)
            return inner(state, batch)

        first = {**arguments, "validation": arguments["validation"]._replace(step=interrupted)}
    else:
        first = arguments

    def send(state, event):
        if event.kind == where and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    log = Log()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(pt.Interrupted) as caught:
        pt.fit(**first, epochs=3, observers=[send, log])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert caught.value.code == 143
    assert caught.value.signal_number == signal.SIGTERM
    assert log.events[-1].kind == "interrupt"
    assert log.closed == 1
    state = caught.value.state
    assert int(state.step) == 3
    assert (int(state.validated) == -1) == (where in ("step", "in validation"))
    end = pt.fit(**{**arguments, "state": state}, epochs=3)
    assert tree_equal(end, pt.fit(**arguments, epochs=3))


def test_signals_may_be_left_alone():
    def send(state, event):
        if event.kind == "step":
            os.kill(os.getpid(), signal.SIGINT)

    log = Log()
    # A shell lets what it starts in the background ignore Ctrl-C, and so this very test run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pt.fit(**run(), epochs=1, observers=[send, log], handle_signals=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert listing(log.events)[-1] == "epoch_start 0 0"
    assert log.closed == 1


def test_outside_of_the_main_thread():
    ends = []
    thread = threading.Thread(target=lambda: ends.append(pt.fit(**run(), epochs=2)))
    thread.start()
    thread.join()
    assert tree_equal(ends, [pt.fit(**run(), epochs=2)])


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


def test_observers_are_closed_after_an_error_also_if_one_cant_be():
    class Broken(Log):
        def close(self):
            super().close()
            raise OSError("the disk is full")

    class Fails(Log):
        def __call__(self, state, event):
            if event.kind == "step":
                raise RuntimeError("no")

    observers = [Log(), Broken(), Fails(), Log()]
    with pytest.raises(OSError, match="full") as caught:
        pt.fit(**run(), epochs=1, observers=observers)
    assert isinstance(caught.value.__context__, RuntimeError)
    assert [observer.closed for observer in observers] == [1, 1, 1, 1]
    first = Log()
    with pytest.raises(ConfigurationError, match="two reducers"):
        pt.fit(**run(), epochs=1, observers=[first], reducers=[pt.ema(), pt.ema()])
    assert (first.closed, first.events) == (1, [])


def test_no_end_is_refused():
    with pytest.raises(ConfigurationError, match="epochs=, steps="):
        pt.fit(**run())


def test_two_reducers_of_one_name_are_refused_and_another_name_helps():
    with pytest.raises(ConfigurationError, match="two reducers are named 'ema'.*another name"):
        pt.fit(**run(), epochs=1, reducers=[pt.ema(0.5), pt.ema(0.9)])
    end = pt.fit(**run(), epochs=1, reducers=[pt.ema(0.5), pt.ema(0.9, name="slow")])
    assert sorted(end.reducers) == ["ema", "slow"]


def test_a_memory_of_another_reducer_is_refused():
    end = pt.fit(**run(), epochs=1, reducers=[pt.ema(0.5, name="a")])
    with pytest.raises(StructureError, match="memory of reducer 'a'.*lacks reducers/a/"):
        pt.fit(**{**run(), "state": end}, epochs=2, reducers=[pt.best_k("val/loss", name="a")])


def used_up():
    items = iter([torch.ones(()), torch.ones(())])
    return lambda epoch: items


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (list, "empty"),
        (lambda: (torch.ones(()) for _ in range(3)), "only once"),
        (lambda: lambda epoch: iter(()), "yielded nothing in epoch 0"),
        (used_up, "yielded nothing in epoch 1"),
        (lambda: {torch.ones(())}, "order changes"),
        (lambda: torch.utils.data.DataLoader([1.0], shuffle=True), "can't be reproduced"),
        (lambda: [torch.ones(2), (torch.ones(2),)], "offset 1: a batch has the structure"),
        (lambda: [{"x": torch.ones(2)}, {"y": torch.ones(2)}], "those before it had"),
    ],
)
def test_sources_that_cant_work(source, message):
    arguments = counting()
    optimizer = pt.optim.sgd(lr=1.0)
    arguments["step"] = pt.train_step(lambda p, b, batch, key: p["w"] * 1.0, optimizer)
    with pytest.raises(DataError, match=message):
        pt.fit(**arguments, batches=source(), epochs=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new: None, "returned a NoneType; it must return the next TrainState"),
        (lambda new: (new, 1.0), "returned a tuple"),
        (
            lambda new: new.replace(params=new.params | {"v": torch.zeros(1)}),
            "params/v was not there and is torch.float32 of shape .1,. after it",
        ),
        (
            lambda new: new.replace(params=tree_map(torch.Tensor.double, new.params)),
            "params/w was torch.float32 of shape .. and is torch.float64",
        ),
        (lambda new: new.replace(params=FrozenDict()), "params/w was .* and is not there"),
        (lambda new: new.replace(step=1), "step was torch.int64 of shape .. and is a int"),
    ],
)
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_changes_the_structure_of_the_state_is_refused(change, message, donate):
    arguments = counting()
    step = arguments["step"]
    arguments["step"] = lambda state, batch: change(step(state, batch))
    with pytest.raises(StructureError, match=message):
        pt.fit(**arguments, batches=[torch.ones(())], epochs=1, donate=donate)


def test_waiting_gradients_without_flush_are_refused():
    arguments = run(accumulate=2)
    step = arguments["step"]
    wrapped = functools.wraps(step)(without_donate(step))
    end = pt.fit(**{**arguments, "step": wrapped}, epochs=2)
    assert tree_equal(end, pt.fit(**arguments, epochs=2))
    arguments["step"] = without_donate(step)
    with pytest.raises(ConfigurationError, match="with 1 accumulated batches.*functools.wraps"):
        pt.fit(**arguments, epochs=1)
