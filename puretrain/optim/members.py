"""One update of many members at once: stacked trees, in which each leaf has a leading axis.

Members do not know of each other, so the result is that of as many updates, one for each. How much
of it can be done together only an optimizer knows: one that works element by element takes stacked
leaves as they are, one that takes the norm of a leaf does not. An ``update`` says so with an
attribute ``together``; without one, its members are updated one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from puretrain.optim.base import Optimizer
from puretrain.tree import tree_flatten, tree_flatten_up_to, tree_map, tree_unflatten

__all__ = ["Together", "update_members"]

Active = Sequence[int]
"""The members to update; the others stay as they are."""


class Together(NamedTuple):
    """How an update does many members at once; the attribute ``together`` of the function."""

    update: Callable[[Sequence[Any], Any, Any, Any, Active], tuple[Any, Any]]
    """``update(own, grads, state, params, active)``, all of them stacked, in their memory. ``own``
    has the ``own`` of each member, the same object where members share their hyper-parameters."""
    own: Any
    """What distinguishes one update of this kind from another."""


def update_members(
    parts: Sequence[Any],
    grads: Any,
    state: Any,
    params: Any,
    active: Active,
    *,
    donate: bool = False,
) -> tuple[Any, Any]:
    """Update the members of an ensemble, each with an optimizer (or transformation) of its own.

    Args:
        parts: one for each member; the same object for members that share it.
        grads: a tree like ``params``, with None where a leaf has no gradient in any member.
        state: the members' states, stacked.
        params: the members' parameters, stacked.
        active: which members to update. Of the others a transformation may return anything.
        donate: the result may be computed in the memory of the arguments.

    Returns:
        What each member's own update returns, stacked.
    """
    if not donate:
        state, params = tree_map(torch.clone, (state, params))
        grads = tree_map(torch.clone, grads)
    with torch.no_grad():
        return together(parts, grads, state, params, active)


def together(
    parts: Sequence[Any], grads: Any, state: Any, params: Any, active: Active
) -> tuple[Any, Any]:
    """Update in the memory of the arguments; see :func:`update_members`."""
    first: Together | None = getattr(parts[0].update, "together", None)
    ways: list[Any] = [first] * len(parts)
    if any(part is not parts[0] for part in parts):
        ways = [getattr(part.update, "together", None) for part in parts]
    if first is None or any(way is None or way.update is not first.update for way in ways):
        return one_after_the_other(parts, grads, state, params, active)
    new: tuple[Any, Any] = first.update([way.own for way in ways], grads, state, params, active)
    return new


def one_after_the_other(
    parts: Sequence[Any], grads: Any, state: Any, params: Any, active: Active
) -> tuple[Any, Any]:
    """Call the update of each member by itself, and put the results in its rows."""
    leaves, structure = tree_flatten(params)
    slopes = tree_flatten_up_to(structure, grads)
    is_transformation = not isinstance(parts[0], Optimizer)
    results = list(slopes if is_transformation else leaves)
    for i in active:
        own = [None if x is None else x[i] for x in slopes]
        new, new_state = parts[i].update(
            tree_unflatten(structure, own),
            tree_map(lambda leaf, i=i: leaf[i].clone(), state),
            tree_unflatten(structure, [leaf[i] for leaf in leaves]),
        )
        for k, value in enumerate(tree_flatten_up_to(structure, new)):
            if results[k] is not None and value is not None:
                results[k][i].copy_(value)
            elif is_transformation:
                results[k] = None  # it takes this gradient away, as `freeze` does
        tree_map(lambda whole, leaf, i=i: whole[i].copy_(leaf), state, new_state)
    # In new containers, so that those given up can be told from them
    return tree_unflatten(structure, results), tree_map(lambda leaf: leaf, state)


def runs(members: Sequence[int]) -> list[slice]:
    """Ascending numbers as slices.

    >>> runs([0, 1, 2, 5, 7, 8])
    [slice(0, 3, None), slice(5, 6, None), slice(7, 9, None)]
    """
    found: list[slice] = []
    for i in members:
        if found and found[-1].stop == i:
            found[-1] = slice(found[-1].start, i + 1)
        else:
            found.append(slice(i, i + 1))
    return found
