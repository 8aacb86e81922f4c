"""Records of metrics that merge; see :mod:`puretrain.metrics`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, StructureError, check_choice
from puretrain.metrics.functional import (
    Average,
    accuracy_of,
    confusion_matrix,
    f1_of,
    hits,
    precision_of,
    recall_of,
    wide,
)
from puretrain.tree import FrozenDict, Record, field

__all__ = [
    "Accuracy",
    "Confusion",
    "Count",
    "Max",
    "Mean",
    "Metric",
    "Min",
    "Std",
    "Sum",
    "Variance",
    "accumulate",
    "as_metric",
    "compute_all",
    "merge_all",
    "merge_trees",
]

M = TypeVar("M", bound="Metric")


class Metric(Protocol):
    """What a metric has to offer; write one's own as a :class:`puretrain.tree.Record`.

    ``merge`` must be associative, and the leaves tensors that do not depend on their values in
    number or shape.
    """

    def merge(self, other: Self, /) -> Self:
        """The metric of both parts of the data together."""
        ...

    def compute(self) -> Tensor:
        """The value."""
        ...


class Mean(Record):
    """A weighted mean, ``Σ wᵢ xᵢ / Σ wᵢ``.

    Without data, or with weights that are all 0, it computes to NaN.

    Example:
        >>> first, second = Mean.of(torch.tensor(0.5), 32), Mean.of(torch.tensor(2.0), 8)
        >>> first.merge(second).compute()
        tensor(0.8000, dtype=torch.float64)
    """

    total: Tensor
    """``Σ wᵢ xᵢ``, float64 of shape ``()``."""
    weight: Tensor
    """``Σ wᵢ``, float64 of shape ``()``."""

    @classmethod
    def zero(cls) -> Self:
        """The mean of nothing."""
        return cls(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor, weight: float | Tensor = 1.0) -> Self:
        """The mean of all elements of a tensor.

        Args:
            values: of any shape.
            weight: of each element: a number, or a tensor that broadcasts to the shape of
                ``values``. An element of weight 0 does not count, whatever it is.
        """
        dtype = wide(values)
        if not isinstance(weight, Tensor):
            total = values.sum(dtype=dtype) * weight
            return cls(total, torch.tensor(weight * values.numel(), dtype=dtype))
        weight = weight.to(dtype).expand(values.shape)
        # NaN times 0 is NaN
        products = torch.where(weight == 0, 0.0, values.to(dtype) * weight)
        return cls(products.sum(), weight.sum())

    def merge(self, other: Self) -> Self:
        """The mean over the data of both."""
        _check_same_kind(self, other)
        return type(self)(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Tensor:
        """The mean, float64 of shape ``()``."""
        return self.total / self.weight


class Sum(Record):
    """The sum of all elements. Without data it is 0.

    >>> Sum.of(torch.tensor([1.0, 2.0])).merge(Sum.of(torch.tensor(4.0))).compute()
    tensor(7., dtype=torch.float64)
    """

    total: Tensor
    """float64 of shape ``()``."""

    @classmethod
    def zero(cls) -> Self:
        """The sum of nothing."""
        return cls(torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The sum of all elements of a tensor of any shape."""
        return cls(values.sum(dtype=wide(values)))

    def merge(self, other: Self) -> Self:
        """The sum over the data of both."""
        _check_same_kind(self, other)
        return type(self)(self.total + other.total)

    def compute(self) -> Tensor:
        """The sum, float64 of shape ``()``."""
        return self.total


class Count(Record):
    """How many. Without data it is 0.

    >>> Count.of(torch.tensor([0.5, 2.0, 3.0]) > 1).merge(Count.of(5)).compute()
    tensor(7)
    """

    count: Tensor
    """int64 of shape ``()``."""

    @classmethod
    def zero(cls) -> Self:
        """None."""
        return cls(torch.zeros((), dtype=torch.int64))

    @classmethod
    def of(cls, values: Tensor | int) -> Self:
        """The number of true elements of a bool tensor, or a sum of numbers counted elsewhere.

        Raises:
            StructureError: ``values`` are floating point.
        """
        values = torch.as_tensor(values)
        if values.is_floating_point() or values.is_complex():
            raise StructureError(
                f"Count.of takes bool or integers, not {values.dtype}; for other sums take Sum"
            )
        return cls(values.sum(dtype=torch.int64))

    def merge(self, other: Self) -> Self:
        """The count over the data of both."""
        _check_same_kind(self, other)
        return type(self)(self.count + other.count)

    def compute(self) -> Tensor:
        """The count, int64 of shape ``()``."""
        return self.count


