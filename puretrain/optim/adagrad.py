"""Adagrad: gradients over the root of the sum of their squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as _torch_adagrad

from puretrain.optim.base import Optimizer, Schedule, check_number, check_rate
from puretrain.optim.leafwise import (
    Column,
    Values,
    counts_before,
    decayed,
    each,
    leafwise,
    on_cpu_or_gpu,
    square_root,
)
from puretrain.tree import Record

__all__ = ["AdagradState", "adagrad"]


class AdagradState(Record):
    """The state of :func:`adagrad`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    step: Tensor
    """Updates of each leaf, in the order of the leaves; float32 of shape ``(leaves,)``."""
    sum: Any
    """The sum of the squared gradients, a tree like the parameters."""


def adagrad(
    lr: float | Tensor | Schedule = 1e-2,
    lr_decay: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    initial_accumulator_value: float | Tensor = 0.0,
    eps: float | Tensor = 1e-10,
    *,
    maximize: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    r"""Divide the gradient by the root of the sum of its squares so far.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1}, \qquad
        s_t = s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1}
            - \frac{\gamma}{1 + (t - 1) \eta} \, \frac{g_t}{\sqrt{s_t} + \epsilon}

    (Duchi, Hazan & Singer, `Adaptive subgradient methods
    <https://jmlr.org/papers/v12/duchi11a.html>`_, JMLR 2011.) On the CPU the bits are those of
    ``torch.optim.Adagrad(fused=True)``; with ``fused=False``, and elsewhere, those of
    ``torch.optim.Adagrad()``.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        lr_decay: η, 0 or more.
        weight_decay: λ, 0 or more.
        initial_accumulator_value: s₀, 0 or more.
        eps: ε, 0 or more; keeps the quotient finite.
        maximize: climb instead of descending.
        fused: use torch's fused kernel for the CPU: None where it fits, True always, False never.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is complex or no floating-point tensor, the gradients or the state do not fit the
            parameters, or ``fused=True`` where torch has no such kernel.

    Example:
        >>> optimizer = adagrad(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"], state.sum["w"]
        (tensor([0.9000, 2.1000]), tensor([ 9., 16.]))
    """
    check_rate("adagrad", "lr", lr)
    check_number("adagrad", "lr_decay", lr_decay)
    check_number("adagrad", "weight_decay", weight_decay)
    check_number("adagrad", "initial_accumulator_value", initial_accumulator_value)
    check_number("adagrad", "eps", eps)

    def first(param: Tensor) -> Tensor:
        if isinstance(initial_accumulator_value, Tensor):
            return torch.zeros_like(param) + initial_accumulator_value.to(param)
        return torch.full_like(param, initial_accumulator_value)

    def scalars(h: Values, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"rate": h.lr / (1 + (vectors["step"] - 1) * h.lr_decay)}

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        grad = decayed(param, grad, h)
        total = slots[0] + grad * grad
        return param - h.rate * grad / (square_root(total) + h.eps), total

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        steps = counts_before(vectors["step"])
        _torch_adagrad(params, grads, slots[0], steps, maximize=maximize, **h)

    def fused_kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        steps = each(vectors["step"])
        torch._fused_adagrad_(params, grads, slots[0], steps, maximize=maximize, **h)

    return leafwise(
        "adagrad",
        AdagradState,
        formula,
        {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps},
        slots={"sum": first},
        vectors={"step": 0.0},
        scalars=scalars,
        kernel=kernel,
        fused_kernel=fused_kernel,
        fused=fused,
        fusable=lambda leaf: on_cpu_or_gpu(leaf) and not leaf.is_cuda,
        maximize=maximize,
    )
