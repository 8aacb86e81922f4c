"""Adadelta: steps as large as the steps before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta as _torch_adadelta

from puretrain.optim.base import Optimizer, Schedule, check_number, check_rate
from puretrain.optim.leafwise import Column, Values, decayed, leafwise, square_root, zeros
from puretrain.tree import Record

__all__ = ["AdadeltaState", "adadelta"]


class AdadeltaState(Record):
    """The state of :func:`adadelta`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    square_avg: Any
    """The running mean of the squared gradients, a tree like the parameters."""
    acc_delta: Any
    """The running mean of the squared steps, a tree like the parameters."""


def adadelta(
    lr: float | Tensor | Schedule = 1.0,
    rho: float | Tensor = 0.9,
    eps: float | Tensor = 1e-6,
    weight_decay: float | Tensor = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Scale the gradient to the size of the steps before, so that no learning rate is needed.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1}, \qquad
        v_t = \rho v_{t-1} + (1 - \rho) g_t^2 \\
        \Delta_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} \, g_t, \qquad
        u_t = \rho u_{t-1} + (1 - \rho) \Delta_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma \Delta_t

    (Zeiler, `ADADELTA <https://arxiv.org/abs/1212.5701>`_, 2012.) The bits are those of
    ``torch.optim.Adadelta()``.

    Args:
        lr: γ, 0 or more, which the paper does without; may be a schedule.
        rho: ρ, from 0 to 1.
        eps: ε, 0 or more; lets the first step be other than 0.
        weight_decay: λ, 0 or more.
        maximize: climb instead of descending.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is complex or no floating-point tensor, or the gradients or the state do not fit the
            parameters.

    Example:
        >>> optimizer = adadelta(rho=0.75, eps=1.0)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([2.0, -2.0])}, state, params)
        >>> params["w"], state.square_avg["w"]
        (tensor([-0.4142,  3.4142]), tensor([1., 1.]))
    """
    check_rate("adadelta", "lr", lr)
    check_number("adadelta", "rho", rho, most=1.0)
    check_number("adadelta", "eps", eps)
    check_number("adadelta", "weight_decay", weight_decay)

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        square, moved = slots
        grad = decayed(param, grad, h)
        square = h.rho * square + (1 - h.rho) * grad * grad
        step = square_root(moved + h.eps) / square_root(square + h.eps) * grad
        moved = h.rho * moved + (1 - h.rho) * step * step
        return param - h.lr * step, square, moved

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        square, moved = slots
        unused = [torch.zeros(()) for _ in params]  # it counts, but does not use the count
        _torch_adadelta(params, grads, square, moved, unused, maximize=maximize, **h)

    return leafwise(
        "adadelta",
        AdadeltaState,
        formula,
        {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay},
        slots={"square_avg": zeros, "acc_delta": zeros},
        kernel=kernel,
        maximize=maximize,
    )
