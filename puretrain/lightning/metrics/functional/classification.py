"""Metrics of classes: counts of right and wrong, and what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.metrics.functional.curves import (
    auc,
    auroc,
    average_precision,
    multiclass_auroc,
    precision_recall_curve,
    roc,
)
from puretrain.lightning.metrics.functional.inputs import (
    DataType,
    format_classification,
    format_one_hot,
)
from puretrain.lightning.metrics.utils import (
    class_reduce,
    get_num_classes,
    reduce,
    to_categorical,
    to_onehot,
)
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.metrics import functional as core

__all__ = [
    "accuracy",
    "auc",
    "auroc",
    "average_precision",
    "confusion_matrix",
    "dice_score",
    "f1",
    "f1_score",
    "fbeta",
    "fbeta_score",
    "get_num_classes",
    "hamming_distance",
    "iou",
    "multiclass_auroc",
    "precision",
    "precision_recall",
    "precision_recall_curve",
    "recall",
    "roc",
    "stat_scores",
    "stat_scores_multiple_classes",
    "to_categorical",
    "to_onehot",
]

_AVERAGES = ("micro", "macro", "weighted", "samples", "none", None)
_NOT_GIVEN: Any = object()


# ── Accuracy and distance ─────────────────────────────────────────────────────────────────────────


def accuracy_counts(
    preds: Tensor, target: Tensor, threshold: float, top_k: int | None, subset_accuracy: bool
) -> tuple[Tensor, Tensor]:
    """How many predictions are right, and how many there are."""
    preds, target, kind = format_classification(preds, target, threshold=threshold, top_k=top_k)
    if kind == DataType.MULTILABEL and top_k:
        raise ValueError(
            "You can not use the `top_k` parameter to calculate accuracy for multi-label inputs."
        )
    if kind == DataType.BINARY or (kind == DataType.MULTILABEL and subset_accuracy):
        correct = (preds == target).all(dim=1).sum()
        total = torch.tensor(target.shape[0], device=target.device)
    elif kind == DataType.MULTILABEL:
        correct = (preds == target).sum()
        total = torch.tensor(target.numel(), device=target.device)
    elif kind == DataType.MULTICLASS:
        correct, total = (preds * target).sum(), target.sum()
    else:
        right = (preds * target).sum(1)
        if right.dim() == 1:
            right = right.unsqueeze(-1)
        if subset_accuracy:
            correct = (right == right.shape[1]).sum()
            total = torch.tensor(right.shape[0], device=target.device)
        else:
            correct, total = right.sum(), torch.tensor(right.numel(), device=target.device)
    return correct, total


def accuracy(
    preds: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    top_k: int | None = None,
    subset_accuracy: bool = False,
    num_classes: int | None = None,
    class_reduction: str | None = None,
    average: str | None = _NOT_GIVEN,
) -> Tensor:
    """The fraction of right predictions.

    Args:
        preds: classes ``(N, ...)``, probabilities ``(N, ...)``, or scores ``(N, C, ...)``.
        target: the true classes ``(N, ...)``.
        threshold: from which probability on something is positive.
        top_k: a prediction is right if the true class is among so many largest scores.
        subset_accuracy: whether a sample of several labels or places is right only as a whole.
        num_classes: the number of classes, for a reduction over them.
        class_reduction: ``micro`` for the fraction of all, ``macro``, ``weighted`` or ``none`` for
            that of each class, which is its recall.
        average: the same.

    >>> accuracy(torch.tensor([0, 2, 1, 3]), torch.tensor([0, 1, 2, 3]))
    tensor(0.5000)
    """
    average = class_reduction if average is _NOT_GIVEN else average
    if average in ("macro", "weighted", "none"):
        return recall(preds, target, average, "global", None, num_classes, threshold, top_k)
    correct, total = accuracy_counts(preds, target, threshold, top_k, subset_accuracy)
    return correct.float() / total


def hamming_counts(preds: Tensor, target: Tensor, threshold: float) -> tuple[Tensor, int]:
    """How many labels are right, and how many there are."""
    preds, target, _ = format_classification(preds, target, threshold=threshold)
    return (preds == target).sum(), preds.numel()


def hamming_distance(preds: Tensor, target: Tensor, threshold: float = 0.5) -> Tensor:
    """The fraction of wrong labels.

    >>> hamming_distance(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 1], [0, 1]]))
    tensor(0.2500)
    """
    correct, total = hamming_counts(preds, target, threshold)
    return 1 - correct.float() / total


# ── Counts of right and wrong ─────────────────────────────────────────────────────────────────────


def stat_counts(
    preds: Tensor,
    target: Tensor,
    reduce: str | None = "micro",
    mdmc_reduce: str | None = None,
    num_classes: int | None = None,
    top_k: int | None = None,
    threshold: float = 0.5,
    is_multiclass: bool | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True positives, false positives, true negatives and false negatives."""
    preds, target, _ = format_classification(
        preds, target, threshold, top_k, num_classes, is_multiclass
    )
    if ignore_index is not None and not 0 <= ignore_index < preds.shape[1]:
        raise ValueError(
            f"The `ignore_index` {ignore_index} is not valid for inputs"
            f" with {preds.shape[1]} classes"
        )
    if ignore_index is not None and preds.shape[1] == 1:
        raise ValueError("You can not use `ignore_index` with binary data.")
    if preds.ndim == 3:
        if not mdmc_reduce:
            raise ValueError(
                "When your inputs are multi-dimensional multi-class,"
                " you have to set the `mdmc_reduce` parameter"
            )
        if mdmc_reduce == "global":
            preds = preds.transpose(1, 2).reshape(-1, preds.shape[1])
            target = target.transpose(1, 2).reshape(-1, target.shape[1])
    if ignore_index is not None and reduce != "macro":
        kept = [c for c in range(preds.shape[1]) if c != ignore_index]
        preds, target = preds[:, kept], target[:, kept]
    dims = {
        "micro": (0, 1) if preds.ndim == 2 else (1, 2),
        "macro": (0,) if preds.ndim == 2 else (2,),
        "samples": (1,),
    }[reduce or "micro"]
    right, predicted = preds == target, preds == 1
    counts = (right & predicted, ~right & predicted, right & ~predicted, ~right & ~predicted)
    tp, fp, tn, fn = (count.sum(dim=dims) for count in counts)
    if ignore_index is not None and reduce == "macro":
        for count in (tp, fp, tn, fn):
            count[..., ignore_index] = -1
    return tp, fp, tn, fn


