"""Whether a user's class overrides a method."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import Mock

__all__ = ["is_overridden"]


def _plain(method: Any) -> Any:
    """The function under bound methods, wrappers and partials."""
    while True:
        if isinstance(method, partial):
            method = method.func
        elif isinstance(method, Mock):
            return method
        elif hasattr(method, "__wrapped__"):
            method = method.__wrapped__
        elif hasattr(method, "__func__"):
            method = method.__func__
        else:
            return method


def _base_class(instance: Any) -> type | None:
    from puretrain.lightning.callbacks import Callback
    from puretrain.lightning.core.datamodule import LightningDataModule
    from puretrain.lightning.core.lightning import LightningModule

    bases = (LightningModule, LightningDataModule, Callback)
    return next((base for base in bases if isinstance(instance, base)), None)


def is_overridden(method_name: str, instance: Any = None, parent: Any = None, **other: Any) -> bool:
    """Whether an object has another method than its base class.

    Args:
        method_name: the method.
        instance: the object; older programs call it ``model``.
        parent: the class to compare with; by default LightningModule, LightningDataModule or
            Callback, whichever the object is. Older programs give an instance, ``super_object``.
        **other: the older names.

    Raises:
        ValueError: the parent has no such method, or the object has no parent to compare with.
    """
    instance = other.get("model", instance)
    parent = other.get("super_object", parent)
    if instance is None:
        return False
    parent = parent if parent is not None else _base_class(instance)
    if parent is None:
        raise ValueError("Expected a parent")
    method = getattr(instance, method_name, None)
    if method is None:
        return False
    original = getattr(parent, method_name, None)
    if original is None:
        raise ValueError("The parent should define the method")
    return _plain(method) is not _plain(original)
