"""Observers: what is on the screen and on the disk, also after kills and resumes."""

import csv
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import puretrain as pt
from puretrain.checkpoint import find_checkpoint
from puretrain.errors import ConfigurationError
from puretrain.loop import Event
from puretrain.tree import tree_digest, tree_equal


def run(**changes):
    """The arguments of fit for a run of four batches an epoch whose validation has a minimum."""
    x = torch.linspace(-1, 1, 14).reshape(7, 2)

    def loss(params, buffers, batch, key):
        return ((batch @ params["w"] - 3.0) ** 2).mean(), pt.Aux(metrics={"size": batch.norm()})

    def distance(params, buffers, batch, key):
        return {"loss": (params["w"][0] - 1.3).abs() + batch.sum()}

    optimizer = pt.optim.adamw(lr=0.1)
    params = {"w": torch.ones(2)}
    return {
        "state": pt.TrainState.create(params, None, optimizer, key=pt.random.key(0)),
        "step": pt.train_step(loss, optimizer),
        "batches": pt.batches(x, 2, shuffle=True),
        "validation": pt.Validation(pt.eval_step(distance), [torch.zeros(1)], every=3),
        "epochs": 4,
        **changes,
    }


class Crash(Exception):
    pass


def crash_at(number):
    """An observer that raises at the n-th event."""
    seen = []

    def observe(state, event):
        seen.append(event)
        if len(seen) == number:
            raise Crash

    return observe


def keep_states(into):
    def observe(state, event):
        into.append((event, pt.tree.tree_map(torch.clone, state)))

    return observe


# ── Progress ──────────────────────────────────────────────────────────────────────────────────────


def timeless(text):
    return re.sub(r"\d+:\d\d", "TIME", text)


def test_progress_writes_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    arguments = run(epochs=2)
    show = pt.progress(file=out, interval=1e-9, metrics=["loss"])
    end = pt.fit(**arguments, observers=[show])
    lines = timeless(out.getvalue()).split("\n")
    assert lines.pop() == ""
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    steps = [line for line in lines if "/4  " in line]
    assert all(
        re.fullmatch(r"epoch [01]  [1-4]/4  [\d.]+[kM]?/s  TIME left  loss [\d.]+", line)
        for line in steps
    )
    assert [line for line in lines if line.startswith("step")] == [
        f"step 3  val/loss {validated(3):.4g}",
        f"step 6  val/loss {validated(6):.4g}",
    ]
    ends = [line for line in lines if re.match(r"epoch \d  step", line)]
    assert [re.sub(r"(train/\w+) [\d.]+", r"\1 x", line) for line in ends] == [
        "epoch 0  step 4  TIME  train/loss x  train/size x",
        "epoch 1  step 8  TIME  train/loss x  train/size x",
    ]
    assert lines[-1] == "finished after step 8, TIME"
    again = io.StringIO()
    pt.fit(**{**arguments, "state": end, "epochs": 3}, observers=[pt.progress(file=again)])
    assert again.getvalue().startswith("going on after step 8, in epoch 2\n")
    assert "epoch 2  step 12" in again.getvalue()
    assert not [line for line in again.getvalue().split("\n") if "/4  " in line]  # not 10 s yet


def validated(step):
    arguments = run(epochs=None, steps=step)
    end = pt.fit(**arguments)
    return float((end.params["w"][0] - 1.3).abs())


def test_progress_tells_why_a_run_ended():
    out = io.StringIO()
    stop = lambda state, event: state.replace(stop=torch.tensor(True))  # noqa: E731
    pt.fit(**run(), reducers=[stop], observers=[pt.progress(file=out)])
    assert timeless(out.getvalue()).endswith("stopped by a reducer after step 1, TIME\n")
    out = io.StringIO()

    def send(state, event):
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(pt.Interrupted):
        pt.fit(**run(), observers=[send, pt.progress(file=out)])
    assert timeless(out.getvalue()).endswith("interrupted after step 2, TIME\n")