def join_stat_scores(tp: Tensor, fp: Tensor, tn: Tensor, fn: Tensor) -> Tensor:
    """The counts and the support, in a last dimension of 5; -1 where a class is ignored."""
    joined = torch.stack([tp, fp, tn, fn, tp + fn], dim=-1)
    return torch.where(joined < 0, -1, joined)


def check_stat_arguments(
    reduce: str | None,
    mdmc_reduce: str | None,
    num_classes: int | None,
    ignore_index: int | None,
) -> None:
    """Refuse reductions that do not exist or lack the number of classes."""
    if reduce not in ("micro", "macro", "samples"):
        raise ValueError(f"The `reduce` {reduce} is not valid.")
    if mdmc_reduce not in (None, "samplewise", "global"):
        raise ValueError(f"The `mdmc_reduce` {mdmc_reduce} is not valid.")
    if reduce == "macro" and (not num_classes or num_classes < 1):
        raise ValueError(
            "When you set `reduce` as 'macro', you have to provide the number of classes."
        )
    _check_ignored(num_classes, ignore_index)


def _check_ignored(num_classes: int | None, ignore_index: int | None) -> None:
    if not num_classes or ignore_index is None:
        return
    if not 0 <= ignore_index < num_classes or num_classes == 1:
        raise ValueError(
            f"The `ignore_index` {ignore_index} is not valid for inputs with {num_classes} classes"
        )


