"""A function of one member as a function of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import vmap as _vmap

from puretrain import random
from puretrain.gradients import Aux
from puretrain.tree import FrozenDict, frozen_dict, tree_leaves, tree_map, tree_stack

__all__ = ["OverMembers", "as_tensor", "count_of"]

_functorch = torch._C._functorch

_NO_HOOKS = (
    "saved-tensor hooks, which activation checkpointing and offloading use, do not work inside of "
    "a vmap over members; leave them out, or run the members one after the other with "
    "vectorize=False"
)


class OverMembers:
    """A function of one member, over all of them; its results are stacked."""

    def __init__(
        self, function: Callable[..., Any], axes: Sequence[int | None], *, vectorize: bool
    ) -> None:
        self._function, self._axes, self._vectorize = function, (*axes, 0), vectorize
        # Whether the function is known to draw. It decides nothing but the speed: a pass in which
        # something was drawn is done again, with a stream for each member.
        self._drew = False

    def __call__(self, count: int, keys: Tensor | None, *arguments: Any) -> Any:
        """The results of all members; the last argument of each is its key, if there are keys."""
        arguments = (*arguments, keys)
        if not self._vectorize:
            return self._one_by_one(count, keys, arguments)
        if keys is None:
            return self._vectorized(count, arguments)
        if not self._drew:
            with random.watch() as watch:
                results = self._vectorized(count, arguments)
            if not watch.drew:
                return results
            self._drew = True
        with random.member_scope(keys):
            return self._vectorized(count, arguments)

    def _one_by_one(self, count: int, keys: Tensor | None, arguments: Sequence[Any]) -> Any:
        results = []
        for i in range(count):
            own = [x if axis is None else _row(x, i) for x, axis in self._zip(arguments)]
            if keys is None:
                results.append(self._function(*own))
            else:
                with random.scope(keys[i]):
                    results.append(self._function(*own))
        return tree_stack(results)

    def _vectorized(self, count: int, arguments: Sequence[Any]) -> Any:
        # This is torch.func.vmap without its walks over the trees, which show in a small step.
        # Under it, a hook on saved tensors would run where the members are gone.
        _vmap.lazy_load_decompositions()  # type: ignore[attr-defined]
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
            level = _functorch._vmap_increment_nesting(count, "different")
            try:
                own = [x if axis is None else _lifted(x, level) for x, axis in self._zip(arguments)]
                return _stacked(self._function(*own), level, count)
            finally:
                _functorch._vmap_decrement_nesting()

    def _zip(self, arguments: Sequence[Any]) -> Any:
        return zip(arguments, self._axes, strict=True)


def _lifted(tree: Any, level: int) -> Any:
    """The tree as one member sees it."""
    if type(tree) is FrozenDict and {*map(type, tree.values())} <= {Tensor}:
        values = [_functorch._add_batch_dim(leaf, 0, level) for leaf in tree.values()]
        return frozen_dict(tree.keys(), values)  # the usual kind, which is much quicker by hand
    return tree_map(
        lambda leaf: (
            _functorch._add_batch_dim(leaf, 0, level) if isinstance(leaf, Tensor) else leaf
        ),
        tree,
    )


def _stacked(tree: Any, level: int, count: int) -> Any:
    """What one member sees, as the tree of all."""
    kind = type(tree)
    if kind is Tensor:
        return _functorch._remove_batch_dim(tree, level, count, 0)
    if kind is FrozenDict:
        return frozen_dict(tree.keys(), [_stacked(x, level, count) for x in tree.values()])
    if kind is tuple:
        return tuple([_stacked(x, level, count) for x in tree])
    if kind is Aux:
        return tree.replace(
            buffers=_stacked(tree.buffers, level, count),
            metrics=_stacked(tree.metrics, level, count),
        )
    return tree_map(lambda leaf: _functorch._remove_batch_dim(leaf, level, count, 0), tree)


def _row(tree: Any, index: int) -> Any:
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)


def count_of(params: Any) -> int:
    """How many members the parameters are of."""
    leaf = next(iter(params.values())) if type(params) is FrozenDict and params else params
    return int((leaf if isinstance(leaf, Tensor) else tree_leaves(params)[0]).shape[0])


def as_tensor(value: Any) -> Any:
    """A metric that is a number as a tensor."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else value
