"""The table of the model's layers, as a callback."""

from __future__ import annotations

from puretrain.lightning.callbacks.base import Callback

__all__ = ["ModelSummary", "RichModelSummary"]


class ModelSummary(Callback):
    """Shows the layers before training, instead of the trainer's own table."""

    def __init__(self, max_depth: int = 1, **unused: object) -> None:
        """Say how many levels of modules to show; -1: all."""
        self._max_depth = max_depth

    def setup(self, trainer, pl_module, stage=None):
        """Take the place of the trainer's table."""
        trainer.weights_summary = None

    def on_fit_start(self, trainer, pl_module):
        """Show the table."""
        if self._max_depth and trainer._fn == "fit":
            pl_module.summarize(mode=None, max_depth=self._max_depth)


RichModelSummary = ModelSummary
