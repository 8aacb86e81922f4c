"""The numbers of an event, on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puretrain.loop import Event
from puretrain.metrics import compute_all

__all__ = ["by_member", "scalars", "spread", "step_metrics"]


def step_metrics(state: Any, event: Event) -> Mapping[str, Any]:
    """The metrics of an event, at a step with those that reducers have added to the state.

    Those of an ensemble come as :func:`by_member` makes them.
    """
    return by_member(state, state.metrics if event.kind == "step" else event.metrics)


def by_member(state: Any, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics of an ensemble as single numbers: ``loss/mean``, ``loss/std``, ``loss/0``, ….

    Mean and standard deviation are over the members whose value is finite. The metrics of a single
    run, and those without an axis of the members, stay as they are.
    """
    members = getattr(state, "members", None)
    if members is None:
        return metrics
    digits = len(str(members - 1))
    found: dict[str, Any] = {}
    for name, value in compute_all(metrics).items():
        if value.shape != (members,):
            found[name] = value
            continue
        mean, deviation, _ = spread(value)
        found[f"{name}/mean"] = torch.tensor(mean, dtype=torch.float64)
        found[f"{name}/std"] = torch.tensor(deviation, dtype=torch.float64)
        found.update((f"{name}/{i:0{digits}}", x) for i, x in enumerate(value.unbind()))
    return found


def spread(values: Tensor) -> tuple[float, float, int]:
    """Mean and standard deviation of the finite elements, and how many are not finite.

    The deviation is that of a sample, 0 of a single element. It waits for the device.

    >>> spread(torch.tensor([1.0, 3.0, float("nan")]))
    (2.0, 1.4142135623730951, 1)
    """
    known = values.detach().to("cpu", torch.float64)
    finite = known[known.isfinite()]
    deviation = float(finite.std()) if finite.numel() > 1 else 0.0
    mean = float(finite.mean()) if finite.numel() else math.nan
    return mean, deviation, values.numel() - finite.numel()


def scalars(metrics: Mapping[str, Any]) -> dict[str, float | int | bool]:
    """Metrics as plain numbers; one of several elements (a confusion matrix) is left out.

    It waits for the device, so call it only for what is written.

    >>> scalars({"loss": torch.tensor(0.5), "matrix": torch.zeros(2, 2)})
    {'loss': 0.5}
    """
    return {
        name: value.item() for name, value in compute_all(metrics).items() if value.numel() == 1
    }
