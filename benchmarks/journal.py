"""What a journal costs: steps with one against steps without.

    python benchmarks/journal.py [--threads N] [--rounds N] [--json FILE]

The model is an MLP 784-512-512-10, the batch 128, the optimizer AdamW. In one run, the journal sees
every other step only, so that what else the machine does falls on steps with it and without it
alike; the medians of both are compared. The digest of the state comes every 100 steps at the
default setting, so it is measured by itself and shared out.
"""

import argparse
import statistics
import tempfile
import time

import torch
from interleaved import write_json
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt

STEPS, BATCH = 100, 128


def run():
    with pt.random.scope(pt.random.key(0)):
        model = nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )
        data = torch.randn(BATCH * STEPS, 784), torch.randint(10, (BATCH * STEPS,))
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        x, y = batch
        return cross_entropy(apply(params, buffers, x)[0], y)

    optimizer = pt.optim.adamw(1e-3)
    return (
        pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0)),
        pt.train_step(loss, optimizer, draws=False),
        pt.batches(data, BATCH),
    )


def measure(rounds):
    """Seconds of steps without and with a journal, and the median of a digest of the state."""
    state, step, batches = run()
    spans = {False: [], True: []}
    begin, number = 0.0, 0

    with tempfile.TemporaryDirectory() as place:
        journal = pt.journal(place)

        def before_step(batch):
            if (number + 1) % 2:
                journal.before_step(batch)

        def half(state, event):
            nonlocal begin, number
            now = time.perf_counter()
            number = event.step
            if event.kind != "step":
                journal(state, event)
            elif event.step % 2:  # never one with a digest of the state
                journal(state, event)
                spans[True].append(time.perf_counter() - begin)
            else:
                spans[False].append(now - begin)
            begin = time.perf_counter()

        half.before_step = before_step
        pt.fit(state, step, batches, epochs=rounds, observers=[half])
        journal.close()
    digests = []
    for _ in range(30):
        begin = time.perf_counter()
        pt.replay.leaf_digests(state)
        digests.append(time.perf_counter() - begin)
    # The first steps warm up.
    return spans[False][STEPS // 2 :], spans[True][STEPS // 2 :], statistics.median(digests)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10, help="of 100 steps")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    without, with_one, digest = measure(max(options.rounds, 2))
    plain, journalled = statistics.median(without), statistics.median(with_one)
    cost = journalled - plain + digest / STEPS
    print(f"threads                  {options.threads}")
    print(f"a step without journal   {plain * 1e3:.3f} ms")
    print(f"a step with one          {journalled * 1e3:.3f} ms")
    print(f"a digest of the state    {digest * 1e3:.3f} ms, every {STEPS} steps")
    print(f"cost of the journal      {cost * 1e6:.0f} µs a step, {cost / plain:.2%}")
    if options.json:
        pairs = list(zip(without, with_one, strict=False))  # neighbours in time
        report = {
            "a step": {"rounds": [first for first, _ in pairs]},
            "a step with a journal": {"rounds": [second + digest / STEPS for _, second in pairs]},
        }
        write_json(options.json, {"MLP 784-512-512-10, batch 128": report})


if __name__ == "__main__":
    main()
