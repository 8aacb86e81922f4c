"""Metrics of scores over all thresholds: curves, and the areas under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.metrics.functional.inputs import (
    DataType,
    format_classification,
    has_class_scores,
)
from puretrain.lightning.utilities.distributed import rank_zero_warn

__all__ = [
    "auc",
    "auroc",
    "average_precision",
    "multiclass_auroc",
    "precision_recall_curve",
    "roc",
]

Curves = tuple[Any, Any, Any]


def _cumulative(
    preds: Tensor, target: Tensor, sample_weights: Any, pos_label: int
) -> tuple[Tensor, Tensor, Tensor]:
    """False and true positives at each distinct score as threshold, the largest first."""
    preds, target = preds.flatten(), target.flatten()
    order = torch.argsort(preds, descending=True, stable=True)
    preds = preds[order]
    positive = (target[order] == pos_label).long()
    changes = torch.where(preds[1:] != preds[:-1])[0]
    last = torch.tensor([len(preds) - 1], device=preds.device)
    places = torch.cat([changes, last])
    if sample_weights is None:
        true = positive.cumsum(0)[places]
        return 1 + places - true, true, preds[places]
    weights = torch.as_tensor(sample_weights, dtype=torch.float, device=preds.device)
    weights = weights.flatten()[order]
    true = (positive * weights).cumsum(0)[places]
    return ((1 - positive) * weights).cumsum(0)[places], true, preds[places]


def curve_inputs(
    preds: Tensor, target: Tensor, num_classes: int | None = None, pos_label: int | None = None
) -> tuple[Tensor, Tensor, int, int | None]:
    """Scores ``(N,)`` or ``(N, C)``, classes ``(N,)``, the number of classes, the positive one."""
    if not has_class_scores(preds, target):
        if num_classes is not None and num_classes != 1:
            raise ValueError(
                "Preds and target have equal shape, but number of classes is different from 1."
            )
        if pos_label is None:
            rank_zero_warn("`pos_label` automatically set 1.")
            pos_label = 1
        return preds.flatten(), target.flatten(), 1, pos_label
    if pos_label is not None:
        rank_zero_warn(
            "Argument `pos_label` should be `None` when running multiclass precision recall"
            f" curve. Got {pos_label}"
        )
    classes = preds.shape[1]
    if num_classes not in (None, classes):
        raise ValueError(
            f"Argument `num_classes` was set to {num_classes} in"
            f" metric `precision_recall_curve` but detected {classes}"
            " number of classes from predictions"
        )
    preds = preds.transpose(0, 1).reshape(classes, -1).transpose(0, 1)
    return preds, target.flatten(), classes, None


def _of_classes(
    function: Any, preds: Tensor, target: Tensor, num_classes: int, sample_weights: Any
) -> Curves:
    found = [
        function(preds[:, label], target, 1, label, sample_weights) for label in range(num_classes)
    ]
    first, second, third = (list(column) for column in zip(*found, strict=True))
    return first, second, third


def roc_of(
    preds: Tensor,
    target: Tensor,
    num_classes: int,
    pos_label: int | None,
    sample_weights: Any = None,
) -> Curves:
    """See :func:`roc`."""
    if num_classes > 1:
        return _of_classes(roc_of, preds, target, num_classes, sample_weights)
    label = 1 if pos_label is None else pos_label
    false, true, thresholds = _cumulative(preds, target, sample_weights, label)
    # a threshold above all scores, at which nothing is positive
    zero = torch.zeros(1, dtype=true.dtype, device=true.device)
    false, true = torch.cat([zero.to(false.dtype), false]), torch.cat([zero, true])
    thresholds = torch.cat([thresholds[0][None] + 1, thresholds])
    if false[-1] <= 0:
        raise ValueError(
            "No negative samples in targets, false positive value should be meaningless"
        )
    if true[-1] <= 0:
        raise ValueError(
            "No positive samples in targets, true positive value should be meaningless"
        )
    return false / false[-1], true / true[-1], thresholds


def roc(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    pos_label: int | None = None,
    sample_weights: Sequence[float] | None = None,
) -> Curves:
    """The receiver operating characteristic.

    Args:
        preds: scores ``(N, ...)`` of binary data, or ``(N, C, ...)``.
        target: the true classes ``(N, ...)``.
        num_classes: the number of classes C.
        pos_label: the positive class of binary data, by default 1.
        sample_weights: of the samples.

    Returns:
        The false positive rates, the true positive rates and the thresholds, from the highest; for
        several classes, lists of these.

    >>> roc(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0, 1, 1, 1]), pos_label=1)[1]
    tensor([0.0000, 0.3333, 0.6667, 1.0000, 1.0000])
    """
    preds, target, num_classes, pos_label = curve_inputs(preds, target, num_classes, pos_label)
    return roc_of(preds, target, num_classes, pos_label, sample_weights)


def precision_recall_curve_of(
    preds: Tensor,
    target: Tensor,
    num_classes: int,
    pos_label: int | None,
    sample_weights: Any = None,
) -> Curves:
    """See :func:`precision_recall_curve`."""
    if num_classes > 1:
        return _of_classes(precision_recall_curve_of, preds, target, num_classes, sample_weights)
    label = 1 if pos_label is None else pos_label
    false, true, thresholds = _cumulative(preds, target, sample_weights, label)
    precision, recall = true / (true + false), true / true[-1]
    # lower thresholds than that of full recall only lose precision
    end = int(torch.where(true == true[-1])[0][0]) + 1
    one = torch.ones(1, dtype=precision.dtype, device=precision.device)
    return (
        torch.cat([precision[:end].flip(0), one]),
        torch.cat([recall[:end].flip(0), torch.zeros_like(one)]),
        thresholds[:end].flip(0),
    )


def precision_recall_curve(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    pos_label: int | None = None,
    sample_weights: Sequence[float] | None = None,
) -> Curves:
    """Precision and recall at all thresholds; the arguments are those of :func:`roc`.

    Returns:
        The precisions and the recalls, which end with 1 and 0, and the thresholds, from the lowest;
        for several classes, lists of these.

    >>> scores, target = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0, 1, 1, 0])
    >>> precision_recall_curve(scores, target, pos_label=1)[0]
    tensor([0.6667, 0.5000, 0.0000, 1.0000])
    """
    preds, target, num_classes, pos_label = curve_inputs(preds, target, num_classes, pos_label)
    return precision_recall_curve_of(preds, target, num_classes, pos_label, sample_weights)


def average_precision_of(
    preds: Tensor,
    target: Tensor,
    num_classes: int,
    pos_label: int | None,
    sample_weights: Any = None,
) -> Any:
    """See :func:`average_precision`."""
    precision, recall, _ = precision_recall_curve_of(
        preds, target, num_classes, pos_label, sample_weights
    )
    if num_classes == 1:
        return -torch.sum((recall[1:] - recall[:-1]) * precision[:-1])
    pairs = zip(precision, recall, strict=True)
    return [-torch.sum((r[1:] - r[:-1]) * p[:-1]) for p, r in pairs]


def average_precision(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    pos_label: int | None = None,
    sample_weights: Sequence[float] | None = None,
) -> Any:
    """The mean of the precisions, weighted by the gain in recall; arguments as for :func:`roc`.

    Returns:
        A tensor, or for several classes a list of tensors.

    >>> scores, target = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0, 1, 1, 1])
    >>> average_precision(scores, target, pos_label=1)
    tensor(1.)
    """
    preds, target, num_classes, pos_label = curve_inputs(preds, target, num_classes, pos_label)
    return average_precision_of(preds, target, num_classes, pos_label, sample_weights)


def auc_inputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors of the same length."""
    x = x.squeeze() if x.ndim > 1 else x
    y = y.squeeze() if y.ndim > 1 else y
    if x.ndim > 1 or y.ndim > 1:
        raise ValueError(
            "Expected both `x` and `y` tensor to be 1d, but got tensors with dimention"
            f" {x.ndim} and {y.ndim}"
        )
    if x.numel() != y.numel():
        raise ValueError(
            "Expected the same number of elements in `x` and `y` tensor but received"
            f" {x.numel()} and {y.numel()}"
        )
    return x, y


