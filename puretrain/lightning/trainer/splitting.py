"""Batches divided over the devices of one process: ``dp``, and ``ddp2`` within a machine.

The module's step runs on each part, and its outputs are gathered: numbers into a vector with one
element for each device, tensors along their first dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import replicate

from puretrain.lightning.utilities.apply_func import move_data_to_device

__all__ = ["call_parts", "divided", "gathered"]


def divided(batch: Any, parts: int) -> list[Any]:
    """A batch in parts: its tensors are cut along their first dimension, the rest is repeated.

    There are fewer parts if there are fewer samples.

    >>> divided({"x": torch.arange(3), "name": "a"}, 2)
    [{'x': tensor([0, 1]), 'name': 'a'}, {'x': tensor([2]), 'name': 'a'}]
    """
    found = _divided(batch, parts)
    return [batch] if found is None else found


def _divided(value: Any, parts: int) -> list[Any] | None:
    """The parts of a value; None if nothing in it can be cut."""
    if isinstance(value, Tensor):
        return list(value.chunk(parts)) if value.dim() else None
    if isinstance(value, Mapping):
        cut = _together([_divided(item, parts) for item in value.values()], list(value.values()))
        return None if cut is None else [type(value)(zip(value, row, strict=True)) for row in cut]
    if isinstance(value, (list, tuple)):
        cut = _together([_divided(item, parts) for item in value], list(value))
        if cut is None:
            return None
        named = hasattr(value, "_fields")
        return [type(value)(*row) if named else type(value)(row) for row in cut]
    return None


def _together(items: list[list[Any] | None], whole: list[Any]) -> list[list[Any]] | None:
    counts = [len(item) for item in items if item is not None]
    if not counts:
        return None
    return [
        [value if item is None else item[i] for item, value in zip(items, whole, strict=True)]
        for i in range(min(counts))
    ]


def gathered(outputs: Sequence[Any], device: torch.device) -> Any:
    """The outputs of all parts as one, on a device.

    >>> gathered([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}], torch.device("cpu"))
    {'loss': tensor([1., 2.])}
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        moved = [output.to(device) for output in outputs]
        return torch.cat(moved) if first.dim() else torch.stack(moved)
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        return torch.tensor(outputs, device=device)
    if isinstance(first, Mapping):
        return {key: gathered([output[key] for output in outputs], device) for key in first}
    if isinstance(first, (list, tuple)):
        rows = [gathered(row, device) for row in zip(*outputs, strict=True)]
        return type(first)(*rows) if hasattr(first, "_fields") else type(first)(rows)
    return first


def call_parts(
    trainer: Any, method: str, arguments: Sequence[Any], named: Mapping[str, Any]
) -> Any:
    """Call a method of the module on each part of a batch, and gather what it returns.

    Args:
        trainer: whose module and devices.
        method: its name.
        arguments: the batch and what follows it.
        named: further arguments.
    """
    module, results = trainer._module, trainer._results
    batch, *rest = arguments
    devices = trainer._processes.plan.devices
    parts = divided(batch, len(devices))
    outputs = []
    try:
        for number, (part, copy, device) in enumerate(
            zip(parts, _copies(module, devices[: len(parts)]), devices, strict=False)
        ):
            if device.type != "cpu":
                part = move_data_to_device(part, device)
            if results is not None:
                results.begin_batch(part, results.loader)
                results.part = number
            outputs.append(getattr(copy, method)(part, *rest, **named))
    finally:
        if results is not None:
            results.part = 0
            results.begin_batch(batch, results.loader)
    return gathered(outputs, devices[0])


def _copies(module: Any, devices: Sequence[torch.device]) -> list[Any]:
    """The module on each device; gradients flow back to the one on the first."""
    if len(devices) == 1 or devices[0].type == "cpu":
        return [module] * len(devices)
    copies = replicate(module, list(devices), detach=not torch.is_grad_enabled())
    for copy, device in zip(copies, devices, strict=True):
        vars(copy)["_replica_device"] = device  # it has no parameters of its own to tell
    return copies
