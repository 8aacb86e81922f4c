"""Accumulate more or fewer batches from an epoch on."""

from __future__ import annotations

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["GradientAccumulationScheduler"]


class GradientAccumulationScheduler(Callback):
    """Sets ``trainer.accumulate_grad_batches`` by the epoch.

    Example:
        >>> GradientAccumulationScheduler({0: 1, 5: 3}).get_accumulate_grad_batches(6)
        3
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        """Take ``{epoch: batches}``, epochs from 0."""
        super().__init__()
        if not scheduling:
            raise TypeError("Empty dict cannot be interpreted correct")
        if any(not isinstance(key, int) or key < 0 for key in scheduling):
            raise MisconfigurationException(
                f"Epoch should be an int greater than or equal to 0. Got {list(scheduling)}."
            )
        if any(not isinstance(value, int) or value < 1 for value in scheduling.values()):
            raise MisconfigurationException(
                "Accumulation factor should be an int greater than 0. Got "
                f"{list(scheduling.values())}."
            )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates."""
        return any(value > 1 for value in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """How many batches are accumulated in an epoch."""
        return self.scheduling[max(e for e in self.epochs if e <= epoch)]

    def on_train_epoch_start(self, trainer, pl_module):
        """Set the number for the epoch."""
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
