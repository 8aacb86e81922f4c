"""Runs that are killed at random moments and resumed end like a run that nobody touched.

Run as a script, this file is the parent of the runs that are killed: importing torch takes two
seconds, so it is done once, and every life of a run is a fork of the script.
"""

import json
import os
import random
import signal
import sys
import time
import traceback

import forking
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt

STEPS = 300
KILLS = 20


def make_run(directory, heartbeat):
    """Everything that a checkpoint must not forget, in a run of a few milliseconds a step."""
    with pt.random.scope(pt.random.key(1)):
        model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        x, y = torch.randn(72, 6), torch.randint(3, (72,))
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, buffers = apply(params, buffers, x)
        return cross_entropy(logits, y), pt.Aux(buffers, {"noise": torch.rand(())})

    def evaluate(params, buffers, batch, key):
        return {"loss": cross_entropy(apply(params, buffers, batch[0], train=False)[0], batch[1])}

    optimizer = pt.optim.chain(
        pt.optim.clip_by_global_norm(1.0), pt.optim.adamw(pt.optim.cosine(1e-2, 150))
    )
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(2)),
        step=pt.train_step(loss, optimizer, accumulate=4),
        # 11 batches an epoch, the last one smaller: groups of accumulation end short as well
        batches=pt.batches((x, y), 7, shuffle=True, seed=3),
        steps=STEPS,
        reducers=[pt.ema(0.9), pt.early_stopping("val/loss", patience=10**6)],
        observers=[pt.checkpoints(directory, every=3, keep=2), heartbeat] if directory else [],
        validation=pt.Validation(pt.eval_step(evaluate), pt.batches((x, y), 72), every=7),
        directory=directory,
    )


# ── The script ────────────────────────────────────────────────────────────────────────────────────


def start(directory):
    """Fork a run. Returns the process, and a pipe that brings a line per step and the result."""
    receive, send = os.pipe()
    process = os.fork()
    if process:
        os.close(send)
        return process, os.fdopen(receive)
    status = 1
    try:
        os.close(receive)

        def heartbeat(state, event):
            if event.kind == "step":
                os.write(send, b"step\n")

        final = make_run(directory, heartbeat).fit(resume=directory is not None)
        os.write(send, f"{pt.tree.tree_digest(final)} {int(final.step)}\n".encode())
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:  # noqa: BLE001 - a fork of a script has nobody to raise it to
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(directory):
    """Run to the end without disturbance. Returns (digest, step)."""
    process, pipe = start(directory)
    with pipe:
        *_, result = pipe
    assert os.waitpid(process, 0)[1] == 0
    digest, step = result.split()
    return digest, int(step)


def disturb(directory, number, steps, delay):
    """Begin or go on, send a signal some time after some steps.

    Returns (exit status, steps that this life of the run took).
    """
    process, pipe = start(directory)
    with pipe:
        for _ in range(steps):
            assert pipe.readline() == "step\n", "the run ended before it could be disturbed"
        time.sleep(delay)
        os.kill(process, number)
        taken = steps + len(list(pipe))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), taken


def script(place):
    torch.set_num_threads(1)
    moments = random.Random(0)
    report = {"undisturbed": finish(None)}
    directory = f"{place}/killed"
    report["kills"] = [
        # zero steps: while it loads the checkpoint
        disturb(directory, signal.SIGKILL, moments.randint(0, 12), moments.uniform(0, 0.01))[0]
        for _ in range(KILLS)
    ]
    report["killed"] = finish(directory)
    for name in ("SIGTERM", "SIGINT"):
        directory = f"{place}/{name}"
        status, taken = disturb(directory, getattr(signal, name), steps=16, delay=0)
        report[name] = {
            "status": status,
            "taken": taken,
            "saved": int(pt.load(pt.latest(directory), only="step")["step"]),
            "final": finish(directory),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    script(sys.argv[1])


# ── The tests ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    done = forking.run(__file__, str(place), timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_twenty_times_and_resumed_it_ends_as_if_undisturbed(report):
    assert report["kills"] == [-signal.SIGKILL] * KILLS
    assert report["undisturbed"][1] == STEPS
    assert report["killed"] == report["undisturbed"]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_with_a_saved_state(report, name, status):
    assert report[name]["status"] == status
    assert 16 <= report[name]["taken"] == report[name]["saved"] < STEPS
    assert report[name]["final"] == report["undisturbed"]
