"""Stop when a metric does not improve any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.distributed import rank_zero_info, rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["EarlyStopping", "MissingMetricError"]


class MissingMetricError(MisconfigurationException, RuntimeError):
    """A callback looks at a metric that nobody has logged."""


class EarlyStopping(Callback):
    """Ends the training when the last ``patience`` looks at a metric brought no improvement."""

    mode_dict = {"min": torch.lt, "max": torch.gt}  # noqa: RUF012
    order_dict = {"min": "<", "max": ">"}  # noqa: RUF012
    _looks_at_metrics = True

    def __init__(
        self,
        monitor: str | None = "early_stop_on",
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = False,
        log_rank_zero_only: bool = False,
    ) -> None:
        """Say what to look at.

        Args:
            monitor: the name of a logged value.
            min_delta: a change of at most this much is no improvement.
            patience: how many looks without improvement end the training.
            verbose: tell of improvements.
            mode: ``min`` or ``max``, or ``auto`` by the name.
            strict: a metric that is not there is an error.
            check_finite: NaN or infinity ends the training.
            stopping_threshold: end as soon as the metric is better than this.
            divergence_threshold: end as soon as it is worse than this.
            check_on_train_epoch_end: look when a training epoch ends, not after validation.
            log_rank_zero_only: kept for its name.
        """
        super().__init__()
        self.monitor = monitor
        self.min_delta = min_delta
        self.patience = patience
        self.verbose = verbose
        self.strict, self.check_finite = strict, check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self.wait_count = 0
        self.stopped_epoch = 0
        if mode == "auto":
            words = ("acc", "auc", "f1", "precision", "recall", "fmeasure")
            mode = "max" if any(word in str(monitor).lower() for word in words) else "min"
        self.mode = mode
        if mode not in self.mode_dict:
            raise MisconfigurationException(
                f"`mode` can be {', '.join(self.mode_dict)}, got {mode}"
            )
        self.min_delta *= 1 if self.monitor_op is torch.gt else -1
        infinity = torch.tensor(torch.inf)
        self.best_score = infinity if self.monitor_op is torch.lt else -infinity

    @property
    def state_key(self) -> str:
        """Under which name the state is in a checkpoint."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """Whether a value is better than another."""
        return self.mode_dict[self.mode]

    def state_dict(self) -> dict[str, Any]:
        """What is in a checkpoint."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what was in a checkpoint."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"])
        self.patience = state_dict["patience"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        """Give :meth:`state_dict`."""
        return self.state_dict()

    def on_load_checkpoint(self, *arguments):
        """Take the state alone (1.2), or trainer, module and state."""
        self.load_state_dict(arguments[-1])

    def on_train_epoch_end(self, trainer, pl_module):
        """Look, if there is no validation to look after."""
        if self._postponed(trainer, self.on_train_epoch_end):
            return
        if self._check_on_train_epoch_end or not trainer._validates:
            self._run_early_stopping_check(trainer)

    def on_validation_end(self, trainer, pl_module):
        """Look."""
        if trainer.sanity_checking or trainer._fn != "fit" or self._check_on_train_epoch_end:
            return
        if not self._postponed(trainer, self.on_validation_end):
            self._run_early_stopping_check(trainer)

    def _run_early_stopping_check(self, trainer):
        metrics = trainer.callback_metrics
        if trainer.fast_dev_run:
            return
        should_stop, reason = False, None
        if self._validate_condition_metric(metrics):
            current = metrics[self.monitor].squeeze()
            should_stop, reason = self._evaluate_stopping_criteria(current)
        should_stop = trainer.strategy.reduce_boolean_decision(should_stop, all=False)
        trainer.should_stop = trainer.should_stop or should_stop
        if should_stop:
            self.stopped_epoch = trainer.current_epoch
        if reason and self.verbose:
            rank_zero_info(reason)

    def _validate_condition_metric(self, metrics: dict[str, Any]) -> bool:
        if self.monitor in metrics:
            return True
        message = (
            f"Early stopping conditioned on metric `{self.monitor}` which is not available. Pass "
            "in or modify your `EarlyStopping` callback to use any of the following: "
            f"`{'`, `'.join(sorted(metrics))}`"
        )
        if self.strict:
            raise MissingMetricError(message)
        rank_zero_warn(message)
        return False

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        name, sign = self.monitor, self.order_dict[self.mode]
        if self.check_finite and not torch.isfinite(current):
            return True, (
                f"Monitored metric {name} = {current} is not finite. Previous best value was "
                f"{self.best_score:.3f}. Signaling Trainer to stop."
            )
        if self.stopping_threshold is not None and self.monitor_op(
            current, self.stopping_threshold
        ):
            return True, (
                f"Stopping threshold reached: {name} = {current} {sign} {self.stopping_threshold}."
                " Signaling Trainer to stop."
            )
        if self.divergence_threshold is not None and self.monitor_op(
            -current, -self.divergence_threshold
        ):
            return True, (
                f"Divergence threshold reached: {name} = {current} has passed "
                f"{self.divergence_threshold}. Signaling Trainer to stop."
            )
        if self.monitor_op(current - self.min_delta, self.best_score.to(current.device)):
            reason = f"Metric {name} improved. New best score: {current:.3f}"
            self.best_score, self.wait_count = current.detach().clone(), 0
            return False, reason
        self.wait_count += 1
        if self.wait_count >= self.patience:
            return True, (
                f"Monitored metric {name} did not improve in the last {self.wait_count} records. "
                f"Best score: {self.best_score:.3f}. Signaling Trainer to stop."
            )
        return False, None