def test_progress_may_be_silent(capfd):
    pt.fit(**run(), observers=[pt.progress(enabled=False)])
    assert capfd.readouterr() == ("", "")
    pt.fit(**run(epochs=1), observers=[pt.progress()])
    assert timeless(capfd.readouterr().out).endswith("finished after step 4, TIME\n")
    for wrong in ({"refresh": 0.01}, {"interval": 0.0}):
        with pytest.raises(ConfigurationError):
            pt.progress(**wrong)


PROGRAM = textwrap.dedent("""
    import itertools, os, time, torch
    import puretrain as pt

    names = ["accuracy", "gradient_norm", "perplexity", "a_rather_long_name_of_a_metric"]

    def loss(params, buffers, batch, key):
        time.sleep(0.01)
        metrics = {name: batch.norm() for name in names}
        return ((params["w"] - batch) ** 2).mean(), pt.Aux(metrics=metrics)

    def say(state, event):
        if event.kind == "step" and event.step == 30:
            print("a line of the program's own")

    def fit(batches, **arguments):
        optimizer = pt.optim.sgd(lr=0.1)
        params = {"w": torch.zeros(8)}
        state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
        show = pt.progress(refresh=0.1)
        pt.fit(state, pt.train_step(loss, optimizer), batches, observers=[show, say], **arguments)

    fit([torch.ones(8)] * 50, epochs=2)
    print("=" * 20)
    os.environ["NO_COLOR"] = "1"
    fit(lambda epoch: iter([torch.ones(8)] * 40), epochs=1)
    print("=" * 20)
    fit(lambda epoch: itertools.repeat(torch.ones(8)), steps=100_000)
""")

WIDTH = 80


