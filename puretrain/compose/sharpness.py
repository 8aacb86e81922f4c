"""Losses at the worst place near the parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from puretrain.compose.evaluation import check_between, pair, value_and_gradient
from puretrain.gradients import Loss
from puretrain.optim import global_norm
from puretrain.tree import FrozenDict, tree_map

__all__ = ["sam"]


def sam(loss: Loss, rho: float = 0.05) -> Loss:
    r"""Sharpness-aware minimization: the loss at the worst place within a distance.

    .. math::
        \epsilon = \rho \frac{\nabla L(\theta)}{\lVert \nabla L(\theta) \rVert}, \qquad
        L_{\mathrm{SAM}}(\theta) = L(\theta + \epsilon), \qquad
        \nabla L_{\mathrm{SAM}}(\theta) := \nabla L(\theta + \epsilon)

    (Foret et al., "Sharpness-aware minimization for efficiently improving generalization", ICLR
    2021). It costs a second forward and backward pass. The metrics and the new buffers are those at
    θ; ``sharpness`` is the difference of the two losses. What the loss draws, it draws anew at the
    second place.

    Args:
        loss: the loss.
        rho: ρ, 0 or more.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> import puretrain as pt
        >>> sharp = sam(lambda params, buffers, batch, key: params["w"] ** 2, rho=0.5)
        >>> sharp({"w": torch.tensor(1.0)}, {}, None, None)[0]  # at 1.5
        tensor(2.2500)
    """
    check_between("sam", "rho", rho, 0.0, math.inf)

    def sharp(params: Any, buffers: Any, batch: Any, key: Tensor, /) -> Any:
        value, aux, slopes = value_and_gradient(
            lambda params: pair(loss(params, buffers, batch, key)), params
        )
        scale = rho / (global_norm(slopes) + 1e-12)
        with torch.enable_grad():
            worst = tree_map(lambda leaf, slope: leaf + slope * scale, params, slopes)
        there, _ = pair(loss(worst, buffers, batch, key))
        metrics = FrozenDict({**aux.metrics, "sharpness": (there - value).detach()})
        return there, aux.replace(metrics=metrics)

    return sharp
