"""What a process holds of a training run, in bytes per parameter: ddp and the stages of ZeRO.

    python benchmarks/zero_memory.py                  # two processes
    python benchmarks/zero_memory.py --processes 4 --json zero_memory.json

It starts itself with torchrun. Nothing is timed: every tensor that is made and freed is counted,
see live_memory.py, so the numbers are the same in each run. The model has twelve layers of 65,536
parameters, and a batch of one, so that activations are nothing beside them; a bucket is as large as
a layer. Theory: Adam in float32 has 4 bytes of a parameter, 4 of its gradient and 8 of its moments.
"""

import argparse
import os
import subprocess
import sys
import time

import torch
from interleaved import write_json
from live_memory import LiveMemory
from torch import nn

import puretrain as pt

LAYERS, WIDTH = 12, 256


class Settled(LiveMemory):
    """Waits before it counts, since gloo's threads let go of a tensor a moment after a call."""

    def count(self, storage):
        if storage._cdata not in self.known and storage.nbytes() >= WIDTH * WIDTH:
            time.sleep(0.003)
        super().count(storage)


def module():
    """Without memory of its own: the parameters are those of the state."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def measure(mesh, stage):
    """Bytes per parameter of one process: the state between steps, and all in the worst moment."""
    apply, params, buffers = pt.functional(module())
    params = pt.tree.tree_map(lambda leaf: torch.full(leaf.shape, 1e-3), params)
    total = sum(leaf.numel() for leaf in params.values())
    megabytes = 4 * WIDTH * WIDTH / 2**20

    def loss(params, buffers, batch, key):
        return apply(params, buffers, batch)[0].square().mean()

    optimizer, across = pt.optim.adamw(1e-3), pt.sharding.ddp(mesh, bucket_megabytes=megabytes)
    if stage:
        run = pt.sharding.zero(mesh, params, optimizer, stage=stage, bucket_megabytes=megabytes)
        params, optimizer, across = run.params, run.optimizer, run.across
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = pt.train_step(loss, optimizer, across=across)
    source = pt.batches(torch.ones(mesh.size(), WIDTH), mesh.size())
    batch = next(iter(pt.sharding.divide(source, mesh)))
    state = step(state, batch, donate=True)  # from here on it owns its memory
    tensors = pt.tree.tree_leaves((state.params, state.opt_state))
    held = sum(leaf.numel() * leaf.element_size() for leaf in tensors)
    with Settled() as memory:
        for leaf in tensors:
            memory.count(leaf.untyped_storage())
        del tensors, leaf
        state = step(state, batch, donate=True)
    return held / total, memory.peak / total


def theory(stage, count):
    """The same on paper: what is held, and at most in a step, without what is under way."""
    if stage == 0:
        return 12.0, 16.0
    if stage == 1:
        return 4 + 8 / count, 8 + 8 / count
    if stage == 2:
        return 12 / count, 4 + 16 / count
    return 12 / count, 16 / count


def report(options):
    """Measure all stages; in every process."""
    rows = []
    with pt.sharding.processes(shard=int(os.environ["WORLD_SIZE"]), device="cpu") as mesh:
        for stage in range(4):
            held, peak = measure(mesh, stage)
            on_paper = theory(stage, mesh.size())
            rows.append({"stage": stage, "held": held, "peak": peak, "theory": on_paper})
        if mesh.get_rank():
            return
        print(
            f"bytes per parameter in each of {mesh.size()} processes; a layer is {4 / LAYERS:.2f}"
        )
        print(f"{'':<8}{'between steps':>16}{'theory':>10}{'most in a step':>18}{'theory':>10}")
        for row in rows:
            name = f"stage {row['stage']}" if row["stage"] else "ddp"
            held, peak = row["theory"]
            print(f"{name:<8}{row['held']:>16.2f}{held:>10.2f}{row['peak']:>18.2f}{peak:>10.2f}")
        sys.stdout.flush()
        if options.json:
            write_json(options.json, {"world_size": mesh.size(), "rows": rows})


def main():
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many processes")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    if "RANK" in os.environ:
        report(options)
        return
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(options.processes), *sys.argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    raise SystemExit(subprocess.run(start, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