def stat_scores(
    preds: Tensor,
    target: Tensor,
    reduce: str | int | None = "micro",
    mdmc_reduce: str | None = None,
    num_classes: int | None = None,
    top_k: int | None = None,
    threshold: float = 0.5,
    is_multiclass: bool | None = None,
    ignore_index: int | None = None,
    class_index: int | None = None,
    argmax_dim: int = 1,
) -> Any:
    """True and false positives and negatives, and the support.

    Args:
        preds: classes ``(N, ...)``, probabilities ``(N, ...)``, or scores ``(N, C, ...)``.
        target: the true classes ``(N, ...)``.
        reduce: ``micro`` over all, ``macro`` for each class, ``samples`` for each sample.
        mdmc_reduce: what to do with more dimensions: ``global`` takes them for samples,
            ``samplewise`` counts in each sample.
        num_classes: the number of classes.
        top_k: how many of the largest scores count as predicted.
        threshold: from which probability on something is positive.
        is_multiclass: True reads binary data as that of two classes, False the other way round.
        ignore_index: a class that does not count.
        class_index: the older form: count for this class alone; also as the third argument.
        argmax_dim: the dimension of the classes, in the older form.

    Returns:
        int64 with a last dimension of 5: TP, FP, TN, FN and support; in the older form a tuple of
        these.

    >>> stat_scores(torch.tensor([1, 0, 2, 1]), torch.tensor([1, 1, 2, 0]), reduce="micro")
    tensor([2, 2, 6, 2, 4])
    """
    if isinstance(reduce, int) and not isinstance(reduce, bool):
        class_index, reduce = reduce, "micro"
    if class_index is not None:
        return _scores_of_class(preds, target, class_index, argmax_dim)
    check_stat_arguments(reduce, mdmc_reduce, num_classes, ignore_index)
    counts = stat_counts(preds, target, reduce, mdmc_reduce, num_classes, top_k, threshold,
                         is_multiclass, ignore_index)  # fmt: skip
    return join_stat_scores(*counts)


def _scores_of_class(
    preds: Tensor, target: Tensor, index: int, argmax_dim: int
) -> tuple[Tensor, ...]:
    if preds.ndim == target.ndim + 1:
        preds = to_categorical(preds, argmax_dim=argmax_dim)
    predicted, true = preds == index, target == index
    counts = (predicted & true, predicted & ~true, ~predicted & ~true, ~predicted & true, true)
    return tuple(count.sum() for count in counts)


