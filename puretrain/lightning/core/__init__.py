"""Modules and data modules."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "CheckpointHooks": "hooks",
    "DataHooks": "hooks",
    "LightningDataModule": "datamodule",
    "LightningModule": "lightning",
    "LightningOptimizer": "optimizer",
    "ModelHooks": "hooks",
    "auto_move_data": "decorators",
    "data_loader": "decorators",
}

_MODULES = (
    "datamodule",
    "decorators",
    "hooks",
    "lightning",
    "memory",
    "module",
    "optimizer",
    "saving",
    "step_result",
)

__all__ = ["LightningDataModule", "LightningModule"]


def __getattr__(name: str) -> Any:
    # on first use: utilities need core.memory, and a module needs the utilities
    place = _NAMES.get(name)
    if place is not None:
        return getattr(importlib.import_module(f"{__name__}.{place}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
