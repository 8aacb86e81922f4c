"""Forms of labels, and ways to make one number out of several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.utilities.distributed import rank_zero_warn

__all__ = [
    "METRIC_EPS",
    "class_reduce",
    "dim_zero_cat",
    "dim_zero_mean",
    "dim_zero_sum",
    "get_num_classes",
    "reduce",
    "select_topk",
    "to_categorical",
    "to_onehot",
]

METRIC_EPS = 1e-6


def dim_zero_cat(x: Any) -> Tensor:
    """Join tensors along their first dimension; numbers count as tensors of one element."""
    parts = x if isinstance(x, (list, tuple)) else [x]
    return torch.cat([part.unsqueeze(0) if part.dim() == 0 else part for part in parts], dim=0)


def dim_zero_sum(x: Tensor) -> Tensor:
    """The sum over the first dimension."""
    return torch.sum(x, dim=0)


def dim_zero_mean(x: Tensor) -> Tensor:
    """The mean over the first dimension."""
    return torch.mean(x, dim=0)


def to_onehot(label_tensor: Tensor, num_classes: int | None = None) -> Tensor:
    """Labels as vectors with a 1 at their class.

    Args:
        label_tensor: integers of shape ``(N, ...)``.
        num_classes: the number of classes C; by default one more than the largest label.

    Returns:
        int64 of shape ``(N, C, ...)``.

    >>> to_onehot(torch.tensor([1, 2]))
    tensor([[0, 1, 0],
            [0, 0, 1]])
    """
    if num_classes is None:
        num_classes = int(label_tensor.max().item() + 1)
    shape = label_tensor.shape
    empty = torch.zeros(
        shape[0], num_classes, *shape[1:], dtype=label_tensor.dtype, device=label_tensor.device
    )
    index = label_tensor.long().unsqueeze(1)
    return empty.scatter_(1, index, 1)


def to_categorical(x: Tensor, argmax_dim: int = 1) -> Tensor:
    """The class of the largest score.

    >>> to_categorical(torch.tensor([[0.2, 0.5], [0.9, 0.1]]))
    tensor([1, 0])
    """
    return torch.argmax(x, dim=argmax_dim)


def select_topk(prob_tensor: Tensor, topk: int = 1, dim: int = 1) -> Tensor:
    """A 1 at the largest scores, and 0 elsewhere.

    >>> select_topk(torch.tensor([[1.1, 2.0, 3.0]]), topk=2)
    tensor([[0, 1, 1]], dtype=torch.int32)
    """
    chosen = torch.zeros_like(prob_tensor, dtype=torch.int32)
    if topk == 1:  # argmax takes the first of equal scores, topk any
        return chosen.scatter_(dim, prob_tensor.argmax(dim=dim, keepdim=True), 1)
    return chosen.scatter_(dim, prob_tensor.topk(k=topk, dim=dim).indices, 1)


def get_num_classes(pred: Tensor, target: Tensor, num_classes: int | None = None) -> int:
    """The given number of classes, or one more than the largest label of both.

    Warns if the given one is another.
    """
    found = int(max(pred.max(), target.max()).item()) + 1
    if num_classes is None:
        return found
    if num_classes != found:
        rank_zero_warn(
            f"You have set {num_classes} number of classes which is"
            f" different from predicted ({int(pred.max()) + 1}) and"
            f" target ({int(target.max()) + 1}) number of classes",
            category=RuntimeWarning,
        )
    return num_classes


def reduce(to_reduce: Tensor, reduction: str) -> Tensor:
    """The mean (``elementwise_mean``), the ``sum``, or the tensor itself (``none``).

    Raises:
        ValueError: the reduction is none of these.
    """
    if reduction == "elementwise_mean":
        return torch.mean(to_reduce)
    if reduction == "none":
        return to_reduce
    if reduction == "sum":
        return torch.sum(to_reduce)
    raise ValueError("Reduction parameter unknown.")


def class_reduce(
    num: Tensor, denom: Tensor, weights: Tensor, class_reduction: str | None = "none"
) -> Tensor:
    """Fractions of the classes as one; a class whose fraction is 0/0 counts as 0.

    Args:
        num: the numerators.
        denom: the denominators.
        weights: of the classes, for ``weighted``.
        class_reduction: ``micro`` for the sum of the numerators over that of the denominators,
            ``macro`` for the mean, ``weighted`` for the weighted mean, ``none`` for all.

    Raises:
        ValueError: the reduction is none of these.
    """
    fraction = num.sum() / denom.sum() if class_reduction == "micro" else num / denom
    fraction = torch.where(fraction.isnan(), torch.zeros_like(fraction), fraction)
    if class_reduction in ("micro", "none", None):
        return fraction
    if class_reduction == "macro":
        return fraction.mean()
    if class_reduction == "weighted":
        return torch.sum(fraction * (weights.to(fraction.dtype) / weights.sum()))
    raise ValueError(
        f"Reduction parameter {class_reduction} unknown."
        " Choose between one of these: ('micro', 'macro', 'weighted', 'none', None)"
    )


def _check_same_shape(pred: Tensor, target: Tensor) -> None:
    if pred.shape != target.shape:
        raise RuntimeError("Predictions and targets are expected to have the same shape")
