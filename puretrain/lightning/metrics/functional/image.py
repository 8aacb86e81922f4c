"""Metrics of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from puretrain.lightning.metrics.utils import reduce
from puretrain.lightning.utilities.distributed import rank_zero_warn

__all__ = ["image_gradients", "psnr", "ssim"]


def squared_errors(
    preds: Tensor, target: Tensor, dim: int | tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of squared differences, and over how many."""
    difference = (preds - target).square()
    if dim is None:
        return difference.sum(), torch.tensor(target.numel(), device=target.device)
    total = difference.sum(dim=dim)
    dims = [dim] if isinstance(dim, int) else list(dim)
    dims = dims or list(range(target.ndim))
    count = math.prod(target.shape[d] for d in dims)
    return total, torch.tensor(count, device=target.device).expand_as(total)


def psnr_of(
    total: Tensor, count: Tensor, data_range: Tensor, base: float, reduction: str
) -> Tensor:
    """Peak signal to noise ratio from a sum of squared differences."""
    ratio = 2 * torch.log(data_range) - torch.log(total / count)
    return reduce(ratio * (10 / math.log(base)), reduction)


def psnr(
    preds: Tensor,
    target: Tensor,
    data_range: float | None = None,
    base: float = 10.0,
    reduction: str = "elementwise_mean",
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """The peak signal to noise ratio, 10 log(range² / mean squared error), in decibels.

    Args:
        preds: images.
        target: of the same shape.
        data_range: the range of the values; by default that of the target.
        base: of the logarithm.
        reduction: ``elementwise_mean``, ``sum`` or ``none``, over what ``dim`` leaves.
        dim: over which dimensions to take the mean; by default all.

    Raises:
        ValueError: ``dim`` is given, and ``data_range`` is not.

    >>> psnr(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[3.0, 2.0], [1.0, 0.0]]))
    tensor(2.5527)
    """
    if dim is None and reduction != "elementwise_mean":
        rank_zero_warn(f"The `reduction={reduction}` will not have any effect when `dim` is None.")
    if data_range is None:
        if dim is not None:
            raise ValueError("The `data_range` must be given when `dim` is not None.")
        span = target.max() - target.min()
    else:
        span = torch.tensor(float(data_range), device=target.device)
    total, count = squared_errors(preds, target, dim)
    return psnr_of(total, count, span, base, reduction)


def check_images(preds: Tensor, target: Tensor) -> None:
    """Refuse what are not two batches of images of one type and shape."""
    if preds.dtype != target.dtype:
        raise TypeError(
            "Expected `preds` and `target` to have the same data type."
            f" Got preds: {preds.dtype} and target: {target.dtype}."
        )
    if preds.shape != target.shape:
        raise RuntimeError("Predictions and targets are expected to have the same shape")
    if preds.ndim != 4:
        raise ValueError(
            "Expected `preds` and `target` to have BxCxHxW shape."
            f" Got preds: {preds.shape} and target: {target.shape}."
        )


def _gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    distance = torch.arange((1 - size) / 2, (1 + size) / 2, dtype=like.dtype, device=like.device)
    weights = torch.exp(-(distance / sigma).square() / 2)
    return weights / weights.sum()


def ssim(
    preds: Tensor,
    target: Tensor,
    kernel_size: Sequence[int] = (11, 11),
    sigma: Sequence[float] = (1.5, 1.5),
    reduction: str = "elementwise_mean",
    data_range: float | None = None,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """The structural similarity of images.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004).

    Args:
        preds: images ``(N, C, H, W)``.
        target: of the same shape and type.
        kernel_size: of the Gaussian window, odd.
        sigma: its standard deviations.
        reduction: ``elementwise_mean``, ``sum`` or ``none``.
        data_range: the range of the values; by default the larger of both images' ranges.
        k1: a constant against small means.
        k2: a constant against small variances.

    >>> image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> round(ssim(image, image).item(), 4)
    1.0
    """
    check_images(preds, target)
    if len(kernel_size) != 2 or len(sigma) != 2:
        raise ValueError(
            "Expected `kernel_size` and `sigma` to have the length of two."
            f" Got kernel_size: {len(kernel_size)} and sigma: {len(sigma)}."
        )
    if any(size % 2 == 0 or size <= 0 for size in kernel_size):
        raise ValueError(f"Expected `kernel_size` to have odd positive number. Got {kernel_size}.")
    if any(width <= 0 for width in sigma):
        raise ValueError(f"Expected `sigma` to have positive number. Got {sigma}.")
    span: Tensor | float
    if data_range is None:
        span = max(preds.max() - preds.min(), target.max() - target.min())
    else:
        span = data_range
    first, second = (k1 * span) ** 2, (k2 * span) ** 2
    channels = preds.shape[1]
    height, width = (_gaussian(n, s, preds) for n, s in zip(kernel_size, sigma, strict=True))
    kernel = torch.outer(height, width).expand(channels, 1, *kernel_size)
    rows, columns = (size // 2 for size in kernel_size)
    padding = (columns, columns, rows, rows)
    preds = functional.pad(preds, padding, mode="reflect")
    target = functional.pad(target, padding, mode="reflect")
    moments = torch.cat([preds, target, preds * preds, target * target, preds * target])
    smooth = functional.conv2d(moments, kernel, groups=channels).chunk(5)
    mean_p, mean_t, square_p, square_t, product = smooth
    variance = (square_p - mean_p**2) + (square_t - mean_t**2)
    covariance = product - mean_p * mean_t
    similarity = (2 * mean_p * mean_t + first) * (2 * covariance + second)
    similarity = similarity / ((mean_p**2 + mean_t**2 + first) * (variance + second))
    # near the border the window sees reflections
    inner = similarity[
        ..., rows : similarity.shape[-2] - rows, columns : similarity.shape[-1] - columns
    ]
    return reduce(inner, reduction)


def image_gradients(img: Tensor) -> tuple[Tensor, Tensor]:
    """The differences to the next row and to the next column; 0 in the last.

    Args:
        img: images ``(N, C, H, W)``.

    Returns:
        Both of the shape of the images.

    >>> image_gradients(torch.arange(4.0).reshape(1, 1, 2, 2))[0]
    tensor([[[[2., 2.],
              [0., 0.]]]])
    """
    if not isinstance(img, Tensor):
        raise TypeError(f"The `img` expects a value of <Tensor> type but got {type(img)}")
    if img.ndim != 4:
        raise RuntimeError(f"The `img` expects a 4D tensor but got {img.ndim}D tensor")
    rows = functional.pad(img[..., 1:, :] - img[..., :-1, :], (0, 0, 0, 1))
    columns = functional.pad(img[..., 1:] - img[..., :-1], (0, 1))
    return rows, columns