def in_a_terminal(program, until, press):
    """Run a program in a pseudo-terminal of 80 columns; press a key when it has shown something.

    Returns what it wrote, and its exit code.
    """
    process, terminal = pty.fork()
    if process == 0:
        path = str(Path(pt.__file__).parents[1])
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        environment |= {"TERM": "xterm-256color", "PYTHONPATH": path}
        os.execve(sys.executable, [sys.executable, "-c", program], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    written, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        written += piece
        if until is not None and re.search(until, written.decode(errors="ignore"), re.DOTALL):
            until = os.write(terminal, press) and None
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(terminal)
    return written.decode(), code


class Screen:
    """As much of a terminal as a progress bar needs; notes lines that were too wide for it."""

    def __init__(self, written):
        self.rows, self.row, self.column, self.wrapped = [""], 0, 0, []
        for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", written, flags=re.DOTALL):
            self.take(token)

    def take(self, token):
        if token == "\r":
            self.column = 0
        elif token == "\n":
            self.row += 1
            self.rows += [""] * (self.row + 1 - len(self.rows))
        elif token == "\x1b[2K":
            self.rows[self.row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d*)A", token):
            self.row -= int(match[1] or 1)
        elif token.startswith("\x1b["):
            assert re.fullmatch(r"\x1b\[(\?25[hl]|[\d;]*m)", token), f"unknown: {token!r}"
        else:
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + token + line[self.column + 1 :]
            self.column += 1
            if self.column > WIDTH:
                self.wrapped.append(self.rows[self.row])


def test_the_progress_bar_in_a_terminal():
    written, code = in_a_terminal(PROGRAM, r"={20}.*={20}.*(batches.*){3}", b"\x03")
    assert code == 130
    assert "Traceback" not in written
    screen = Screen(written)
    assert screen.wrapped == []
    lines = [timeless(row.rstrip()) for row in screen.rows if row]
    cut = [i for i, line in enumerate(lines) if line == "=" * 20]
    colored, plain, stopped = lines[: cut[0]], lines[cut[0] + 1 : cut[1]], lines[cut[1] + 1 :]
    epochs = [
        line
        for epoch, step in ((0, 50), (1, 100))
        for line in (
            f"epoch {epoch}  step {step}  TIME  train/loss {{}}  train/accuracy 2.828",
            "  train/gradient_norm 2.828  train/perplexity 2.828",
            "  train/a_rather_long_name_of_a_metric 2.828",
        )
    ]
    assert [re.sub(r"loss [\d.e-]+", "loss {}", line) for line in colored] == [
        "a line of the program's own",  # above the bar, which is gone
        *epochs,
        "finished after step 100, TIME",
    ]
    assert plain[0] == "a line of the program's own"
    assert plain[-1] == "finished after step 40, TIME"
    assert re.search(r"interrupted after step \d+, TIME$", stopped[-1])
    # It was drawn again and again in its place, and filled up; the cursor came back.
    one, two, three = written.split("=" * 20)
    assert one.count("\x1b[2K") > 5
    bars = re.findall(r"\x1b\[32m(━+)", one)
    assert len({len(bar) for bar in bars}) > 3
    assert max(map(len, bars)) >= 8
    assert re.search(r"epoch 1 .*\d/50 .*\d/s  \d:\d\d left", one)
    assert re.search(r"epoch 0  \d+ batches  [\d.]+/s", two)
    for part in (one, two, three):
        assert part.count("\x1b[?25h") == part.count("\x1b[?25l") >= 1
    assert re.search(r"\x1b\[[\d;]*3\d", one)
    assert not re.search(r"\x1b\[[\d;]*[34]\d", two)  # NO_COLOR


# ── TensorBoard ───────────────────────────────────────────────────────────────────────────────────


def read_back(directory):
    reader = EventAccumulator(str(directory), {"scalars": 0, "histograms": 0, "tensors": 0})
    reader.Reload()
    return reader


def points(directory):
    reader = read_back(directory)
    return {
        tag: [(point.step, point.value) for point in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_tensorboard_scalars_are_what_its_own_reader_finds(tmp_path):
    expected = {}

    def note(state, event):
        metrics = {"step": state.metrics, "validation": event.metrics, "epoch_end": event.metrics}
        if event.kind != "step" or event.step % 3 == 0:
            for name, value in metrics.get(event.kind, {}).items():
                value = value.float().item()  # which is what event files hold
                expected.setdefault(name, []).append((event.step, value))

    pt.fit(**run(), observers=[pt.tensorboard(tmp_path, every=3), note])
    assert sorted(expected) == ["loss", "size", "train/loss", "train/size", "val/loss"]
    assert points(tmp_path) == expected


@pytest.mark.parametrize("crash", [1, 2, 5, 9, 12, 17, 22, 26, 30])
def test_tensorboard_has_each_point_once_after_a_resume(crash, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pt.fit(**run(), observers=[pt.tensorboard(whole, every=2)])
    states = []
    with pytest.raises(Crash):
        pt.fit(
            **run(),
            observers=[pt.tensorboard(broken, every=2), keep_states(states), crash_at(crash)],
        )
    # From the newest state, and from one that was saved some events before the crash.
    for _, state in (states[-1], states[max(0, len(states) - 4)]):
        (newest,) = sorted(broken.glob("*"))[-1:]
        with newest.open("ab") as file:
            file.write(struct.pack("<Q", 1000) + b"half a record")  # killed while it was writing
        pt.fit(**run(state=state), observers=[pt.tensorboard(broken, every=2)])
        assert points(broken) == points(whole)


def test_tensorboard_histograms(tmp_path):
    states = []
    pt.fit(
        **run(epochs=2),
        observers=[pt.tensorboard(tmp_path, histograms_every=4), keep_states(states)],
    )
    after = {event.step: state.params["w"] for event, state in states if event.kind == "step"}
    reader = read_back(tmp_path)
    assert sorted(reader.Tags()["histograms"]) == ["params/w", "updates/w"]
    for tag, expected in (
        ("params/w", {step: after[step] for step in (4, 8)}),
        ("updates/w", {step: after[step] - after[step - 1] for step in (4, 8)}),
    ):
        found = {point.step: point.histogram_value for point in reader.Histograms(tag)}
        assert sorted(found) == [4, 8]
        for step, values in expected.items():
            histogram = found[step]
            assert (histogram.num, histogram.min, histogram.max) == (
                2,
                values.min().item(),
                values.max().item(),
            )
            assert histogram.sum == pytest.approx(values.double().sum().item())
            assert sum(histogram.bucket) == 2


def test_tensorboard_hparams_are_there_once(tmp_path):
    hparams = {"lr": 0.1, "layers": 2, "name": "a", "nesterov": True}
    end = pt.fit(**run(epochs=2), observers=[pt.tensorboard(tmp_path, hparams=hparams)])
    pt.fit(**run(state=end), observers=[pt.tensorboard(tmp_path, hparams=hparams)])
    content = read_back(tmp_path).PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    found = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in start.session_start_info.hparams.items()
    }
    assert found == hparams
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"])
    metrics = {info.name.tag for info in experiment.experiment.metric_infos}
    assert metrics >= {"val/loss", "train/loss"}
    assert len(list(tmp_path.glob("*"))) == 2
    written = b"".join(path.read_bytes() for path in tmp_path.glob("*"))
    assert written.count(b"_hparams_/session_start_info") == 1


def test_tensorboard_refuses_what_it_cant_write(tmp_path):
    with pytest.raises(ConfigurationError, match="every is a whole number from 1, not 0"):
        pt.tensorboard(tmp_path, every=0)
    with pytest.raises(ConfigurationError, match="hparams\\['betas'\\] is a tuple.*str"):
        pt.tensorboard(tmp_path, hparams={"betas": (0.9, 0.999)})
    assert list(tmp_path.iterdir()) == []


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────

LOGS = {"csv": pt.csv_log, "jsonl": pt.jsonl_log}


def test_the_rows_of_a_csv_log(tmp_path):
    states = []
    path = tmp_path / "logs" / "a.csv"
    pt.fit(**run(epochs=1), observers=[pt.csv_log(path, every=2), keep_states(states)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["event"], row["epoch"], row["step"]) for row in rows] == [
        ("step", "0", "2"),
        ("validation", "0", "3"),
        ("step", "0", "4"),
        ("epoch_end", "0", "4"),
    ]
    assert list(rows[0]) == [
        "event",
        "epoch",
        "step",
        "loss",
        "size",
        "val/loss",
        "train/loss",
        "train/size",
    ]
    by_step = {event.step: event.metrics for event, _ in states if event.kind == "step"}
    assert float(rows[0]["loss"]) == by_step[2]["loss"].item()
    assert rows[0]["val/loss"] == rows[1]["loss"] == ""
    means = next(event.metrics for event, _ in states if event.kind == "epoch_end")
    assert float(rows[3]["train/size"]) == means["train/size"].item()


def test_the_rows_of_a_jsonl_log(tmp_path):
    path = tmp_path / "a.jsonl"
    state = pt.TrainState.create({}, key=pt.random.key(0))
    log = pt.jsonl_log(path, every=1)
    log(state, Event("fit_start", 0, 0))
    metrics = {
        "nan": torch.tensor(float("nan")),
        "inf": torch.tensor(float("-inf")),
        "count": torch.tensor(3),
        "matrix": torch.zeros(2, 2),
        "länge": torch.tensor(0.5),
    }
    log(state, Event("validation", 1, 7, metrics))
    log.close()
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "event": "validation",
        "epoch": 1,
        "step": 7,
        "nan": "nan",
        "inf": "-inf",
        "count": 3,
        "länge": 0.5,
    }


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_after_a_resume_is_that_of_an_undisturbed_run(kind, tmp_path):
    whole, broken = tmp_path / f"whole.{kind}", tmp_path / f"broken.{kind}"
    log = LOGS[kind]
    states = []
    pt.fit(**run(epochs=3), observers=[log(whole, every=1), keep_states(states)])
    expected = whole.read_bytes()
    for i, (event, state) in enumerate(states):
        # What a run leaves that went on after its last save, and was killed in the middle of a line
        with pytest.raises(Crash):
            crash = crash_at(min(i + 5, len(states)))
            pt.fit(**run(epochs=3), observers=[log(broken, every=1), crash])
        with broken.open("ab") as file:
            file.write(b'{"event": "st' if kind == "jsonl" else b"step,2,9")
        pt.fit(**run(epochs=3, state=state), observers=[log(broken, every=1)])
        assert broken.read_bytes() == expected, f"from {event.kind} after step {event.step}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [broken.name, whole.name]


def test_a_run_from_the_beginning_begins_its_log(tmp_path):
    path = tmp_path / "a.csv"
    pt.fit(**run(epochs=2), observers=[pt.csv_log(path, every=1)])
    pt.fit(**run(epochs=1), observers=[pt.csv_log(path, every=1)])
    assert len(path.read_text().splitlines()) == 1 + 4 + 1 + 1


@pytest.mark.parametrize(
    ("kind", "content", "line"),
    [
        ("csv", "a,b\n1,2\n", 1),
        ("csv", "event,epoch,step,loss\nstep,0,1,0.5\nstep,0\n", 3),
        ("jsonl", '{"event": "step", "epoch": 0, "step": 1}\nhello\n', 2),
        ("jsonl", "[1, 2]\n", 1),
        ("jsonl", '{"loss": 1}\n', 1),
    ],
)
def test_a_file_that_is_no_log_is_left_alone(kind, content, line, tmp_path):
    path = tmp_path / "precious"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=f"precious, line {line}: this is no log"):
        pt.fit(**run(), observers=[LOGS[kind](path)])
    assert path.read_text() == content


# ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────


def saved(directory):
    """The steps of the checkpoints in a directory."""
    first, *names = sorted(path.name for path in Path(directory).iterdir())
    assert first == "LATEST"
    assert Path(directory, first).read_text().strip() == names[-1]
    assert all(re.fullmatch(r"step_\d{8}\.ckpt", name) for name in names), names
    return [int(name[5:13]) for name in names]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"keep": None}, [4, 8, 12, 16]),
        ({"every": 3, "keep": None}, [3, 6, 9, 12, 15, 16]),
        ({"every": 5}, [10, 15, 16]),
        ({"every": 5, "keep": 1}, [16]),
        ({"every_epochs": 3, "keep": None}, [12, 16]),
        ({"every": 7, "every_epochs": 3, "keep": None}, [7, 12, 14, 16]),
        ({"every_minutes": 1e-9, "keep": None}, [*range(1, 17)]),
        ({"every_minutes": 1000.0, "keep": None}, [16]),
    ],
)
def test_when_checkpoints_are_saved_and_kept(options, steps, tmp_path):
    states = []
    end = pt.fit(**run(), observers=[keep_states(states), pt.checkpoints(tmp_path, **options)])
    assert saved(tmp_path) == steps
    # The last one is the very state that fit returns; the others are states of the run.
    digests = {tree_digest(state) for _, state in states}
    for step in steps:
        state = pt.load(tmp_path / f"step_{step:08}.ckpt", like=run()["state"])
        assert int(state.step) == step
        assert tree_digest(state) in digests
    assert tree_equal(state, end)


