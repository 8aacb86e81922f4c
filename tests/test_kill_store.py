"""Runs that save in the background and share blocks, killed at random moments.

Twelve kills as a test. ``python tests/test_kill_store.py DIRECTORY [KILLS] [SEED]`` does the same
with 200: it prints what came of it, and ends with status 1 if anything was lost or a run ended
differently. After every kill the directory must open, and must have no older state than before.
"""

import json
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import forking
import test_resume_kill as runs

import puretrain as pt
from puretrain.checkpoint import store
from puretrain.tree import tree_digest

KILLS = 12
plain_run = runs.make_run


def make_run(directory, heartbeat):
    """The run of the other test, with every option that makes saving more complicated."""
    run = plain_run(None, heartbeat)
    frozen = torch.arange(40_000, dtype=torch.float32)  # is shared
    buffers = pt.FrozenDict({**run.state.buffers, "frozen": frozen})
    saving = pt.checkpoints(
        directory or "nowhere", every=2, keep=2, asynchronous=True, when_busy="skip", share=True
    )
    return run.replace(
        state=run.state.replace(buffers=buffers),
        step=with_frozen(run.step),
        observers=[saving, heartbeat] if directory else [],
        directory=directory,
        validation=None,
        reducers=[pt.ema(0.9)],
    )


def with_frozen(step):
    """The model does not know of the frozen buffer: it is taken out, and put back."""

    def wrapped(state, batch, /, *, donate=False):
        frozen = state.buffers["frozen"]
        own = pt.FrozenDict({k: v for k, v in state.buffers.items() if k != "frozen"})
        after = step(state.replace(buffers=own), batch, donate=donate)
        return after.replace(buffers=pt.FrozenDict({**after.buffers, "frozen": frozen}))

    wrapped.flush = step.flush
    return wrapped


def script(place, kills, seed):
    torch.set_num_threads(1)
    runs.make_run = make_run
    moments = random.Random(seed)
    undisturbed = runs.finish(None)
    report = {"kills": 0, "lost": 0, "different": 0, "unreadable": 0, "leftovers": 0}
    directory = f"{place}/run"
    while report["kills"] < kills:
        before = max((entry.step for entry in store.saved(directory)), default=0)
        if before > runs.STEPS - 60:  # go through the whole run again and again
            report["different"] += runs.finish(directory) != undisturbed
            report["leftovers"] += len(store.check(directory))
            shutil.rmtree(directory)
            continue
        status, _ = runs.disturb(
            directory, signal.SIGKILL, moments.randint(0, 20), moments.uniform(0, 0.01)
        )
        if status != -signal.SIGKILL:
            raise SystemExit(f"the run ended with the status {status} before it was killed")
        report["kills"] += 1
        newest = store.latest(directory)
        if newest is None:
            report["lost"] += before > 0
            continue
        report["unreadable"] += sum(p.cure == "set aside" for p in store.check(directory))
        report["lost"] += int(pt.load(newest, only="step")["step"]) < before
    report["different"] += runs.finish(directory) != undisturbed
    report["digest"] = tree_digest(pt.load(store.latest(directory), only="params/**"))
    print(json.dumps(report))
    return report


def test_killed_while_saving_in_the_background_nothing_is_lost(tmp_path):
    done = forking.run(__file__, str(tmp_path), str(KILLS), timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["kills"] == KILLS
    bad = {"lost", "different", "unreadable", "leftovers"}
    assert {name: report[name] for name in bad} == dict.fromkeys(bad, 0)


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[2:]]
    found = script(sys.argv[1], *(numbers + [200, 0][len(numbers) :]))
    raise SystemExit(any(found[name] for name in ("lost", "different", "unreadable", "leftovers")))
