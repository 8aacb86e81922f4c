import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forking
import fsspec
import pytest
import torch

import puretrain as pt
from puretrain.cli import main

TOY = """
import torch
import puretrain as pt


def loss(params, buffers, batch, key):
    return ((batch - params["w"]) ** 2).mean()


def run(directory="runs/toy", seed=0, lr=0.1, batch_size=2, nesterov=False, observe=True):
    optimizer = pt.optim.sgd(lr, momentum=0.5, nesterov=nesterov)
    return pt.Run(
        state=pt.TrainState.create(
            {"w": torch.zeros(3), "b": torch.zeros(())}, None, optimizer, key=pt.random.key(seed)
        ),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches(torch.arange(24.0).reshape(8, 3), batch_size, shuffle=True, seed=seed),
        epochs=3,
        observers=[pt.checkpoints(directory, every=2, keep=3)] if observe else [],
        directory=directory,
    )


def failing(error="zero"):
    def loss(params, buffers, batch, key):
        return 1 / 0 if error == "zero" else "no loss"

    return run("runs/failing").replace(step=pt.train_step(loss, pt.optim.sgd(0.1, momentum=0.5)))


def demanding(size):
    return run()


here = run("runs/here", seed=5)
number = 3


def wrong():
    return number
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the file ``toy.py``, to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "toy.py").write_text(TOY)
    yield tmp_path
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


def expected_digest(epochs=3, lr=0.1, seed=0):
    """The toy run by an independent route: the same pieces, and torch-style nested loops."""
    namespace = {}
    exec(TOY, namespace)
    run = namespace["run"](lr=lr, seed=seed, observe=False)
    return pt.tree.tree_digest(pt.fit(run.state, run.step, run.batches, epochs=epochs))


# ── fit ───────────────────────────────────────────────────────────────────────────────────────────


def test_fit_prints_where_it_ended_and_how_to_go_on(place, call):
    status, out, _ = call("fit", "toy.py")
    assert status == 0
    assert "step 12, epoch 3:" in out
    assert "train/loss" in out
    assert expected_digest() in out
    assert "puretrain fit toy.py --resume --epochs N" in out
    newest = pt.latest("runs/toy")
    assert str(newest) in out
    assert pt.tree.tree_digest(pt.load(newest)) == expected_digest()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epochs", "2"], {"epochs": 2}),
        (["--seed", "4"], {"seed": 4}),
        (["--set", "lr=1"], {"lr": 1.0}),
        (["--set", "lr=2e-1", "--set", "nesterov=False"], {"lr": 0.2}),
    ],
)
def test_fit_options_change_the_run(place, call, options, expected):
    status, out, _ = call("fit", "toy.py", "--directory", "runs/other", "--json", *options)
    assert status == 0
    assert json.loads(out)["digest"] == expected_digest(**expected)
    assert Path(json.loads(out)["checkpoint"]).parent == Path("runs/other")


def test_fit_takes_a_variable_and_a_name(place, call):
    status, out, _ = call("fit", "toy.py:here", "--steps", "5", "--json")
    assert (status, json.loads(out)["step"]) == (0, 5)
    (place / "only.py").write_text("from toy import here as something\n")
    status, out, _ = call("fit", "only.py", "--resume", "--json")
    assert (status, json.loads(out)["digest"]) == (0, expected_digest(seed=5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "no file 'nowhere.py'"),
        (["toy.py:nothing"], "has no 'nothing'"),
        (["toy.py:number"], "has a int as 'number'"),
        (["toy.py:wrong"], "wrong() of toy.py must return a puretrain.Run, not a value"),
        (["toy.py:demanding"], "--set size=VALUE"),
        (["toy.py", "--set", "rate=1"], "can't take rate"),
        (["toy.py", "--set", "lr=fast"], "lr is of type float, not 'fast'"),
        (["toy.py", "--set", "lr"], "NAME=VALUE"),
        (["toy.py:here", "--directory", "elsewhere"], "can't take directory"),
        (["toy.py", "--resume", "runs/nothing.ckpt"], "runs/nothing.ckpt"),
        (["toy.py:failing", "--set", "error=type"], "the loss function returned"),
    ],
)
def test_fit_says_in_one_line_what_is_wrong(place, call, arguments, message):
    status, out, err = call("fit", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("puretrain: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" in call("fit", *arguments, "--debug")[2]


def test_an_exception_of_the_users_code_keeps_its_traceback(place, call):
    status, out, err = call("fit", "toy.py:failing")
    assert (status, out) == (2, "")
    assert "return 1 / 0 if error" in err
    assert err.endswith("ZeroDivisionError: division by zero\n")
    assert err.splitlines()[1].startswith('  File "toy.py"')  # and none of ours before it
    assert "puretrain/cli" in call("fit", "toy.py:failing", "--debug")[2]


def test_a_file_that_is_no_program_is_shown_where_it_is_not(place, call):
    (place / "bad.py").write_text("def run(:\n")
    status, out, err = call("fit", "bad.py")
    assert (status, out) == (2, "")
    assert err.startswith('  File "bad.py", line 1\n')
    assert err.endswith("SyntaxError: invalid syntax\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "invalid choice: 'fitt'"),
        (["fit", "toy.py", "--foo"], "unknown arguments: --foo (see puretrain fit --help)"),
        (["fit"], "required: FILE[:NAME] (see puretrain fit --help)"),
        (["fit", "toy.py", "--epochs", "x"], "--epochs: invalid int value: 'x'"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(place, call, arguments, message):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("puretrain: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_without_arguments_there_is_help(call):
    assert call() == call("--help")


def test_a_directory_that_can_t_be_made_is_named(place, call):
    (place / "file").touch()
    for observer in ("tensorboard('file/x')", "csv_log('file/x/log.csv')"):
        (place / "logs.py").write_text(
            "import puretrain as pt\nfrom toy import run as toy\n\n\ndef run():\n"
            f"    return toy('runs/x', observe=False)._replace(observers=[pt.{observer}])\n"
        )
        status, _, err = call("fit", "logs.py")
        assert status == 2
        assert "puretrain: error: the directory file/x can't be made: Not a directory" in err


def test_a_run_at_its_end_says_so(place, call):
    call("fit", "toy.py")
    status, _, err = call("fit", "toy.py", "--resume")
    assert status == 0
    assert "no step was left to take" in err
    assert "no step" not in call("fit", "toy.py", "--resume", "--epochs", "4")[2]


# ── fit --resume ──────────────────────────────────────────────────────────────────────────────────


def test_resume_goes_on_from_the_newest_good_checkpoint(place, call):
    call("fit", "toy.py", "--steps", "7")
    newest = pt.latest("runs/toy")
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="1 checkpoints of steps after 6"):
        status, out, err = call("fit", "toy.py", "--resume", "--json")
    assert (status, json.loads(out)["digest"]) == (0, expected_digest())
    assert f"skipped the damaged {newest}" in err
    assert "resuming from runs/toy/" in err


def test_resume_from_a_given_checkpoint_or_directory(place, call):
    call("fit", "toy.py", "--steps", "5")
    kept = shutil.copy(pt.latest("runs/toy"), place / "kept.ckpt")
    shutil.move("runs/toy", "moved")
    for source in (kept, "moved"):
        status, out, err = call("fit", "toy.py", "--json", "--resume", source)
        assert (status, json.loads(out)["digest"]) == (0, expected_digest())
        assert f"resuming from {source}" in err
        shutil.rmtree("runs/toy")


def test_resume_without_a_checkpoint_begins_anew_and_says_so(place, call):
    status, out, err = call("fit", "toy.py", "--resume", "--json")
    assert (status, json.loads(out)["digest"]) == (0, expected_digest())
    assert "no good checkpoint in runs/toy" in err


def test_a_new_run_does_not_mix_with_an_earlier_one(place, call):
    call("fit", "toy.py", "--steps", "3")
    status, _, err = call("fit", "toy.py")
    assert status == 2
    assert "--resume" in err
    assert "--directory" in err


@pytest.mark.parametrize(
    ("number", "status", "observe"),
    [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)],
)
def test_a_signal_ends_with_a_saved_state_and_one_line(place, number, status, observe):
    # The run sends the signal to itself, in the middle of its fourth step.
    (place / "stopped.py").write_text(f"""
