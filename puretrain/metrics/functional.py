"""Metrics of one batch as pure functions. All of them work under ``vmap``.

Classes are integers from 0. Where a function takes predictions, they are either the predicted
classes, of the shape of the target, or scores (logits or probabilities) with the classes in one
more dimension, the last one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, StructureError, check_choice, check_whole

__all__ = [
    "Average",
    "accuracy",
    "confusion_matrix",
    "f1",
    "mean_absolute_error",
    "mean_squared_error",
    "precision",
    "recall",
    "top_k_accuracy",
]

Average = Literal["micro", "macro", "none"]
"""``micro`` counts all predictions together; ``macro`` is the mean over the classes; ``none`` gives
one value for each class."""


def accuracy(predictions: Tensor, target: Tensor) -> Tensor:
    """The fraction of right predictions; NaN if there are none at all.

    Args:
        predictions: classes of shape ``(...)`` or scores of shape ``(..., classes)``.
        target: the true classes, integers of shape ``(...)``.

    Returns:
        A float64 tensor of shape ``()``.

    >>> accuracy(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]))
    tensor(0.7500, dtype=torch.float64)
    """
    return hits(predictions, target).to(wide(predictions)).mean()


def top_k_accuracy(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """The fraction of samples whose true class is among the ``k`` largest scores.

    Args:
        scores: shape ``(..., classes)``.
        target: the true classes, integers of shape ``(...)``.
        k: from 1 to the number of classes.

    Returns:
        A float64 tensor of shape ``()``.

    >>> scores = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.4, 0.1]])
    >>> top_k_accuracy(scores, torch.tensor([1, 2]), k=2)
    tensor(0.5000, dtype=torch.float64)
    """
    return hits(scores, target, k).to(wide(scores)).mean()


def confusion_matrix(
    predictions: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = None
) -> Tensor:
    """How often each class was predicted for each true class.

    Args:
        predictions: classes of shape ``(...)`` or scores of shape ``(..., classes)``.
        target: the true classes, integers of shape ``(...)``.
        num_classes: the number of classes.
        ignore_index: a value of ``target`` that marks samples to leave out.

    Returns:
        int64 of shape ``(num_classes, num_classes)``; the rows are the true classes, the columns
        the predicted ones.

    Raises:
        StructureError: a class is not among ``num_classes``, or the shapes do not fit.

    >>> confusion_matrix(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]), 2)
    tensor([[1, 1],
            [0, 2]])
    """
    _check_num_classes(num_classes)
    # to int64 first: small integer types would overflow in the index of a cell
    predicted, target = classes(predictions, target).long(), target.long()
    inside = (target >= 0) & (target < num_classes) & (predicted >= 0) & (predicted < num_classes)
    cell = torch.where(inside, target * num_classes + predicted, -1)
    counted = torch.ones_like(target)
    if ignore_index is not None:
        counted = (target != ignore_index).long()
        cell = cell * counted
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=target.device)
    try:
        # a class outside of the matrix has an index that scatter_add refuses
        counts = counts.scatter_add(0, cell.reshape(-1), counted.reshape(-1))
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        raise StructureError(
            f"a class in predictions or target is not one of 0 … {num_classes - 1}; give a larger "
            "num_classes, or the ignore_index of the samples to leave out"
        ) from None
    return counts.reshape(num_classes, num_classes)


def precision(
    predictions: Tensor, target: Tensor, num_classes: int, *, average: Average = "macro"
) -> Tensor:
    """Of the samples predicted as a class, the fraction that belong to it: TP / (TP + FP).

    A class that was never predicted has precision 0. Without any sample the result is NaN.

    Args:
        predictions: classes of shape ``(...)`` or scores of shape ``(..., classes)``.
        target: the true classes, integers of shape ``(...)``.
        num_classes: the number of classes; ``macro`` averages over all of them.
        average: see :data:`Average`.

    Returns:
        A float64 tensor of shape ``()``, or ``(num_classes,)`` with ``average="none"``.

    >>> precision(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]), 2, average="none")
    tensor([1.0000, 0.6667], dtype=torch.float64)
    """
    return precision_of(confusion_matrix(predictions, target, num_classes), average)


def recall(
    predictions: Tensor, target: Tensor, num_classes: int, *, average: Average = "macro"
) -> Tensor:
    """Of the samples that belong to a class, the fraction predicted as it: TP / (TP + FN).

    A class without samples has recall 0. Arguments and result as for :func:`precision`.

    >>> recall(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]), 2, average="none")
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    return recall_of(confusion_matrix(predictions, target, num_classes), average)


