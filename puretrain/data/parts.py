"""Batches that are divided: which part of each a process reads."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puretrain.errors import DataError
from puretrain.tree import Record, path_string, tree_leaves, tree_map, tree_paths

__all__ = ["Parts", "Share"]


class Parts(Record):
    """What one process gets of a batch that is divided: one or several parts of it."""

    parts: tuple[Any, ...]
    """Each is a batch by itself. Where there was no sample left for a part, it has one that belongs
    to another, so that it can be evaluated like the others; its size is 0."""
    sizes: Tensor
    """How many samples of the batch are in each part, int64 of shape ``(parts,)`` on the CPU."""
    total: Tensor
    """How many samples the whole batch has, int64 of shape ``()`` on the CPU."""


class Share(NamedTuple):
    """Which of the equal parts of every batch are read."""

    parts: int
    """How many parts a batch is divided into."""
    start: int
    """The first part that is read."""
    stop: int
    """The one after the last."""

    def cuts(self, length: int) -> list[tuple[int, int]]:
        """Where the parts of a batch begin and end.

        Part i of n begins at ``i * length // n``, so that the parts of k workers are made of whole
        parts of a multiple of k. One that would be empty gets the sample at its place.

        >>> Share(4, 1, 3).cuts(10), Share(4, 0, 2).cuts(2)
        ([(2, 5), (5, 7)], [(0, 1), (0, 1)])
        """
        cuts = []
        for part in range(self.start, self.stop):
            start, stop = part * length // self.parts, (part + 1) * length // self.parts
            if start == stop:
                start = min(start, length - 1)
                stop = start + 1
            cuts.append((start, stop))
        return cuts

    def of(self, parts: list[Any], length: int) -> Parts:
        """What was read for the cuts of a batch of some length, with the sizes that count."""
        n = self.parts
        ends = [part * length // n for part in range(self.start, self.stop + 1)]
        sizes = [stop - start for start, stop in itertools.pairwise(ends)]
        return Parts(tuple(parts), torch.tensor(sizes), torch.tensor(length))


def first_dimension(batch: Any) -> int:
    """The first dimension of the first leaf that has one, else 1."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim:
            return int(leaf.shape[0])
    return 1


def cut(batch: Any, share: Share) -> Parts:
    """The parts of a ready batch, cut along the first dimension of all of its leaves.

    Raises:
        DataError: the leaves are no tensors or arrays of one first dimension.
    """
    length = first_dimension(batch)
    for path, leaf in zip(tree_paths(batch), tree_leaves(batch), strict=True):
        if not isinstance(leaf, Tensor | np.ndarray) or not leaf.ndim or leaf.shape[0] != length:
            raise DataError(
                "a ready batch can be divided only if all of its leaves are tensors with one row "
                f"per sample, and {path_string(path) or 'it'} is none with {length} rows; give "
                "batches() samples and a batch_size"
            )
    if not length:
        raise DataError(
            "a ready batch without a sample can't be divided; leave it out of the source"
        )
    parts = [tree_map(lambda leaf: leaf[a:b], batch) for a, b in share.cuts(length)]  # noqa: B023
    return share.of(parts, length)
