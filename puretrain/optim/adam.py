"""Adam and its relatives: a running mean of gradients over the root of one of their squares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as _torch_adam

from puretrain.optim.base import Optimizer, Schedule, check_number, check_rate
from puretrain.optim.leafwise import (
    Column,
    decayed,
    each,
    fusable,
    is_zero,
    leafwise,
    square_root,
    zeros,
)
from puretrain.tree import Record

__all__ = ["AdamState", "adam", "adamw"]


class AdamState(Record):
    """The state of :func:`adam` and :func:`adamw`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    step: Tensor
    """Updates of each leaf, in the order of the leaves; float32 of shape ``(leaves,)``."""
    exp_avg: Any
    """The running mean of the gradients, a tree like the parameters."""
    exp_avg_sq: Any
    """The running mean of their squares, a tree like the parameters."""
    max_exp_avg_sq: Any
    """The largest of those so far, with ``amsgrad``; otherwise None."""


def adamw(
    lr: float | Tensor | Schedule = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    r"""Adam with decoupled weight decay.

    Example:
        >>> optimizer = adamw(lr=0.1, weight_decay=0.0)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"]
        tensor([0.9000, 2.1000])
    """
    return _adam("adamw", lr, betas, eps, weight_decay, amsgrad, True, maximize, fused)


def adam(
    lr: float | Tensor | Schedule = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    fused: bool | None = None,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    r"""Adam."""
    return _adam(
        "adam", lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay, maximize, fused
    )


def _adam(
    name: str,
    lr: float | Tensor | Schedule,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float | Tensor,
    weight_decay: float | Tensor,
    amsgrad: bool,
    decoupled: bool,
    maximize: bool,
    fused: bool | None,
) -> Optimizer:
    fused_kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def scalars(h: SimpleNamespace, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = vectors["step"]
        return {"correction1": 1 - h.beta1**step, "correction2": 1 - h.beta2**step}

    def formula(
        param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *largest: Tensor,
        h: SimpleNamespace,
    ) -> tuple[Tensor, ...]:
        if decoupled:
            param = param - h.lr * h.weight_decay * param
        else:
            grad = decayed(param, grad, h)
        mean = h.beta1 * mean + (1 - h.beta1) * grad
        square = h.beta2 * square + (1 - h.beta2) * grad * grad
        largest = tuple(torch.maximum(old, square) for old in largest)
        root = square_root((*largest, square)[0]) / h.correction2**0.5
        param = param - h.lr / h.correction1 * mean / (root + h.eps)
        return param, mean, square, *largest

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: SimpleNamespace,
    ) -> None:
        mean, square, largest = (*slots, []) if not amsgrad else slots
        if fused or (fused is None and fusable(params, grads, slots, ("cpu", "cuda"))):
            fused_kernel(
                params, grads, mean, square, largest, each(vectors["step"]),
                lr=h.lr, beta1=h.beta1, beta2=h.beta2, weight_decay=h.weight_decay, eps=h.eps,
                amsgrad=amsgrad, maximize=maximize,
            )
            return
        _torch_adam(
            params, grads, mean, square, largest, list((vectors["step"] - 1).unbind()),
            lr=h.lr, beta1=h.beta1, beta2=h.beta2, weight_decay=h.weight_decay, eps=h.eps,
            amsgrad=amsgrad, maximize=maximize, decoupled_weight_decay=decoupled,
        )

    slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    return leafwise(
        name,
        AdamState,
        formula,
        {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay},
        slots=dict.fromkeys(slots, zeros),
        vectors={"step": 0.0},
        scalars=scalars,
        kernel=kernel,
        maximize=maximize,
    )
