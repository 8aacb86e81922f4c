"""Gradient descent along the gradient itself, its running mean, or what is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as _torch_sgd

from puretrain.errors import OptimizerError
from puretrain.optim.base import Optimizer, Schedule, check_number, check_rate
from puretrain.optim.leafwise import Column, decayed, fusable, is_zero, leafwise, zeros
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
    r"""Stochastic gradient descent.

    Example:
        >>> optimizer = sgd(lr=0.5, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     params, state = optimizer.update({"w": torch.tensor([1.0, -1.0])}, state, params)
        >>> params["w"], state.momentum_buffer["w"]
        (tensor([-0.4500,  3.4500]), tensor([ 1.9000, -1.9000]))
    """
    heavy = not is_zero(momentum)

    def scalars(h: SimpleNamespace, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"first": vectors["step"] == 1} if heavy else {}

    def formula(
        param: Tensor, grad: Tensor, *buffer: Tensor, h: SimpleNamespace
    ) -> tuple[Tensor, ...]:
        grad = decayed(param, grad, h)
        for old in buffer:
            new = torch.where(
                h.first.bool(), grad, h.momentum * old + (1 - h.dampening) * grad
            )
            buffer = (new,)
            grad = grad + h.momentum * new if nesterov else new
        return param - h.lr * grad, *buffer

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: SimpleNamespace,
    ) -> None:
        firsts = [step == 1 for step in vectors["step"].tolist()] if heavy else [False] * len(params)
        for first in set(firsts):
            if all(f == first for f in firsts):
                part = params, grads, *slots
            else:
                part = tuple(
                    [x for x, f in zip(column, firsts, strict=True) if f == first]
                    for column in (params, grads, *slots)
                )
            descend(part[0], part[1], part[2] if heavy else [], first, h)

    def descend(params: Column, grads: Column, buffer: Column, first: bool, h: SimpleNamespace) -> None:
        if fused or (fused is None and fusable(params, grads, [buffer] if heavy else [], ("cpu", "cuda"))):
            torch._fused_sgd_(
                params, grads, buffer, weight_decay=h.weight_decay, momentum=h.momentum, lr=h.lr,
                dampening=h.dampening, nesterov=nesterov, maximize=maximize, is_first_step=first,
            )
            return
        held: list[Tensor | None] = [None] * len(params) if first or not heavy else list(buffer)
        _torch_sgd(
            params, grads, held, weight_decay=h.weight_decay, momentum=h.momentum, lr=h.lr,
            dampening=h.dampening, nesterov=nesterov, maximize=maximize,
        )
        if first and heavy:
            for old, new in zip(buffer, held, strict=True):
                old.copy_(new)

    return leafwise(
        "sgd",
        SGDState,
        formula,
        {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay},
        slots={"momentum_buffer": zeros} if heavy else {},
        vectors={"step": 0.0} if heavy else {},
        scalars=scalars,
        kernel=kernel,
        maximize=maximize,
    )
