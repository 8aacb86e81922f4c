"""What an optimizer must know when it is given parts of parameters instead of whole ones.

Most updates work on each element by itself, and a part of a leaf is to them like any other leaf.
A norm of gradients or of a leaf is one over all parts. Who cuts the leaves says so for the time of
a call, see :func:`sharded`; optimizers ask with :func:`cut_leaves`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from puretrain.tree import Path, under_transform

__all__ = ["Shards", "cut_leaves", "sharded"]


class Shards(NamedTuple):
    """Which leaves of the parameters are parts, and how what is known of the parts is added up."""

    paths: Collection[Path]
    """The leaves of which the optimizer has a part."""
    total: Callable[[Tensor], Tensor]
    """The sum of a tensor over all parts. All who have a part call it together."""

    def norm(self, part: Tensor) -> Tensor:
        """The Euclidean norm of a whole leaf, of which this is a part; of shape ``()``."""
        square = torch.linalg.vector_norm(part.contiguous()).double().square()
        return self.total(square).sqrt().to(part.dtype)


_current: ContextVar[Shards | None] = ContextVar("shards", default=None)


@contextmanager
def sharded(shards: Shards) -> Iterator[None]:
    """Say that the optimizers called inside of this context are given parts of leaves.

    >>> import puretrain as pt
    >>> clip = pt.optim.clip_by_global_norm(1.0)
    >>> half = {"w": torch.tensor([3.0])}  # of [3.0, 4.0]; the other has 16 to add
    >>> with sharded(Shards([("w",)], lambda squares: squares + 16.0)):
    ...     clip.update(half, clip.init(half), half)[0]
    {'w': tensor([0.6000])}
    """
    token = _current.set(shards)
    try:
        yield
    finally:
        _current.reset(token)


def cut_leaves(paths: Sequence[Path]) -> tuple[Shards, list[bool]] | None:
    """Which of some leaves are parts; None if none is, as always inside of a transform."""
    if under_transform():
        return None
    shards = _current.get()
    if shards is None:
        return None
    cut = [path in shards.paths for path in paths]
    return (shards, cut) if any(cut) else None


def parts_are_given() -> bool:
    """Whether the caller is inside of :func:`sharded`; quicker than :func:`cut_leaves`."""
    return not under_transform() and _current.get() is not None
