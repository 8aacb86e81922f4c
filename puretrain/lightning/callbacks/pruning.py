"""A callback that is not supported."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["ModelPruning"]


class ModelPruning(Callback):
    """Not supported; making one says what to use instead."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            MisconfigurationException: always.
        """
        raise MisconfigurationException(
            "ModelPruning is not supported; use torch.nn.utils.prune in on_train_epoch_end"
        )
