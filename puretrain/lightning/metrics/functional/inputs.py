"""The forms in which predictions and targets of a classification come, brought into one."""

from __future__ import annotations

import torch
from torch import Tensor

from puretrain.lightning.metrics.utils import select_topk, to_onehot
from puretrain.lightning.utilities.enums import LightningEnum

__all__ = [
    "DataType",
    "check_threshold",
    "format_classification",
    "format_one_hot",
    "has_class_scores",
]


class DataType(LightningEnum):
    """The kinds of classification."""

    BINARY = "binary"
    MULTILABEL = "multi-label"
    MULTICLASS = "multi-class"
    MULTIDIM_MULTICLASS = "multi-dim multi-class"


def has_class_scores(preds: Tensor, target: Tensor) -> bool:
    """Whether predictions have a dimension more than the targets, that of the classes.

    Raises:
        ValueError: the numbers of dimensions do not fit.
    """
    if preds.ndim not in (target.ndim, target.ndim + 1):
        raise ValueError(
            "preds and target must have same number of dimensions,"
            " or one additional dimension for preds"
        )
    return preds.ndim > target.ndim


def check_threshold(threshold: float) -> None:
    """Refuse thresholds that are no probability, or leave no choice."""
    if not 0 < threshold < 1:
        raise ValueError(
            f"The `threshold` should be a float in the (0,1) interval, got {threshold}"
        )


def _squeezed(tensor: Tensor) -> Tensor:
    """Without dimensions of length 1, except the first."""
    return tensor.squeeze().unsqueeze(0) if tensor.shape[:1] == (1,) else tensor.squeeze()


def _kind(preds: Tensor, target: Tensor) -> tuple[DataType, int]:
    """The kind of classification, and the number of classes that the shapes imply."""
    scores = preds.is_floating_point()
    if preds.ndim == target.ndim:
        if preds.shape != target.shape:
            raise ValueError(
                "The `preds` and `target` should have the same shape,"
                f" got `preds` with shape={preds.shape} and `target` with shape={target.shape}."
            )
        if scores and target.numel() and target.max() > 1:
            raise ValueError(
                "If `preds` and `target` are of shape (N, ...) and `preds` are floats,"
                " `target` should be binary."
            )
        if preds.ndim <= 1:
            return (DataType.BINARY if scores else DataType.MULTICLASS), 1
        kind = DataType.MULTILABEL if scores else DataType.MULTIDIM_MULTICLASS
        return kind, preds[0].numel() if len(preds) else 0
    if preds.ndim == target.ndim + 1:
        if not scores:
            raise ValueError(
                "If `preds` have one dimension more than `target`,"
                " `preds` should be a float tensor."
            )
        if preds.shape[2:] != target.shape[1:]:
            raise ValueError(
                "If `preds` have one dimension more than `target`, the shape of `preds` should be"
                " (N, C, ...), and the shape of `target` should be (N, ...)."
            )
        kind = DataType.MULTICLASS if preds.ndim == 2 else DataType.MULTIDIM_MULTICLASS
        return kind, preds.shape[1]
    raise ValueError(
        "Either `preds` and `target` both should have the (same) shape (N, ...), or `target`"
        " should be (N, ...) and `preds` should be (N, C, ...)."
    )


def _check(
    preds: Tensor,
    target: Tensor,
    kind: DataType,
    implied: int,
    threshold: float,
    num_classes: int | None,
    is_multiclass: bool | None,
    top_k: int | None,
) -> None:
    if target.is_floating_point():
        raise ValueError("The `target` has to be an integer tensor.")
    if target.numel() and target.min() < 0:
        raise ValueError("The `target` has to be a non-negative tensor.")
    scores = preds.is_floating_point()
    if not scores and preds.numel() and preds.min() < 0:
        raise ValueError("If `preds` are integers, they have to be non-negative.")
    # scores of classes are compared with each other, and need not be probabilities
    if kind in (DataType.BINARY, DataType.MULTILABEL) and preds.numel():
        if preds.min() < 0 or preds.max() > 1:
            raise ValueError(
                "The `preds` should be probabilities, but values were detected outside of [0,1]"
                " range."
            )
        check_threshold(threshold)
    if is_multiclass is False and target.numel() and target.max() > 1:
        raise ValueError("If you set `is_multiclass=False`, then `target` should be binary.")
    several = kind in (DataType.MULTICLASS, DataType.MULTIDIM_MULTICLASS)
    if num_classes and several and scores and num_classes != implied:
        raise ValueError("The size of C dimension of `preds` does not match `num_classes`.")
    if num_classes and several and target.numel() and is_multiclass is not False:
        largest = target.max() if scores else torch.maximum(target.max(), preds.max().to(target))
        if num_classes > 1 and largest >= num_classes:
            raise ValueError(
                "The highest label in `preds` or `target` should be smaller than `num_classes`."
            )
    if top_k is not None:
        if kind == DataType.BINARY:
            raise ValueError("You can not use `top_k` parameter with binary data.")
        if not isinstance(top_k, int) or top_k <= 0:
            raise ValueError("The `top_k` has to be an integer larger than 0.")
        if not scores:
            raise ValueError("You have set `top_k`, but you do not have probability predictions.")
        if several and top_k >= implied:
            raise ValueError(
                "The `top_k` has to be strictly smaller than the `C` dimension of `preds`."
            )


