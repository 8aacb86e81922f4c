"""Finding a learning rate and a batch size."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["Tuner"]


class Tuner:
    """What ``trainer.tuner`` is."""

    def __init__(self, trainer: Any) -> None:
        """Tune for a trainer.

        Args:
            trainer: the trainer.
        """
        self.trainer = trainer

    def tune(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Do what ``auto_lr_find`` and ``auto_scale_batch_size`` ask.

        Raises:
            MisconfigurationException: one of them asks for something.
        """
        if self.trainer.auto_scale_batch_size:
            self.scale_batch_size(model)
        if self.trainer.auto_lr_find:
            self.lr_find(model)
        return {}

    def lr_find(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Raise: there is no learning rate finder yet."""
        raise MisconfigurationException(
            "the learning rate finder is not available yet; set the learning rate yourself and "
            "leave auto_lr_find out"
        )

    def scale_batch_size(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Raise: there is no batch size finder yet."""
        raise MisconfigurationException(
            "the batch size finder is not available yet; set the batch size yourself and leave "
            "auto_scale_batch_size out"
        )
