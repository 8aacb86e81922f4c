"""What compiling a whole step brings, against the eager step and the plain torch loop.

    python benchmarks/compiled.py --threads 1                # all models, about four minutes
    python benchmarks/compiled.py --only tiny --rounds 31

The compiled step is made by puretrain.compiled and called as `fit` calls it, with donate=True.
Where jax and optax are installed, the two multilayer perceptrons are also trained with them, jitted
and with donated buffers. With --threads 1 all are held to one core, since XLA computes in more
threads than it is told to. Each row runs in rounds that alternate; see interleaved.py.
"""

import argparse
import importlib.util
import itertools
import os
import time

import torch
from interleaved import compare, machine, show, write_json
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import puretrain as pt

LR = 1e-3


def perceptron(sizes):
    layers = []
    for left, right in itertools.pairwise(sizes):
        layers += [nn.Linear(left, right), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional():
    """The network of examples/digits.py."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width=64, heads=4, layers=2, tokens=64, length=32):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, tokens)

    def forward(self, x):
        return self.head(self.blocks(self.embedding(x) + self.position)).flatten(0, 1)


def images(generator):
    return torch.randn(50, 1, 8, 8, generator=generator)


def tokens(generator):
    return torch.randint(64, (16, 32), generator=generator)


# By name: the module, the inputs, how many targets of how many classes, steps in a round.
MODELS = {
    "MLP 784-512-512-10, batch 128": (
        lambda: perceptron((784, 512, 512, 10)),
        lambda g: torch.randn(128, 784, generator=g),
        (128, 10),
        16,
    ),
    "tiny MLP 32-64-10, batch 32": (
        lambda: perceptron((32, 64, 10)),
        lambda g: torch.randn(32, 32, generator=g),
        (32, 10),
        200,
    ),
    "conv 32-64 with dropout, batch 50": (convolutional, images, (50, 10), 16),
    "transformer 2x64, batch 16x32": (Transformer, tokens, (512, 64), 16),
}


class Task:
    """A model, its data, and the ways to train it."""

    def __init__(self, make, inputs, targets, count):
        generator = torch.Generator().manual_seed(0)
        number, classes = targets
        self.make = make
        self.batches = [
            (inputs(generator), torch.randint(classes, (number,), generator=generator))
            for _ in range(count)
        ]

    def module(self):
        with pt.random.scope(pt.random.key(0)):
            return self.make()

    def raw(self):
        model = self.module()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

        def loop():
            for x, y in self.batches:
                loss = cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return len(self.batches)

        return loop

    def pure(self):
        apply, params, buffers = pt.functional(self.module())

        def loss(params, buffers, batch, key):
            x, y = batch
            logits, buffers = apply(params, buffers, x)
            return cross_entropy(logits, y), pt.Aux(buffers)

        optimizer = pt.optim.adamw(LR)
        state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
        return pt.train_step(loss, optimizer), pt.tree.tree_map(torch.clone, state)

    def stepping(self, wrap=lambda step: step):
        step, state = self.pure()
        step, held = wrap(step), [state]

        def loop():
            state = held[0]
            for batch in self.batches:
                state = step(state, batch, donate=True)
            held[0] = state
            return len(self.batches)

        return loop, step


def jax_loop(task):
    """The same perceptron in jax and optax, jitted, with donated buffers."""
    import jax
    import optax

    module = task.module()
    layers = [layer for layer in module if isinstance(layer, nn.Linear)]
    params = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in layers]
    optimizer = optax.adamw(LR, weight_decay=1e-2)

    def loss(params, x, y):
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        logits = x @ params[-1][0] + params[-1][1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def advance(params, opt_state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    advance = jax.jit(advance, donate_argnums=(0, 1))
    params = jax.tree.map(jax.numpy.array, params)
    held = [params, optimizer.init(params)]
    batches = [(jax.numpy.array(x.numpy()), jax.numpy.array(y.numpy())) for x, y in task.batches]

    def loop():
        params, opt_state = held
        for x, y in batches:
            params, opt_state, value = advance(params, opt_state, x, y)
        jax.block_until_ready((params, opt_state, value))
        held[:] = params, opt_state
        return len(batches)

    return loop


def draw(results, path):
    """The ratios to the eager step as bars, with the middle half of the rounds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [name for report in results.values() for name in report if name != "compilation"]
    names = [*dict.fromkeys(names)]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "puretrain", "font.size": 9}):
        figure = Figure(figsize=(7.6, 0.8 + 0.8 * len(results)), layout="constrained")
        axes = figure.add_subplot()
        for place, name in enumerate(names):
            rows = [
                (i, report[name]) for i, report in enumerate(results.values()) if name in report
            ]
            at = [i + 0.8 * place / len(names) for i, _ in rows]
            ratios = [row["ratio"] for _, row in rows]
            spread = [
                [max(row["ratio"] - row["quartiles"][0], 0) for _, row in rows],
                [max(row["quartiles"][1] - row["ratio"], 0) for _, row in rows],
            ]
            color = ("#aab3c2", "#d97706", "#2563eb", "#059669")[place]
            axes.barh(at, ratios, 0.75 / len(names), xerr=spread, label=name, color=color)
        axes.set_yticks([i + 0.3 for i in range(len(results))], results)
        axes.invert_yaxis()
        axes.set_xlabel("time of a step, the eager one = 1")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside upper left", ncols=len(names))
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="the models whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="torch's threads; by default what torch takes")
    parser.add_argument("--mode", help="of torch.compile, such as max-autotune")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    parser.add_argument("--picture", metavar="FILE", help="draw the ratios there (.svg, .png)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.threads == 1:
        # XLA has threads of its own beside those that it can be told about; so all get one core.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        # read when jax is imported
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    with_jax = all(importlib.util.find_spec(name) for name in ("jax", "optax"))
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    print("jax and optax: " + ("compared as well" if with_jax else "not installed, left out"))
    results = {}
    for name, description in MODELS.items():
        if options.only and options.only not in name:
            continue
        task = Task(*description)
        eager, _ = task.stepping()
        compiled, step = task.stepping(lambda step: pt.compiled(step, mode=options.mode))
        begin = time.perf_counter()
        compiled()
        seconds = time.perf_counter() - begin
        contenders = {
            "puretrain, eager": eager,
            "torch, AdamW(fused=True)": task.raw(),
            "puretrain.compiled": compiled,
        }
        if with_jax and "MLP" in name:
            contenders["jax and optax"] = jax_loop(task)
        results[name] = compare(contenders, options.rounds)
        show(name, results[name], "compiled < 1x where it pays")
        report = step.report()
        print(f"  first round {seconds:.1f} s; {str(report).splitlines()[0]}", flush=True)
        results[name]["compilation"] = {
            "seconds": [graph.seconds for graph in report.graphs],
            "operations": [graph.operations for graph in report.graphs],
            "recompiles": len(report.recompiles),
        }
    if options.picture:
        draw(results, options.picture)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
