"""Losses at the worst place near the inputs: adversarial training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from puretrain.compose.evaluation import check_between, drawing, pair, value_and_gradient
from puretrain.errors import check_whole
from puretrain.gradients import Loss
from puretrain.tree import tree_map, under_transform

__all__ = ["fgsm", "pgd"]

_Limits = tuple[float, float]


def fgsm(loss: Loss, epsilon: float, *, clean: float = 0.0, limits: _Limits | None = None) -> Loss:
    r"""Train on inputs that were moved against the model, by the fast gradient sign method.

    .. math:: x' = x + \epsilon\, \mathrm{sign}(\nabla_x L(\theta, x, y))

    (Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015).

    Args:
        loss: of batches ``(inputs, …)`` whose inputs are one floating-point tensor.
        epsilon: how far each number of the inputs moves.
        clean: the share of the loss at the inputs as they are, from 0 to 1; the paper takes 0.5.
            Metrics and buffers are those at the moved inputs.
        limits: the least and the greatest value that an input can have, such as ``(0.0, 1.0)``.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] * batch[0]).sum()
        >>> fgsm(loss, 0.25)({"w": torch.tensor(2.0)}, {}, (torch.ones(1),), None)
        (tensor(2.5000), Aux(buffers=None, metrics={}))
    """
    return pgd(loss, epsilon, epsilon, 1, random_start=False, clean=clean, limits=limits)


def pgd(
    loss: Loss,
    epsilon: float,
    step_size: float,
    steps: int = 7,
    *,
    random_start: bool = True,
    clean: float = 0.0,
    limits: _Limits | None = None,
) -> Loss:
    r"""Train on inputs that were moved against the model, by projected gradient descent.

    .. math:: x_{k+1} = \Pi_{\lVert x' - x \rVert_\infty \le \epsilon}
        \bigl(x_k + \alpha\, \mathrm{sign}(\nabla_x L(\theta, x_k, y))\bigr)

    (Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018). Each
    step costs a forward and a backward pass, whose new buffers are not kept.

    Args:
        loss: of batches ``(inputs, …)`` whose inputs are one floating-point tensor.
        epsilon: ε, how far a number of the inputs can move.
        step_size: α.
        steps: how many.
        random_start: begin at a random place within reach, which the step must be able to draw.
        clean: as for :func:`fgsm`.
        limits: as for :func:`fgsm`.

    Raises:
        ConfigurationError: an argument is out of its range.
    """
    check_between("pgd", "epsilon", epsilon, 0.0, math.inf)
    check_between("pgd", "step_size", step_size, 0.0, math.inf)
    check_between("pgd", "clean", clean, 0.0, 1.0)
    steps = check_whole("pgd: steps", steps)

    def attacked(params: Any, buffers: Any, batch: Any, key: Tensor, /) -> Any:
        inputs, *rest = batch
        project = _projection(inputs, epsilon, limits)
        still = tree_map(torch.detach, params)
        moved = inputs.detach()
        if random_start:
            drawing("pgd with random_start", key)
            moved = project(moved + epsilon * (2 * torch.rand_like(moved) - 1))
        for _ in range(steps):
            _, _, slope = value_and_gradient(
                lambda x: pair(loss(still, buffers, (x, *rest), key)), moved
            )
            moved = project(moved + step_size * slope.sign())
        if inputs.requires_grad or under_transform():  # an attack around this one
            moved = moved + (inputs - inputs.detach())
        value, aux = pair(loss(params, buffers, (moved, *rest), key))
        if clean:
            value = (1 - clean) * value + clean * pair(loss(params, buffers, batch, key))[0]
        return value, aux

    return attacked


def _projection(
    inputs: Tensor, epsilon: float, limits: _Limits | None
) -> Callable[[Tensor], Tensor]:
    """Into the reach of the inputs, and into the limits."""
    low, high = inputs.detach() - epsilon, inputs.detach() + epsilon
    if limits is not None:
        low, high = low.clamp(*limits), high.clamp(*limits)
    return lambda moved: torch.minimum(torch.maximum(moved, low), high)
