"""Metrics of numbers that gather over batches; see the functions of the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.metrics.functional import image
from puretrain.lightning.metrics.functional import regression as sums
from puretrain.lightning.metrics.metric import Metric
from puretrain.lightning.metrics.utils import _check_same_shape, dim_zero_cat
from puretrain.lightning.utilities.distributed import rank_zero_warn

__all__ = [
    "MAE",
    "MSE",
    "PSNR",
    "SSIM",
    "ExplainedVariance",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "MeanSquaredLogError",
    "R2Score",
]


class _MeanError(Metric):
    """A mean over all elements."""

    def __init__(self, **kwargs: Any) -> None:
        """Take the arguments of :class:`Metric`."""
        super().__init__(**kwargs)
        self.add_state("sum_error", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def _errors(self, preds: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        _check_same_shape(preds, target)
        self.sum_error = self.sum_error + self._errors(preds, target).sum()
        self.total = self.total + target.numel()

    def compute(self) -> Tensor:
        """The mean."""
        return self.sum_error / self.total


class MeanAbsoluteError(_MeanError):
    """The mean of the absolute differences.

    >>> x = torch.arange(10.0)
    >>> MeanAbsoluteError()(x, x + 2)
    tensor(2.)
    """

    def _errors(self, preds: Tensor, target: Tensor) -> Tensor:
        return (preds - target).abs()


class MeanSquaredError(_MeanError):
    """The mean of the squared differences."""

    def _errors(self, preds: Tensor, target: Tensor) -> Tensor:
        return (preds - target).square()


class MeanSquaredLogError(_MeanError):
    """The mean of the squared differences of log(1 + x)."""

    def _errors(self, preds: Tensor, target: Tensor) -> Tensor:
        return (preds.log1p() - target.log1p()).square()


MAE = MeanAbsoluteError
MSE = MeanSquaredError


class ExplainedVariance(Metric):
    """1 - Var(target - preds) / Var(target)."""

    def __init__(self, multioutput: str = "uniform_average", **kwargs: Any) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        sums.check_multioutput(multioutput)
        self.multioutput = multioutput
        self.add_state("n_obs", default=torch.tensor(0), dist_reduce_fx="sum")
        for name in ("sum_error", "sum_squared_error", "sum_target", "sum_squared_target"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        for name, value in zip(
            self._defaults, sums.explained_variance_sums(preds, target), strict=True
        ):
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        """The share, of one or each output."""
        return sums.explained_variance_of(
            *(getattr(self, name) for name in self._defaults), multioutput=self.multioutput
        )


class R2Score(Metric):
    """The coefficient of determination."""

    def __init__(
        self,
        num_outputs: int = 1,
        adjusted: int = 0,
        multioutput: str = "uniform_average",
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        if adjusted < 0 or not isinstance(adjusted, int):
            raise ValueError("`adjusted` parameter should be an integer larger or equal to 0.")
        sums.check_multioutput(multioutput)
        self.num_outputs, self.adjusted, self.multioutput = num_outputs, adjusted, multioutput
        shape = (num_outputs,) if num_outputs > 1 else ()
        for name in ("total", "squares", "residual"):
            self.add_state(name, default=torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        for name, value in zip(self._defaults, sums.r2_sums(preds, target), strict=True):
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        """R², of one or each output."""
        return sums.r2_of(
            *(getattr(self, name) for name in self._defaults), self.adjusted, self.multioutput
        )


class PSNR(Metric):
    """The peak signal to noise ratio."""

    def __init__(
        self,
        data_range: float | None = None,
        base: float = 10.0,
        reduction: str = "elementwise_mean",
        dim: int | tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        if dim is None and reduction != "elementwise_mean":
            rank_zero_warn(
                f"The `reduction={reduction}` will not have any effect when `dim` is None."
            )
        if data_range is None and dim is not None:
            raise ValueError("The `data_range` must be given when `dim` is not None.")
        self.base, self.reduction, self.given_range = base, reduction, data_range
        self.dim = tuple(dim) if isinstance(dim, (list, tuple)) else dim
        default: Any = torch.tensor(0.0) if dim is None else []
        how = "sum" if dim is None else "cat"
        self.add_state("sum_squared_error", default=default, dist_reduce_fx=how)
        count: Any = torch.tensor(0) if dim is None else []
        self.add_state("total", default=count, dist_reduce_fx=how)
        if data_range is None:
            infinite = torch.tensor(float("inf"))
            self.add_state("min_target", default=infinite, dist_reduce_fx=torch.min)
            self.add_state("max_target", default=-infinite, dist_reduce_fx=torch.max)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        squared, count = image.squared_errors(preds, target, self.dim)
        if self.dim is not None:
            self.sum_squared_error.append(squared)
            self.total.append(count)
            return
        self.sum_squared_error = self.sum_squared_error + squared
        self.total = self.total + count
        if self.given_range is None:
            self.min_target = torch.minimum(self.min_target, target.min())
            self.max_target = torch.maximum(self.max_target, target.max())

    def compute(self) -> Tensor:
        """The ratio in decibels."""
        if self.dim is None:
            squared, count = self.sum_squared_error, self.total
        else:
            squared = torch.cat([each.flatten() for each in self.sum_squared_error])
            count = torch.cat([each.flatten() for each in self.total])
        if self.given_range is None:
            span = self.max_target - self.min_target
        else:
            span = torch.tensor(float(self.given_range), device=squared.device)
        return image.psnr_of(squared, count, span, self.base, self.reduction)


class SSIM(Metric):
    """The structural similarity of images."""

    def __init__(
        self,
        kernel_size: tuple[int, ...] = (11, 11),
        sigma: tuple[float, ...] = (1.5, 1.5),
        reduction: str = "elementwise_mean",
        data_range: float | None = None,
        k1: float = 0.01,
        k2: float = 0.03,
        **kwargs: Any,
    ) -> None:
        """Keep the arguments, which are those of the function, and of :class:`Metric`."""
        super().__init__(**kwargs)
        rank_zero_warn(
            "Metric `SSIM` will save all targets and predictions in buffer."
            " For large datasets this may lead to large memory footprint."
        )
        self.add_state("y", default=[], dist_reduce_fx="cat")
        self.add_state("y_pred", default=[], dist_reduce_fx="cat")
        self.kernel_size, self.sigma, self.reduction = kernel_size, sigma, reduction
        self.data_range, self.k1, self.k2 = data_range, k1, k2

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        image.check_images(preds, target)
        self.y_pred.append(preds)
        self.y.append(target)

    def compute(self) -> Tensor:
        """The similarity."""
        return image.ssim(
            dim_zero_cat(self.y_pred),
            dim_zero_cat(self.y),
            self.kernel_size,
            self.sigma,
            self.reduction,
            self.data_range,
            self.k1,
            self.k2,
        )
