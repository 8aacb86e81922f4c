"""How long `import puretrain` takes, against `import torch`.

    python benchmarks/imports.py [--rounds N] [--json FILE]

Each import happens in a fresh process; the two take turns, and each process times itself. The
first round, which may write bytecode and fill the disk's cache, does not count.
"""

import argparse
import os
import pathlib
import subprocess
import sys

from interleaved import machine, ratios, write_json

import puretrain as pt

MODULES = ("torch", "puretrain")
TIMED = """
import sys, time
begin = time.perf_counter()
__import__(sys.argv[1])
print(time.perf_counter() - begin)
"""


def seconds(module):
    """What importing a module takes in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED, module],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(pt.__file__).parents[1])},
    )
    return float(done.stdout)


def measure(rounds):
    """Seconds of each import, by round."""
    times = {module: [] for module in MODULES}
    for number in range(rounds + 1):
        for module in MODULES if number % 2 else reversed(MODULES):
            taken = seconds(module)
            if number:
                times[module].append(taken)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    times = measure(max(options.rounds, 2))
    for module, taken in times.items():
        ratio, (low, high) = ratios(taken, times["torch"])
        middle = sorted(taken)[len(taken) // 2]
        print(f"  import {module:<12} {middle:>7.3f} s   {ratio:>6.3f}x  [{low:.3f}, {high:.3f}]")
    if options.json:
        results = {module: {"rounds": taken} for module, taken in times.items()}
        write_json(options.json, {"import": results})


if __name__ == "__main__":
    main()
