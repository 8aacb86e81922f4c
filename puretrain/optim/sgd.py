"""Gradient descent along the gradient itself, its running mean, or what is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd as _torch_sgd

from puretrain.errors import OptimizerError
from puretrain.optim.base import Optimizer, Schedule, check_number, check_rate
from puretrain.optim.leafwise import (
    Column,
    Values,
    decayed,
    is_zero,
    leafwise,
    on_cpu_or_gpu,
    zeros,
)
from puretrain.tree import Record

__all__ = ["SGDState", "sgd"]


class SGDState(Record):
    """The state of :func:`sgd`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    step: Tensor | None
    """Updates of each leaf, in the order of the leaves; float32 of shape ``(leaves,)``. None
    without momentum."""
    momentum_buffer: Any
    """The sum of the gradients so far, a tree like the parameters; None without momentum."""


def sgd(
    lr: float | Tensor | Schedule = 1e-3,
    momentum: float | Tensor = 0.0,
    dampening: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    r"""Stochastic gradient descent, with or without momentum.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1} \\
        b_1 &= g_1, \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t \\
        \theta_t &= \theta_{t-1} - \gamma \begin{cases}
            g_t + \mu b_t & \text{with Nesterov} \\
            b_t & \text{otherwise}
        \end{cases}

    (Robbins & Monro, `A stochastic approximation method
    <https://doi.org/10.1214/aoms/1177729586>`_, 1951; Sutskever et al., `On the importance of
    initialization and momentum <https://proceedings.mlr.press/v28/sutskever13.html>`_, ICML 2013.)
    The bits are those of ``torch.optim.SGD(fused=True)``; those of ``torch.optim.SGD()`` with
    ``fused=False``, and for 16-bit parameters on the CPU, where torch's fused kernel is wrong.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        momentum: μ, 0 or more. Given as a tensor, there is a buffer for it even if it is 0.
        dampening: τ, which weakens every gradient but the first.
        weight_decay: λ, 0 or more.
        nesterov: look ahead; wants a momentum, and no dampening.
        maximize: climb instead of descending.
        fused: use torch's fused kernel: None where there is one, True always, False never.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is complex or no floating-point tensor, the gradients or the state do not fit the
            parameters, or ``fused=True`` where torch has no such kernel.

    Example:
        >>> optimizer = sgd(lr=0.5, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     params, state = optimizer.update({"w": torch.tensor([1.0, -1.0])}, state, params)
        >>> params["w"], state.momentum_buffer["w"]
        (tensor([-0.4500,  3.4500]), tensor([ 1.9000, -1.9000]))
    """
    check_rate("sgd", "lr", lr)
    check_number("sgd", "momentum", momentum)
    check_number("sgd", "dampening", dampening, least=-math.inf)
    check_number("sgd", "weight_decay", weight_decay)
    heavy = not is_zero(momentum)
    if nesterov and not (heavy and (isinstance(dampening, Tensor) or dampening == 0)):
        raise OptimizerError(
            "sgd: nesterov=True needs a momentum greater than 0 and a dampening of 0, not "
            f"momentum={momentum!r} and dampening={dampening!r}"
        )

    def scalars(h: Values, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"first": vectors["step"] == 1} if heavy else {}

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        grad = decayed(param, grad, h)
        if not heavy:
            return (param - h.lr * grad,)
        (old,) = slots
        buffer = torch.where(h.first.bool(), grad, h.momentum * old + (1 - h.dampening) * grad)
        step = grad + h.momentum * buffer if nesterov else buffer
        if isinstance(h.momentum, Tensor):
            moves = h.momentum != 0  # as in torch: without momentum no dampening, no buffer
            step, buffer = torch.where(moves, step, grad), torch.where(moves, buffer, old)
        return param - h.lr * step, buffer

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        for first, part in by_age(params, grads, slots, vectors, h):
            held: list[Tensor | None] = [None] * len(part[0])
            if h.momentum != 0 and not first:
                held = [*part[2]]
            _torch_sgd(part[0], part[1], held, nesterov=nesterov, maximize=maximize, **h)
            if first:
                for old, new in zip(part[2], held, strict=True):
                    old.copy_(cast(Tensor, new))

    def fused_kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        options = {"nesterov": nesterov, "maximize": maximize, **h}
        for first, part in by_age(params, grads, slots, vectors, h):
            torch._fused_sgd_(*part, is_first_step=first, **options)

    def by_age(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> Iterator[tuple[bool, tuple[Column, Column, Column]]]:
        """The leaves that begin and those that have a momentum: a kernel takes one kind."""
        if h.momentum == 0:
            yield False, (params, grads, [])
            return
        firsts = [step == 1 for step in vectors["step"].tolist()]
        for first in sorted(set(firsts)):
            chosen = [f is first for f in firsts]
            weights, slopes, buffer = (
                list(compress(column, chosen)) for column in (params, grads, *slots)
            )
            yield first, (weights, slopes, buffer)

    def fusable(leaf: Tensor) -> bool:
        # For 16-bit numbers on the CPU torch's fused kernel is wrong up to torch 2.13 at least: it
        # leaves most elements as they are (pytorch issue 191763).
        return on_cpu_or_gpu(leaf) and (
            leaf.is_cuda or leaf.dtype in (torch.float32, torch.float64)
        )

    return leafwise(
        "sgd",
        SGDState,
        formula,
        {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay},
        slots={"momentum_buffer": zeros} if heavy else {},
        vectors={"step": 0.0} if heavy else {},
        scalars=scalars,
        kernel=kernel,
        fused_kernel=fused_kernel,
        fused=fused,
        fusable=fusable,
        maximize=maximize,
    )
