"""The base class of callbacks."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any

__all__ = ["Callback"]


class Callback(ABC):  # noqa: B024 - all its methods are optional
    """What wants to hear of a trainer's events; override the methods for those you need."""

    _looks_at_metrics = False

    @property
    def state_key(self) -> str:
        """Under which name the state of this callback is in a checkpoint."""
        return type(self).__qualname__

    @property
    def _legacy_state_key(self) -> type:
        return type(self)

    def _generate_state_key(self, **values: Any) -> str:
        return f"{type(self).__qualname__}{values!r}"

    def _postponed(self, trainer: Any, method: Callable[..., None]) -> bool:
        """Whether to look at the metrics later, since more of this epoch will be logged.

        If so, the trainer calls the method again when all others have been called.
        """
        if trainer._late_follows:
            trainer._postponed.append(method)
        return bool(trainer._late_follows)

    def on_configure_sharded_model(self, trainer, pl_module):
        """Kept for its name; nothing is sharded here."""

    def on_before_accelerator_backend_setup(self, trainer, pl_module):
        """Before the device is prepared."""

    def setup(self, trainer, pl_module, stage=None):
        """When ``fit``, ``validate``, ``test`` or ``predict`` begins."""

    def teardown(self, trainer, pl_module, stage=None):
        """When ``fit``, ``validate``, ``test`` or ``predict`` ends."""

    def on_init_start(self, trainer):
        """When the trainer is being made."""

    def on_init_end(self, trainer):
        """When the trainer has been made."""

    def on_batch_start(self, trainer, pl_module):
        """When a training batch begins."""

    def on_batch_end(self, trainer, pl_module):
        """When a training batch ends."""

    def on_keyboard_interrupt(self, trainer, pl_module):
        """When Ctrl-C has ended the training."""

    def on_exception(self, trainer, pl_module, exception):
        """When an exception ends the run."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        """Give what is to be in a checkpoint, or change the checkpoint."""

    def on_load_checkpoint(self, trainer, pl_module, callback_state):
        """Take back what :meth:`on_save_checkpoint` has given."""

    def state_dict(self) -> dict[str, Any]:
        """Give what is to be in a checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` has given."""

    def on_fit_start(self, trainer, pl_module):
        """At the very beginning of ``fit`` (and, as in 1.2, of ``test``)."""

    def on_fit_end(self, trainer, pl_module):
        """At the very end of ``fit``."""

    def on_train_start(self, trainer, pl_module):
        """When training begins."""

    def on_train_end(self, trainer, pl_module):
        """When training ends."""

    def on_validation_start(self, trainer, pl_module):
        """When validation begins."""

    def on_validation_end(self, trainer, pl_module):
        """When validation ends."""

    def on_test_start(self, trainer, pl_module):
        """When the test begins."""

    def on_test_end(self, trainer, pl_module):
        """When the test ends."""

    def on_predict_start(self, trainer, pl_module):
        """When prediction begins."""

    def on_predict_end(self, trainer, pl_module):
        """When prediction ends."""

    def on_pretrain_routine_start(self, trainer, pl_module):
        """Before the summary of the model."""

    def on_pretrain_routine_end(self, trainer, pl_module):
        """After the summary of the model."""

    def on_sanity_check_start(self, trainer, pl_module):
        """When a sanity check begins."""

    def on_sanity_check_end(self, trainer, pl_module):
        """When a sanity check ends."""

    def on_epoch_start(self, trainer, pl_module):
        """When a training epoch begins."""

    def on_epoch_end(self, trainer, pl_module):
        """When an epoch of training, validation or test ends."""

    def on_train_epoch_start(self, trainer, pl_module):
        """When a training epoch begins."""

    def on_train_epoch_end(self, trainer, pl_module, outputs=None):
        """When a training epoch ends."""

    def on_validation_epoch_start(self, trainer, pl_module):
        """When a validation epoch begins."""

    def on_validation_epoch_end(self, trainer, pl_module, outputs=None):
        """When a validation epoch ends."""

    def on_test_epoch_start(self, trainer, pl_module):
        """When a test epoch begins."""

    def on_test_epoch_end(self, trainer, pl_module, outputs=None):
        """When a test epoch ends."""

    def on_predict_epoch_start(self, trainer, pl_module):
        """When a prediction epoch begins."""

    def on_predict_epoch_end(self, trainer, pl_module, outputs=None):
        """When a prediction epoch ends."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        """When a training batch begins."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """When a training batch ends."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        """When a validation batch begins."""

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ):
        """When a validation batch ends."""

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        """When a test batch begins."""

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """When a test batch ends."""

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        """When a prediction batch begins."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """When a prediction batch ends."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        """Before the gradients are set to none."""

    def on_before_backward(self, trainer, pl_module, loss):
        """Before the backward pass, with the loss."""

    def on_after_backward(self, trainer, pl_module):
        """After the backward pass, before gradients are clipped."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer, optimizer_idx=0):
        """Before an optimizer makes its step."""