import os, sys
import puretrain as pt
import toy

def run():
    made = toy.run(observe={observe})
    count = 0
    def step(state, batch, *, donate=False):
        nonlocal count
        count += 1
        if count == 4 and "--resume" not in sys.argv:
            os.kill(os.getpid(), {int(number)})
        return made.step(state, batch, donate=donate)
    return made.replace(step=step)
""")

    def command(*options):
        return forking.run("-m", "puretrain", "fit", "stopped.py", *options)

    done = command("--json")
    told = json.loads(done.stdout)
    assert done.returncode == status
    assert (told["interrupted"], told["step"]) == (signal.Signals(number).name, 4)
    assert Path(told["checkpoint"]) == pt.latest("runs/toy")
    shutil.rmtree("runs/toy")
    done = command()
    saved = pt.latest("runs/toy")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == 1
    again = pt.command_line("puretrain", "fit", "stopped.py", "--resume")
    assert f"after step 4; saved in {saved}; go on with: {again}" in done.stderr
    assert int(pt.load(saved, only="step")["step"]) == 4
    resumed = command("--resume", "--json")
    assert json.loads(resumed.stdout)["digest"] == expected_digest()
    assert json.loads(resumed.stdout)["interrupted"] is None


# ── inspect, diff, verify ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def saved(tmp_path):
    w = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    tree = {
        "params": {"w": w, "h": torch.ones(3).bfloat16()},
        "bad": torch.tensor([math.nan, 1.0]),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
        "step": torch.tensor(7),
        "name": "run\x1b[31m",
        "tied": w,
    }
    path = tmp_path / "a.ckpt"
    pt.save(path, tree, metadata={"note": "first"})
    return path, tree


def rows(out):
    """The lines of a table by their first word."""
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}


def test_inspect_lists_the_leaves(saved, call):
    status, out, _ = call("inspect", saved[0])
    assert status == 0
    assert rows(out)["params/w"] == ["float32", "2,2", "16", "B"]
    assert rows(out)["params/h"] == ["bfloat16", "3", "6", "B"]
    assert rows(out)["empty"] == ["float32", "0,4", "0", "B"]
    assert rows(out)["tied"] == ["float32", "2,2", "tied"]
    assert "note: first" in out
    assert "leaves, " in out.splitlines()[-1]


def test_inspect_counts_only_what_matches(saved, call):
    status, out, _ = call("inspect", saved[0], "--only", "params/*")
    assert status == 0
    assert "step" not in rows(out)
    assert out.splitlines()[-1] == "2 leaves, 7 elements, 22 B"
    status, _, err = call("inspect", saved[0], "--only", "parms/*")
    assert (status, err.count("\n")) == (2, 1)
    assert "parms/*" in err


def test_inspect_computes_statistics(saved, call):
    _, out, _ = call("inspect", saved[0], "--stats")
    assert rows(out)["params/w"][-4:] == ["-4", "3", "-0.25", "5"]
    assert rows(out)["bad"][-4:] == ["NaN"] * 4
    assert rows(out)["empty"] == ["float32", "0,4", "0", "B"]
    out = call("inspect", saved[0], "--stats", "--json")[1]
    leaves = {
        leaf["path"]: leaf
        for leaf in json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))[
            "leaves"
        ]
    }
    assert leaves["bad"]["max"] == "NaN"
    assert leaves["params/w"] == {
        "path": "params/w",
        "dtype": "float32",
        "shape": [2, 2],
        "elements": 4,
        "bytes": 16,
        "min": -4.0,
        "max": 3.0,
        "mean": -0.25,
        "norm": 5.0,
    }


def test_inspect_writes_metadata_for_people(tmp_path, call):
    path = tmp_path / "a.ckpt"
    metadata = {"metrics": {"loss": 0.19609360396, "n": 3}, "command": ["fit", "my run.py"]}
    pt.save(path, {"w": torch.ones(1)}, metadata=metadata)
    _, out, _ = call("inspect", path)
    assert "metrics: loss 0.1961, n 3\n" in out
    assert "command: fit 'my run.py'\n" in out
    assert json.loads(call("inspect", path, "--json")[1])["metadata"] == metadata


def test_names_and_metadata_of_strangers_cant_control_the_terminal(tmp_path, call):
    path = tmp_path / "odd.ckpt"
    pt.save(path, {"w\x1b[31m": torch.ones(1)}, metadata={"note": "\x1b]0;title\x07[bold]"})
    _, out, _ = call("inspect", path)
    assert "w\\x1b[31m" in out
    assert "[bold]" in out
    assert "\x1b" not in out


def test_diff(saved, tmp_path, call):
    path, tree = saved
    copy, other = tmp_path / "copy.ckpt", tmp_path / "other.ckpt"
    pt.save(copy, tree)
    changed = tree["params"]["w"].clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    pt.save(other, {"params": {"w": changed, "h": tree["params"]["h"]}, "step": torch.ones(2)})
    assert call("diff", path, copy) == (0, "identical\n", "")

    status, out, _ = call("diff", path, other)
    assert status == 1
    assert rows(out)["params/w"][-3:] == ["2.384e-07", "1", "1"]
    assert rows(out)["step"][0] == "shape"
    assert rows(out)["bad"][:3] == ["only", "in", "a"]

    assert call("diff", path, other, "--only", "params/h")[0] == 0
    status, out, _ = call("diff", path, other, "--only", "params/w", "--json")
    (difference,) = json.loads(out)["differences"]
    assert (status, difference["kind"], difference["max_abs"]) == (1, "value", 2.0**-22)

    pt.save(copy, {"loss": torch.tensor(0.1), "far": torch.tensor(-1.0)})
    pt.save(other, {"loss": torch.tensor(0.2), "far": torch.tensor(1.0)})
    found = rows(call("diff", copy, other)[1])
    assert found["loss"][:5] == ["value", "f32", "0.1", "->", "0.2"]
    assert found["far"][-2:] == ["2.131e+09", "1"]  # twice the 0x3f800000 numbers up to 1
    exact = json.loads(call("diff", copy, other, "--only", "far", "--json")[1])
    assert exact["differences"][0]["max_ulps"] == 2 * 0x3F800000

    status, out, err = call("diff", path, tmp_path / "nothing.ckpt")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.count("nothing.ckpt") == 1


def test_verify(saved, tmp_path, call):
    path, tree = saved
    (tmp_path / "deep").mkdir()
    broken = tmp_path / "deep" / "broken.ckpt"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)

    status, out, _ = call("verify", path)
    assert (status, out.split()[0]) == (0, "ok")
    status, out, _ = call("verify", tmp_path)
    assert status == 1
    assert sorted(line.split()[0] for line in out.splitlines()) == ["DAMAGED", "ok"]
    assert str(broken) in out
    fsspec.filesystem("memory").pipe("/verified/a.ckpt", path.read_bytes())
    for url in ("memory://verified", "memory://verified/a.ckpt"):
        status, out, _ = call("verify", url)
        assert (status, out.split()[0]) == (0, "ok")
    status, _, err = call("verify", "memory://nowhere")
    assert status == 2
    assert "there is no checkpoint (*.ckpt) in memory://nowhere" in err
    status, out, _ = call("verify", path, broken, "--json")
    assert (status, [result["ok"] for result in json.loads(out)]) == (1, [True, False])
    (tmp_path / "nothing").mkdir()
    assert call("verify", tmp_path / "nothing")[0] == 2
    status, out, err = call("verify", tmp_path / "absent.ckpt")  # not damaged: not there
    assert (status, out) == (2, "")
    assert err == f"puretrain: error: there is no file or directory {tmp_path / 'absent.ckpt'}\n"


# ── The whole ─────────────────────────────────────────────────────────────────────────────────────


def test_help_and_version(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call("--version")[:2] == (0, f"puretrain {pt.__version__}\n")
    status, out, _ = call("--help")
    commands = re.findall(r"^    ([a-z-]+) ", out, flags=re.MULTILINE)
    assert {"fit", "lr-find", "inspect", "diff", "verify", "convert", "explain"} <= {*commands}
    assert max(map(len, out.splitlines())) <= 80
    for command in commands:
        status, out, _ = call(command, "--help")
        assert status == 0
        examples = out.split("\nexample")[1]
        assert f"\n  puretrain {command} " in examples
        assert max(map(len, out.splitlines())) <= 80
        assert re.search(r"^  --debug +show the traceback", out, flags=re.MULTILINE)
    assert call("frobnicate")[0] == 2


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    path = tmp_path / "many.ckpt"
    pt.save(path, {f"leaf{i}": torch.zeros(1) for i in range(5000)})
    process = subprocess.Popen(
        [sys.executable, "-m", "puretrain", "inspect", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(pt.__file__).parents[1])},
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
