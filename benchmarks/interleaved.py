"""Timing of several ways to do the same, so that a noisy machine disturbs all of them alike.

The contenders take turns in short rounds. What is reported of each is the median of its ratios to
the first contender *of the same round*, and the middle half of these ratios as the spread; an
absolute time is only there to give an idea.
"""

import json
import os
import platform
import statistics
import sys
import time

import torch


def compare(contenders, rounds=15, warmup=2, before=lambda: None):
    """Time functions against the first of them.

    Args:
        contenders: by name, a function that does a round's work and returns its number of steps.
        rounds: how often each takes its turn.
        warmup: rounds that do not count.
        before: done before each turn, and not timed.

    Returns:
        For each name: seconds per step (median), the ratio to the first one (median), the
        quartiles of the ratio, and the seconds of each round.
    """
    times = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        names = list(contenders)
        if number % 2:  # nobody always follows the same neighbour
            names.reverse()
        for name in names:
            before()
            begin = time.perf_counter()
            steps = contenders[name]()
            seconds = (time.perf_counter() - begin) / steps
            if number >= warmup:
                times[name].append(seconds)
    base = times[next(iter(contenders))]
    report = {}
    for name, own in times.items():
        ratio, quartiles = ratios(own, base)
        report[name] = {
            "seconds": statistics.median(own),
            "ratio": ratio,
            "quartiles": quartiles,
            "rounds": own,
        }
    return report


def ratios(own, base):
    """The median and the quartiles of the ratios of two contenders, round by round."""
    found = [mine / theirs for mine, theirs in zip(own, base, strict=True)]
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return statistics.median(found), [low, high]


def machine():
    """What the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = [line for line in lines if line.startswith("model name")]
        names = [line.split(":", 1)[1].strip() for line in named]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def show(title, report, target=None):
    """Print a table of one comparison."""
    print(f"\n{title}" + (f"  (to reach: {target})" if target else ""))
    for name, row in report.items():
        low, high = row["quartiles"]
        print(
            f"  {name:<44} {row['seconds'] * 1e6:>10.1f} us   "
            f"{row['ratio']:>6.3f}x  [{low:.3f}, {high:.3f}]"
        )
    sys.stdout.flush()


def write_json(path, results):
    """Write everything that was measured, and on what, to a file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "results": results}, file, indent=2)
        file.write("\n")