class Min(Record):
    """The smallest element, NaN if one is NaN. Without data it is infinite.

    >>> Min.of(torch.tensor([3.0, 2.0])).merge(Min.of(torch.tensor([4.0]))).compute()
    tensor(2., dtype=torch.float64)
    """

    value: Tensor
    """float64 of shape ``()``."""

    @classmethod
    def zero(cls) -> Self:
        """The minimum of nothing, infinity."""
        return cls(torch.tensor(float("inf"), dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The smallest element of a tensor of any shape."""
        return cls(values.amin().to(wide(values))) if values.numel() else cls.zero()

    def merge(self, other: Self) -> Self:
        """The minimum over the data of both."""
        _check_same_kind(self, other)
        return type(self)(torch.minimum(self.value, other.value))

    def compute(self) -> Tensor:
        """The minimum, float64 of shape ``()``."""
        return self.value


class Max(Record):
    """The largest element, NaN if one is NaN. Without data it is minus infinity.

    >>> Max.of(torch.tensor([3.0, 2.0])).merge(Max.of(torch.tensor([4.0]))).compute()
    tensor(4., dtype=torch.float64)
    """

    value: Tensor
    """float64 of shape ``()``."""

    @classmethod
    def zero(cls) -> Self:
        """The maximum of nothing, minus infinity."""
        return cls(torch.tensor(float("-inf"), dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The largest element of a tensor of any shape."""
        return cls(values.amax().to(wide(values))) if values.numel() else cls.zero()

    def merge(self, other: Self) -> Self:
        """The maximum over the data of both."""
        _check_same_kind(self, other)
        return type(self)(torch.maximum(self.value, other.value))

    def compute(self) -> Tensor:
        """The maximum, float64 of shape ``()``."""
        return self.value


class Accuracy(Record):
    """The fraction of right predictions. Without data it computes to NaN.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
        >>> Accuracy.of(logits, torch.tensor([0, 1, 1])).compute()
        tensor(0.6667, dtype=torch.float64)
    """

    correct: Tensor
    """int64 of shape ``()``."""
    count: Tensor
    """int64 of shape ``()``."""

    @classmethod
    def zero(cls) -> Self:
        """The accuracy of no prediction."""
        return cls(torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64))

    @classmethod
    def of(
        cls,
        predictions: Tensor,
        target: Tensor,
        *,
        top_k: int = 1,
        ignore_index: int | None = None,
    ) -> Self:
        """The accuracy of a batch.

        Args:
            predictions: classes of shape ``(...)`` or scores of shape ``(..., classes)``.
            target: the true classes, integers of shape ``(...)``.
            top_k: a prediction is right if the true class is among the ``top_k`` largest scores.
            ignore_index: a value of ``target`` that marks samples to leave out.
        """
        right = hits(predictions, target, top_k)
        if ignore_index is None:
            return cls(right.sum(), torch.tensor(target.numel()))
        counted = target != ignore_index
        return cls((right & counted).sum(), counted.sum())

    def merge(self, other: Self) -> Self:
        """The accuracy over the data of both."""
        _check_same_kind(self, other)
        return type(self)(self.correct + other.correct, self.count + other.count)

    def compute(self) -> Tensor:
        """The accuracy, float64 of shape ``()``."""
        return self.correct.to(wide(self.correct)) / self.count


Report = Literal["matrix", "accuracy", "precision", "recall", "f1"]


class Confusion(Record):
    """A confusion matrix, and what follows from it: precision, recall and F1.

    A class that was never predicted has precision 0, one without samples recall 0. Without data,
    all three are NaN and the matrix is 0.

    Example:
        >>> predicted, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0])
        >>> confusion = Confusion.of(predicted, target, 2)
        >>> confusion.compute()
        tensor([[1, 1],
                [0, 2]])
        >>> confusion.recall("none")
        tensor([0.5000, 1.0000], dtype=torch.float64)
        >>> Confusion.of(predicted, target, 2, report="f1").compute()
        tensor(0.7333, dtype=torch.float64)
    """

    matrix: Tensor
    """int64 of shape ``(classes, classes)``; rows are the true classes, columns the predicted."""
    report: Report = field(static=True, default="matrix")
    """What :meth:`compute` returns."""
    average: Average = field(static=True, default="macro")
    """How :meth:`compute` averages over the classes."""

    @classmethod
    def zero(
        cls, num_classes: int, *, report: Report = "matrix", average: Average = "macro"
    ) -> Self:
        """The matrix of no prediction."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls.of(nothing, nothing, num_classes, report=report, average=average)

    @classmethod
    def of(
        cls,
        predictions: Tensor,
        target: Tensor,
        num_classes: int,
        *,
        ignore_index: int | None = None,
        report: Report = "matrix",
        average: Average = "macro",
    ) -> Self:
        """The confusion matrix of a batch.

        Args:
            predictions: classes of shape ``(...)`` or scores of shape ``(..., classes)``.
            target: the true classes, integers of shape ``(...)``.
            num_classes: the number of classes.
            ignore_index: a value of ``target`` that marks samples to leave out.
            report: what :meth:`compute` returns, and so what a run logs.
            average: see :data:`puretrain.metrics.functional.Average`; for ``compute``.

        Raises:
            ConfigurationError: ``report`` or ``average`` is none of the choices.
            StructureError: a class is not among ``num_classes``, or the shapes do not fit.
        """
        check_choice("report", report, ("matrix", "accuracy", "precision", "recall", "f1"))
        check_choice("average", average, ("micro", "macro", "none"))
        matrix = confusion_matrix(predictions, target, num_classes, ignore_index=ignore_index)
        return cls(matrix, report, average)

    def merge(self, other: Self) -> Self:
        """The matrix over the data of both."""
        _check_same_kind(self, other)
        if self.matrix.shape != other.matrix.shape:
            raise StructureError(
                "confusion matrices of different numbers of classes can't be merged: "
                f"{tuple(self.matrix.shape)} and {tuple(other.matrix.shape)}"
            )
        return self.replace(matrix=self.matrix + other.matrix)

    def compute(self) -> Tensor:
        """What ``report`` asks for."""
        if self.report == "matrix":
            return self.matrix
        if self.report == "accuracy":
            return self.accuracy()
        derived = {"precision": precision_of, "recall": recall_of, "f1": f1_of}
        return derived[self.report](self.matrix, self.average)

    def accuracy(self) -> Tensor:
        """The fraction of right predictions, float64 of shape ``()``."""
        return accuracy_of(self.matrix)

    def precision(self, average: Average = "macro") -> Tensor:
        """TP / (TP + FP), see :func:`puretrain.metrics.functional.precision`."""
        return precision_of(self.matrix, average)

    def recall(self, average: Average = "macro") -> Tensor:
        """TP / (TP + FN), see :func:`puretrain.metrics.functional.recall`."""
        return recall_of(self.matrix, average)

    def f1(self, average: Average = "macro") -> Tensor:
        """2 TP / (2 TP + FP + FN), see :func:`puretrain.metrics.functional.f1`."""
        return f1_of(self.matrix, average)


class Variance(Record):
    """The variance of all elements, ``Σ (xᵢ - x̄)² / (n - correction)``.

    The sums of squares are about the mean of each part, and merging adds what the means differ by,
    so nothing cancels; from Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979). NaN with no more elements than ``correction``.

    Example:
        >>> values = torch.tensor([1e9, 1e9 + 2, 1e9 + 4], dtype=torch.float64)
        >>> Variance.of(values[:2]).merge(Variance.of(values[2:])).compute()
        tensor(4., dtype=torch.float64)
    """

    count: Tensor
    """int64 of shape ``()``."""
    mean: Tensor
    """float64 of shape ``()``; 0 without data."""
    squares: Tensor
    """``Σ (xᵢ - x̄)²``, float64 of shape ``()``."""
    correction: int = field(static=True, default=1)
    """1 for the unbiased variance of a sample, 0 for that of a whole population."""

    @classmethod
    def zero(cls, *, correction: int = 1) -> Self:
        """The variance of nothing."""
        nothing = torch.zeros((), dtype=torch.float64)
        return cls(torch.zeros((), dtype=torch.int64), nothing, nothing.clone(), correction)

    @classmethod
    def of(cls, values: Tensor, *, correction: int = 1) -> Self:
        """The variance of all elements of a tensor of any shape."""
        if not values.numel():
            return cls.zero(correction=correction)
        values = values.to(wide(values))
        mean = values.mean()
        squares = (values - mean).square().sum()
        return cls(torch.tensor(values.numel()), mean, squares, correction)

    def merge(self, other: Self) -> Self:
        """The variance over the data of both."""
        _check_same_kind(self, other)
        if self.correction != other.correction:
            raise StructureError(
                "variances of different corrections can't be merged: "
                f"{self.correction} and {other.correction}"
            )
        count = self.count + other.count
        share = other.count / count.clamp(min=1).to(self.mean.dtype)
        gap = other.mean - self.mean
        return self.replace(
            count=count,
            mean=self.mean + gap * share,
            squares=self.squares + other.squares + gap.square() * (self.count * share),
        )

    def variance(self) -> Tensor:
        """The variance, float64 of shape ``()``."""
        freedom = (self.count - self.correction).to(self.squares.dtype)
        return torch.where(freedom > 0, self.squares / freedom, float("nan"))

    def compute(self) -> Tensor:
        """The variance, float64 of shape ``()``."""
        return self.variance()


class Std(Variance):
    """The standard deviation: the square root of :class:`Variance`.

    >>> Std.of(torch.tensor([1.0, 3.0]), correction=0).compute()
    tensor(1., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The standard deviation, float64 of shape ``()``."""
        return self.variance().sqrt()


# ── Several metrics ───────────────────────────────────────────────────────────────────────────────


def as_metric(value: Any, weight: float | Tensor = 1.0) -> Any:
    """A metric as it is; a tensor or number as a :class:`Mean` with a weight.

    A tensor that has dimensions keeps them, one mean for each element: the members of an ensemble
    whose step is a ``vmap`` stay apart.

    Args:
        value: a metric record, a tensor or a number.
        weight: the weight of a tensor or number, usually the size of the batch. A caller that has
            many metrics to weight makes a tensor of shape ``()`` of it once.

    Raises:
        StructureError: the value is none of them.

    >>> as_metric(torch.tensor(0.5), 32)
    Mean(total=f64 16.0, weight=f64 32.0)
    """
    if isinstance(value, (int, float)):
        value = torch.tensor(value, dtype=torch.float64)
    if isinstance(value, Tensor):
        # A step does this for each of its metrics, so it takes two operations. The product of two
        # tensors of shape () has the wider of their dtypes.
        dtype = wide(value)
        if not value.dim():
            if isinstance(weight, Tensor):
                one = weight.to(dtype)
            else:
                one = torch.full((), weight, dtype=dtype)  # on the CPU: no work for an accelerator
            return Mean(value * one, one)
        each = torch.ones(value.shape, dtype=dtype, device=value.device) * weight
        return Mean(value.to(dtype) * each, each)
    if isinstance(value, Record) and hasattr(value, "merge") and hasattr(value, "compute"):
        return value
    raise StructureError(
        f"a metric is a tensor, a number, or a record with merge and compute, not {value!r}"
    )


def accumulate(total: Any, value: Any, weight: Tensor) -> Any:
    """``total.merge(as_metric(value, weight))``, in a third of the time for a plain tensor.

    Args:
        total: a metric record.
        value: as for :func:`as_metric`.
        weight: float64 of shape ``()`` on the CPU.
    """
    plain = type(total) is Mean and type(value) is Tensor and not value.dim()
    if plain and value.device.type != "mps":
        return Mean(total.total + value * weight, total.weight + weight)
    return total.merge(as_metric(value, weight))


def merge_all(metrics: Iterable[M]) -> M:
    """Merge several metrics of one kind, from the left.

    Raises:
        ConfigurationError: there are none, so that their kind is unknown.

    >>> merge_all(Sum.of(torch.tensor(x)) for x in (1.0, 2.0, 3.0)).compute()
    tensor(6., dtype=torch.float64)
    """
    metrics = list(metrics)
    if not metrics:
        raise ConfigurationError("merge_all needs at least one metric; start with a zero")
    return functools.reduce(lambda a, b: a.merge(b), metrics)


def merge_trees(a: Mapping[str, Any], b: Mapping[str, Any]) -> FrozenDict[Any]:
    """Merge the metrics of two mappings by their names; what only one has stays as it is.

    The mappings may be nested.

    Raises:
        StructureError: two metrics of one name are not of one kind; names it.

    >>> one = FrozenDict(loss=Sum.of(torch.tensor(1.0)), seen=Count.of(2))
    >>> two = FrozenDict(loss=Sum.of(torch.tensor(3.0)))
    >>> merge_trees(one, two)["loss"]
    Sum(total=f64 4.0)
    """
    merged = dict(a)
    for name, value in b.items():
        if name not in merged:
            merged[name] = value
            continue
        try:
            if isinstance(value, Mapping) and isinstance(merged[name], Mapping):
                merged[name] = merge_trees(merged[name], value)
            else:
                _check_same_kind(merged[name], value)
                merged[name] = merged[name].merge(value)
        except StructureError as error:
            raise StructureError(f"the metric {name!r}: {error}") from None
    return FrozenDict(merged)


def compute_all(metrics: Mapping[str, Any]) -> FrozenDict[Tensor]:
    """The values of metrics by their names.

    Nested mappings become names with slashes. A plain tensor is its own value.

    >>> compute_all(FrozenDict(loss=Mean.of(torch.tensor([1.0, 3.0])), n=FrozenDict(a=Count.of(2))))
    {'loss': f64 2.0, 'n/a': i64 2}
    """
    values: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        if isinstance(metric, Tensor):
            values[name] = metric
        elif isinstance(metric, Mapping):
            values.update((f"{name}/{k}", value) for k, value in compute_all(metric).items())
        else:
            values[name] = cast(Metric, as_metric(metric)).compute()
    return FrozenDict(values)


def _check_same_kind(a: object, b: object) -> None:
    if type(a) is not type(b) or not isinstance(a, Record):
        raise StructureError(
            f"a {type(a).__name__} can't be merged with a {type(b).__name__}; "
            "metrics of one name must be records of one kind"
        )
