"""Time and memory of a derivative through k steps: all kept, or most of it computed again.

    python benchmarks/scan.py --threads 1
    python benchmarks/scan.py --steps 16 64 --rounds 5

The derivative is that of the loss after k steps, by the learning rate. Memory is counted, not
guessed: the bytes of all tensors that are alive at once, see live_memory.py.
"""

import argparse

import torch
from interleaved import compare, machine, show, write_json
from live_memory import LiveMemory
from torch import nn
from torch.nn.functional import mse_loss

import puretrain as pt

WAYS = {"all kept": False, "remat=True": True}


def derivative(steps, remat):
    """A function that computes it, of an MLP 16-64-1 at batch 32, trained with momentum."""
    with pt.random.scope(pt.random.key(0)):
        module = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
        batches = [(torch.randn(32, 16), torch.randn(32, 1)) for _ in range(steps)]
    apply, params, buffers = pt.functional(module)

    def loss(params, buffers, batch, key):
        x, y = batch
        return mse_loss(apply(params, buffers, x)[0], y)

    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1, momentum=0.9)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = pt.train_step(loss, optimizer, draws=False)

    def outer(lr):
        start = state.replace(opt_state=pt.optim.set_hyperparams(state.opt_state, lr=lr))
        end = pt.scan(step, start, batches, remat=remat)
        return loss(end.params, buffers, batches[0], None)

    return lambda: torch.func.grad(outer)(torch.tensor(0.1, dtype=torch.float64))


def timed(function, steps):
    def run():
        function()
        return steps

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch's threads; by default what torch takes")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    results = {}
    for steps in options.steps:
        functions = {name: derivative(steps, remat) for name, remat in WAYS.items()}
        title = f"a derivative through {steps} steps, time of a step"
        times = {name: timed(function, steps) for name, function in functions.items()}
        results[title] = compare(times, options.rounds, warmup=1)
        show(title, results[title])
        for name, function in functions.items():
            with LiveMemory() as memory:
                function()
            results[title][name]["bytes"] = memory.peak
            print(f"  {name:<44} {memory.peak / 1e6:>10.2f} MB at once")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