def test_what_the_metadata_of_a_checkpoint_says(tmp_path):
    states = []
    pt.fit(**run(epochs=1), observers=[keep_states(states), pt.checkpoints(tmp_path, every=3)])
    about = pt.read_index(tmp_path / "step_00000003.ckpt").metadata
    assert (about["step"], about["epoch"], about["event"]) == (3, 0, "step")
    event = next(event for event, _ in states if event.kind == "step" and event.step == 3)
    assert about["metrics"]["loss"] == event.metrics["loss"].item()
    assert about["command"] == sys.argv
    last = pt.read_index(tmp_path / "step_00000004.ckpt").metadata
    assert last["event"] == "fit_end"
    assert {"loss", "val/loss", "train/loss"} <= last["metrics"].keys()


def test_the_best_are_kept(tmp_path):
    values = {}

    def note(state, event):
        if event.kind == "validation":
            values[event.step] = event.metrics["val/loss"].item()

    end = pt.fit(
        **run(),
        reducers=[pt.best_k("val/loss", 2)],
        observers=[note, pt.checkpoints(tmp_path, every=4, keep=1)],
    )
    best = sorted(values, key=values.get)[:2]
    assert end.reducers["best_k"].steps.tolist() == best
    assert max(best) < 12  # or else they would be there without being the best
    assert saved(tmp_path) == sorted([*best, 16])
    for step in best:  # each is there as it was when it was found to be good
        state = pt.load(tmp_path / f"step_{step:08}.ckpt", like=run()["state"])
        assert float((state.params["w"][0] - 1.3).abs()) == pytest.approx(values[step])


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_crash_beside_the_checkpoints_heals_itself(where, tmp_path):
    """Between the reducer and the observer, or right after it: the directory ends the same."""

    def arguments(directory, crash=None):
        save = pt.checkpoints(directory, every=4, keep=1)
        observers = (
            [save] if crash is None else [crash, save] if where == "before" else [save, crash]
        )
        return {**run(), "reducers": [pt.best_k("val/loss", 2)], "observers": observers}

    whole = pt.fit(**arguments(tmp_path / "whole"))
    expected = saved(tmp_path / "whole")
    for number in range(3, 28):
        directory = tmp_path / str(number)
        with pytest.raises(Crash):
            pt.fit(**arguments(directory, crash_at(number)))
        again = arguments(directory)
        newest = find_checkpoint(directory).path
        if newest is not None:
            again["state"] = pt.load(newest, like=again["state"])
        assert tree_equal(pt.fit(**again), whole)
        assert saved(directory) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state(number, tmp_path):
    def send(state, event):
        if event.kind == "step" and event.step == 6:
            os.kill(os.getpid(), number)

    with pytest.raises(pt.Interrupted) as caught:
        pt.fit(**run(), observers=[send, pt.checkpoints(tmp_path, every=1000)])
    assert saved(tmp_path) == [6]
    state = pt.load(tmp_path / "step_00000006.ckpt", like=run()["state"])
    assert tree_digest(state) == tree_digest(caught.value.state)
    assert pt.read_index(tmp_path / "step_00000006.ckpt").metadata["event"] == "interrupt"


