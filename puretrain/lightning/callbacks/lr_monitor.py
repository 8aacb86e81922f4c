"""Log the learning rates."""

from __future__ import annotations

from collections import Counter
from typing import Any

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """Gives the learning rates to the loggers, under names such as ``lr-Adam/pg1``."""

    def __init__(
        self,
        logging_interval: str | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        """Say how often.

        Args:
            logging_interval: ``step``, ``epoch``, or None for each scheduler's own.
            log_momentum: momenta as well.
            log_weight_decay: weight decays as well.
        """
        super().__init__()
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                "logging_interval should be `step` or `epoch` or `None`."
            )
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.lr_sch_names: list[str] = []
        self.last_momentum_values: dict[str, Any] = {}

    def on_train_start(self, trainer, pl_module, *args, **kwargs):
        """Find the names."""
        if not trainer.logger:
            raise MisconfigurationException(
                "Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger."
            )
        if not trainer.lr_schedulers:
            rank_zero_warn(
                "You are using `LearningRateMonitor` callback with models that have no learning "
                "rate schedulers. Please see documentation for `configure_optimizers` method."
            )
        self.lr_sch_names = []
        self.lrs = {name: [] for name, _, _ in self._groups(trainer)}
        self.last_momentum_values = {f"{name}-momentum": None for name in self.lrs}

    def on_train_batch_start(self, trainer, pl_module, *args, **kwargs):
        """Log, if a step is due."""
        every = trainer.log_every_n_steps
        due = (trainer.global_step + 1) % every == 0 if every else False
        if self.logging_interval != "epoch" and (due or trainer.should_stop):
            interval = "any" if self.logging_interval is not None else "step"
            self._log(trainer, interval)

    def on_train_epoch_start(self, trainer, pl_module, *args, **kwargs):
        """Log, if epochs are wanted."""
        if self.logging_interval != "step":
            interval = "any" if self.logging_interval is not None else "epoch"
            self._log(trainer, interval)

    def _log(self, trainer: Any, interval: str) -> None:
        found: dict[str, float] = {}
        for name, group, kind in self._groups(trainer):
            if interval not in (kind, "any"):
                continue
            found[name] = group["lr"]
            self.lrs.setdefault(name, []).append(group["lr"])
            if self.log_momentum:
                momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                found[f"{name}-momentum"] = momentum
                self.last_momentum_values[f"{name}-momentum"] = momentum
            if self.log_weight_decay:
                found[f"{name}-weight_decay"] = group.get("weight_decay", 0)
        if found:
            trainer._callback_metrics.update(_tensors(found))
            for logger in trainer.loggers:
                logger.log_metrics(found, step=max(trainer.global_step, 0))

    def _groups(self, trainer: Any) -> list[tuple[str, dict[str, Any], str]]:
        """Name, parameter group and interval of every learning rate."""
        found: list[tuple[str, dict[str, Any], str]] = []
        seen: Counter[str] = Counter()
        optimizers = []
        for config in trainer.lr_schedulers:
            scheduler = config["scheduler"]
            optimizer = scheduler.optimizer
            optimizers.append(optimizer)
            base = config["name"] or self._base(trainer, optimizer, seen)
            self._add(found, base, optimizer, config["interval"])
        for optimizer in trainer.optimizers:
            if any(optimizer is other for other in optimizers) or not optimizer.param_groups:
                continue
            self._add(found, self._base(trainer, optimizer, seen), optimizer, "any"
                      if not trainer.lr_schedulers else "epoch")  # fmt: skip
        return found

    def _base(self, trainer: Any, optimizer: Any, seen: Counter[str]) -> str:
        kind = type(optimizer)
        name = f"lr-{kind.__name__}"
        number = seen[name]
        seen[name] += 1
        return name if number == 0 else f"{name}-{number}"

    def _add(self, found: list[Any], base: str, optimizer: Any, interval: str) -> None:
        groups = optimizer.param_groups
        named = [group.get("name") for group in groups]
        for number, group in enumerate(groups):
            suffix = "" if len(groups) == 1 else f"/pg{number + 1}"
            if named[number] is not None:
                suffix = f"/{named[number]}"
            found.append((base + suffix, group, interval))
            if base not in self.lr_sch_names:
                self.lr_sch_names.append(base)


def _tensors(values: dict[str, float]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(float(value)) for name, value in values.items()}
