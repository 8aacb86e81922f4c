"""Metrics of classes that gather over batches; see the functions of the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.metrics.functional import classification as counts
from puretrain.lightning.metrics.functional import curves
from puretrain.lightning.metrics.functional.inputs import check_threshold
from puretrain.lightning.metrics.metric import Metric
from puretrain.lightning.metrics.utils import dim_zero_cat
from puretrain.lightning.utilities.distributed import rank_zero_warn

__all__ = [
    "AUC",
    "AUROC",
    "F1",
    "ROC",
    "Accuracy",
    "AveragePrecision",
    "ConfusionMatrix",
    "FBeta",
    "HammingDistance",
    "IoU",
    "Precision",
    "PrecisionRecallCurve",
    "Recall",
    "StatScores",
]


class _Share(Metric):
    """What is right, of what there is."""

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        """Begin with nothing."""
        super().__init__(**kwargs)
        check_threshold(threshold)
        self.threshold = threshold
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def _counts(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        correct, total = self._counts(preds, target)
        self.correct = self.correct + correct
        self.total = self.total + total

    def compute(self) -> Tensor:
        """The fraction that is right."""
        return self.correct.float() / self.total


class Accuracy(_Share):
    """The fraction of right predictions.

    >>> accuracy = Accuracy()
    >>> accuracy(torch.tensor([0, 2, 1, 3]), torch.tensor([0, 1, 2, 3]))
    tensor(0.5000)
    """

    def __init__(
        self,
        threshold: float = 0.5,
        top_k: int | None = None,
        subset_accuracy: bool = False,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(threshold, **kwargs)
        if top_k is not None and (not isinstance(top_k, int) or top_k <= 0):
            raise ValueError(f"The `top_k` should be an integer larger than 0, got {top_k}")
        self.top_k, self.subset_accuracy = top_k, subset_accuracy

    def _counts(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        return counts.accuracy_counts(
            preds, target, self.threshold, self.top_k, self.subset_accuracy
        )


class HammingDistance(_Share):
    """The fraction of wrong labels."""

    def _counts(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        return counts.hamming_counts(preds, target, self.threshold)

    def compute(self) -> Tensor:
        """The distance."""
        return 1 - super().compute()


class StatScores(Metric):
    """True and false positives and negatives, and the support."""

    def __init__(
        self,
        threshold: float = 0.5,
        top_k: int | None = None,
        reduce: str | None = "micro",
        num_classes: int | None = None,
        ignore_index: int | None = None,
        mdmc_reduce: str | None = None,
        is_multiclass: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        check_threshold(threshold)
        counts.check_stat_arguments(reduce, mdmc_reduce, num_classes, ignore_index)
        self.threshold, self.top_k, self.reduce = threshold, top_k, reduce
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.mdmc_reduce, self.is_multiclass = mdmc_reduce, is_multiclass
        # counts of single samples are kept one by one, all others as sums
        self._kept = mdmc_reduce == "samplewise" or reduce == "samples"
        for name in ("tp", "fp", "tn", "fn"):
            shape = (num_classes,) if reduce == "macro" else ()
            default: Any = [] if self._kept else torch.zeros(shape, dtype=torch.long)  # type: ignore[arg-type]
            self.add_state(name, default=default, dist_reduce_fx="cat" if self._kept else "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        found = counts.stat_counts(
            preds, target, self.reduce, self.mdmc_reduce, self.num_classes, self.top_k,
            self.threshold, self.is_multiclass, self.ignore_index,
        )  # fmt: skip
        for name, value in zip(("tp", "fp", "tn", "fn"), found, strict=True):
            if self._kept:
                getattr(self, name).append(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def _counts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tp, fp, tn, fn = (
            dim_zero_cat(value) if isinstance(value, list) else value
            for value in (self.tp, self.fp, self.tn, self.fn)
        )
        return tp, fp, tn, fn

    def compute(self) -> Tensor:
        """The counts, with a last dimension of TP, FP, TN, FN and support."""
        return counts.join_stat_scores(*self._counts())


class _Averaged(StatScores):
    """Precision and recall: counts, and an average."""

    def __init__(
        self,
        num_classes: int | None = None,
        threshold: float = 0.5,
        average: str | None = "micro",
        multilabel: bool = False,
        mdmc_average: str | None = None,
        ignore_index: int | None = None,
        top_k: int | None = None,
        is_multiclass: bool | None = None,
        class_reduction: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`.

        Args:
            num_classes: the number of classes.
            threshold: from which probability on something is positive.
            average: over the classes.
            multilabel: accepted because older programs pass it; the data tells.
            mdmc_average: what to do with more dimensions.
            ignore_index: a class that does not count.
            top_k: how many of the largest scores count as predicted.
            is_multiclass: how to read binary data.
            class_reduction: the older name of ``average``.
            **kwargs: of :class:`Metric`.
        """
        average = average if class_reduction is None else class_reduction
        counts.check_average(average, mdmc_average, num_classes, ignore_index)
        super().__init__(
            reduce=average if average in ("micro", "samples") else "macro",
            mdmc_reduce=mdmc_average,
            threshold=threshold,
            top_k=top_k,
            num_classes=num_classes,
            is_multiclass=is_multiclass,
            ignore_index=ignore_index,
            **kwargs,
        )
        self.average, self.multilabel = average, multilabel


