"""Living runs again: replay, bisect, time travel, and the commands."""

import json
import multiprocessing
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import forking
import numpy as np
import pytest
import torch

import puretrain as pt
from puretrain.cli import main
from puretrain.errors import ConfigurationError, DataError, JournalError
from puretrain.replay import bisect

ROOT = Path(__file__).parents[1]

TOY = """
import torch
import puretrain as pt


def run(directory="run", seed=0, lr=0.1, nudge="", at=7, every=1, save=3, epochs=3, spoiled=-1):
    data = torch.arange(24.0).reshape(8, 3)
    if spoiled >= 0:
        data[spoiled, 0] += 1

    def loss(params, buffers, batch, key):
        buffers = {"seen": buffers["seen"] + len(batch), "still": buffers["still"]}
        noise = torch.rand(())
        return ((batch - params["w"]) ** 2).mean() * (1 + noise), pt.Aux(buffers, {"noise": noise})

    optimizer = pt.optim.sgd(lr, momentum=0.5)
    state = pt.TrainState.create(
        {"w": torch.zeros(3), "b": torch.ones(2)},
        {"seen": torch.tensor(0), "still": torch.ones(2)},
        optimizer,
        key=pt.random.key(seed),
    )
    train = pt.train_step(loss, optimizer)

    def up(leaf):
        return torch.nextafter(leaf, torch.tensor(9.0))

    def step(state, batch, *, donate=False):
        state = train(state, batch, donate=False)
        if int(state.step) != at or not nudge:
            return state
        if nudge == "params":
            return state.replace(params=state.params | {"b": up(state.params["b"])})
        if nudge == "buffers":
            return state.replace(buffers=state.buffers | {"still": up(state.buffers["still"])})
        if nudge == "key":
            return state.replace(key=state.key + 1)
        return state.replace(
            opt_state=pt.tree.tree_map(
                lambda x: up(x) if x.is_floating_point() else x, state.opt_state
            )
        )

    return pt.Run(
        state=state,
        step=step,
        batches=pt.batches(data, 2, shuffle=True, seed=3),
        epochs=epochs,
        reducers=[pt.ema(0.9), pt.best_k("val/b")],
        validation=pt.Validation(
            pt.eval_step(lambda params, buffers, batch, key: {"b": params["w"].sum()}),
            pt.batches(data, 8),
        ),
        observers=[
            pt.journal(directory, every=every),
            pt.checkpoints(directory, every=save, keep=None),
        ],
        directory=directory,
    )


def wrapped(seed=0):
    return run("wrapped", seed)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The function of ``toy.py``, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "toy.py").write_text(TOY)
    import toy

    yield toy.run
    for name in ("toy", "puretrain_toy"):
        sys.modules.pop(name, None)


@pytest.fixture
def call(capsys):
    """Run the command line in this process; returns (exit status, stdout, stderr)."""

    def call(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


def digests_of(run):
    """The digest of the state after each step of a run, by a fold without anything else."""
    found = {}

    def note(state, event):
        if event.kind == "step":
            found[event.step] = pt.tree.tree_digest(state)

    run.replace(observers=[note], directory=None).fit()
    return found


# ── Replay ────────────────────────────────────────────────────────────────────────────────────────


def test_a_replay_is_identical_and_writes_nothing(toy, tmp_path):
    toy().fit()
    before = {path: path.stat().st_mtime_ns for path in Path("run").iterdir()}
    generator = torch.get_rng_state()
    for begin, end in ((0, None), (0, 0), (4, 9), (11, 12), (12, 12)):
        found = pt.open_run("run").replay(begin, end)
        end = 12 if end is None else end
        assert found.begin == {0: 0, 4: 4, 11: 9, 12: 12}[begin]  # best_k keeps that of step 4
        assert found.end == end
        assert found.difference is None
        assert found.compared == found.states == end - found.begin
        assert not found.facts
    assert {path: path.stat().st_mtime_ns for path in Path("run").iterdir()} == before
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("every", [1, 4])
def test_a_replay_says_where_and_by_how_much_it_differs(toy, every):
    toy(every=every).fit()
    found = pt.open_run("run", nudge="params", at=7).replay()
    difference = found.difference
    journalled = -(-7 // every) * every
    assert (difference.step, difference.since) == (journalled, journalled - every)
    assert found.compared == journalled - 1
    assert not difference.batch
    assert not difference.metrics
    # a tenth of an ulp is nothing to the average
    paths = [leaf.path for leaf in difference.leaves]
    assert paths == ["params/b"]
    assert difference.stored.checkpoint.step == 9
    first = difference.stored.leaves[0]
    assert (first.path, first.max_ulps, first.count) == ("params/b", 1, 2)


def test_a_replay_with_other_data_or_rate_or_seed_differs_at_the_first_step(toy):
    toy().fit()
    other = pt.open_run("run", lr=0.2).replay().difference
    assert (other.step, other.leaves[0].path) == (1, "params/w")
    spoiled = pt.open_run("run", spoiled=0).replay().difference
    assert spoiled.batch
    assert 1 <= spoiled.step <= 4
    key = pt.open_run("run", seed=1).replay().difference
    assert (key.step, [leaf.path for leaf in key.leaves]) == (0, ["key"])


def test_a_replay_goes_over_restarts_and_what_they_took_back(toy):
    toy(save=5, epochs=2).replace(epochs=None, steps=7).fit()
    Path("run/step_00000007.ckpt").unlink()
    toy(save=5).fit(resume=True)
    run = pt.open_run("run")
    assert [segment.start for segment in run.journal.segments] == [0, 5]
    found = run.replay()
    assert (found.compared, found.difference) == (12, None)


def test_threads_are_a_fact_that_a_replay_uses_or_reports(toy):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        toy().fit()
        torch.set_num_threads(before)
        run = pt.open_run("run")
        assert not run.replay().facts
        assert torch.get_num_threads() == before
        (fact,) = run.replay(recorded_settings=False).facts
        assert fact == ("settings/threads", before + 1, before)
    finally:
        torch.set_num_threads(before)


def test_a_changed_file_is_a_fact(toy):
    toy().fit()
    Path("toy.py").write_text(TOY + "# changed\n")
    assert [fact.name for fact in pt.open_run("run").replay().facts] == ["code/file"]


# ── Time travel ───────────────────────────────────────────────────────────────────────────────────


def test_any_state_can_be_had(toy):
    expected = digests_of(toy())
    toy(save=5).fit()
    run = pt.open_run("run")
    assert pt.tree.tree_digest(run.state_at(0)) == pt.tree.tree_digest(
        pt.prepare(toy().state, toy().reducers)
    )
    held = {found.step for found in run.checkpoints()}
    for step, digest in expected.items():
        if step not in held:
            assert pt.tree.tree_digest(run.state_at(step)) == digest
    assert pt.tree.tree_equal(run.state_at(5).params, pt.load("run/step_00000005.ckpt")["params"])
    for step in (-1, 13, 1.5):
        with pytest.raises(ConfigurationError, match="steps from 0 to 12"):
            run.state_at(step)


def test_a_fork_goes_on_like_the_run_and_can_be_replayed(toy):
    final = toy().fit()
    fork = pt.open_run("run").fork(at=7, directory="other/fork")
    assert int(fork.state.step) == 7
    assert pt.tree.tree_digest(fork.fit()) == pt.tree.tree_digest(final)
    found = pt.open_run("other/fork").replay(7)
    assert (found.begin, found.compared, found.difference) == (7, 5, None)
    with pytest.raises(ConfigurationError, match="not empty"):
        pt.open_run("run").fork(at=7, directory="other/fork")


def test_metrics_as_columns(toy):
    rows = []

    def note(state, event):
        if event.kind == "step":
            rows.append((event.step, event.epoch, event.metrics["loss"].item()))

    run = toy()
    run.replace(observers=[*run.observers, note]).fit()
    recorded = pt.open_run("run")
    columns = recorded.metrics()
    assert [*zip(*(columns[name].tolist() for name in ("step", "epoch", "loss")), strict=True)] == (
        rows
    )
    assert np.all(np.diff(columns["time"]) >= 0)
    assert recorded.metrics("validation")["step"].tolist() == [4, 8, 12]
    assert recorded.metrics("epoch_end").keys() >= {"train/loss", "train/noise"}
    assert recorded.environment()["environment"]["torch"] == torch.__version__


def test_a_run_or_function_of_ones_own_can_be_given(toy):
    toy().fit()
    assert pt.open_run("run", toy()).replay(9).difference is None
    assert pt.open_run("run", toy, lr=0.1).replay(9).difference is None
    with pytest.raises(ConfigurationError, match="made already"):
        pt.open_run("run", toy()).fork(3, "fork")


def test_what_is_missing_is_said(toy):
    with pytest.raises(JournalError, match="puretrain.journal"):
        pt.open_run(".")
    toy().replace(epochs=None, steps=5).fit()
    for path in Path("run").glob("*.ckpt"):
        path.unlink()
    assert pt.open_run("run").replay(3).begin == 0
    Path("toy.py").rename("moved.py")
    with pytest.raises(ConfigurationError, match="--file"):
        pt.open_run("run").state_at(3)


# ── Bisect ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(
    ("nudge", "path"),
    [
        ("params", "params/b"),
        ("buffers", "buffers/still"),
        ("key", "key"),
        ("opt_state", "opt_state"),
    ],
)
def test_bisect_finds_the_step_and_the_leaf(toy, every, nudge, path):
    toy("a", every=every).fit()
    toy("b", every=every, nudge=nudge, at=7).fit()
    found = bisect(pt.open_run("a"), pt.open_run("b"))
    assert (found.step, found.since, found.exact, found.what) == (7, 6, True, nudge)
    first = found.leaves[0]
    assert first.path.startswith(path)
    assert first.max_ulps == (None if nudge == "key" else 1)
    assert not found.facts


def test_bisect_tells_a_batch_and_a_beginning(toy):
    toy("a", every=100).fit()
    toy("b", every=100, spoiled=5).fit()
    order = [batch[:, 1].tolist() for batch in toy().batches]
    number = 1 + next(i for i, rows in enumerate(order) if 16.0 in rows)  # sample 5 is 15, 16, 17
    found = bisect(pt.open_run("a"), pt.open_run("b"))
    assert (found.step, found.exact, found.what) == (number, True, "batch")
    toy("c", seed=9).fit()
    found = bisect(pt.open_run("a"), pt.open_run("c"))
    assert (found.step, found.what, found.leaves[0].path) == (0, "key", "key")


def test_bisect_of_equal_runs_and_without_their_program(toy):
    toy("a", every=5).fit()
    toy("b", every=5, nudge="params", at=7).fit()
    toy("c", every=5, epochs=2).fit()
    assert bisect(pt.open_run("a"), pt.open_run("c")).step is None
    Path("toy.py").rename("moved.py")
    found = bisect(pt.open_run("a"), pt.open_run("b"))
    assert (found.step, found.since, found.exact, found.what) == (10, 5, False, "params")
    assert "can't be replayed" in found.notes[0]


# ── The commands ──────────────────────────────────────────────────────────────────────────────────


def test_the_command_replay_and_its_exit_status(toy, call):
    assert call("fit", "toy.py", "--set", "lr=0.05")[0] == 0
    status, out, _ = call("replay", "run")
    assert status == 0
    assert "identical   for 12 steps" in out
    status, out, _ = call("replay", "run", "--from", "4", "--to", "9", "--json")
    result = json.loads(out)
    assert (status, result["begin"], result["compared"]) == (0, 4, 5)
    assert result["difference"] is None
    status, out, _ = call("replay", "run", "--set", "nudge=params")
    assert status == 1
    assert "DIFFERS     at step 7; the whole state was last the same at step 6" in out
    assert "first leaf  params/b" in out
    assert re.search(r"params/b +value +f32\[2\] +\S+ +1 +2", out)
    status, out, err = call("replay", "run", "--file", "toy.py:wrapped")
    assert (status, err) == (1, "")  # its rate is another one
    assert call("replay", "run", "--file", "toy.py", "--set", "lr=0.05")[0] == 0
    for arguments in (("nowhere",), ("run", "--to", "99"), ("run", "--file", "no.py")):
        status, out, err = call("replay", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)


def test_the_command_bisect_and_its_exit_status(toy, call):
    toy("a", every=5).fit()
    toy("b", every=5, nudge="params").fit()
    status, out, _ = call("bisect", "a", "b")
    assert status == 1
    assert "PARTED      at step 7; after step 6 they were the same" in out
    assert "first       params" in out
    assert call("bisect", "a", "a")[:2] == (0, "identical   for the 12 steps that both have\n")
    assert json.loads(call("bisect", "a", "b", "--json")[1])["what"] == "params"
    assert call("bisect", "a", "nowhere")[0] == 2


def test_damage_is_said_and_left_out(toy, call):
    toy().fit()
    path = Path("run/run.journal")
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)
    status, out, err = call("replay", "run")
    assert status == 0
    assert "damaged bytes at byte" in err


def test_the_how_to_runs_as_it_stands(tmp_path):
    text = (ROOT / "docs/replay.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```(python|sh)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    python = [body for language, body in fences if language == "python"]
    commands = [body for language, body in fences if language == "sh"]
    (tmp_path / "line.py").write_text(python[0])
    (tmp_path / "travel.py").write_text("import puretrain as pt\n" + python[1])
    printed = ""
    for line in [*"".join(commands).splitlines(), "python travel.py"]:
        command, _, otherwise = line.partition(" || ")
        program, *arguments = shlex.split(command)
        arguments = {"python": [], "puretrain": ["-m", "puretrain"]}[program] + arguments
        done = forking.run(*arguments, cwd=tmp_path)
        assert done.returncode == (1 if otherwise == "echo they part" else 0), line + done.stderr
        printed += done.stdout
    assert "identical   for 24 steps, the whole state at 2 of them" in printed
    assert "PARTED      at step 1;" in printed
    assert (tmp_path / "runs/line/report.html").is_file()
    assert int(pt.load(pt.latest(tmp_path / "runs/fork"))["step"]) == 40


# ── The examples, killed, resumed and lived again ─────────────────────────────────────────────────


def example(name, *options):
    return forking.start(f"examples/{name}.py", *options, cwd=ROOT)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [("digits", ["--epochs", 4], 96), ("char_lm", ["--steps", 15], 15)],
)
def test_an_example_that_was_killed_and_resumed_replays_to_the_bit(
    name, options, steps, tmp_path, call, monkeypatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    journal = tmp_path / "run.journal"
    process = example(name, "--directory", tmp_path, *options)
    while not journal.exists() or journal.stat().st_size < 6000:
        assert process.poll() is None, process.errors()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.finished()
    done = example(name, "--directory", tmp_path, "--resume", *options).finished()
    assert done.returncode == 0, done.stderr
    assert f"puretrain replay {tmp_path}" in done.stdout
    assert len(pt.replay.read_journal(tmp_path).segments) == 2
    status, out, _ = call("replay", tmp_path)
    assert f"identical   for {steps} steps" in out
    assert status == 0
    sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_digits_with_workers_one_of_them_killed_replays_with_any_number(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import digits

    images, labels = digits.data()[0]
    samples = [*zip(images, labels, strict=True)]

    def make(num_workers):
        run = digits.run(str(tmp_path), epochs=2)
        batches = pt.batches(samples, 50, shuffle=True, num_workers=num_workers)
        observers = [pt.journal(tmp_path, every=10), pt.checkpoints(tmp_path, every=10)]
        return run.replace(batches=batches, observers=observers, validation=None, reducers=[])

    def kill_a_worker(state, event):
        if event.kind == "step" and event.step == 15:
            multiprocessing.active_children()[0].kill()

    run = make(2)
    with pytest.raises((DataError, RuntimeError)):  # torch's signal handler may raise anywhere
        run.replace(observers=[*run.observers, kill_a_worker]).fit()
    assert int(make(1).fit(resume=True).step) == 48
    for program in (make(0), make(3)):
        found = pt.open_run(tmp_path, program).replay()
        assert (found.compared, found.states, found.difference) == (48, 4, None)
    # read from the arrays, as the example does, the batches are the same
    plain = make(0).replace(batches=digits.run().batches)
    assert pt.open_run(tmp_path, plain).replay().difference is None
