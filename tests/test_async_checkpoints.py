"""Saving in the background: the loop goes on, nothing is lost, the states are the right ones."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import puretrain as pt
from puretrain.checkpoint import store, writer
from puretrain.errors import CheckpointError
from puretrain.tree import tree_digest


def make(steps, directory, observers=(), **options):
    with pt.random.scope(pt.random.key(1)):
        model = nn.Sequential(
            nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.Linear(64, 1)
        )
        x = torch.randn(40, 6)
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        out, buffers = apply(params, buffers, batch)
        return (out**2).mean(), pt.Aux(buffers)

    optimizer = pt.optim.adamw(1e-2)
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(2)),
        step=pt.train_step(loss, optimizer, accumulate=2),
        batches=pt.batches(x, 7, shuffle=True, seed=3),
        steps=steps,
        reducers=[pt.ema(0.9), pt.swa(start_step=3, every=2)],
        observers=[*observers, *([pt.checkpoints(directory, **options)] if directory else [])],
        directory=directory,
    )


class Gate:
    """Holds every save back until it is opened."""

    def __init__(self, patch):
        self.open, self.begun = threading.Event(), []
        original = store.write

        def write(path, *arguments, **named):
            self.begun.append(Path(path).name)
            assert self.open.wait(60)
            return original(path, *arguments, **named)

        patch.setattr(store, "write", write)


def digests():
    found = {}

    def observe(state, event):
        if event.kind == "step":
            found[event.step] = tree_digest(state)

    return found, observe


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_the_files_hold_the_states_of_their_steps(tmp_path, when_busy):
    seen, observe = digests()
    run = make(25, tmp_path, [observe], every=1, keep=None, asynchronous=True, when_busy=when_busy)
    final = run.fit()
    plain = make(25, None).fit()
    assert tree_digest(final) == tree_digest(plain)
    entries = store.saved(tmp_path)
    assert entries[-1].step == 25
    if when_busy == "wait":
        assert [entry.step for entry in entries] == list(range(1, 26))
    for entry in entries:
        assert tree_digest(pt.load(entry.path)) == seen[entry.step]


def test_the_loop_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    seen, observe = digests()

    def release(state, event):
        if event.kind == "step" and event.step == 9:  # five steps in place beside the save
            gate.open.set()

    final = make(
        11, tmp_path, [observe, release], every=4, asynchronous=True, when_busy="skip", keep=None
    ).fit()
    assert gate.begun[0] == "step_00000004.ckpt"
    for entry in store.saved(tmp_path):
        assert tree_digest(pt.load(entry.path)) == seen[entry.step]
    assert store.saved(tmp_path)[-1].step == 11
    assert tree_digest(final) == tree_digest(make(11, None).fit())


def test_skip_drops_the_older_of_two_that_wait(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)

    def release(state, event):
        if event.kind == "step" and event.step == 4:
            gate.open.set()

    late = [release]
    run = make(4, tmp_path, every=1, keep=None, asynchronous=True, when_busy="skip")
    run = run.replace(observers=[*run.observers, *late])  # after the save of step 4 was submitted
    run.fit()
    # 1 is being written, 2 and then 3 wait and are dropped
    assert [entry.step for entry in store.saved(tmp_path)] == [1, 4]


def test_wait_holds_the_loop_until_the_disk_is_free(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    steps = []
    timer = threading.Timer(0.5, gate.open.set)
    timer.start()
    make(
        6,
        tmp_path,
        [lambda state, event: steps.append((event.step, gate.open.is_set()))],
        every=2,
        keep=None,
        asynchronous=True,
    ).fit()
    assert (2, False) in steps
    assert (3, False) in steps
    assert (4, False) in steps  # it is told of step 4 before the save of that is due
    assert (5, False) not in steps
    assert [entry.step for entry in store.saved(tmp_path)] == [2, 4, 6]


def test_no_lease_is_left(tmp_path):
    from puretrain import state as state_module

    make(10, tmp_path, every=1, asynchronous=True).fit()
    assert not state_module._leases
    assert not state_module._reserved


@pytest.mark.parametrize("fails_at", [3, 8])  # in the middle, and the very last
def test_an_error_in_the_background_is_raised(tmp_path, monkeypatch, fails_at):
    original = store.write

    def write(path, *arguments, **named):
        if path.endswith(f"{fails_at}.ckpt"):
            raise CheckpointError(f"no room for {fails_at}")
        return original(path, *arguments, **named)

    monkeypatch.setattr(store, "write", write)
    with pytest.raises(CheckpointError, match=f"no room for {fails_at}"):
        make(8, tmp_path, every=1, keep=None, asynchronous=True).fit()
    assert [entry.step for entry in store.saved(tmp_path)][:2] == [1, 2]


def test_an_error_is_not_lost_when_the_loop_fails_as_well(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)

    def fail(state, event):
        if event.kind == "step" and event.step == 2:
            raise RuntimeError("the loop's own error")

    def write(path, *arguments, **named):
        raise CheckpointError("no room")

    gate.open.set()
    monkeypatch.setattr(store, "write", write)
    run = make(8, tmp_path, every=1, asynchronous=True)
    run = run.replace(observers=[*run.observers, fail])
    with pytest.raises((CheckpointError, RuntimeError)) as caught:
        run.fit()
    chain = [caught.value, caught.value.__context__]
    assert any("no room" in str(error) for error in chain)


def test_on_error_warn_goes_on_and_tries_again(tmp_path, monkeypatch):
    original, failed = store.write, []

    def write(path, *arguments, **named):
        if not failed:
            failed.append(path)
            raise CheckpointError("no room")
        return original(path, *arguments, **named)

    monkeypatch.setattr(store, "write", write)
    with pytest.warns(UserWarning, match="a checkpoint was not saved: no room"):
        final = make(8, tmp_path, every=4, asynchronous=True, on_error="warn").fit()
    assert tree_digest(pt.load(store.latest(tmp_path))) == tree_digest(final)


def test_a_writer_does_its_jobs_in_order_and_keeps_every_error():
    done, background = [], writer.Writer()

    def job(number):
        def run():
            done.append(number)
            if number % 2:
                raise ValueError(number)

        return writer.Job(run, lambda: done.append(-number))

    for number in range(1, 6):
        background.submit(job(number), replace=False)
    assert background.wait()
    assert done == [1, -1, 2, -2, 3, -3, 4, -4, 5, -5]
    assert [error.args for error in background.errors()] == [(1,), (3,), (5,)]
    assert background.errors() == []


# ── A lease against a step in another thread ──────────────────────────────────────────────────────


def test_a_lease_taken_while_the_gradients_are_computed_keeps_the_state():
    held = []

    def loss(params, buffers, batch, key):
        thread = threading.Thread(target=lambda: held.append(pt.lease(state)))
        thread.start()
        thread.join()
        return (params["w"] * batch).sum()

    optimizer = pt.optim.adamw(0.1)
    state = pt.TrainState.create({"w": torch.ones(3)}, None, optimizer, key=pt.random.key(0))
    before = tree_digest(state)
    after = pt.train_step(loss, optimizer)(state, torch.ones(3), donate=True)
    assert tree_digest(state) == before
    assert not torch.equal(after.params["w"], state.params["w"])
    held[0].release()


def test_no_lease_is_given_on_a_state_that_is_being_overwritten():
    caught = []
    plain = pt.optim.sgd(0.1)

    def update(grads, opt_state, params, /, *, donate=False):
        def take():
            try:
                pt.lease(state)
            except pt.errors.DonatedStateError as error:
                caught.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return plain.update(grads, opt_state, params, donate=donate)

    optimizer = pt.optim.Optimizer(plain.init, update)
    state = pt.TrainState.create({"w": torch.ones(3)}, None, optimizer, key=pt.random.key(0))
    step = pt.train_step(lambda p, b, x, key: (p["w"] * x).sum(), optimizer)
    after = step(state, torch.ones(3), donate=True)
    assert len(caught) == 1
    pt.lease(after).release()  # the next state is free


# ── SIGTERM ───────────────────────────────────────────────────────────────────────────────────────


SCRIPT = """
import sys, time, torch
import puretrain as pt
directory, blocking, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(1)

