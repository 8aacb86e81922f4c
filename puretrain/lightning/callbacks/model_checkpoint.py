"""Write checkpoints: the best ones by a metric, the last, or all."""

from __future__ import annotations

import os
import re
import time
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.callbacks.early_stopping import MissingMetricError
from puretrain.lightning.trainer import checkpointing
from puretrain.lightning.utilities.distributed import rank_zero_info, rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["ModelCheckpoint"]


class ModelCheckpoint(Callback):
    """Writes checkpoints when a validation, or a training epoch without one, ends."""

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1
    _looks_at_metrics = True

    def __init__(
        self,
        dirpath: Any = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | str | None = None,
        save_top_k: int | None = None,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        every_n_val_epochs: int | None = None,
        period: int | None = None,
        prefix: str = "",
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        save_on_exception: bool = False,
    ) -> None:
        """Say what to write, where and when.

        Args:
            dirpath: the directory; by default ``checkpoints`` in the logger's.
            filename: with fields such as ``{epoch}`` and ``{val_loss:.2f}``.
            monitor: the name of the logged value by which the best are kept.
            verbose: tell of each file.
            save_last: write ``last.ckpt`` as well.
            save_top_k: how many to keep; -1 all, 0 none.
            save_weights_only: leave out all that is needed to go on training.
            mode: ``min`` or ``max``.
            auto_insert_metric_name: write ``epoch=2``, not ``2``.
            every_n_train_steps: write after so many steps.
            every_n_val_epochs: write after so many validations; 2.x: ``every_n_epochs``.
            period: the same in 1.2.
            prefix: put in front of the names.
            train_time_interval: write after so much time.
            every_n_epochs: see ``every_n_val_epochs``.
            save_on_train_epoch_end: write when the training epoch ends, not after validation.
            enable_version_counter: ``-v1`` for a name that is taken; else overwrite.
            save_on_exception: write when an exception ends the run.
        """
        super().__init__()
        self.monitor, self.verbose, self.save_last = monitor, verbose, save_last
        self.save_weights_only, self.mode_given = save_weights_only, mode
        self.auto_insert_metric_name = auto_insert_metric_name
        if save_top_k is None:
            save_top_k = 1
        self.save_top_k = save_top_k
        self.filename, self.prefix = filename, prefix
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self._save_on_exception = save_on_exception
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self.current_score: Tensor | None = None
        self._last_global_step_saved = -1
        self._last_time_checked: float | None = None
        if mode == "auto":
            mode = "max" if any(w in str(monitor) for w in ("acc", "auc", "f1")) else "min"
        if mode not in {"min", "max"}:
            raise MisconfigurationException(f"`mode` can be min, max, got {mode}")
        self.mode = mode
        self.kth_value = torch.tensor(torch.inf if mode == "min" else -torch.inf)
        if save_top_k < -1:
            raise MisconfigurationException(
                f"Invalid value for save_top_k={save_top_k}. Must be >= -1"
            )
        self._speaks_2 = (
            every_n_epochs is not None or save_on_exception or not enable_version_counter
        )
        epochs = next(
            (n for n in (every_n_epochs, every_n_val_epochs, period) if n is not None), None
        )
        given = [every_n_train_steps, epochs, train_time_interval]
        if every_n_train_steps is None and epochs is None and train_time_interval is None:
            every_n_train_steps, epochs = 0, 1
        else:
            every_n_train_steps, epochs = every_n_train_steps or 0, epochs or 0
        if every_n_train_steps < 0:
            raise MisconfigurationException(
                f"Invalid value for every_n_train_steps={every_n_train_steps}. Must be >= 0"
            )
        if epochs < 0:
            raise MisconfigurationException(
                f"Invalid value for every_n_val_epochs={epochs}. Must be >= 0"
            )
        if sum(bool(n) for n in given) > 1:
            raise MisconfigurationException(
                "every_n_train_steps, every_n_val_epochs and train_time_interval should be "
                "mutually exclusive."
            )
        self._every_n_train_steps, self._every_n_epochs = every_n_train_steps, epochs
        self._train_time_interval = train_time_interval
        if monitor is None and save_top_k not in (-1, 0, 1):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={save_top_k}, monitor=None) is not a valid "
                "configuration. No quantity for top_k to track."
            )
        if monitor is None and save_last and save_top_k in (-1, 0):
            rank_zero_info(
                f"ModelCheckpoint(save_last={save_last}, save_top_k={save_top_k}, monitor=None) "
                "will duplicate the last checkpoint saved."
            )
        self.dirpath: str | None = None
        if dirpath is not None:
            text = os.fspath(dirpath)
            self.dirpath = text if "://" in text else os.path.realpath(os.path.expanduser(text))

    @property
    def period(self) -> int:
        """After how many epochs to write."""
        return self._every_n_epochs

    @period.setter
    def period(self, epochs: int) -> None:
        self._every_n_epochs = epochs

    @property
    def every_n_epochs(self) -> int:
        """After how many epochs to write."""
        return self._every_n_epochs

    @property
    def state_key(self) -> str:
        """Under which name the state is in a checkpoint."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
        )

    # ── When ──────────────────────────────────────────────────────────────────────────────────────

    def setup(self, trainer, pl_module, stage=None):
        """Find the directory."""
        if stage == "fit":
            self.dirpath = self.dirpath or self._directory(trainer)
            folder = Path(self.dirpath)
            if self.save_top_k != 0 and folder.is_dir() and any(folder.iterdir()):
                rank_zero_warn(f"Checkpoint directory {folder} exists and is not empty.")

    def on_pretrain_routine_start(self, trainer, pl_module):
        """Kept for its name: in 1.2 the directory was found here."""

    def on_train_start(self, trainer, pl_module):
        """Start the clock."""
        self._last_time_checked = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
        """Write, if a step or the time is due."""
        if trainer._accumulating or not (self._every_n_train_steps or self._train_time_interval):
            return
        if self._skips(trainer):
            return
        if self._train_time_interval is not None:
            now, before = time.monotonic(), self._last_time_checked
            early = before is not None and (
                now - before < self._train_time_interval.total_seconds()
            )
            if trainer.strategy.broadcast(early):
                return
            self._last_time_checked = now
        elif trainer._steps_done % self._every_n_train_steps:
            return
        self._save(trainer)

    def on_train_epoch_end(self, trainer, pl_module, *args, **kwargs):
        """Write, if no validation follows to write after."""
        if (
            self._postponed(trainer, self.on_train_epoch_end)
            or self._skips(trainer)
            or not self._epoch_is_due(trainer)
        ):
            return
        if self._save_on_train_epoch_end or (
            self._save_on_train_epoch_end is None and not self._waits_for_validation(trainer)
        ):
            self._save(trainer)

    def on_validation_end(self, trainer, pl_module):
        """Write."""
        if (
            self._postponed(trainer, self.on_validation_end)
            or self._skips(trainer)
            or not self._epoch_is_due(trainer)
        ):
            return
        if not self._save_on_train_epoch_end:
            self._save(trainer)

    def on_exception(self, trainer, pl_module, exception):
        """Write, if that is wanted."""
        if self._save_on_exception and not self._skips(trainer) and trainer._fold is not None:
            self._save(trainer)

    def on_keyboard_interrupt(self, trainer, pl_module):
        """Write where the run was interrupted, so that it can go on from there."""
        if self.save_top_k and not self._skips(trainer) and trainer._steps_done:
            path = self._free_path(trainer, self._place("interrupted"))
            _save_together(trainer, path, False)

    def _waits_for_validation(self, trainer: Any) -> bool:
        if not trainer._validates or trainer._validation_follows:
            return trainer._validation_follows
        # in other epochs there is a validation, whose metrics may be what is monitored
        return self.monitor is not None or trainer.val_check_interval != 1.0

    def _epoch_is_due(self, trainer: Any) -> bool:
        every = self._every_n_epochs
        return every >= 1 and (trainer.current_epoch + 1) % every == 0

    def _skips(self, trainer: Any) -> bool:
        return bool(
            trainer.fast_dev_run
            or trainer._fn != "fit"
            or trainer.sanity_checking
            or self._last_global_step_saved == self._count(trainer)
        )

    # ── What ──────────────────────────────────────────────────────────────────────────────────────

    def save_checkpoint(self, trainer: Any, unused: Any = None) -> None:
        """Write now, as 1.2 calls it."""
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        self.dirpath = self.dirpath or self._directory(trainer)
        metrics = self._candidates(trainer)
        if self.monitor is not None and self.monitor not in metrics:
            known = sorted(trainer.callback_metrics)
            raise MissingMetricError(
                f"ModelCheckpoint(monitor='{self.monitor}') not found in the returned metrics: "
                f"{known}. HINT: Did you call self.log('{self.monitor}', tensor) in the "
                "LightningModule?"
            )
        if trainer.world_size > 1:  # all decide by the values of the first process
            metrics = trainer.strategy.broadcast(metrics)
        self._last_global_step_saved = self._count(trainer)
        if self.save_top_k != 0:
            if self.monitor is not None:
                self._save_monitored(trainer, metrics)
            else:
                self._save_newest(trainer, metrics)
        if self.save_last:
            self._save_the_last(trainer, metrics)

    @staticmethod
    def _count(trainer: Any) -> int:
        """How many steps were made; programs may set ``trainer.global_step`` without any."""
        return max(int(trainer._steps_done), int(trainer.global_step))

    def _candidates(self, trainer: Any) -> dict[str, Any]:
        metrics = {k: deepcopy(v) for k, v in trainer.callback_metrics.items()}
        metrics.setdefault("epoch", torch.tensor(trainer.current_epoch))
        metrics["epoch"] = torch.as_tensor(metrics["epoch"]).int()
        # in 1.x the last step's number, from 0; in 2.x how many steps were made
        number = trainer._steps_done - (0 if trainer._speaks_2 or self._speaks_2 else 1)
        metrics["step"] = torch.as_tensor(metrics.get("step", max(number, 0))).int()
        return metrics

    def _write(self, trainer: Any, path: str) -> None:
        _save_together(trainer, path, self.save_weights_only)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if hasattr(logger, "after_save_checkpoint"):
                logger.after_save_checkpoint(self)
        if self.verbose:
            rank_zero_info(f"Epoch {trainer.current_epoch:d}, step {trainer._steps_done:d}: {path}")

    def check_monitor_top_k(self, trainer: Any, current: Tensor | None = None) -> bool:
        """Whether a score is among the best ``save_top_k``."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        worst = self.best_k_models[self.kth_best_model_path]
        return bool(current < worst if self.mode == "min" else current > worst)

    def _save_monitored(self, trainer: Any, metrics: dict[str, Any]) -> None:
        current = metrics[self.monitor]
        current = torch.as_tensor(current)
        if self.check_monitor_top_k(trainer, current):
            self._keep(trainer, current, metrics)
        elif self.verbose:
            rank_zero_info(
                f"Epoch {trainer.current_epoch:d}, step {trainer._steps_done:d}: {self.monitor} "
                f"was not in top {self.save_top_k}"
            )

    def _keep(self, trainer: Any, current: Tensor, metrics: dict[str, Any]) -> None:
        count = len(self.best_k_models) + 1 if self.save_top_k == -1 else self.save_top_k
        removed = None
        if len(self.best_k_models) == count and count > 0:
            removed = self.kth_best_model_path
            self.best_k_models.pop(removed)
        infinity = float("inf" if self.mode == "min" else "-inf")
        if torch.isnan(current):
            current = torch.tensor(infinity, device=current.device)
        path = self._free_path(trainer, self._named(metrics), removed)
        self.current_score = current
        self.best_k_models[path] = current
        if len(self.best_k_models) == count:
            pick = max if self.mode == "min" else min
            self.kth_best_model_path = pick(self.best_k_models, key=self.best_k_models.get)
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        pick = min if self.mode == "min" else max
        self.best_model_path = pick(self.best_k_models, key=self.best_k_models.get)
        self.best_model_score = self.best_k_models[self.best_model_path]
        self._write(trainer, path)
        if removed is not None and removed != path:
            _remove(trainer, removed)

    def _save_newest(self, trainer: Any, metrics: dict[str, Any]) -> None:
        path = self._free_path(trainer, self._named(metrics), self.best_model_path)
        before, self.best_model_path = self.best_model_path, path
        self._write(trainer, path)
        if self.save_top_k == 1 and before and before != path:
            _remove(trainer, before)

    def _save_the_last(self, trainer: Any, metrics: dict[str, Any]) -> None:
        name = self._format(self.CHECKPOINT_NAME_LAST, metrics)
        path = self._place(name)
        before = self.last_model_path
        if before != path:
            path = self._free_path(trainer, path, before or None)
        self.last_model_path = path
        self._write(trainer, path)
        if before and before != path:
            _remove(trainer, before)

    # ── Where ─────────────────────────────────────────────────────────────────────────────────────

    def _directory(self, trainer: Any) -> str:
        folder = self._own_directory(trainer) if trainer.is_global_zero else ""
        return str(trainer.strategy.broadcast(folder))

    def _own_directory(self, trainer: Any) -> str:
        logger = trainer.logger
        if logger is not None:
            if trainer._weights_save_path is not None:
                folder = trainer.weights_save_path
            else:
                folder = getattr(logger, "save_dir", None) or trainer.default_root_dir
            if logger.version is None:  # of a service, which names a run when it begins
                getattr(logger, "experiment", None)
            version = logger.version
            version = version if isinstance(version, str) else f"version_{version}"
            return os.path.join(os.fspath(folder), str(logger.name), version, "checkpoints")
        return os.path.join(trainer.weights_save_path, "checkpoints")

    def _place(self, name: str) -> str:
        return os.path.join(str(self.dirpath), f"{name}{self.FILE_EXTENSION}")

    def _named(self, metrics: dict[str, Any]) -> str:
        return self.format_checkpoint_name(metrics)

    def _free_path(self, trainer: Any, path: str, replaced: str | None = None) -> str:
        """The path, with ``-v1`` and so on while a file has it that is not to be replaced."""
        if not self._enable_version_counter:
            return path
        base, version = path[: -len(self.FILE_EXTENSION)], self.STARTING_VERSION
        while os.path.exists(path) and path != replaced:
            path = f"{base}-v{version}{self.FILE_EXTENSION}"
            version += 1
        return str(trainer.strategy.broadcast(path))  # by the files that the first process sees

    def _format(self, filename: str | None, metrics: dict[str, Any]) -> str:
        if not filename:
            joined = f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"
            filename = joined
        # longer names first: one may begin like another
        for group in sorted(set(re.findall(r"\{.*?[:\}]", filename)), key=len, reverse=True):
            name = group[1:-1]
            if self.auto_insert_metric_name:
                filename = filename.replace(
                    group, name + self.CHECKPOINT_EQUALS_CHAR + "{" + group[1:]
                )
            filename = filename.replace("{" + name, "{0[" + name + "]")
            metrics.setdefault(name, torch.tensor(0))
        values = {
            k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v
            for k, v in metrics.items()
        }
        filename = filename.format(values)
        if self.prefix:
            filename = self.CHECKPOINT_JOIN_CHAR.join([self.prefix, filename])
        return filename

    @classmethod
    def _format_checkpoint_name(
        cls,
        filename: str | None,
        *arguments: Any,
        prefix: str = "",
        auto_insert_metric_name: bool = True,
    ) -> str:
        """The name for metrics (1.3), or for epoch, step and metrics (1.2)."""
        metrics = dict(arguments[-1])
        if len(arguments) == 3:
            metrics |= {"epoch": arguments[0], "step": arguments[1]}
        shape = cls(prefix=prefix, auto_insert_metric_name=auto_insert_metric_name)
        return shape._format(filename, metrics)

    def format_checkpoint_name(self, *arguments: Any, **named: Any) -> str:
        """The path of a checkpoint.

        Args:
            *arguments: the metrics, and ``ver`` (1.3, 2.x); or epoch, step, metrics, ``ver`` (1.2).
            **named: the same by name, and in 2.x ``filename``.
        """
        version = named.get("ver")
        names = ["metrics", "ver"]
        if arguments and isinstance(arguments[0], int):
            names = ["epoch", "step", "metrics", "ver"]
        given = {**dict(zip(names, arguments, strict=False)), **named}
        version = given.get("ver")
        metrics = dict(given.get("metrics") or {})
        metrics |= {key: given[key] for key in ("epoch", "step") if key in given}
        name = self._format(given.get("filename", self.filename), metrics)
        if version is not None:
            name = self.CHECKPOINT_JOIN_CHAR.join((name, f"v{version}"))
        return self._place(name) if self.dirpath else f"{name}{self.FILE_EXTENSION}"

    def to_yaml(self, filepath: Any = None) -> None:
        """Write the best paths and scores to a file."""
        target = Path(filepath or os.path.join(str(self.dirpath), "best_k_models.yaml"))
        lines = [f"{path}: {float(score)}" for path, score in self.best_k_models.items()]
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # ── In the state ──────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """What is in a checkpoint."""
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(self.best_k_models),
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
            "last_global_step_saved": self._last_global_step_saved,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what was in a checkpoint."""
        if state_dict.get("dirpath", self.dirpath) == self.dirpath:
            self.best_model_score = state_dict["best_model_score"]
            self.kth_best_model_path = state_dict.get("kth_best_model_path", "")
            self.kth_value = state_dict.get("kth_value", self.kth_value)
            self.best_k_models = dict(state_dict.get("best_k_models", {}))
            self.last_model_path = state_dict.get("last_model_path", "")
            self.current_score = state_dict.get("current_score")
            self._last_global_step_saved = state_dict.get("last_global_step_saved", -1)
        else:
            rank_zero_warn(
                f"The dirpath has changed from {state_dict.get('dirpath')!r} to {self.dirpath!r}, "
                "therefore `best_model_score`, `kth_best_model_path`, `kth_value`, "
                "`last_model_path` and `best_k_models` won't be reloaded. Only `best_model_path` "
                "will be reloaded."
            )
        self.best_model_path = state_dict["best_model_path"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        """Give :meth:`state_dict`."""
        return self.state_dict()

    def on_load_checkpoint(self, *arguments):
        """Take the state alone (1.2), or trainer, module and state."""
        self.load_state_dict(arguments[-1])


def _save_together(trainer: Any, path: str, weights_only: bool) -> None:
    """Write a checkpoint that holds what every process has, and wait for it."""
    if trainer.world_size == 1 or not trainer.strategy.connected:
        trainer.save_checkpoint(path, weights_only)
    else:
        checkpointing.save(trainer, path, weights_only=weights_only, together=True)


def _remove(trainer: Any, path: str) -> None:
    if trainer.is_global_zero:
        Path(path).unlink(missing_ok=True)
