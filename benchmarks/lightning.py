"""What the Lightning interface costs on a tiny model, against pytorch-lightning itself.

The loop by hand, the adapter and the real trainer train the same model on the same batches, with
the defaults of both trainers: logger, progress bar, checkpoints. What is compared is the time of a
step over that of the loop by hand, so the model's own work does not count.

    python benchmarks/lightning.py [--rounds N] [--json FILE]
"""

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings

import interleaved
import torch
from torch import nn
from torch.nn import functional as F

import puretrain.lightning as ours

try:
    import pytorch_lightning as real
except ImportError:
    real = None

STEPS = 400
TARGET = 0.35


class Batches:
    """The same batches for everybody."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (
                torch.randn(32, 32, generator=generator),
                torch.randint(0, 10, (32,), generator=generator),
            )
            for _ in range(STEPS)
        ]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return STEPS


def network():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def by_hand(data):
    """Seconds of a loop without any library."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    begin = time.perf_counter()
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.perf_counter() - begin


def fitted(pl, data):
    """Seconds between a trainer's first batch and its last hook of training."""

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    class Clock(pl.Callback):
        begin = end = 0.0

        def on_train_start(self, trainer, pl_module):
            self.begin = time.perf_counter()

        def on_train_end(self, trainer, pl_module):
            self.end = time.perf_counter()

    clock = Clock()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        pl.Trainer(max_epochs=1, default_root_dir=folder, callbacks=[clock]).fit(Model(), data)
    return clock.end - clock.begin


def measure(rounds):
    """Let all take turns: seconds of a step by hand, and what both trainers add, by round."""
    data = Batches()
    contenders = {
        "by hand": lambda: by_hand(data),
        "puretrain.lightning": lambda: fitted(ours, data),
        "pytorch-lightning": lambda: fitted(real, data),
    }
    times = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        if number % 2:  # nobody always follows the same neighbour
            names.reverse()
        for name in names:
            seconds = contenders[name]() / STEPS
            if number:  # the first round warms up
                times[name].append(seconds)
    hand = times["by hand"]
    over = {
        name: [own - base for own, base in zip(times[name], hand, strict=True)]
        for name in contenders
        if name != "by hand"
    }
    return {"by hand": hand, **over}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the numbers to this file, too")
    options = parser.parse_args()
    if real is None:
        print("pytorch-lightning is not installed: nothing to compare with (nox -s lightning)")
        return
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = measure(max(options.rounds, 2))
    ratio, (low, high) = interleaved.ratios(
        found["puretrain.lightning"], found["pytorch-lightning"]
    )
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    print(f"Lightning adapter, defaults on, tiny model (to reach: {TARGET:.2f}x)")
    print(f"  the step by hand                  {middle['by hand'] * 1e6:>8.1f} us")
    for name in ("puretrain.lightning", "pytorch-lightning"):
        print(f"  {name + ' over it':<33} {middle[name] * 1e6:>8.1f} us")
    print(f"  ratio of the two                  {ratio:>8.3f}x  [{low:.3f}, {high:.3f}]")
    if options.json:
        rounds = {name: {"rounds": seconds} for name, seconds in found.items()}
        interleaved.write_json(options.json, {"what a trainer adds to the step by hand": rounds})


if __name__ == "__main__":
    main()