def loss(params, buffers, batch, key):
    return ((params["w"] - batch) ** 2).sum()

optimizer = pt.optim.adamw(0.1)
inner = pt.train_step(loss, optimizer)

def slow(params, buffers, batch, key):
    if float(batch[0]) == 5:
        print("slow", flush=True)
        end = time.monotonic() + blocking
        while time.monotonic() < end:
            time.sleep(0.01)
    return loss(params, buffers, batch, key)

state = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))
pt.fit(state, pt.train_step(slow, optimizer), [torch.full((3,), float(i)) for i in range(10)],
       epochs=1, reducers=[pt.ema(0.9)],
       observers=[pt.checkpoints(directory, every=100, preemption_seconds=seconds)])
"""


def preempted(tmp_path, blocking, seconds, *, kill_after=None):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(blocking), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:
        assert process.stdout.readline() == "slow\n"
        process.send_signal(signal.SIGTERM)
        if kill_after is not None:
            for line in process.stderr:
                assert "SIGTERM: the state of step 5" in line, line
                break
            process.kill()
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors


def test_the_last_complete_state_is_saved_while_a_step_goes_on(tmp_path):
    status, _ = preempted(tmp_path, blocking=1000, seconds=5, kill_after=True)
    assert status == -signal.SIGKILL
    saved = pt.load(store.latest(tmp_path))
    assert int(saved["step"]) == 5
    optimizer = pt.optim.adamw(0.1)
    state = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))
    expected = pt.fit(
        state,
        pt.train_step(lambda p, b, x, key: ((p["w"] - x) ** 2).sum(), optimizer),
        [torch.full((3,), float(i)) for i in range(10)],
        steps=5,
        reducers=[pt.ema(0.9)],
    )
    assert torch.equal(saved["params"]["w"], expected.params["w"])
    assert torch.equal(
        saved["reducers"]["ema"]["params"]["w"], expected.reducers["ema"].params["w"]
    )


def test_a_step_that_ends_soon_is_saved_itself(tmp_path):
    status, errors = preempted(tmp_path, blocking=0.2, seconds=20)
    assert status == 143
    assert store.saved(tmp_path)[-1].step == 6
    assert "the state of step 6 is saved" in errors


def test_a_step_that_ends_after_the_rescue_is_saved_as_well(tmp_path):
    status, errors = preempted(tmp_path, blocking=4, seconds=10)
    assert status == 143
    assert "the state of step 5, the last complete one, is saved" in errors
    assert [entry.step for entry in store.saved(tmp_path)] == [5, 6]


def test_preemption_needs_signals(tmp_path):
    optimizer = pt.optim.sgd(0.1)
    state = pt.TrainState.create({"w": torch.ones(1)}, None, optimizer, key=pt.random.key(0))
    step = pt.train_step(lambda p, b, x, key: (p["w"] * x).sum(), optimizer)
    with pytest.raises(pt.errors.ConfigurationError, match="handle_signals"):
        pt.fit(
            state,
            step,
            [torch.ones(1)],
            epochs=1,
            handle_signals=False,
            observers=[pt.checkpoints(tmp_path, preemption_seconds=5)],
        )
