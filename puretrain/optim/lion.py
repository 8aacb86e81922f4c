"""Lion: the sign of a running mean of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puretrain.optim.base import Optimizer, Schedule, check_betas, check_number, check_rate
from puretrain.optim.leafwise import Values, leafwise, zeros
from puretrain.tree import Record

__all__ = ["LionState", "lion"]


class LionState(Record):
    """The state of :func:`lion`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    exp_avg: Any
    """The running mean of the gradients, a tree like the parameters."""


def lion(
    lr: float | Tensor | Schedule = 1e-4,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
    weight_decay: float | Tensor = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Move every element by the same distance, in the direction of a mean of its gradients.

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t \\
        \theta_t &= \theta_{t-1} - \gamma \, (\operatorname{sign}(c_t) + \lambda \theta_{t-1})

    (Chen et al., `Symbolic discovery of optimization algorithms
    <https://arxiv.org/abs/2302.06675>`_, NeurIPS 2023, who find learning rates good that are 3 to
    10 times smaller than those for :func:`adamw`, and weight decays as many times larger.)

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        betas: β₁ and β₂, from 0 and below 1.
        weight_decay: λ, 0 or more.
        maximize: climb instead of descending; the decay stays one.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is complex or no floating-point tensor, or the gradients or the state do not fit the
            parameters.

    Example:
        >>> optimizer = lion(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"], state.exp_avg["w"]
        (tensor([0.9000, 2.1000]), tensor([ 0.0300, -0.0400]))
    """
    check_rate("lion", "lr", lr)
    check_betas("lion", betas)
    check_number("lion", "weight_decay", weight_decay)

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        (mean,) = slots
        direction = torch.sign(h.beta1 * mean + (1 - h.beta1) * grad)
        param = param - h.lr * (direction + h.weight_decay * param)
        return param, h.beta2 * mean + (1 - h.beta2) * grad

    return leafwise(
        "lion",
        LionState,
        formula,
        {"lr": lr, "beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay},
        slots={"exp_avg": zeros},
        maximize=maximize,
    )
