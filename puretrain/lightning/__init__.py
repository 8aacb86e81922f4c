"""The interface of PyTorch Lightning on puretrain.

``import puretrain.lightning as pl`` takes the place of ``import pytorch_lightning as pl``: module
by module it has the same import paths, names and arguments. Programs that must not be edited run
with ``python -m puretrain.lightning script.py``; :func:`import_as_lightning` does the same for the
rest of a process, for example in a ``conftest.py``.

Everything loads on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from puretrain.lightning.imports import import_as_lightning
from puretrain.lightning.version import __version__

_MODULES = (
    "accelerators",
    "callbacks",
    "cli",
    "core",
    "loggers",
    "metrics",
    "plugins",
    "profiler",
    "profilers",
    "strategies",
    "trainer",
    "tuner",
    "utilities",
)

_NAMES = {
    "Callback": "callbacks.base",
    "LightningDataModule": "core.datamodule",
    "LightningModule": "core.lightning",
    "Trainer": "trainer.trainer",
    "_logger": "utilities.distributed:log",
    "seed_everything": "utilities.seed",
}

__all__ = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "__version__",
    "import_as_lightning",
    "metrics",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    place = _NAMES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = place.partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