def auc(x: Tensor, y: Tensor, reorder: bool = False) -> Tensor:
    """The area under a curve, by trapezoids.

    Args:
        x: the positions, all rising or all falling.
        y: the heights.
        reorder: whether to sort by position first.

    Raises:
        ValueError: the positions neither rise nor fall.

    >>> auc(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 2]))
    tensor(4.)
    """
    x, y = auc_inputs(x, y)
    if reorder:
        order = torch.argsort(x, stable=True)
        x, y = x[order], y[order]
    steps = x[1:] - x[:-1]
    direction = 1.0
    if (steps < 0).any():
        if not (steps <= 0).all():
            raise ValueError(
                "The `x` tensor is neither increasing or decreasing."
                " Try setting the reorder argument to `True`."
            )
        direction = -1.0
    return torch.trapezoid(y.float(), x.float()) * direction


def auroc_mode(preds: Tensor, target: Tensor) -> DataType:
    """The kind of data, from scores and classes."""
    _, _, kind = format_classification(preds, target)
    return kind


def check_average(average: str | None) -> None:
    """Refuse averages that do not exist."""
    if average not in (None, "none", "macro", "weighted", "micro"):
        raise ValueError(
            "Argument `average` expected to be one of the following:"
            f" (None, 'macro', 'weighted', 'micro') but got {average}"
        )