def test_checkpoints_ahead_of_the_run_are_set_aside(tmp_path):
    pt.fit(**run(), observers=[pt.checkpoints(tmp_path, every=4, keep=None)])
    (tmp_path / "other.ckpt").write_bytes(b"not ours")
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = pt.load(tmp_path / "step_00000008.ckpt", like=run()["state"])
    with pytest.warns(UserWarning, match="2 checkpoints of steps after 8.*step 16"):
        pt.fit(**run(state=state, epochs=3), observers=[pt.checkpoints(tmp_path, every=4)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "LATEST",
        "other.ckpt",
        "step_00000004.ckpt",
        "step_00000008.ckpt",
        "step_00000012.ckpt",
        "step_00000012.ckpt.old",
        "step_00000016.ckpt.old",
    ]
    assert (tmp_path / "step_00000016.ckpt.old").read_bytes() == contents["step_00000016.ckpt"]
    assert (tmp_path / "other.ckpt").read_bytes() == b"not ours"
    (tmp_path / "other.ckpt").unlink()
    assert find_checkpoint(tmp_path).path == tmp_path / "step_00000012.ckpt"


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"keep": 0}, {"every_epochs": 1.5}, {"every_minutes": 0.0}]
)
def test_arguments_of_checkpoints_out_of_range(wrong, tmp_path):
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))} is"):
        pt.checkpoints(tmp_path, **wrong)


# ── Profiler ──────────────────────────────────────────────────────────────────────────────────────


def test_the_profiler_writes_a_trace_and_a_table(tmp_path, capsys):
    end = pt.fit(**run(), observers=[pt.profiler(tmp_path, wait=2, warmup=1, active=2, rows=5)])
    (trace,) = tmp_path.iterdir()
    assert trace.name == "steps_00000004-00000005.pt.trace.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::mm", "aten::mean"} & names
    out = capsys.readouterr().out
    assert "Self CPU" in out
    assert "aten::" in out
    assert tree_equal(end, pt.fit(**run()))


def test_the_profiler_says_when_the_run_was_too_short(tmp_path, capsys):
    pt.fit(**run(epochs=1), observers=[pt.profiler(tmp_path, wait=5, warmup=2)])
    assert "ended before step 8, the first to record" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match="active"):
        pt.profiler(tmp_path, active=0)
