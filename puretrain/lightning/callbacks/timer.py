"""End a run when its time is over."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.distributed import rank_zero_info
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["Interval", "Timer"]


class Interval:
    """When the time is looked at."""

    step = "step"
    epoch = "epoch"


class Timer(Callback):
    """Measures training, validation and test, and ends the training after a time."""

    def __init__(self, duration: Any = None, interval: str = "step", verbose: bool = True) -> None:
        """Take the time as ``DD:HH:MM:SS``, a timedelta or a dict of its arguments."""
        super().__init__()
        if isinstance(duration, str):
            parts = duration.strip().split(":")
            if len(parts) != 4 or not all(part.isdigit() for part in parts):
                raise MisconfigurationException(
                    f"duration={duration!r} is not of the form DD:HH:MM:SS"
                )
            days, hours, minutes, seconds = map(int, parts)
            duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if isinstance(duration, dict):
            duration = timedelta(**duration)
        if interval not in {"step", "epoch"}:
            raise MisconfigurationException(
                f"Unsupported parameter value `Timer(interval={interval})`. Possible choices are: "
                "step, epoch"
            )
        self._duration = None if duration is None else duration.total_seconds()
        self._interval, self._verbose = interval, verbose
        self._began: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._offset = 0.0

    def start_time(self, stage: str = "train") -> float | None:
        """When a stage began, in seconds of a monotonic clock."""
        return self._began.get(_word(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When a stage ended."""
        return self._ended.get(_word(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """How long a stage has been running, in seconds."""
        stage = _word(stage)
        offset = self._offset if stage == "train" else 0.0
        if stage not in self._began:
            return offset
        return self._ended.get(stage, time.monotonic()) - self._began[stage] + offset

    def time_remaining(self, stage: str = "train") -> float | None:
        """How much time is left, in seconds; None if it is not limited."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def on_train_start(self, trainer, pl_module):
        """Begin."""
        self._began["train"] = time.monotonic()
        self._ended.pop("train", None)

    def on_train_end(self, trainer, pl_module):
        """End."""
        self._ended["train"] = time.monotonic()

    def on_validation_start(self, trainer, pl_module):
        """Begin."""
        self._began["validate"] = time.monotonic()

    def on_validation_end(self, trainer, pl_module):
        """End."""
        self._ended["validate"] = time.monotonic()

    def on_test_start(self, trainer, pl_module):
        """Begin."""
        self._began["test"] = time.monotonic()

    def on_test_end(self, trainer, pl_module):
        """End."""
        self._ended["test"] = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
        """Look at the clock."""
        if self._interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer, pl_module, *args, **kwargs):
        """Look at the clock."""
        if self._interval == "epoch":
            self._check(trainer)

    def state_dict(self):
        """How much time was used."""
        return {"time_elapsed": {"train": self.time_elapsed()}}

    def load_state_dict(self, state_dict):
        """Take back how much time was used."""
        self._offset = state_dict.get("time_elapsed", {}).get("train", 0.0)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        """Give :meth:`state_dict`."""
        return self.state_dict()

    def on_load_checkpoint(self, *arguments):
        """Take back how much time was used."""
        self.load_state_dict(arguments[-1])

    def _check(self, trainer: Any) -> None:
        if self._duration is not None and self.time_elapsed() >= self._duration:
            if self._verbose and not trainer.should_stop:
                rank_zero_info(
                    f"Time limit reached. Elapsed time is {self.time_elapsed():.0f} s. "
                    "Signaling Trainer to stop."
                )
            trainer.should_stop = True


def _word(stage: Any) -> str:
    return str(getattr(stage, "value", stage))