def auroc_of(
    preds: Tensor,
    target: Tensor,
    mode: DataType,
    num_classes: int | None,
    pos_label: int | None,
    average: str | None,
    max_fpr: float | None,
    sample_weights: Any = None,
) -> Tensor:
    """See :func:`auroc`."""
    check_average(average)
    if max_fpr is not None and (mode != DataType.BINARY or not 0 < max_fpr <= 1):
        raise ValueError(
            "Partial AUC computation not available in multilabel/multiclass setting,"
            " and 'max_fpr' must be in (0, 1]; got " + repr(max_fpr)
        )
    if mode == DataType.MULTILABEL and average == "micro":
        preds, target, mode = preds.flatten(), target.flatten(), DataType.BINARY
    if mode == DataType.BINARY or preds.ndim == 1:
        false, true, _ = roc_of(preds.flatten(), target.flatten(), 1, pos_label, sample_weights)
        if max_fpr is None or max_fpr == 1:
            return auc(false, true)
        return _partial_auc(false, true, max_fpr)
    if mode == DataType.MULTILABEL:
        count = preds.shape[1]
        columns = [
            roc_of(preds[:, c].flatten(), target[:, c].flatten(), 1, 1, sample_weights)
            for c in range(count)
        ]
        support = target.transpose(0, 1).reshape(count, -1).sum(dim=1)
    else:
        if num_classes is None:
            raise ValueError(
                "Detected input to `multiclass` but you did not provide `num_classes` argument"
            )
        if average == "micro":
            raise ValueError("average 'micro' is for binary data and for several labels")
        preds, target, num_classes, _ = curve_inputs(preds, target, num_classes)
        columns = [roc_of(preds[:, c], target, 1, c, sample_weights) for c in range(num_classes)]
        support = torch.bincount(target.long(), minlength=num_classes)
    areas = torch.stack([auc(false, true) for false, true, _ in columns])
    if average in (None, "none"):
        return areas
    if average == "macro":
        return areas.mean()
    return torch.sum(areas * support / support.sum())


def _partial_auc(false: Tensor, true: Tensor, max_fpr: float) -> Tensor:
    """The area up to a false positive rate, scaled to 0.5 for chance and 1 at best.

    McClish, "Analyzing a portion of the ROC curve" (1989).
    """
    limit = torch.tensor(max_fpr, device=false.device, dtype=false.dtype)
    stop = int(torch.searchsorted(false, limit, right=True))
    weight = (limit - false[stop - 1]) / (false[stop] - false[stop - 1])
    height = torch.lerp(true[stop - 1], true[stop], weight)
    area = auc(torch.cat([false[:stop], limit[None]]), torch.cat([true[:stop], height[None]]))
    smallest, largest = 0.5 * limit**2, limit
    return 0.5 * (1 + (area - smallest) / (largest - smallest))


def auroc(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    pos_label: int | None = None,
    average: str | None = "macro",
    max_fpr: float | None = None,
    sample_weights: Sequence[float] | None = None,
) -> Tensor:
    """The area under the receiver operating characteristic.

    Args:
        preds: probabilities ``(N,)`` of binary data or ``(N, C)`` of several labels, or scores
            ``(N, C, ...)`` of classes.
        target: the true classes ``(N, ...)``, or with several labels zeros and ones ``(N, C)``.
        num_classes: the number of classes C.
        pos_label: the positive class of binary data, by default 1.
        average: of the classes: ``macro``, ``weighted`` by their support, None for each, and for
            several labels ``micro``.
        max_fpr: for binary data, only the area up to this false positive rate, scaled as McClish
            (1989) does.
        sample_weights: of the samples.

    >>> auroc(torch.tensor([0.13, 0.26, 0.08, 0.19, 0.34]), torch.tensor([0, 0, 1, 1, 1]))
    tensor(0.5000)
    """
    mode = auroc_mode(preds, target)
    return auroc_of(preds, target, mode, num_classes, pos_label, average, max_fpr, sample_weights)


def multiclass_auroc(
    pred: Tensor,
    target: Tensor,
    sample_weight: Sequence[float] | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """The mean of the areas of the classes, from their probabilities.

    Raises:
        ValueError: the probabilities of a sample do not sum to 1, or a class does not occur.
    """
    if not torch.allclose(pred.sum(dim=1), torch.ones(1, dtype=pred.dtype, device=pred.device)):
        raise ValueError(
            "Multiclass AUROC metric expects the target scores to be"
            " probabilities, i.e. they should sum up to 1.0 over classes"
        )
    if torch.unique(target).numel() != pred.shape[1]:
        raise ValueError(
            f"Number of classes found in in 'target' ({torch.unique(target).numel()})"
            f" does not equal the number of columns in 'pred' ({pred.shape[1]})."
            " Multiclass AUROC is not defined when all of the classes do not"
            " occur in the target labels."
        )
    if num_classes is not None and num_classes != pred.shape[1]:
        raise ValueError(
            f"Number of classes deduced from 'pred' ({pred.shape[1]}) does not equal"
            f" the number of classes passed in 'num_classes' ({num_classes})."
        )
    return auroc(pred, target, pred.shape[1], average="macro", sample_weights=sample_weight)
