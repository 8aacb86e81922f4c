"""What sixteen tiny models cost in one step, against sixteen plain torch loops.

    python benchmarks/ensemble.py                       # all rows, about three minutes
    python benchmarks/ensemble.py --only 16 --rounds 15
    python benchmarks/ensemble.py --threads 1 --json ensemble.json

Each row runs in rounds that alternate between the contenders; see interleaved.py. A step is that of
all members; for the loops, the sum of one step of each.
"""

import argparse

import torch
from interleaved import compare, machine, show, write_json
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt

SIZES, BATCH, STEPS = (32, 64, 10), 32, 60


class Task:
    """A small perceptron for each member, the data, and ways to train them."""

    def __init__(self, members, dropout=False):
        self.members, self.dropout = members, dropout
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(BATCH * STEPS, SIZES[0], generator=generator)
        y = torch.randint(SIZES[-1], (BATCH * STEPS,), generator=generator)
        self.batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        self.keys = pt.random.split(pt.random.key(0), members)
        self.apply, _, _ = pt.functional(self.module())

    def module(self):
        layers = [nn.Linear(SIZES[0], SIZES[1]), nn.ReLU(), nn.Linear(SIZES[1], SIZES[2])]
        if self.dropout:
            layers.insert(2, nn.Dropout(0.2))
        return nn.Sequential(*layers)

    def loss(self, params, buffers, batch, key):
        x, y = batch
        return cross_entropy(self.apply(params, buffers, x)[0], y)

    def init(self, optimizer):
        def init(key):
            _, params, buffers = pt.functional(self.module())
            return pt.TrainState.create(params, buffers, optimizer, key=key)

        return init

    def loops(self):
        """What one would write by hand for one model after the other; the base of every ratio."""
        models = [self.module() for _ in range(self.members)]
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in models]

        def loop():
            for model, optimizer in zip(models, optimizers, strict=True):
                for x, y in self.batches:
                    loss = cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            return len(self.batches)

        return loop

    def torch_func(self):
        """What one would write by hand for all together, as torch's tutorial on ensembles does."""
        models = [self.module() for _ in range(self.members)]
        base = self.module().to("meta")
        params, buffers = torch.func.stack_module_state(models)
        optimizer = torch.optim.AdamW(params.values(), lr=1e-3, fused=True)

        def loss(params, buffers, x, y):
            return cross_entropy(torch.func.functional_call(base, (params, buffers), (x,)), y)

        randomness = "different" if self.dropout else "error"
        together = torch.func.vmap(loss, (0, 0, None, None), randomness=randomness)

        def loop():
            for x, y in self.batches:
                losses = together(params, buffers, x, y)
                optimizer.zero_grad()
                losses.sum().backward()
                optimizer.step()
            return len(self.batches)

        return loop

    def vmapped(self):
        """The transform over a whole step of a single run."""
        optimizer = pt.optim.adamw(1e-3)
        step = pt.train_step(self.loss, optimizer, draws=self.dropout)
        together = torch.func.vmap(step, (0, None), randomness="different")
        members = []
        for key in self.keys:
            with pt.random.scope(key):
                members.append(self.init(optimizer)(key))
        return self.folding(
            lambda state, batch, donate: together(state, batch), pt.tree.tree_stack(members)
        )

    def ensemble(self, sweep=0, **options):
        """Our step; with so many different learning rates."""
        optimizer = pt.optim.adamw(1e-3)
        rates = {}
        if sweep:
            optimizer = pt.optim.inject_hyperparams(pt.optim.adamw)(lr=1e-3)
            rates["lr"] = torch.linspace(1e-3, 2e-3, sweep).repeat_interleave(self.members // sweep)
        state = pt.ensemble(self.init(optimizer), self.keys, **rates)
        return self.folding(pt.ensemble_step(self.loss, optimizer, **options), state)

    def folding(self, step, state):
        held = [state]

        def loop():
            state = held[0]
            for batch in self.batches:
                state = step(state, batch, donate=True)
            held[0] = state
            return len(self.batches)

        return loop

    def fitting(self):
        """The same through the loop, with progress and means of the epoch."""
        optimizer = pt.optim.adamw(1e-3)
        step = pt.ensemble_step(self.loss, optimizer)
        held = [pt.ensemble(self.init(optimizer), self.keys)]

        def loop():
            steps = int(held[0].step) + len(self.batches)
            held[0] = pt.fit(held[0], step, self.batches, steps=steps, donate=True)
            return len(self.batches)

        return loop


def members_row(members):
    def row():
        task = Task(members)
        return {
            f"{members} torch loops": task.loops(),
            "torch.func by hand": task.torch_func(),
            "vmap(train_step)": task.vmapped(),
            "ensemble_step": task.ensemble(),
            "ensemble_step, 4 learning rates": task.ensemble(sweep=4),
            f"ensemble_step, {members} learning rates": task.ensemble(sweep=members),
            "ensemble_step through fit": task.fitting(),
            "ensemble_step, compiled": task.ensemble(draws=False, compile=True),
        }

    return row


def dropout_row():
    task = Task(16, dropout=True)
    return {
        "16 torch loops, dropout": task.loops(),
        "torch.func by hand": task.torch_func(),
        "ensemble_step": task.ensemble(),
    }


ROWS = {"16": members_row(16), "64": members_row(64), "dropout": dropout_row}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, action="append", help="this row; may be repeated")
    parser.add_argument("--way", action="append", help="ways named so; the loops always run")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="torch's threads; by default what torch takes")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    results = {}
    for name in options.only or ROWS:
        title = f"MLP {'-'.join(map(str, SIZES))}, batch {BATCH}, {name}"
        ways = ROWS[name]()
        if options.way:
            ways = {way: ways[way] for way in ways if way in [next(iter(ways)), *options.way]}
        results[title] = compare(ways, options.rounds)
        show(title, results[title], "16 members <= 0.33x" if name == "16" else None)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
