"""What the processes tell each other in every step: metrics, sizes, and what else is small."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puretrain.errors import StructureError
from puretrain.metrics import as_metric
from puretrain.sharding.processes import start_all_gather
from puretrain.tree import (
    FrozenDict,
    path_string,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_paths,
    tree_unflatten,
)

__all__ = ["Exchange", "merged_metrics", "weighted_mean"]


class Exchange:
    """Gathers small trees of tensors from all processes, to the bit.

    The trees of one exchange must have the same structure, shapes and dtypes in all processes and
    in all calls; the first call compares them.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._agreed: list[str] | None = None

    def __call__(self, tree: Any, what: str) -> list[Any]:
        """The trees of all processes, in the order of their ranks.

        Raises:
            StructureError: a process has something else than the others, or than it had before.
        """
        return self.start(tree, what)()

    def start(self, tree: Any, what: str) -> Callable[[], list[Any]]:
        """Begin an exchange; what is returned waits for its end. Raises as a call does."""
        world_size = dist.get_world_size(self._group)
        if world_size == 1:
            return lambda: [tree]
        leaves, structure = tree_flatten(tree)
        signature = [
            f"{path_string(path)} ({_kind(leaf)})"
            for path, leaf in zip(tree_paths(tree), leaves, strict=True)
        ]
        if self._agreed is None:
            self._compare(signature, what)
            self._agreed = signature
        elif self._agreed != signature:
            raise StructureError(_difference(what, "before", self._agreed, "now", signature))
        if not leaves:
            return lambda: [tree] * world_size
        mine = torch.cat(
            [leaf.detach().contiguous().reshape(-1).view(torch.uint8).cpu() for leaf in leaves]
        ).to(self._device)
        finish = start_all_gather(mine, self._group)

        def received() -> list[Any]:
            rows = finish().cpu().view(world_size, -1).unbind()
            return [tree_unflatten(structure, _unpacked(row, leaves)) for row in rows]

        return received

    def _compare(self, signature: list[str], what: str) -> None:
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, signature, self._group)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise StructureError(
                    _difference(what, "in the process of rank 0", found[0], f"in {rank}'s", other)
                )


def _unpacked(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    leaves = []
    for leaf, part in zip(
        like, torch.split(row, [leaf.numel() * leaf.element_size() for leaf in like]), strict=True
    ):
        # cloned, for a view of a row of bytes need not be aligned to its elements
        leaves.append(part.clone().view(leaf.dtype).reshape(leaf.shape).to(leaf.device))
    return leaves


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        raise StructureError(f"only tensors go from process to process, not {leaf!r}")
    return f"{leaf.dtype} of shape {tuple(leaf.shape)}"


def _difference(what: str, a: str, one: list[str], b: str, other: list[str]) -> str:
    only = [f"{name} {a}" for name in one if name not in other]
    only += [f"{name} {b}" for name in other if name not in one]
    return (
        f"{what} must be the same in every process and in every step, but there is only "
        f"{'; '.join(only) or 'another order'}"
    )


def merged_metrics(parts: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> FrozenDict[Any]:
    """The metrics of a batch out of those of its parts, in their order.

    Metric records merge; a plain tensor becomes the mean, weighted by the sizes of the parts.
    A part of size 0 does not count.
    """
    counted = [(part, size) for part, size in zip(parts, sizes, strict=True) if size]
    if len(counted) == 1:
        return FrozenDict(counted[0][0])
    merged: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part, _ in counted]
        if isinstance(values[0], Tensor):
            merged[name] = weighted_mean(values, [size for _, size in counted])
        else:
            total = as_metric(values[0])
            for value in values[1:]:
                total = total.merge(value)
            merged[name] = total
    return FrozenDict(merged)


def weighted_mean(values: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    """The mean of tensors by whole weights, summed in float64 in their order.

    Tensors of integers and truth values do not mix: the first is taken.

    >>> weighted_mean([torch.tensor(1.0), torch.tensor(4.0)], [2, 1])
    tensor(2.)
    """
    first = values[0]
    if not first.is_floating_point() and not first.is_complex():
        return first
    wide = torch.complex128 if first.is_complex() else torch.float64
    total = sum(weights)
    mean = torch.zeros_like(first, dtype=wide)
    for value, weight in zip(values, weights, strict=True):
        mean = mean + value.to(wide) * (weight / total)
    return mean.to(first.dtype)


def merged_buffers(before: Any, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The buffers of a batch out of those of its parts: floating-point ones are averaged."""
    counted = [(part, size) for part, size in zip(parts, sizes, strict=True) if size]
    if len(counted) == 1:
        return counted[0][0]
    weights = [size for _, size in counted]
    return tree_map(
        lambda old, *new: new[0] if _all_same(old, new) else weighted_mean(new, weights),
        before,
        *(part for part, _ in counted),
    )


def _all_same(old: Any, new: Sequence[Any]) -> bool:
    return not isinstance(old, Tensor) or all(value is new[0] for value in new)


def changed(before: Any, after: Any) -> list[bool]:
    """Which leaves of some buffers an evaluation has changed."""
    return [
        a is not b and not torch.equal(a, b)
        for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True)
    ]
