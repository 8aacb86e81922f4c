"""How a loss that stands around another calls it and differentiates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, LossError
from puretrain.gradients import Aux
from puretrain.tree import tree_flatten, tree_leaves, tree_unflatten, under_transform

__all__ = ["check_between", "drawing", "pair", "value_and_gradient"]

_NOTHING = Aux()  # made here, since a compiler can't follow the making of a frozen record


def pair(returned: Any) -> tuple[Tensor, Aux]:
    """What a loss returned, with an Aux in any case."""
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned
    return returned, _NOTHING


def value_and_gradient(
    function: Callable[[Any], tuple[Tensor, Aux]], tree: Any, *, others: Any = ()
) -> tuple[Tensor, Aux, Any]:
    """Evaluate ``(value, aux) = function(tree)`` and the gradient of the value.

    The gradient is a tree like the argument, with zeros where nothing flows, and detached. It is
    computed as the step around it computes its own: by ``torch.func`` inside of a transform, else
    by autograd. The value can still be differentiated by ``others``, a tree, and not by ``tree``.
    """
    leaves, structure = tree_flatten(tree)

    def of_leaves(leaves: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Aux]]:
        value, aux = function(tree_unflatten(structure, leaves))
        return value, (value, aux)

    leaves = [leaf.detach() for leaf in leaves]
    if under_transform():
        slopes, (_, (value, aux)) = torch.func.grad_and_value(of_leaves, has_aux=True)(leaves)
    else:
        with torch.enable_grad():
            leaves = [leaf.requires_grad_() for leaf in leaves]
            value, (_, aux) = of_leaves(leaves)
            again = any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(others))
            slopes = torch.autograd.grad(
                value, leaves, retain_graph=again, allow_unused=True, materialize_grads=True
            )
        value = value if again else value.detach()
    return value, aux, tree_unflatten(structure, [slope.detach() for slope in slopes])


def drawing(who: str, key: Tensor | None) -> None:
    """Raise if the step has not seeded torch's generators."""
    if key is None:
        raise LossError(
            f"{who} draws random numbers, but the step is made with draws=False, so that they "
            "would not be a function of the state: make it without"
        )


def check_between(who: str, argument: str, value: Any, least: float, most: float) -> None:
    """Raise a ConfigurationError unless ``least <= value <= most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ConfigurationError(
            f"{who}: {argument} is a number from {least:g} to {most:g}, not {value!r}"
        )
