"""The hooks of a module and of its data."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.utilities.apply_func import move_data_to_device

__all__ = ["CheckpointHooks", "DataHooks", "ModelHooks"]


class ModelHooks:
    """What a module may do at the events of a run."""

    def on_validation_model_zero_grad(self):
        """Before a validation in the middle of training; 2.x clears gradients here."""

    def on_validation_model_eval(self):
        """Set the module to evaluate, before validation."""
        self.eval()

    def on_validation_model_train(self):
        """Set the module to train, after validation."""
        self.train()

    def on_test_model_eval(self):
        """Set the module to evaluate, before the test."""
        self.eval()

    def on_test_model_train(self):
        """Set the module to train, after the test."""
        self.train()

    def on_predict_model_eval(self):
        """Set the module to evaluate, before prediction."""
        self.eval()

    def configure_sharded_model(self):
        """Kept for its name; nothing is sharded here."""

    def configure_model(self):
        """Make layers late, before the optimizers are made."""

    def on_fit_start(self):
        """At the very beginning of ``fit`` (and, as in 1.2, of ``test``)."""

    def on_fit_end(self):
        """At the very end of ``fit``."""

    def on_train_start(self):
        """When training begins."""

    def on_train_end(self):
        """When training ends."""

    def on_validation_start(self):
        """When validation begins."""

    def on_validation_end(self):
        """When validation ends."""

    def on_test_start(self):
        """When the test begins."""

    def on_test_end(self):
        """When the test ends."""

    def on_predict_start(self):
        """When prediction begins."""

    def on_predict_end(self):
        """When prediction ends."""

    def on_pretrain_routine_start(self):
        """Before the summary of the model."""

    def on_pretrain_routine_end(self):
        """After the summary of the model."""

    def on_epoch_start(self):
        """When a training epoch begins."""

    def on_epoch_end(self):
        """When an epoch of training, validation or test ends."""

    def on_train_epoch_start(self):
        """When a training epoch begins."""

    def on_train_epoch_end(self, outputs=None):
        """When a training epoch ends."""

    def on_validation_epoch_start(self):
        """When a validation epoch begins."""

    def on_validation_epoch_end(self, outputs=None):
        """When a validation epoch ends."""

    def on_test_epoch_start(self):
        """When a test epoch begins."""

    def on_test_epoch_end(self, outputs=None):
        """When a test epoch ends."""

    def on_predict_epoch_start(self):
        """When a prediction epoch begins."""

    def on_predict_epoch_end(self, results):
        """When a prediction epoch ends."""

    def on_train_batch_start(self, batch, batch_idx, dataloader_idx=0):
        """When a training batch begins."""

    def on_train_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        """When a training batch ends."""

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        """When a validation batch begins."""

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        """When a validation batch ends."""

    def on_test_batch_start(self, batch, batch_idx, dataloader_idx=0):
        """When a test batch begins."""

    def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        """When a test batch ends."""

    def on_predict_batch_start(self, batch, batch_idx, dataloader_idx=0):
        """When a prediction batch begins."""

    def on_predict_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        """When a prediction batch ends."""

    def on_before_zero_grad(self, optimizer):
        """Before the gradients are set to none."""

    def on_before_backward(self, loss):
        """Before the backward pass, with the loss."""

    def on_after_backward(self):
        """After the backward pass, before gradients are clipped."""

    def on_before_optimizer_step(self, optimizer, optimizer_idx=0):
        """Before an optimizer makes its step."""


class DataHooks:
    """Where a module or data module gets its data from."""

    def prepare_data(self):
        """Download or prepare data; called in one process only, so keep nothing in ``self``."""

    def setup(self, stage=None):
        """Prepare for ``fit``, ``validate``, ``test`` or ``predict``; called in each process."""

    def teardown(self, stage=None):
        """Clean up after ``fit``, ``validate``, ``test`` or ``predict``."""

    def train_dataloader(self):
        """Give one loader, or a list or dict of several."""
        return None

    def val_dataloader(self):
        """Give one loader or a list of several."""
        return None

    def test_dataloader(self):
        """Give one loader or a list of several."""
        return None

    def predict_dataloader(self):
        """Give one loader or a list of several."""
        return None

    def transfer_batch_to_device(self, batch: Any, device=None, dataloader_idx: int = 0) -> Any:
        """Move a batch to a device; override it for types of your own."""
        return move_data_to_device(batch, device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Change a batch before it goes to the device."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Change a batch on the device."""
        return batch


class CheckpointHooks:
    """What a module adds to its checkpoints."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look at a checkpoint before the module's parameters are read from it."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint before it is written."""
