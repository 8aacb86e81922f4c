"""Losses of several tasks whose gradients get in each other's way."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puretrain.compose.evaluation import drawing, pair, value_and_gradient
from puretrain.errors import ConfigurationError
from puretrain.gradients import Aux, Loss
from puretrain.tree import FrozenDict, tree_leaves

__all__ = ["pcgrad"]


def pcgrad(losses: Mapping[str, Loss]) -> Loss:
    r"""Gradient surgery: the sum of losses, without the parts of gradients that are in conflict.

    For each task i and the others j in a random order,

    .. math:: g_i \leftarrow g_i - \min\left(0,
        \frac{g_i \cdot g_j^0}{\lVert g_j^0 \rVert^2}\right) g_j^0

    with the task's own gradient :math:`g_j^0`; the gradient of the whole is the sum of all
    :math:`g_i` (Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020). The losses
    are evaluated one after the other on the whole batch, each with the buffers of the one before.

    Args:
        losses: at least two, by the name of the task; each takes its part out of the batch.

    Returns:
        The loss: the value is the sum, its metrics are those of all tasks and each task's loss by
        name. It raises a LossError if the step draws nothing (``draws=False``).

    Example:
        >>> import puretrain as pt
        >>> both = pcgrad({
        ...     "right": lambda params, buffers, batch, key: (params["w"] * batch[0]).sum(),
        ...     "left": lambda params, buffers, batch, key: (params["w"] * batch[1]).sum()})
        >>> batch = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])  # gradients at an angle of 135 degrees
        >>> step = pt.train_step(both, pt.optim.sgd(1.0))
        >>> state = pt.TrainState.create(
        ...     {"w": torch.zeros(2)}, None, pt.optim.sgd(1.0), key=pt.random.key(0))
        >>> step(state, batch).params["w"]
        tensor([-0.5000, -1.5000])
    """
    if not isinstance(losses, Mapping) or len(losses) < 2:
        raise ConfigurationError(f"pcgrad takes two losses or more by name, not {losses!r}")
    names = tuple(losses)

    def surgery(params: Any, buffers: Any, batch: Any, key: Tensor, /) -> Any:
        drawing("pcgrad", key)
        metrics: dict[str, Any] = {}
        rows, values = [], []
        for name in names:
            value, aux, slopes = value_and_gradient(
                functools.partial(_one, losses[name], buffers, batch, key), params, others=batch
            )
            buffers = buffers if aux.buffers is None else aux.buffers
            metrics |= {**aux.metrics, name: value.detach()}
            values.append(value)
            rows.append(torch.cat([slope.reshape(-1) for slope in tree_leaves(slopes)]))
        total = torch.stack(values).sum()
        surrogate = _with_gradient(total, tree_leaves(params), _without_conflict(rows))
        return surrogate, _AUX.replace(buffers=buffers, metrics=FrozenDict(metrics))

    return surgery


_AUX = Aux()


def _one(loss: Loss, buffers: Any, batch: Any, key: Tensor, params: Any) -> tuple[Tensor, Aux]:
    return pair(loss(params, buffers, batch, key))


def _without_conflict(rows: list[Tensor]) -> Tensor:
    """The sum of the projected gradients."""
    gradients = torch.stack(rows)
    total = torch.zeros_like(rows[0])
    for i, gradient in enumerate(rows):
        order = torch.randperm(len(rows), device=gradient.device)
        # Not by unbinding the order: a compiler wants to know where an index points to.
        for j, other in zip(torch.split(order, 1), gradients.index_select(0, order), strict=True):
            along = (gradient * other).sum() / (other * other).sum()
            conflict = (along < 0) & (j[0] != i)
            gradient = torch.where(conflict, gradient - along * other, gradient)
        total = total + gradient
    return total


def _with_gradient(value: Tensor, leaves: list[Tensor], flat: Tensor) -> Tensor:
    """A loss of this value whose gradient by the leaves is this one."""
    parts = torch.split(flat, [leaf.numel() for leaf in leaves])
    for leaf, part in zip(leaves, parts, strict=True):
        value = value + ((leaf - leaf.detach()) * part.reshape(leaf.shape)).sum()
    return value
