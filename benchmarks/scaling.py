"""How much a process moves in a step and holds, on paper, from 1 to 1,024 processes.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --parameters 7e9 --megabytes-per-second 25000 --microseconds 20

The formulas are those of docs/scaling.md; benchmarks/distributed.py counts the bytes of 2 to 4
real processes, and benchmarks/zero_memory.py what they hold.
"""

import argparse

WORLD_SIZES = (1, 2, 4, 8, 64, 256, 1024)
BYTES = 4  # of a float32

# Units of (W - 1) / W * P * 4 bytes that a process receives in a step, and what it holds: parts of
# 16 bytes for each parameter (4 of parameters, 4 of gradients, 8 of Adam's two moments).
WAYS = {
    "ddp": (2, lambda k: 16),
    "elastic": (2, lambda k: 16),
    "zero stage 1": (3, lambda k: 8 + 8 / k),
    "zero stage 2": (2, lambda k: 4 + 16 / k),
    "zero stage 3": (3, lambda k: 16 / k),
}


def bytes_moved(units, parameters, world_size):
    """What a process receives in a step, as in a ring."""
    return units * (world_size - 1) / world_size * parameters * BYTES


def messages(units, world_size):
    """How many messages follow one another in a step, in rings."""
    return units * (world_size - 1)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--megabytes-per-second", type=float, default=12_500.0)
    parser.add_argument("--microseconds", type=float, default=10.0, help="latency of a message")
    options = parser.parse_args()
    count = options.parameters
    print(f"{count:,.0f} parameters, all processes in one group\n")
    heads = "".join(f"{world_size:>10}" for world_size in WORLD_SIZES)
    tables = {
        "GB that a process receives in a step": lambda units, held, w: (
            bytes_moved(units, count, w) / 1e9
        ),
        "GB that a process holds, without activations": lambda units, held, w: (
            held(w) * count / 1e9
        ),
        "milliseconds of talking, none of it behind the backward pass": lambda units, held, w: (
            bytes_moved(units, count, w) / options.megabytes_per_second / 1e3
            + messages(units, w) * options.microseconds / 1e3
        ),
    }
    for title, value in tables.items():
        print(f"{title}\n{'':16}{heads}")
        for way, (units, held) in WAYS.items():
            row = "".join(f"{value(units, held, w):>10.2f}" for w in WORLD_SIZES)
            print(f"{way:16}{row}")
        print()


if __name__ == "__main__":
    main()
