"""What a step costs, against the plain torch loop that does the same.

    python benchmarks/step.py                       # all rows, about three minutes
    python benchmarks/step.py --only fit --rounds 31
    python benchmarks/step.py --threads 1 --json step.json

Each row runs in rounds that alternate between the contenders; see interleaved.py.
"""

import argparse
import io
import tempfile

import torch
from interleaved import compare, machine, show, write_json
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt

MEMBERS = 16  # of the vmapped ensemble


class Task:
    """A multilayer perceptron, its data, and both ways to train it."""

    def __init__(self, sizes, batch_size, count=32):
        self.sizes = sizes
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch_size * count, sizes[0], generator=generator)
        self.y = torch.randint(sizes[-1], (batch_size * count,), generator=generator)
        self.batch_size = batch_size
        self.batches = list(zip(self.x.split(batch_size), self.y.split(batch_size), strict=True))

    def module(self):
        with pt.random.scope(pt.random.key(0)):
            layers = []
            for left, right in zip(self.sizes, self.sizes[1:], strict=False):
                layers += [nn.Linear(left, right), nn.ReLU()]
            return nn.Sequential(*layers[:-1])

    def raw(self):
        """The loop that one would write by hand; the base of every ratio."""
        model = self.module()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def loop():
            for x, y in self.batches:
                loss = cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return len(self.batches)

        return loop

    def pure(self, draws=True):
        """(step, first state): the same in puretrain."""
        apply, params, buffers = pt.functional(self.module())

        def loss(params, buffers, batch, key):
            x, y = batch
            logits, _ = apply(params, buffers, x)
            return cross_entropy(logits, y)

        optimizer = pt.optim.adamw(1e-3)
        state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
        # Donation overwrites a state's memory; the module keeps its own.
        return pt.train_step(loss, optimizer, draws=draws), pt.tree.tree_map(torch.clone, state)

    def stepping(self, donate, draws=True):
        step, state = self.pure(draws)
        held = [state]

        def loop():
            state = held[0]
            for batch in self.batches:
                state = step(state, batch, donate=donate)
            held[0] = state
            return len(self.batches)

        return loop

    def fitting(self, **callbacks):
        step, state = self.pure()
        held = [state]
        data = pt.batches((self.x, self.y), self.batch_size)

        def loop():
            state = held[0]
            steps = int(state.step) + len(self.batches)
            held[0] = pt.fit(state, step, data, steps=steps, donate=True, **callbacks)
            return len(self.batches)

        return loop

    def compiled(self):
        step, state = self.pure(draws=False)
        compiled = torch.compile(step, fullgraph=True)
        held = [state]

        def loop():
            state = held[0]
            for batch in self.batches:
                state = compiled(state, batch)
            held[0] = state
            return len(self.batches)

        return loop

    def ensemble(self):
        step, state = self.pure(draws=False)
        members = [state.replace(key=key) for key in pt.random.split(state.key, MEMBERS)]
        together = torch.func.vmap(step, (0, None), randomness="different")
        held = [pt.tree.tree_stack(members)]

        def loop():
            state = held[0]
            for batch in self.batches:
                state = together(state, batch)
            held[0] = state
            return len(self.batches)

        return loop

    def raw_many(self):
        loops = [self.raw() for _ in range(MEMBERS)]

        def loop():
            for each in loops:
                steps = each()
            return steps

        return loop


def large():
    return Task((784, 512, 512, 10), 128)


def tiny():
    return Task((32, 64, 10), 32, count=200)


def step_row(rounds):
    task = large()
    contenders = {
        "torch, AdamW(fused=True)": task.raw(),
        "puretrain, donated": task.stepping(donate=True),
        "puretrain, out of place": task.stepping(donate=False),
    }
    return "MLP 784-512-512-10, batch 128", contenders, rounds, "donated <= 1.03x"


def fit_row(rounds):
    task = large()
    directory = tempfile.mkdtemp()
    observers = [pt.progress(file=io.StringIO()), pt.tensorboard(directory, every=50)]
    contenders = {
        "torch, AdamW(fused=True), nothing else": task.raw(),
        "puretrain.fit": task.fitting(),
        "puretrain.fit, progress, TensorBoard, ema": task.fitting(
            observers=observers, reducers=[pt.ema(0.999, every=10)]
        ),
    }
    return "the same through fit", contenders, rounds, "all on <= 1.10x"


def tiny_row(rounds):
    task = tiny()
    contenders = {
        "torch, AdamW(fused=True)": task.raw(),
        "puretrain, donated": task.stepping(donate=True),
        "puretrain, donated, draws=False": task.stepping(donate=True, draws=False),
        "puretrain, out of place": task.stepping(donate=False),
        "puretrain.fit": task.fitting(),
    }
    return "MLP 32-64-10, batch 32", contenders, rounds, "donated <= 1.3x"


def compiled_row(rounds):
    large_task, tiny_task = large(), tiny()
    return [
        (
            f"the compiled step, {name}",
            {"torch, AdamW(fused=True)": task.raw(), "puretrain, torch.compile": task.compiled()},
            rounds,
            None,
        )
        for name, task in (("MLP 784-512-512-10", large_task), ("MLP 32-64-10", tiny_task))
    ]


def ensemble_row(rounds):
    task = tiny()
    contenders = {
        f"{MEMBERS} torch loops": task.raw_many(),
        f"{MEMBERS} members in one vmapped step": task.ensemble(),
    }
    return f"{MEMBERS} tiny models", contenders, max(rounds // 3, 3), "vmapped <= 0.33x"


ROWS = {
    "step": step_row,
    "fit": fit_row,
    "tiny": tiny_row,
    "ensemble": ensemble_row,
    "compiled": compiled_row,
}


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
        made = ROWS[name](options.rounds)
        for title, contenders, rounds, target in made if isinstance(made, list) else [made]:
            results[title] = compare(contenders, rounds)
            show(title, results[title], target)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
