"""LAMB: Adam with steps in proportion to the size of what they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puretrain.optim.base import Optimizer, Schedule, check_betas, check_number, check_rate
from puretrain.optim.leafwise import Values, leafwise, power, square_root, zeros
from puretrain.tree import Record

__all__ = ["LambState", "lamb"]


class LambState(Record):
    """The state of :func:`lamb`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    step: Tensor
    """Updates of each leaf, in the order of the leaves; float32 of shape ``(leaves,)``."""
    exp_avg: Any
    """The running mean of the gradients, a tree like the parameters."""
    exp_avg_sq: Any
    """The running mean of their squares, a tree like the parameters."""


def lamb(
    lr: float | Tensor | Schedule = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-6,
    weight_decay: float | Tensor = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adam whose step is scaled, tensor by tensor, to the norm of the parameter.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}
            + \lambda \theta_{t-1} \\
        \theta_t &= \theta_{t-1} - \gamma \, \frac{\|\theta_{t-1}\|}{\|u_t\|} \, u_t

    where the quotient of norms is 1 if one of them is 0. (You et al., `Large batch optimization for
    deep learning <https://arxiv.org/abs/1904.00962>`_, ICLR 2020, with φ the identity.)

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        betas: β₁ and β₂, from 0 and below 1.
        eps: ε, 0 or more; keeps the quotient finite.
        weight_decay: λ, 0 or more.
        maximize: climb instead of descending; the decay stays one.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is complex or no floating-point tensor, or the gradients or the state do not fit the
            parameters.

    Example:
        >>> optimizer = lamb(lr=0.1)
        >>> params = {"w": torch.tensor([6.0, 8.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"]
        tensor([5.2929, 8.7071])
    """
    check_rate("lamb", "lr", lr)
    check_betas("lamb", betas)
    check_number("lamb", "eps", eps)
    check_number("lamb", "weight_decay", weight_decay)

    def scalars(h: Values, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = vectors["step"]
        return {"correction1": 1 - power(h.beta1, step), "correction2": 1 - power(h.beta2, step)}

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        mean, square = slots
        mean = h.beta1 * mean + (1 - h.beta1) * grad
        square = h.beta2 * square + (1 - h.beta2) * grad * grad
        step = mean / h.correction1 / (square_root(square / h.correction2) + h.eps)
        step = step + h.weight_decay * param
        size, length = h.norm(param), h.norm(step)
        moves = (size > 0) & (length > 0)
        # A quotient by 0 would be chosen out, but its derivative would be NaN.
        ratio = torch.where(moves, size / torch.where(moves, length, 1.0), 1.0)
        return param - h.lr * ratio * step, mean, square

    return leafwise(
        "lamb",
        LambState,
        formula,
        {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay},
        slots={"exp_avg": zeros, "exp_avg_sq": zeros},
        vectors={"step": 0.0},
        scalars=scalars,
        maximize=maximize,
        reads="norms",
    )
