"""What an optimizer is: a pair of pure functions. And what a gradient transformation is: another.

Neither keeps anything between two calls; all that an optimizer remembers is in its state, a tree
of tensors.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from puretrain.errors import OptimizerError
from puretrain.tree import under_transform

__all__ = ["GradientTransformation", "Optimizer", "Schedule", "schedule_value"]

Schedule = Callable[[Any], Any]
"""A hyper-parameter as a function of the number of updates done, from 0.

Given an int it returns a float; given an int64 tensor, which happens under transforms, a tensor."""


class Init(Protocol):
    """Makes the state of an optimizer or transformation."""

    def __call__(self, params: Any, /) -> Any:
        """Return the state before the first update; it shares no tensor with ``params``."""
        ...


class Update(Protocol):
    """One update, a pure function."""

    def __call__(
        self, grads: Any, state: Any, params: Any, /, *, donate: bool = False
    ) -> tuple[Any, Any]:
        """Return the new parameters (a transformation: the new gradients) and the new state.

        Args:
            grads: a tree like ``params``, with None where a leaf has no gradient. Such a leaf is
                left out of the update: the parameter and what is remembered of it stay.
            state: what ``init`` or the last update returned.
            params: a tree of tensors.
            donate: the caller gives up ``grads``, ``state`` and ``params``; the result is computed
                in their memory. Otherwise the result shares no memory with ``state`` and
                ``params``. The bits are the same.
        """
        ...


class Optimizer(NamedTuple):
    """Turns gradients into new parameters: ``update(grads, state, params) -> (params, state)``.

    Example:
        >>> import torch
        >>> import puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([1.0, -1.0])}, state, params)
        >>> params["w"]
        tensor([0.9000, 2.1000])
    """

    init: Init
    update: Update


class GradientTransformation(NamedTuple):
    """Turns gradients into gradients: ``update(grads, state, params) -> (grads, state)``.

    :func:`puretrain.optim.chain` puts transformations in front of an optimizer.
    """

    init: Init
    update: Update


def schedule_value(value: float | Tensor | Schedule, count: Tensor) -> Any:
    """What a hyper-parameter is now: a schedule's value after ``count`` updates, or itself.

    >>> import torch
    >>> schedule_value(lambda n: 1 / (n + 1), torch.tensor(3)), schedule_value(0.1, torch.tensor(3))
    (0.25, 0.1)
    """
    if not callable(value):
        return value
    return value(count if under_transform() else int(count))


def plain_value(where: str, argument: str, value: Any) -> Any:
    """A tensor of shape ``()`` as a Python number; anything else as it is.

    Torch's kernels take numbers, and a number keeps its float64 where a tensor would be rounded to
    the dtype of what it is combined with.
    """
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise OptimizerError(
            f"{where}: {argument} requires grad, but no gradient flows through an update outside "
            "of torch.func: differentiate with torch.func.grad, or give a detached tensor"
        )
    return value.item()


def check_number(
    where: str,
    argument: str,
    value: Any,
    *,
    least: float = 0.0,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise an OptimizerError that names the argument unless it is a finite number in its limits.

    The limits are ``least <= value <= most`` and ``value < below``. The value of a tensor is looked
    at where it can be: under a transform it has none.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise OptimizerError(
                f"{where}: {argument} is a number or a floating-point tensor of shape (), "
                f"not a tensor of {value.dtype} and shape {tuple(value.shape)}"
            )
        if under_transform():
            return
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptimizerError(f"{where}: {argument} is a number, not {value!r}")
    if not (math.isfinite(value) and least <= value <= most and value < below):
        limits = ["finite"]
        limits += [f"at least {least:g}"] if least > -math.inf else []
        limits += [f"at most {most:g}"] if most < math.inf else []
        limits += [f"below {below:g}"] if below < math.inf else []
        raise OptimizerError(f"{where}: {argument} must be {' and '.join(limits)}, not {value!r}")


def check_rate(where: str, argument: str, value: Any) -> None:
    """Check a number from 0, or accept a schedule, whose values are not known yet."""
    if not callable(value):
        check_number(where, argument, value)


def check_betas(where: str, betas: Any) -> None:
    """Check the two factors by which running means decay: each from 0 and below 1."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise OptimizerError(f"{where}: betas are a pair of numbers, not {betas!r}")
    for i, beta in enumerate(betas):
        check_number(where, f"betas[{i}]", beta, below=1.0)