class Precision(_Averaged):
    """Of what was predicted as a class, the fraction that is of it: TP / (TP + FP).

    >>> precision = Precision(num_classes=2, average="none")
    >>> precision(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1]))
    tensor([0.7500, 1.0000])
    """

    def compute(self) -> Tensor:
        """The precision."""
        tp, fp, _, fn = self._counts()
        return counts.precision_of(tp, fp, fn, self.average, self.mdmc_reduce)


class Recall(_Averaged):
    """Of what is of a class, the fraction that was predicted as it: TP / (TP + FN)."""

    def compute(self) -> Tensor:
        """The recall."""
        tp, fp, _, fn = self._counts()
        return counts.recall_of(tp, fp, fn, self.average, self.mdmc_reduce)


class FBeta(Metric):
    """The weighted harmonic mean of precision and recall."""

    def __init__(
        self,
        num_classes: int,
        beta: float = 1.0,
        threshold: float = 0.5,
        average: str | None = "micro",
        multilabel: bool = False,
        class_reduction: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        average = average if class_reduction is None else class_reduction
        if average not in ("micro", "macro", "weighted", "none", None):
            raise ValueError(
                "Argument `average` expected to be one of the following:"
                f" ('micro', 'macro', 'weighted', 'none', None) but got {average}"
            )
        self.num_classes, self.beta, self.threshold = num_classes, beta, threshold
        self.average, self.multilabel = average, multilabel
        for name in ("true_positives", "predicted_positives", "actual_positives"):
            self.add_state(
                name, default=torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum"
            )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        true, predicted, actual = counts.fbeta_counts(
            preds, target, self.num_classes, self.threshold, self.multilabel
        )
        self.true_positives = self.true_positives + true
        self.predicted_positives = self.predicted_positives + predicted
        self.actual_positives = self.actual_positives + actual

    def compute(self) -> Tensor:
        """The F score."""
        return counts.fbeta_of(
            self.true_positives,
            self.predicted_positives,
            self.actual_positives,
            self.beta,
            self.average,
        )


class F1(FBeta):
    """The harmonic mean of precision and recall.

    >>> f1 = F1(num_classes=2, average="none")
    >>> f1(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    tensor([0.6667, 0.6667])
    """

    def __init__(
        self,
        num_classes: int,
        threshold: float = 0.5,
        average: str | None = "micro",
        multilabel: bool = False,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(num_classes, 1.0, threshold, average, multilabel, **kwargs)


class ConfusionMatrix(Metric):
    """How often each class was predicted for each true class."""

    def __init__(
        self,
        num_classes: int,
        normalize: str | None = None,
        threshold: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        allowed = ("true", "pred", "all", "none", None)
        if normalize not in allowed:
            raise AssertionError(
                f"Argument average needs to one of the following: {allowed}, not {normalize!r}"
            )
        self.num_classes, self.normalize, self.threshold = num_classes, normalize, threshold
        default = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.add_state("confmat", default=default, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.confmat = self.confmat + counts.confusion_counts(
            preds, target, self.num_classes, self.threshold
        )

    def compute(self) -> Tensor:
        """The matrix: the rows are the true classes."""
        return counts.normalized(self.confmat, self.normalize)


class IoU(ConfusionMatrix):
    """Intersection over union."""

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        absent_score: float = 0.0,
        threshold: float = 0.5,
        reduction: str = "elementwise_mean",
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(num_classes, None, threshold, **kwargs)
        self.ignore_index, self.absent_score, self.reduction = ignore_index, absent_score, reduction

    def compute(self) -> Tensor:
        """The score."""
        return counts.iou_of(
            self.confmat, self.num_classes, self.ignore_index, self.absent_score, self.reduction
        )


class _Gathered(Metric):
    """Metrics that need all scores and classes at the end."""

    def __init__(
        self, num_classes: int | None = None, pos_label: int | None = None, **kwargs: Any
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        self.num_classes, self.pos_label = num_classes, pos_label
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")
        rank_zero_warn(
            f"Metric `{type(self).__name__}` will save all targets and predictions in buffer."
            " For large datasets this may lead to large memory footprint."
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        preds, target, num_classes, pos_label = curves.curve_inputs(
            preds, target, self.num_classes, self.pos_label
        )
        self.preds.append(preds)
        self.target.append(target)
        self.num_classes, self.pos_label = num_classes, pos_label

    def _all(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.preds), dim_zero_cat(self.target)

    def _inputs(self) -> tuple[Tensor, Tensor, int, int | None]:
        preds, target = self._all()
        # after a resume the scores tell what no batch has told yet
        classes = self.num_classes or (preds.shape[1] if preds.ndim > 1 else 1)
        return preds, target, classes, self.pos_label


class ROC(_Gathered):
    """The receiver operating characteristic."""

    def compute(self) -> Any:
        """False positive rates, true positive rates and thresholds."""
        return curves.roc_of(*self._inputs())


class PrecisionRecallCurve(_Gathered):
    """Precision and recall at all thresholds."""

    def compute(self) -> Any:
        """Precisions, recalls and thresholds."""
        return curves.precision_recall_curve_of(*self._inputs())


class AveragePrecision(_Gathered):
    """The mean of the precisions, weighted by the gain in recall."""

    def compute(self) -> Any:
        """A tensor, or a list with one for each class."""
        return curves.average_precision_of(*self._inputs())


class AUROC(_Gathered):
    """The area under the receiver operating characteristic."""

    def __init__(
        self,
        num_classes: int | None = None,
        pos_label: int | None = None,
        average: str | None = "macro",
        max_fpr: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(num_classes, pos_label, **kwargs)
        curves.check_average(average)
        if max_fpr is not None and (not isinstance(max_fpr, float) or not 0 < max_fpr <= 1):
            raise ValueError(f"`max_fpr` should be a float in range (0, 1], got: {max_fpr}")
        self.average, self.max_fpr = average, max_fpr
        self.mode: Any = None

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        mode = curves.auroc_mode(preds, target)
        if self.mode is not None and self.mode != mode:
            raise ValueError(
                "The mode of data (binary, multi-label, multi-class) should be constant,"
                f" but changed between batches from {self.mode} to {mode}"
            )
        self.preds.append(preds)
        self.target.append(target)
        self.mode = mode

    def compute(self) -> Tensor:
        """The area."""
        preds, target = self._all()
        mode = curves.auroc_mode(preds, target) if self.mode is None else self.mode
        return curves.auroc_of(
            preds, target, mode, self.num_classes, self.pos_label, self.average, self.max_fpr
        )


class AUC(Metric):
    """The area under a curve."""

    def __init__(self, reorder: bool = False, **kwargs: Any) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        self.reorder = reorder
        self.add_state("x", default=[], dist_reduce_fx="cat")
        self.add_state("y", default=[], dist_reduce_fx="cat")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add points."""
        x, y = curves.auc_inputs(x, y)
        self.x.append(x)
        self.y.append(y)

    def compute(self) -> Tensor:
        """The area."""
        return curves.auc(dim_zero_cat(self.x), dim_zero_cat(self.y), self.reorder)
