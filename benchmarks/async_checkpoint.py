"""How long the loop stands still for a checkpoint: saved at once, and saved in the background.

Prints the medians over several checkpoints of the time that the observer takes of the loop, and
their ratio. The background save also makes the next step compute out of place, and shares
the processor; the time of that step is compared with the others.

    python benchmarks/async_checkpoint.py [--megabytes 400] [--saves 6] [--json FILE]
"""

import argparse
import statistics
import tempfile
import time

import torch
from interleaved import write_json

import puretrain as pt


def stalls(megabytes, saves, *, asynchronous, directory):
    """Seconds that each save takes of the loop, and the times of the steps after and of others."""
    rows = megabytes * 250_000 // 3 // 4096  # the parameters and Adam's two averages
    optimizer = pt.optim.adamw(1e-3)
    state = pt.TrainState.create(
        {"w": torch.randn(rows, 4096)}, None, optimizer, key=pt.random.key(0)
    )
    step = pt.train_step(lambda p, b, x, key: (p["w"] * x).square().mean(), optimizer)
    every = 4
    saving = pt.checkpoints(directory, every=every, keep=1, asynchronous=asynchronous)
    taken, after, others, last = [], [], [], [None]

    class Timed:
        def __call__(self, state, event):
            now = time.perf_counter()
            if event.kind == "step" and last[0] is not None:
                (after if event.step % every == 1 else others).append(now - last[0])
            if event.kind == "step" and event.step % every == 0:
                saving._writer.wait()  # the disk is not behind: only the loop's own part is timed
                now = time.perf_counter()
            saving(state, event)
            done = time.perf_counter()
            if event.kind == "step" and event.step % every == 0:
                taken.append(done - now)
            last[0] = done

        def close(self):
            saving.close()

    data = [torch.ones(4096)] * (every * saves + 1)
    pt.fit(state, step, data, steps=every * saves + 1, observers=[Timed()], donate=True)
    return taken[1:], after[1:], others[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="size of the state")
    parser.add_argument("--saves", type=int, default=6, help="checkpoints of each kind")
    parser.add_argument("--directory", help="where to write; by default a temporary one")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    found, report = {}, {}
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            taken, after, others = stalls(
                options.megabytes, options.saves, asynchronous=asynchronous, directory=directory
            )
        found[asynchronous] = statistics.median(taken)
        name = "in the background" if asynchronous else "at once"
        report[name] = {"rounds": taken}
        print(
            f"{name:18} "
            f"the loop stands still for {1e3 * found[asynchronous]:9.3f} ms; the step after takes "
            f"{1e3 * statistics.median(after):.1f} ms, others {1e3 * statistics.median(others):.1f}"
        )
    ratio = found[True] / found[False]
    print(f"async checkpoint stall / synchronous save: {100 * ratio:.3f} % (at most 5 %)")
    if options.json:
        write_json(options.json, {"the loop stands still": report})
    return 0 if ratio <= 0.05 else 1


if __name__ == "__main__":
    raise SystemExit(main())
