"""The random generators that a dataset draws from, seeded sample by sample.

What ``Dataset.__getitem__`` draws (with torch, numpy's global functions or :mod:`random`) is to
depend on the sample alone, not on which worker reads it or what was read before. So each sample is
read with all three generators freshly seeded.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["generators_kept", "mix", "seed_generators", "seeded"]

_MASK = 2**64 - 1


def mix(seed: int, number: int) -> int:
    """Derive a 64-bit seed from a seed and a number, with the SplitMix64 generator.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014): its
    output function at place ``number`` of the sequence that starts at ``seed``. At half a
    microsecond it is ten times faster than :func:`puretrain.random.fold_in`, and is called for
    every sample.

    >>> mix(0, 0), mix(0, 1)
    (16294208416658607535, 7960286522194355700)
    """
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (CPU), numpy and Python; takes about 8 µs."""
    # All three are Mersenne Twisters, and torch's and numpy's keep 32 bits of a seed: give them
    # different halves, or they would produce the same numbers.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed >> 32)  # noqa: NPY002 - it is the global generator that datasets draw from
    random.seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators of torch (CPU), numpy and Python back at the end; about 0.1 ms."""
    before_torch = torch.default_generator.get_state()
    before_numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    before_python = random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(before_torch)
        np.random.set_state(before_numpy)  # noqa: NPY002
        random.setstate(before_python)


def seeded(iterator: Iterator[Any], seed: int, start: int = 0) -> Iterator[Any]:
    """Yield items, each produced with the generators seeded from its number.

    Args:
        iterator: where the items come from.
        seed: the seed of the epoch.
        start: the number of the first item.
    """
    for number in itertools.count(start):
        seed_generators(mix(seed, number))
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item
