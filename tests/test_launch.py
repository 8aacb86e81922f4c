"""``puretrain fit`` on several processes: starting, ending, failing, starting again."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import forking
import pytest
from forking import ENVIRONMENT, descendants
from processes import shared

import puretrain as pt
from puretrain.cli import main

PROGRAM = """
import os, signal, time
import torch
from torch import nn
from torch.nn.functional import cross_entropy
import puretrain as pt

calls = 0


def run(directory="runs/a", fail="", pause=0.0, steps=20):
    with pt.random.scope(pt.random.key(1)):
        model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 3))
        x, y = torch.randn(56, 6), torch.randint(3, (56,))
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        global calls
        calls += 1
        time.sleep(pause)
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if fail and os.environ.get("RANK") == "1" and first_start and calls == 20:
            if fail == "raise":
                raise ValueError("the sample is bad")
            if fail == "exit":
                raise SystemExit(7)
            if fail == "hang":
                while True:
                    time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        logits, buffers = apply(params, buffers, batch[0])
        return cross_entropy(logits, batch[1]), pt.Aux(buffers)

    print("made by rank", os.environ.get("RANK"))
    optimizer = pt.optim.adamw(1e-2)
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(2)),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches((x, y), 24, shuffle=True),
        steps=steps,
        observers=[pt.progress(), pt.checkpoints(directory, every=4)],
        directory=directory,
    )


def divided(mesh, directory="runs/divided"):
    made = run(directory)
    assert made.together is None
    return pt.sharding.distribute(made, mesh, logical_shards=4)
"""
FIT = ["-m", "puretrain", "fit"]
ELASTIC = ["--logical-shards", "4", "--json"]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@pytest.fixture
def fit(place):
    """Run the command in the directory of the program; all that it started is gone then."""

    def fit(*arguments, count=None):
        nproc = [] if count is None else ["--nproc", count]
        return forking.run(*FIT, "program.py", *nproc, *arguments, cwd=place)

    return fit


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """That of the last state of the undisturbed run on one process."""

    def run():
        place = tmp_path_factory.mktemp("undisturbed")
        (place / "program.py").write_text(PROGRAM)
        return result(forking.run(*FIT, "program.py", *ELASTIC, cwd=place))["digest"]

    return shared(tmp_path_factory, "undisturbed", run)


def result(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_end_with_the_same_bits(fit, digest):
    two = fit(*ELASTIC, "--directory", "runs/b", count=2)
    assert result(two)["digest"] == digest
    assert two.stderr.count("made by rank") == 1  # stdout has the result alone; one process prints
    assert "--nproc 2 --logical-shards 4 --resume" in result(two)["resume"]


def test_the_same_bits_when_torchrun_has_started_them(place, digest):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = forking.run(*torchrun, *FIT, "program.py:divided", "--json", cwd=place)
    assert result(started)["digest"] == digest


def test_the_same_bits_after_a_killed_process(fit, digest):
    options = ["--directory", "runs/c", "--set", "fail=kill", "--resume", "--max-restarts", "1"]
    killed = fit(*ELASTIC, *options, count=2)
    assert result(killed)["digest"] == digest
    assert re.search(r"the process of rank 1 \(pid \d+\) was killed by SIGKILL", killed.stderr)
    assert "resuming from runs/c/step_00000008.ckpt" in killed.stderr


def test_an_exception_of_one_process_is_shown_once(fit):
    done = fit("--set", "fail=raise", "--set", "steps=40", count=2)
    assert done.returncode == 2
    assert done.stderr.count("Traceback") == 1
    assert "puretrain: error: the process of rank 1:\nTraceback" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: the sample is bad")


def test_a_program_that_exits_in_one_process_is_named(fit):
    done = fit("--set", "fail=exit", "--set", "steps=40", count=2)
    assert done.returncode == 2
    assert "puretrain: error: the process of rank 1 ended with status 7" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_hangs_ends_the_run_and_says_where(fit):
    done = fit("--set", "fail=hang", "--set", "steps=40", "--timeout", "3", count=2)
    assert done.returncode == 2
    assert "the process of rank 1" in done.stderr
    assert re.search(r'File "program.py", line 29 in loss', done.stderr)
    assert "puretrain: error: the process of rank 0:" in done.stderr
    assert "Timed out" in done.stderr


@pytest.mark.parametrize(
    ("number", "to_launcher", "status", "name"),
    [
        (signal.SIGINT, True, 130, "SIGINT"),  # as Ctrl-C in a terminal does
        (signal.SIGTERM, False, 143, "SIGTERM"),  # to one of the processes only
        pytest.param(
            *(signal.SIGKILL, True, -signal.SIGKILL, "SIGTERM"),
            marks=pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a signal"),
        ),
    ],
    ids=["Ctrl-C", "SIGTERM-to-one", "killed-launcher"],
)
def test_a_signal_ends_all_and_another_number_goes_on(
    place, fit, digest, number, to_launcher, status, name
):
    options = [*ELASTIC, "--set", "pause=0.05", "--directory", "runs/c"]
    process = subprocess.Popen(
        [sys.executable, *FIT, "program.py", *options, "--nproc", "2"],
        cwd=place,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(place.glob("runs/c/step_*.ckpt")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid if to_launcher else descendants(process.pid)[1], number)
    out, err = process.communicate(timeout=60)  # until all have closed their outputs
    assert process.returncode == status, err
    assert json.loads(out)["interrupted"] == name
    assert "Traceback" not in err
    assert "error" not in err
    saved = pt.latest(place / "runs/c")
    assert int(pt.load(saved, only="step")["step"]) == json.loads(out)["step"] < 20
    assert result(fit(*options, "--resume"))["digest"] == digest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-restarts", "1"], "--max-restarts needs --resume"),
        (["--max-restarts", "1", "--resume", "a.ckpt"], "--resume (without a file)"),
        (["--nproc", "0"], "nproc=0: give a number of processes from 1"),
        (["--nproc", "1", "--timeout", "0", "--logical-shards", "1"], "a number of seconds above"),
        (["--nnodes", "2"], "give --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "2:1"], "MIN:MAX"),
        (["--nnodes", "2", "--rdzv-endpoint", "nowhere.invalid:1"], "no HOST:PORT"),
        (["--nnodes", "2", "--rdzv-endpoint", "localhost:70000"], "could not meet at localhost:70"),
        (["--nproc", "1", "--logical-shards", "0"], "logical_shards=0"),
    ],
)
def test_what_cant_be_is_said(place, monkeypatch, capsys, options, said):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["fit", "program.py", *options]) == 2
    assert said in capsys.readouterr().err
    sys.modules.pop("program", None)


def test_several_processes_are_named_where_the_program_wants_to_know_them(place, capsys):
    assert main(["fit", f"{place / 'program.py'}:divided"]) == 2
    assert "needs a value for mesh: start it with --nproc N" in capsys.readouterr().err
    sys.modules.pop("program", None)