def f1(
    predictions: Tensor, target: Tensor, num_classes: int, *, average: Average = "macro"
) -> Tensor:
    """The harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN).

    A class that neither occurs nor is predicted has 0. Arguments and result as for
    :func:`precision`.

    >>> f1(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]), 2, average="micro")
    tensor(0.7500, dtype=torch.float64)
    """
    return f1_of(confusion_matrix(predictions, target, num_classes), average)


def mean_squared_error(predictions: Tensor, target: Tensor) -> Tensor:
    """The mean of the squared differences, over all elements; in the dtype of the arguments.

    Raises:
        StructureError: the shapes differ. They are not broadcast.

    >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    _check_same_shape(predictions, target)
    return (predictions - target).square().mean()


def mean_absolute_error(predictions: Tensor, target: Tensor) -> Tensor:
    """The mean of the absolute differences, over all elements; in the dtype of the arguments.

    Raises:
        StructureError: the shapes differ. They are not broadcast.

    >>> mean_absolute_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(1.)
    """
    _check_same_shape(predictions, target)
    return (predictions - target).abs().mean()


# ── Shared with the records ───────────────────────────────────────────────────────────────────────


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype to sum in: float64 where the tensor's device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def classes(predictions: Tensor, target: Tensor) -> Tensor:
    """The predicted classes, of the shape of the target."""
    if predictions.dim() == target.dim() + 1 and predictions.shape[:-1] == target.shape:
        return predictions.argmax(-1)
    if predictions.shape != target.shape:
        raise StructureError(
            f"predictions of shape {tuple(predictions.shape)} do not fit a target of shape "
            f"{tuple(target.shape)}; they are classes of the same shape, or scores with the "
            "classes in one more dimension at the end"
        )
    if predictions.is_floating_point():
        raise StructureError(
            "predictions are floating point and have no dimension of classes; turn them into "
            "classes, for example with (predictions > 0).long()"
        )
    return predictions


def hits(predictions: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Where the true class is among the ``k`` largest scores: bool of the target's shape."""
    if k == 1:
        return classes(predictions, target) == target
    if predictions.dim() != target.dim() + 1 or predictions.shape[:-1] != target.shape:
        raise StructureError(
            f"scores of shape {tuple(predictions.shape)} do not fit a target of shape "
            f"{tuple(target.shape)}; top-k needs one more dimension at the end, the classes"
        )
    if not 1 <= k <= predictions.shape[-1]:
        raise ConfigurationError(
            f"k must be from 1 to the number of classes, {predictions.shape[-1]}, not {k}"
        )
    return (predictions.topk(k).indices == target.unsqueeze(-1)).any(-1)


def precision_of(matrix: Tensor, average: Average) -> Tensor:
    """Precision from confusion matrices of shape ``(..., classes, classes)``."""
    return _ratio(matrix.diagonal(dim1=-2, dim2=-1), matrix.sum(-2), matrix, average)


def recall_of(matrix: Tensor, average: Average) -> Tensor:
    """Recall from confusion matrices of shape ``(..., classes, classes)``."""
    return _ratio(matrix.diagonal(dim1=-2, dim2=-1), matrix.sum(-1), matrix, average)


def f1_of(matrix: Tensor, average: Average) -> Tensor:
    """F1 from confusion matrices of shape ``(..., classes, classes)``."""
    right = matrix.diagonal(dim1=-2, dim2=-1)
    return _ratio(2 * right, matrix.sum(-1) + matrix.sum(-2), matrix, average)


def accuracy_of(matrix: Tensor) -> Tensor:
    """Accuracy from confusion matrices of shape ``(..., classes, classes)``."""
    return precision_of(matrix, "micro")


def _ratio(part: Tensor, whole: Tensor, matrix: Tensor, average: Average) -> Tensor:
    check_choice("average", average, ("micro", "macro", "none"))
    if average == "micro":
        part, whole = part.sum(-1), whole.sum(-1)
    values = part.to(wide(matrix)) / whole.clamp(min=1)
    if average == "macro":
        values = values.mean(-1)
    samples = matrix.sum((-2, -1))
    if average == "none":
        samples = samples.unsqueeze(-1)
    return torch.where(samples > 0, values, float("nan"))


def _check_num_classes(num_classes: int) -> None:
    check_whole("num_classes", num_classes)


def _check_same_shape(predictions: Tensor, target: Tensor) -> None:
    if predictions.shape != target.shape:
        raise StructureError(
            f"predictions have shape {tuple(predictions.shape)}, the target "
            f"{tuple(target.shape)}; they must be the same"
        )
