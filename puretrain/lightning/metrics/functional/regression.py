"""Metrics of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from puretrain.lightning.metrics.functional.image import psnr, ssim
from puretrain.lightning.metrics.utils import _check_same_shape
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.metrics import functional as core

__all__ = [
    "explained_variance",
    "mae",
    "mean_absolute_error",
    "mean_relative_error",
    "mean_squared_error",
    "mean_squared_log_error",
    "mse",
    "psnr",
    "r2score",
    "rmse",
    "rmsle",
    "ssim",
]


def _floating(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.float()


def _pair(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    _check_same_shape(preds, target)
    return _floating(preds), _floating(target)


def mean_absolute_error(preds: Tensor, target: Tensor) -> Tensor:
    """The mean of the absolute differences.

    >>> x = torch.arange(10.0)
    >>> mean_absolute_error(x, x + 2)
    tensor(2.)
    """
    return core.mean_absolute_error(*_pair(preds, target))


def mean_squared_error(preds: Tensor, target: Tensor) -> Tensor:
    """The mean of the squared differences.

    >>> x = torch.arange(10.0)
    >>> mean_squared_error(x, x + 2)
    tensor(4.)
    """
    return core.mean_squared_error(*_pair(preds, target))


def mean_squared_log_error(preds: Tensor, target: Tensor) -> Tensor:
    """The mean of the squared differences of log(1 + x).

    >>> mean_squared_log_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    tensor(0.)
    """
    preds, target = _pair(preds, target)
    return core.mean_squared_error(preds.log1p(), target.log1p())


def mean_relative_error(preds: Tensor, target: Tensor) -> Tensor:
    """The mean of the absolute differences, relative to the target; one of 0 counts as 1.

    >>> mean_relative_error(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0]))
    tensor(1.7500)
    """
    preds, target = _pair(preds, target)
    whole = torch.where(target == 0, torch.ones_like(target), target)
    return ((preds - target) / whole).abs().mean()


mae = mean_absolute_error
mse = mean_squared_error


def rmse(pred: Tensor, target: Tensor) -> Tensor:
    """The square root of the mean squared error."""
    return mean_squared_error(pred, target).sqrt()


def rmsle(pred: Tensor, target: Tensor) -> Tensor:
    """The square root of the mean squared logarithmic error."""
    return mean_squared_log_error(pred, target).sqrt()


# ── Shares of the variance ────────────────────────────────────────────────────────────────────────

_MULTIOUTPUT = ("raw_values", "uniform_average", "variance_weighted")


def check_multioutput(multioutput: str) -> None:
    """Refuse reductions over outputs that do not exist."""
    if multioutput not in _MULTIOUTPUT:
        raise ValueError(
            f"Invalid input to argument `multioutput`. Choose one of the following: {_MULTIOUTPUT}"
        )


def _over_outputs(scores: Tensor, variance: Tensor, multioutput: str) -> Tensor:
    if multioutput == "raw_values":
        return scores
    if multioutput == "uniform_average":
        return scores.mean()
    return torch.sum(scores * variance / variance.sum())


def _one_minus(numerator: Tensor, denominator: Tensor) -> Tensor:
    """1 - a / b; 1 where both are 0, 0 where only b is."""
    fraction = numerator / torch.where(denominator == 0, 1.0, denominator)
    scores = torch.where(numerator == 0, 1.0, 1 - fraction)
    return torch.where((numerator != 0) & (denominator == 0), 0.0, scores)


def explained_variance_sums(
    preds: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The number of samples, and sums of errors and targets and of their squares, in float64."""
    preds, target = _pair(preds, target)
    preds, target = preds.to(core.wide(preds)), target.to(core.wide(target))
    error = target - preds
    return (
        torch.tensor(preds.shape[0], device=preds.device),
        error.sum(dim=0),
        error.square().sum(dim=0),
        target.sum(dim=0),
        target.square().sum(dim=0),
    )


def explained_variance_of(
    count: Tensor,
    error: Tensor,
    squared_error: Tensor,
    total: Tensor,
    squared_total: Tensor,
    multioutput: str = "uniform_average",
) -> Tensor:
    """Explained variance from sums."""
    numerator = squared_error / count - (error / count).square()
    denominator = squared_total / count - (total / count).square()
    scores = _one_minus(numerator.clamp(min=0), denominator.clamp(min=0))
    return _over_outputs(scores, denominator, multioutput).float()


def explained_variance(
    preds: Tensor, target: Tensor, multioutput: str = "uniform_average"
) -> Tensor:
    """1 - Var(target - preds) / Var(target).

    Args:
        preds: ``(N, ...)``.
        target: of the same shape.
        multioutput: what to do with several outputs: ``uniform_average``, ``variance_weighted``,
            or ``raw_values`` for all.

    >>> explained_variance(torch.tensor([2.5, 0.0, 2, 8]), torch.tensor([3, -0.5, 2, 7]))
    tensor(0.9572)
    """
    check_multioutput(multioutput)
    return explained_variance_of(*explained_variance_sums(preds, target), multioutput)


def r2_sums(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of targets, their squares and squared errors in float64, and the number of samples."""
    preds, target = _pair(preds, target)
    if preds.ndim > 2:
        raise ValueError(
            "Expected both prediction and target to be 1D or 2D tensors,"
            f" but received tensors with dimension {preds.shape}"
        )
    if len(preds) < 2:
        raise ValueError("Needs at least two samples to calculate r2 score.")
    preds, target = preds.to(core.wide(preds)), target.to(core.wide(target))
    return (
        target.sum(dim=0),
        target.square().sum(dim=0),
        (target - preds).square().sum(dim=0),
        torch.tensor(target.shape[0], device=target.device),
    )


def r2_of(
    total: Tensor,
    squares: Tensor,
    residual: Tensor,
    count: Tensor,
    adjusted: int = 0,
    multioutput: str = "uniform_average",
) -> Tensor:
    """R² from sums."""
    spread = squares - total.square() / count
    score = _over_outputs(1 - residual / spread, spread, multioutput)
    if adjusted < 0 or not isinstance(adjusted, int):
        raise ValueError("`adjusted` parameter should be an integer larger or equal to 0.")
    if adjusted:
        if adjusted > count - 1:
            rank_zero_warn(
                "More independent regressions than datapoints in"
                " adjusted r2 score. Falls back to standard r2 score.",
            )
        elif adjusted == count - 1:
            rank_zero_warn(
                "Division by zero in adjusted r2 score. Falls back to standard r2 score."
            )
        else:
            score = 1 - (1 - score) * (count - 1) / (count - adjusted - 1)
    return score.float()


def r2score(
    preds: Tensor, target: Tensor, adjusted: int = 0, multioutput: str = "uniform_average"
) -> Tensor:
    """The coefficient of determination, 1 - Σ(target - preds)² / Σ(target - mean)².

    Args:
        preds: ``(N,)`` or ``(N, outputs)``.
        target: of the same shape.
        adjusted: the number of independent variables to adjust for.
        multioutput: as for :func:`explained_variance`.

    Raises:
        ValueError: there are fewer than two samples, or more than two dimensions.

    >>> r2score(torch.tensor([2.5, 0.0, 2, 8]), torch.tensor([3, -0.5, 2, 7]))
    tensor(0.9486)
    """
    check_multioutput(multioutput)
    return r2_of(*r2_sums(preds, target), adjusted, multioutput)
