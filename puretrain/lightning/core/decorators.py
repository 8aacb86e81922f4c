"""Decorators of a module's methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from puretrain.lightning.utilities.apply_func import move_data_to_device

__all__ = ["auto_move_data", "data_loader"]


def _device_of(module: nn.Module) -> torch.device | None:
    device = getattr(module, "device", None)
    if isinstance(device, torch.device):
        return device
    return next((parameter.device for parameter in module.parameters()), None)


def auto_move_data(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method, such as ``forward``, move its tensors to the module's device first.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 1)
        ...     @auto_move_data
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> Model()(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """

    @functools.wraps(fn)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, nn.Module):
            return fn(self, *args, **kwargs)
        transfer = getattr(self, "transfer_batch_to_device", None)
        device = _device_of(self)
        if device is None:
            return fn(self, *args, **kwargs)
        if transfer is None:
            args, kwargs = move_data_to_device((args, kwargs), device)
        else:
            args, kwargs = transfer((args, kwargs), device)
        return fn(self, *args, **kwargs)

    return moved


def data_loader(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method as it is; very old programs decorate their loaders with it."""
    return fn