def format_classification(
    preds: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    top_k: int | None = None,
    num_classes: int | None = None,
    is_multiclass: bool | None = None,
) -> tuple[Tensor, Tensor, DataType]:
    """Bring predictions and targets into the form of zeros and ones.

    Args:
        preds: classes ``(N, ...)``, probabilities of being positive ``(N, ...)``, or scores of
            classes ``(N, C, ...)``.
        target: the true classes ``(N, ...)``.
        threshold: from which probability on something is positive.
        top_k: how many of the largest scores count as predicted; by default 1.
        num_classes: the number of classes C, where the shapes don't tell.
        is_multiclass: True reads binary data as that of two classes, False that of two classes as
            binary.

    Returns:
        Both as ``(N, C)`` or ``(N, C, X)``, int32, and the kind of the data.

    Raises:
        ValueError: shapes, types or values do not fit.
    """
    preds, target = _squeezed(preds), _squeezed(target)
    if preds.dtype in (torch.float16, torch.bfloat16):
        preds = preds.float()
    if preds.shape[:1] != target.shape[:1]:
        raise ValueError("The `preds` and `target` should have the same first dimension.")
    if preds.dtype == torch.bool:
        preds = preds.int()
    target = target.int() if target.dtype == torch.bool else target
    if target.is_floating_point():
        raise ValueError("The `target` has to be an integer tensor.")
    kind, implied = _kind(preds, target)
    _check(preds, target, kind, implied, threshold, num_classes, is_multiclass, top_k)
    several = kind in (DataType.MULTICLASS, DataType.MULTIDIM_MULTICLASS)
    scores = preds.is_floating_point()
    if not several and not top_k:
        preds, scores = (preds >= threshold).int(), False
        num_classes = 2 if is_multiclass else num_classes
    elif kind == DataType.MULTILABEL:
        preds, scores = select_topk(preds, top_k or 1), False
    if several or is_multiclass:
        if scores:
            num_classes = preds.shape[1]
            preds = select_topk(preds, top_k or 1)
        else:
            if not num_classes:
                num_classes = int(max(preds.max(), target.max())) + 1 if preds.numel() else 2
            preds = to_onehot(preds, max(2, num_classes))
        target = to_onehot(target, max(2, num_classes))
        if is_multiclass is False:
            preds, target = preds[:, 1, ...], target[:, 1, ...]
    if (several and is_multiclass is not False) or is_multiclass:
        preds = preds.reshape(preds.shape[0], preds.shape[1], -1)
        target = target.reshape(target.shape[0], target.shape[1], -1)
        if preds.shape[-1] == 1:
            preds, target = preds.squeeze(-1), target.squeeze(-1)
    else:
        preds = preds.reshape(preds.shape[0], -1)
        target = target.reshape(target.shape[0], -1)
    return preds.int(), target.int(), kind


def format_one_hot(
    num_classes: int | None,
    preds: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    multilabel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bring predictions and targets into the form ``(C, samples)`` of zeros and ones.

    Args:
        num_classes: the number of classes C; 1 for binary data.
        preds: classes ``(N, ...)``, probabilities ``(N, ...)``, or scores ``(N, C, ...)``.
        target: the true classes ``(N, ...)``; with several labels zeros and ones ``(N, C, ...)``.
        threshold: from which probability on something is positive.
        multilabel: whether the second dimension are labels.

    Raises:
        ValueError: the numbers of dimensions do not fit.
    """
    if has_class_scores(preds, target):
        preds = torch.argmax(preds, dim=1)
    preds = preds.long() if preds.dtype == torch.bool else preds
    if preds.is_floating_point():
        preds = (preds >= threshold).long()
        if num_classes is None:
            num_classes = preds.shape[1] if preds.ndim > 1 else 1
    elif not multilabel:
        if num_classes is None:
            num_classes = max(2, int(max(preds.max(), target.max())) + 1)
        if num_classes > 1:
            preds, target = to_onehot(preds, num_classes), to_onehot(target, num_classes)
    elif num_classes is None:
        num_classes = preds.shape[1]
    if preds.ndim > 1:
        preds, target = preds.transpose(1, 0), target.transpose(1, 0)
    return preds.reshape(num_classes, -1).long(), target.reshape(num_classes, -1).long()
