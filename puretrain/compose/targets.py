"""Losses whose targets are softened: label smoothing, mixup."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from puretrain.compose.evaluation import check_between, drawing
from puretrain.errors import LossError
from puretrain.gradients import Loss
from puretrain.tree import tree_leaves, tree_map

__all__ = ["label_smoothing", "mixup"]


def label_smoothing(loss: Loss, amount: float = 0.1, *, classes: int) -> Loss:
    r"""Give a loss targets that are a little uncertain.

    .. math:: q = (1 - a)\, p + a / K

    with the one-hot or already soft targets p over K classes (Szegedy et al., "Rethinking the
    inception architecture for computer vision", CVPR 2016).

    Args:
        loss: of batches ``(inputs, targets)``, and takes probabilities as targets, of shape
            ``(n, classes)``, as ``torch.nn.functional.cross_entropy`` does.
        amount: a, from 0 to 1.
        classes: K.

    Returns:
        The loss; its targets may be class numbers, or probabilities.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> import puretrain as pt
        >>> smooth = label_smoothing(lambda params, buffers, batch, key: batch[1], 0.2, classes=2)
        >>> smooth({}, {}, (torch.zeros(2, 1), torch.tensor([0, 1])), None)
        tensor([[0.9000, 0.1000],
                [0.1000, 0.9000]])
    """
    check_between("label_smoothing", "amount", amount, 0.0, 1.0)

    def smoothed(params: Any, buffers: Any, batch: Any, key: Tensor, /) -> Any:
        inputs, targets = batch
        soft = _probabilities("label_smoothing", inputs, targets, classes)
        return loss(params, buffers, (inputs, soft * (1 - amount) + amount / classes), key)

    return smoothed


def mixup(loss: Loss, alpha: float = 0.2, *, classes: int | None = None) -> Loss:
    r"""Give a loss mixtures of the samples of a batch.

    .. math::
        \lambda &\sim \mathrm{Beta}(\alpha, \alpha) \\
        x_i &\leftarrow \lambda x_i + (1 - \lambda) x_{\pi(i)}, \qquad
        y_i \leftarrow \lambda y_i + (1 - \lambda) y_{\pi(i)}

    with one λ and one random permutation π for each batch (Zhang et al., "mixup: beyond empirical
    risk minimization", ICLR 2018).

    Args:
        loss: of batches ``(inputs, targets)``; the inputs may be a tree, and the targets are
            floating-point numbers, such as probabilities.
        alpha: α, above 0.
        classes: how many, to make probabilities of targets that are class numbers.

    Returns:
        The loss. It raises a LossError if the targets are whole numbers and ``classes`` is missing,
        or if the step draws nothing (``draws=False``).

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> import puretrain as pt
        >>> mixed = mixup(lambda params, buffers, batch, key: batch[1], 1.0, classes=2)
        >>> batch = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> with pt.random.scope(pt.random.key(0)):
        ...     mixed({}, {}, batch, pt.random.key(0)).sum(dim=1)
        tensor([1., 1.])
    """
    check_between("mixup", "alpha", alpha, 1e-6, math.inf)

    def mixed(params: Any, buffers: Any, batch: Any, key: Tensor, /) -> Any:
        drawing("mixup", key)
        inputs, targets = batch
        targets = _probabilities("mixup", inputs, targets, classes)
        share = torch._sample_dirichlet(torch.full((2,), alpha, device=targets.device))[0]
        order = torch.randperm(len(targets), device=targets.device)

        def mix(leaf: Tensor) -> Tensor:
            part = share.to(leaf.dtype)
            return part * leaf + (1 - part) * leaf[order]

        return loss(params, buffers, (tree_map(mix, inputs), mix(targets)), key)

    return mixed


def _probabilities(who: str, inputs: Any, targets: Tensor, classes: int | None) -> Tensor:
    """The targets as floating-point numbers, in the precision of the inputs."""
    if targets.is_floating_point():
        return targets
    if classes is None:
        raise LossError(
            f"{who}: the targets are {targets.dtype}; give classes= to make probabilities of them"
        )
    given = tree_leaves(inputs)[0].dtype
    dtype = given if given.is_floating_point else torch.get_default_dtype()
    return (targets[..., None] == torch.arange(classes, device=targets.device)).to(dtype)
