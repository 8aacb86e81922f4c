"""What per-example gradients cost: all at once with vmap, against a loop over the examples.

    python benchmarks/per_example.py --threads 1
    python benchmarks/per_example.py --only mlp --rounds 31

The plain gradient of the batch and a private step are measured beside them.
"""

import argparse

import torch
from interleaved import compare, machine, show, write_json
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt


def mlp():
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return module, torch.randn(64, 64)


def convnet():
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )
    return module, torch.randn(64, 1, 8, 8)


def contenders(make):
    with pt.random.scope(pt.random.key(0)):
        module, x = make()
        y = torch.randint(0, 10, (len(x),))
    apply, params, buffers = pt.functional(module)

    def loss(params, buffers, batch, key):
        x, y = batch
        return cross_entropy(apply(params, buffers, x)[0], y)

    optimizer = pt.optim.sgd(0.0)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    plain = pt.train_step(loss, optimizer)
    private = pt.train_step(
        pt.per_example.private(loss, max_norm=1.0, noise_multiplier=1.0, batch_size=len(x)),
        optimizer,
    )
    weights = list(module.parameters())

    def loop():
        rows = [
            torch.autograd.grad(cross_entropy(module(x[i : i + 1]), y[i : i + 1]), weights)
            for i in range(len(x))
        ]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def times(function, *arguments):
        def run():
            for _ in range(3):
                function(*arguments)
            return 3

        return run

    return {
        "a loop over the examples, plain torch": times(loop),
        "per_example.gradients": times(pt.per_example.gradients, loss, state, (x, y)),
        "per_example.gradients, chunk_size=16": times(
            lambda: pt.per_example.gradients(loss, state, (x, y), chunk_size=16)
        ),
        "a private step": times(private, state, (x, y)),
        "a plain step": times(plain, state, (x, y)),
    }


ROWS = {"mlp": mlp, "convnet": convnet}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, action="append", help="this row; may be repeated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="torch's threads; by default what torch takes")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    results = {}
    for name in options.only or ROWS:
        title = f"gradients of 64 examples, {name}"
        results[title] = compare(contenders(ROWS[name]), options.rounds)
        show(title, results[title])
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
