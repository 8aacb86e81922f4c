"""Write predictions to files."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["BasePredictionWriter"]


class BasePredictionWriter(Callback):
    """Override ``write_on_batch_end`` or ``write_on_epoch_end``."""

    def __init__(self, write_interval: str = "batch") -> None:
        """Say when to write: ``batch``, ``epoch`` or ``batch_and_epoch``."""
        if write_interval not in {"batch", "epoch", "batch_and_epoch"}:
            raise MisconfigurationException(
                "`write_interval` should be one of ['batch', 'epoch', 'batch_and_epoch']."
            )
        self.interval = write_interval

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any,
        batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Write the predictions of a batch.

        Args:
            trainer: the trainer.
            pl_module: the module.
            prediction: what ``predict_step`` returned.
            batch_indices: the places in the dataset of the batch's samples; empty if the loader
                has no batch sampler to ask.
            batch: the batch.
            batch_idx: its number.
            dataloader_idx: that of its loader.
        """
        raise NotImplementedError

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        """Write all predictions.

        Args:
            trainer: the trainer.
            pl_module: the module.
            predictions: for each loader those of its batches; of a trainer with arguments of 2.x
                and one loader, those of the batches alone, as there.
            batch_indices: for each loader, for each batch, the places of its samples.
        """
        raise NotImplementedError

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Write, if batches are wanted."""
        if "batch" in self.interval:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(
                trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx
            )

    def on_predict_epoch_end(self, trainer, pl_module, outputs=None):
        """Write, if the whole is wanted."""
        if "epoch" in self.interval:
            done = trainer.predict_loop
            predictions = done.predictions if trainer._speaks_2 else done.outputs
            self.write_on_epoch_end(trainer, pl_module, predictions, done.epoch_batch_indices)
