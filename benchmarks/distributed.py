"""What a step over several processes costs, against torch's DistributedDataParallel, and moves.

    python benchmarks/distributed.py                  # two processes of one thread each
    python benchmarks/distributed.py --processes 4 --rounds 21 --json distributed.json

It starts itself with torchrun. The contenders take turns in all processes together; see
interleaved.py. The bytes are those that the kernel counts on the loopback device, per step and
process; the theory beside them is in docs/scaling.md. Run it while nothing else talks over
loopback.
"""

import argparse
import functools
import os
import pathlib
import subprocess
import sys

import torch
import torch.distributed as dist
from interleaved import compare, machine, show, write_json
from step import Task
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import puretrain as pt

TASKS = {
    "MLP 784-512-512-10": ([784, 512, 512, 10], 128),
    "wide MLP 784-2048-2048-10": ([784, 2048, 2048, 10], 128),
}


def raw(model, batches):
    """The loop that one would write around a module of torch's own engine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loop():
        for x, y in batches:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return len(batches)

    return loop


def fully_sharded(model, mesh):
    """The module under torch's FSDP: parameters, gradients and optimizer in shards, by layer."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["shard"])
    return fully_shard(model, mesh=mesh["shard"])


def zero(task, batches, mesh, stage):
    """A stage of ZeRO in puretrain."""
    made = functools.partial(pt.sharding.zero, mesh, stage=stage)
    return ours(task, batches, None, made)


def ours(task, batches, across, sharded=None):
    """The same in puretrain, with its metrics merged over the processes in every step."""
    apply, params, buffers = pt.functional(task.module())

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, _ = apply(params, buffers, x)
        return cross_entropy(logits, y)

    optimizer = pt.optim.adamw(1e-3)
    if sharded is not None:
        params, optimizer, across, *_ = sharded(params, optimizer)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = pt.train_step(loss, optimizer, across=across)
    held = [pt.tree.tree_map(torch.clone, state)]

    def loop():
        state = held[0]
        for batch in batches:
            state = step(state, batch, donate=True)
        held[0] = state
        return len(batches)

    return loop


def parts(task, number, each, rank, total):
    """What a process gets of every batch, in so many parts."""
    batches = pt.batches((task.x, task.y), task.batch_size)
    shares = batches.divided(total, rank * each, (rank + 1) * each)
    return list(shares)[:number]


def loopback():
    """Bytes received on the loopback device so far; None where the kernel does not say."""
    try:
        lines = pathlib.Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip()[:3] == "lo:")


def moved(loop):
    """Bytes that all processes have received together in a step of a loop."""
    dist.barrier()
    before = loopback()
    dist.barrier()
    steps = loop()
    dist.barrier()
    after = loopback()
    return None if before is None else (after - before) / steps


def measure(options):
    """Run all rows, in every process."""
    results = {}
    count = int(os.environ["WORLD_SIZE"])
    with pt.sharding.processes(device="cpu", shard=count) as mesh:
        rank, world_size = mesh.get_rank(), mesh.size()
        for name, (sizes, batch_size) in TASKS.items():
            task = Task(sizes, batch_size * world_size, count=options.steps)
            mine = [(x.chunk(world_size)[rank], y.chunk(world_size)[rank]) for x, y in task.batches]
            one = parts(task, options.steps, 1, rank, world_size)
            shards = 2 * world_size
            two = parts(task, options.steps, 2, rank, shards)
            sharding = pt.sharding
            contenders = {
                "DistributedDataParallel": raw(DistributedDataParallel(task.module()), mine),
                "across=ddp(mesh)": ours(task, one, sharding.ddp(mesh)),
                f"across=elastic(mesh, {world_size})": ours(
                    task, one, sharding.elastic(mesh, world_size)
                ),
                f"across=elastic(mesh, {shards})": ours(task, two, sharding.elastic(mesh, shards)),
                "fully_shard (FSDP) of torch": raw(fully_sharded(task.module(), mesh), mine),
            }
            for stage in (1, 2, 3):
                contenders[f"zero(mesh, stage={stage})"] = zero(task, one, mesh, stage)
            report = compare(contenders, rounds=options.rounds, before=dist.barrier)
            parameters = sum(parameter.numel() for parameter in task.module().parameters())
            theory = 2 * (world_size - 1) / world_size * parameters * 4
            for contender, loop in contenders.items():
                total = moved(loop)
                report[contender]["bytes"] = None if total is None else total / world_size
            if rank == 0:
                show(
                    f"{name}, {parameters} parameters, batch {batch_size} on each of {world_size}",
                    report,
                    "across=ddp <= 1.05x",
                )
                print(f"  bytes received by a process in a step; a ring all-reduce: {theory:,.0f}")
                for contender, row in report.items():
                    if row["bytes"] is not None:
                        print(f"  {contender:<44} {row['bytes']:>14,.0f}")
                sys.stdout.flush()
            results[name] = {"rows": report, "ring_bytes": theory, "parameters": parameters}
        if rank == 0 and options.json:
            write_json(options.json, {"world_size": world_size, "tasks": results})


def main():
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many processes")
    parser.add_argument("--steps", type=int, default=16, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=15, help="how often each takes its turn")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "RANK" in os.environ:
        measure(options)
        return
    print(machine())
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(options.processes), *sys.argv]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    raise SystemExit(subprocess.run(start, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
