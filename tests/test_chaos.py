"""A run of several processes whose processes are killed at random, until it has ended all the same.

Three kills as a test. ``python tests/test_chaos.py DIRECTORY [KILLS] [SEED]`` does it with 50: it
prints what came of it, and ends with status 1 if a bit was wrong, a state was lost or a run hung.
The number of processes changes from start to start, and the launcher starts them again after a kill
as often as it may.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import puretrain as pt
from puretrain.checkpoint import store

ROOT = Path(__file__).parents[1]
KILLS = 3
SHARDS = 4
RESTARTS = 4
PATIENCE = 120  # seconds without a new checkpoint, a kill or an end: it hangs


def make_run(directory="nowhere", steps=400, pause=0.02):
    """Dropout, running statistics, a moving average and epochs that end in a smaller batch."""
    with pt.random.scope(pt.random.key(1)):
        model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        x, y = torch.randn(64, 6), torch.randint(3, (64,))
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        time.sleep(pause / SHARDS)
        logits, buffers = apply(params, buffers, batch[0])
        return cross_entropy(logits, batch[1]), pt.Aux(buffers, {"noise": torch.rand(())})

    optimizer = pt.optim.adamw(pt.optim.cosine(1e-2, 400))
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(2)),
        step=pt.train_step(loss, optimizer, accumulate=3),
        batches=pt.batches((x, y), 24, shuffle=True, seed=3),
        steps=steps,
        reducers=[pt.ema(0.9)],
        observers=[pt.checkpoints(directory, every=5, keep=2)],
        directory=directory,
    )


# ── The script ────────────────────────────────────────────────────────────────────────────────────


def start(directory, steps, *options):
    command = [sys.executable, "-m", "puretrain", "fit", f"{__file__}:make_run", "--json"]
    command += ["--directory", directory, "--steps", str(steps), "--timeout", "60"]
    return subprocess.Popen(
        [*command, "--logical-shards", str(SHARDS), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def workers(pid):
    """The processes that a launcher has started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def last_step(directory):
    return max((entry.step for entry in store.saved(directory)), default=0)


def ended(process):
    """The digest of a run that has come to its end, or None."""
    out, err = process.communicate(timeout=PATIENCE)
    return (json.loads(out)["digest"] if process.returncode == 0 else None), err


class Hanging(Exception):
    pass


def wait_for(condition, process):
    """Wait until something is so; False if the launcher has ended before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            raise Hanging
        time.sleep(0.01)
    return True


def kill_one(process, directory, moments, killed):
    """Kill one of the processes, at some time after they were started; whether that came about."""
    before = last_step(directory)
    if not wait_for(lambda: set(workers(process.pid)) - killed, process):
        return False
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0, 3))  # while it starts
    else:
        steps = 5 * moments.randint(1, 8)
        if not wait_for(lambda: last_step(directory) >= before + steps, process):
            return False
        time.sleep(moments.uniform(0, 0.1))
    alive = sorted(set(workers(process.pid)) - killed)
    if not alive:
        return False
    victim = moments.choice(alive)
    killed.update(alive)  # the others are ended by the launcher
    os.kill(victim, signal.SIGKILL)
    return True


def script(place, kills, seed, steps=400):
    moments = random.Random(seed)
    expected, err = ended(start(f"{place}/undisturbed", steps))
    assert expected is not None, err
    report = {"kills": 0, "starts": 0, "ends": 0, "hangs": 0, "wrong": 0, "lost": 0, "errors": 0}
    directory = f"{place}/run"
    while True:
        done = report["kills"] >= kills
        count = moments.choice([2, 4])
        options = ["--nproc", str(count), "--resume", "--max-restarts", str(RESTARTS)]
        process = start(directory, steps, *options)
        report["starts"] += 1
        in_this_start, killed = 0, set()
        try:
            while report["kills"] < kills:
                before = last_step(directory)
                if not kill_one(process, directory, moments, killed):
                    break
                report["kills"] += 1
                in_this_start += 1
                report["lost"] += last_step(directory) < before
            digest, err = ended(process)
        except (Hanging, subprocess.TimeoutExpired):
            report["hangs"] += 1
            for pid in [process.pid, *workers(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.communicate()
            continue
        if digest is not None:
            report["ends"] += 1
            report["wrong"] += digest != expected
            shutil.rmtree(directory)
            if done or report["kills"] >= kills:
                break
        elif in_this_start <= RESTARTS:  # it has ended although it had restarts left
            report["errors"] += 1
            print(err, file=sys.stderr)
    print(json.dumps(report))
    return report


BAD = ("hangs", "wrong", "lost", "errors")


def test_killed_processes_leave_no_trace(tmp_path):
    report = script(str(tmp_path), KILLS, 1, steps=150)
    assert report["kills"] == KILLS
    assert {name: report[name] for name in BAD} == dict.fromkeys(BAD, 0)
    assert report["ends"] >= 1


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[2:]]
    found = script(sys.argv[1], *(numbers + [50, 0][len(numbers) :]))
    raise SystemExit(any(found[name] for name in BAD))
