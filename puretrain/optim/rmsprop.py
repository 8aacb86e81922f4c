"""RMSprop: gradients over the root of the running mean of their squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop as _torch_rmsprop

from puretrain.optim.base import Optimizer, Schedule, check_number, check_rate
from puretrain.optim.leafwise import Column, Values, decayed, is_zero, leafwise, square_root, zeros
from puretrain.tree import Record

__all__ = ["RMSpropState", "rmsprop"]


class RMSpropState(Record):
    """The state of :func:`rmsprop`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    square_avg: Any
    """The running mean of the squared gradients, a tree like the parameters."""
    grad_avg: Any
    """The running mean of the gradients, if ``centered``; otherwise None."""
    momentum_buffer: Any
    """The sum of the steps so far, a tree like the parameters; None without momentum."""


def rmsprop(
    lr: float | Tensor | Schedule = 1e-2,
    alpha: float | Tensor = 0.99,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    momentum: float | Tensor = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Divide the gradient by the root of the running mean of its square.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1} \\
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad
        a_t = \alpha a_{t-1} + (1 - \alpha) g_t \\
        b_t &= \mu b_{t-1} + \frac{g_t}{\sqrt{v_t - a_t^2} + \epsilon} \\
        \theta_t &= \theta_{t-1} - \gamma \, b_t

    where :math:`a_t` is 0 unless ``centered``. (Hinton, `Neural networks for machine learning
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, lecture 6, 2012;
    centred: Graves, `Generating sequences with recurrent neural networks
    <https://arxiv.org/abs/1308.0850>`_, 2013.) The bits are those of ``torch.optim.RMSprop()``.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        alpha: α, from 0 to 1.
        eps: ε, 0 or more; keeps the quotient finite. It is added to the root, not under it.
        weight_decay: λ, 0 or more.
        momentum: μ, 0 or more. Given as a tensor, there is a buffer for it even if it is 0.
        centered: divide by an estimate of the standard deviation.
        maximize: climb instead of descending.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is complex or no floating-point tensor, or the gradients or the state do not fit the
            parameters.

    Example:
        >>> optimizer = rmsprop(lr=0.1, alpha=0.75)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"], state.square_avg["w"]
        (tensor([0.8000, 2.2000]), tensor([2.2500, 4.0000]))
    """
    check_rate("rmsprop", "lr", lr)
    check_number("rmsprop", "alpha", alpha, most=1.0)
    check_number("rmsprop", "eps", eps)
    check_number("rmsprop", "weight_decay", weight_decay)
    check_number("rmsprop", "momentum", momentum)
    heavy = not is_zero(momentum)

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        grad = decayed(param, grad, h)
        square, *more = slots
        square = h.alpha * square + (1 - h.alpha) * grad * grad
        variance = square
        if centered:
            more[0] = h.alpha * more[0] + (1 - h.alpha) * grad
            variance = square - more[0] * more[0]
        step = grad / (square_root(variance) + h.eps)
        if heavy:
            old, step = more[-1], h.momentum * more[-1] + step
            # As in torch: while the momentum is 0, the buffer rests
            more[-1] = torch.where(torch.as_tensor(h.momentum != 0), step, old)
        return param - h.lr * step, square, *more

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        square, *more = slots
        _torch_rmsprop(
            params,
            grads,
            square,
            more[0] if centered else [],
            more[-1] if heavy else [],
            [torch.zeros(()) for _ in params],  # it counts, but does not use the count
            centered=centered,
            maximize=maximize,
            **h,
        )

    slots = ["square_avg"] + ["grad_avg"] * centered + ["momentum_buffer"] * heavy
    return leafwise(
        "rmsprop",
        RMSpropState,
        formula,
        {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
        },
        slots=dict.fromkeys(slots, zeros),
        kernel=kernel,
        maximize=maximize,
    )
