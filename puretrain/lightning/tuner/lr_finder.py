"""The place of the learning rate finder."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.tuner.tuning import Tuner

__all__ = ["lr_find"]


def lr_find(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The same as ``trainer.tuner.lr_find``."""
    return Tuner(trainer).lr_find(model, *args, **kwargs)