def stat_scores_multiple_classes(
    pred: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    argmax_dim: int = 1,
    reduction: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """True and false positives and negatives of each class, and the support, as five vectors.

    Args:
        pred: classes, or scores with the classes in ``argmax_dim``.
        target: the true classes.
        num_classes: the number of classes; by default one more than the largest.
        argmax_dim: the dimension of the classes.
        reduction: ``none``, or ``sum`` or ``elementwise_mean`` over the classes.
    """
    if pred.ndim == target.ndim + 1:
        pred = to_categorical(pred, argmax_dim=argmax_dim)
    num_classes = get_num_classes(pred, target, num_classes)
    if reduction not in ("elementwise_mean", "none", "sum"):
        raise ValueError(
            f"reduction type {reduction} not supported,"
            " choose from 'elementwise_mean', 'none', 'sum'"
        )
    found = [_scores_of_class(pred, target, index, argmax_dim) for index in range(num_classes)]
    tp, fp, tn, fn, sup = (
        reduce(torch.stack(column).float(), reduction) for column in zip(*found, strict=True)
    )
    return tp, fp, tn, fn, sup


# ── Precision, recall, F ──────────────────────────────────────────────────────────────────────────


def reduce_fractions(
    numerator: Tensor,
    denominator: Tensor,
    weights: Tensor | None,
    average: str | None,
    mdmc_average: str | None,
    zero_division: int = 0,
) -> Tensor:
    """Fractions of classes or samples as one; a denominator below 0 marks what to leave out."""
    numerator, denominator = numerator.float(), denominator.float()
    zero, ignored = denominator == 0, denominator < 0
    weights = torch.ones_like(denominator) if weights is None else weights.float()
    numerator = torch.where(zero, float(zero_division), numerator)
    denominator = torch.where(zero | ignored, 1.0, denominator)
    weights = torch.where(ignored, 0.0, weights)
    if average not in ("micro", "none", None):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    scores = weights * (numerator / denominator)
    scores = torch.where(scores.isnan(), float(zero_division), scores)
    if mdmc_average == "samplewise":
        scores, ignored = scores.mean(dim=0), ignored.sum(dim=0).bool()
    if average in ("none", None):
        return torch.where(ignored, float("nan"), scores)
    return scores.sum()


def check_average(
    average: Any, mdmc_average: Any, num_classes: int | None, ignore_index: int | None
) -> None:
    """Refuse averages that do not exist."""
    if average not in _AVERAGES:
        raise ValueError(f"The `average` has to be one of {_AVERAGES}, got {average}.")
    if mdmc_average not in (None, "samplewise", "global"):
        raise ValueError(
            "The `mdmc_average` has to be one of (None, 'samplewise', 'global'),"
            f" got {mdmc_average}."
        )
    _check_ignored(num_classes, ignore_index)


def precision_of(tp: Tensor, fp: Tensor, fn: Tensor, average: Any, mdmc_average: Any) -> Tensor:
    """Precision from counts."""
    weights = tp + fn if average == "weighted" else None
    return reduce_fractions(tp, tp + fp, weights, average, mdmc_average)


def recall_of(tp: Tensor, fp: Tensor, fn: Tensor, average: Any, mdmc_average: Any) -> Tensor:
    """Recall from counts."""
    weights = tp + fn if average == "weighted" else None
    return reduce_fractions(tp, tp + fn, weights, average, mdmc_average)


def precision(
    preds: Tensor,
    target: Tensor,
    average: Any = "micro",
    mdmc_average: str | None = None,
    ignore_index: int | None = None,
    num_classes: int | None = None,
    threshold: float = 0.5,
    top_k: int | None = None,
    is_multiclass: bool | None = None,
    class_reduction: Any = _NOT_GIVEN,
) -> Tensor:
    """Of what was predicted as a class, the fraction that is of it: TP / (TP + FP).

    Args:
        preds: classes ``(N, ...)``, probabilities ``(N, ...)``, or scores ``(N, C, ...)``.
        target: the true classes ``(N, ...)``.
        average: ``micro`` over all, ``macro`` for the mean of the classes, ``weighted`` by their
            support, ``samples`` for the mean of the samples, ``none`` for each class. A class that
            was never predicted counts as 0.
        mdmc_average: what to do with more dimensions: ``global`` takes them for samples,
            ``samplewise`` for classes of their own in each sample.
        ignore_index: a class that does not count.
        num_classes: the number of classes.
        threshold: from which probability on something is positive.
        top_k: how many of the largest scores count as predicted.
        is_multiclass: True reads binary data as that of two classes, False the other way round.
        class_reduction: the older name of ``average``.

    >>> preds, target = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    >>> precision(preds, target, "none", num_classes=2)
    tensor([0.7500, 1.0000])
    """
    return precision_recall(preds, target, average, mdmc_average, ignore_index, num_classes,
                            threshold, top_k, is_multiclass, class_reduction)[0]  # fmt: skip


def recall(
    preds: Tensor,
    target: Tensor,
    average: Any = "micro",
    mdmc_average: str | None = None,
    ignore_index: int | None = None,
    num_classes: int | None = None,
    threshold: float = 0.5,
    top_k: int | None = None,
    is_multiclass: bool | None = None,
    class_reduction: Any = _NOT_GIVEN,
) -> Tensor:
    """Of what is of a class, the fraction that was predicted as it: TP / (TP + FN).

    The arguments are those of :func:`precision`. A class without samples counts as 0.

    >>> preds, target = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    >>> recall(preds, target, "none", num_classes=2)
    tensor([1.0000, 0.5000])
    """
    return precision_recall(preds, target, average, mdmc_average, ignore_index, num_classes,
                            threshold, top_k, is_multiclass, class_reduction)[1]  # fmt: skip


def precision_recall(
    preds: Tensor,
    target: Tensor,
    average: Any = "micro",
    mdmc_average: str | None = None,
    ignore_index: int | None = None,
    num_classes: int | None = None,
    threshold: float = 0.5,
    top_k: int | None = None,
    is_multiclass: bool | None = None,
    class_reduction: Any = _NOT_GIVEN,
) -> tuple[Tensor, Tensor]:
    """:func:`precision` and :func:`recall`, with the same arguments.

    >>> precision_recall(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), "macro", num_classes=2)
    (tensor(0.7500), tensor(0.7500))
    """
    if isinstance(average, int) and not isinstance(average, bool):
        # once the third argument was the number of classes and the fourth the reduction
        num_classes, average = average, mdmc_average or "micro"
        mdmc_average = "global"
    if class_reduction is not _NOT_GIVEN:
        average, mdmc_average = class_reduction, mdmc_average or "global"
    check_average(average, mdmc_average, num_classes, ignore_index)
    over = average if average in ("micro", "samples") else "macro"
    tp, fp, _, fn = stat_counts(preds, target, over, mdmc_average, num_classes, top_k, threshold,
                                is_multiclass, ignore_index)  # fmt: skip
    return (
        precision_of(tp, fp, fn, average, mdmc_average),
        recall_of(tp, fp, fn, average, mdmc_average),
    )


def fbeta_counts(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None,
    threshold: float = 0.5,
    multilabel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """True positives, predicted positives and actual positives of each class."""
    preds, target = format_one_hot(num_classes, preds, target, threshold, multilabel)
    return (preds * target).sum(dim=1), preds.sum(dim=1), target.sum(dim=1)


def fbeta_of(tp: Tensor, predicted: Tensor, actual: Tensor, beta: float, average: Any) -> Tensor:
    """F from counts: (1 + β²) TP / (β² actual + predicted)."""
    numerator = (1 + beta**2) * tp.float()
    denominator = beta**2 * actual.float() + predicted.float()
    return class_reduce(numerator, denominator, actual, average)


def fbeta(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    beta: float = 1.0,
    threshold: Any = 0.5,
    average: str | None = "micro",
    multilabel: bool = False,
    class_reduction: Any = _NOT_GIVEN,
) -> Tensor:
    """The weighted harmonic mean of precision and recall: (1 + β²) P R / (β² P + R).

    Args:
        preds: classes ``(N, ...)``, probabilities ``(N, ...)``, or scores ``(N, C, ...)``.
        target: the true classes ``(N, ...)``, or with several labels zeros and ones ``(N, C)``.
        num_classes: the number of classes, 1 for binary data.
        beta: how many times as much recall counts as precision.
        threshold: from which probability on something is positive.
        average: ``micro``, ``macro``, ``weighted`` or ``none``. A class that neither occurs nor is
            predicted counts as 0.
        multilabel: whether a sample can have several classes.
        class_reduction: the older name of ``average``.

    >>> fbeta(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 1, 0]), 3, beta=0.5)
    tensor(0.5000)
    """
    if isinstance(threshold, str):  # the older order of the arguments
        threshold, average = 0.5, threshold
    average = average if class_reduction is _NOT_GIVEN else class_reduction
    counts = fbeta_counts(preds, target, num_classes, threshold, multilabel)
    return fbeta_of(*counts, beta, average)


def f1(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    threshold: Any = 0.5,
    average: str | None = "micro",
    multilabel: bool = False,
    class_reduction: Any = _NOT_GIVEN,
) -> Tensor:
    """The harmonic mean of precision and recall; the arguments are those of :func:`fbeta`.

    >>> f1(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), num_classes=2, average="none")
    tensor([0.6667, 0.6667])
    """
    return fbeta(preds, target, num_classes, 1.0, threshold, average, multilabel, class_reduction)


def fbeta_score(
    pred: Tensor,
    target: Tensor,
    beta: float,
    num_classes: int | None = None,
    class_reduction: str = "micro",
) -> Tensor:
    """The older form of :func:`fbeta`."""
    return fbeta(pred, target, num_classes, beta, average=class_reduction)


def f1_score(
    pred: Tensor, target: Tensor, num_classes: int | None = None, class_reduction: str = "micro"
) -> Tensor:
    """The older form of :func:`f1`."""
    return f1(pred, target, num_classes, average=class_reduction)


# ── Confusion matrix, and what follows from it ────────────────────────────────────────────────────


def confusion_counts(
    preds: Tensor, target: Tensor, num_classes: int, threshold: float = 0.5
) -> Tensor:
    """How often each class was predicted for each true class, int64 ``(C, C)``."""
    preds, target, kind = format_classification(preds, target, threshold)
    if kind not in (DataType.BINARY, DataType.MULTILABEL):
        preds, target = preds.argmax(dim=1), target.argmax(dim=1)
    return core.confusion_matrix(preds.flatten(), target.flatten(), num_classes)


def normalized(matrix: Tensor, normalize: str | bool | None) -> Tensor:
    """Divide a confusion matrix by its rows, columns or all of it."""
    if normalize in (None, False, "none"):
        return matrix.float()
    normalize = "true" if normalize is True else normalize
    matrix = matrix.float()
    if normalize == "true":
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    elif normalize == "pred":
        matrix = matrix / matrix.sum(dim=0, keepdim=True)
    elif normalize == "all":
        matrix = matrix / matrix.sum()
    else:
        raise AssertionError(
            "Argument average needs to one of the following: ('true', 'pred', 'all', 'none', None)"
        )
    missing = int(matrix.isnan().sum())
    if missing:
        rank_zero_warn(
            f"{missing} nan values found in confusion matrix have been replaced with zeros."
        )
    return torch.nan_to_num(matrix, nan=0.0)


def confusion_matrix(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    normalize: str | bool | None = None,
    threshold: float = 0.5,
) -> Tensor:
    """How often each class was predicted for each true class.

    Args:
        preds: classes ``(N, ...)``, probabilities ``(N, ...)``, or scores ``(N, C, ...)``.
        target: the true classes ``(N, ...)``.
        num_classes: the number of classes; by default one more than the largest.
        normalize: divide by the sum of the true classes' rows (``"true"``), of the predicted
            classes' columns (``"pred"``), or of ``"all"``.
        threshold: from which probability on something is positive.

    Returns:
        float32 ``(C, C)``: the rows are the true classes, the columns the predicted ones.

    >>> confusion_matrix(torch.tensor([0, 1, 0, 0]), torch.tensor([1, 1, 0, 0]), num_classes=2)
    tensor([[2., 0.],
            [1., 1.]])
    """
    if num_classes is None:
        num_classes = max(2, _largest(preds, target) + 1)
    return normalized(confusion_counts(preds, target, num_classes, threshold), normalize)


def _largest(preds: Tensor, target: Tensor) -> int:
    if preds.ndim == target.ndim + 1:
        return preds.shape[1] - 1
    if preds.is_floating_point():
        return 1
    return int(max(preds.max(), target.max()))


def iou_of(
    matrix: Tensor,
    num_classes: int,
    ignore_index: int | None = None,
    absent_score: float = 0.0,
    reduction: str = "elementwise_mean",
) -> Tensor:
    """Intersection over union from a confusion matrix."""
    intersection = matrix.diagonal()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - intersection
    scores = intersection.float() / union.float()
    scores = torch.where(union == 0, float(absent_score), scores)
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        scores = torch.cat([scores[:ignore_index], scores[ignore_index + 1 :]])
    return reduce(scores, reduction)


def iou(
    pred: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    absent_score: float = 0.0,
    threshold: float = 0.5,
    num_classes: int | None = None,
    reduction: str = "elementwise_mean",
) -> Tensor:
    """Intersection over union, TP / (TP + FP + FN), of each class.

    Args:
        pred: classes or probabilities of any shape, or scores ``(N, C, ...)``.
        target: the true classes.
        ignore_index: a class whose score is left out.
        absent_score: the score of a class that neither occurs nor is predicted.
        threshold: from which probability on something is positive.
        num_classes: the number of classes; by default one more than the largest.
        reduction: ``elementwise_mean``, ``sum`` or ``none``.

    >>> iou(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]), reduction="none")
    tensor([0.5000, 0.6667])
    """
    if num_classes is None:
        num_classes = max(2, _largest(pred, target) + 1)
    matrix = confusion_counts(pred, target, num_classes, threshold)
    return iou_of(matrix, num_classes, ignore_index, absent_score, reduction)


def dice_score(
    pred: Tensor,
    target: Tensor,
    bg: bool = False,
    nan_score: float = 0.0,
    no_fg_score: float = 0.0,
    reduction: str = "elementwise_mean",
) -> Tensor:
    """The Dice score 2 TP / (2 TP + FP + FN) of each class.

    Args:
        pred: scores ``(N, C, ...)``.
        target: the true classes ``(N, ...)``.
        bg: whether class 0, the background, counts.
        nan_score: the score where the fraction is 0/0.
        no_fg_score: the score of a class that does not occur.
        reduction: ``elementwise_mean``, ``sum`` or ``none``.

    >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    >>> dice_score(scores, torch.tensor([0, 1, 0]))
    tensor(0.6667)
    """
    scores = []
    for index in range(0 if bg else 1, pred.shape[1]):
        if not (target == index).any():
            scores.append(torch.tensor(float(no_fg_score), device=pred.device))
            continue
        tp, fp, _, fn, _ = _scores_of_class(pred, target, index, 1)
        denominator = (2 * tp + fp + fn).float()
        nothing = torch.tensor(float(nan_score), device=pred.device)
        scores.append(torch.where(denominator == 0, nothing, 2 * tp / denominator))
    return reduce(torch.stack(scores), reduction)
