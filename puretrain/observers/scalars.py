"""The numbers of an event, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puretrain.loop import Event
from puretrain.metrics import compute_all

__all__ = ["scalars", "step_metrics"]


def step_metrics(state: Any, event: Event) -> Mapping[str, Any]:
    """The metrics of an event, at a step with those that reducers have added to the state."""
    metrics: Mapping[str, Any] = state.metrics if event.kind == "step" else event.metrics
    return metrics


def scalars(metrics: Mapping[str, Any]) -> dict[str, float | int | bool]:
    """Metrics as plain numbers; one of several elements (a confusion matrix) is left out.

    It waits for the device, so call it only for what is written.

    >>> import torch
    >>> scalars({"loss": torch.tensor(0.5), "matrix": torch.zeros(2, 2)})
    {'loss': 0.5}
    """
    return {
        name: value.item() for name, value in compute_all(metrics).items() if value.numel() == 1
    }
