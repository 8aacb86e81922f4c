"""The place of the batch size finder."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.tuner.tuning import Tuner

__all__ = ["scale_batch_size"]


def scale_batch_size(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The same as ``trainer.tuner.scale_batch_size``."""
    return Tuner(trainer).scale_batch_size(model, *args, **kwargs)
