"""What a run tells: its metrics and hyper-parameters, to callbacks, loggers and the screen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.core.memory import get_memory_profile

__all__ = [
    "MetricsView",
    "finish_loggers",
    "keep_metrics",
    "log_hyperparameters",
    "log_metrics",
    "mean_loss",
    "numbers",
    "print_results",
]


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics with Python's numbers for tensors."""
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}


def keep_metrics(trainer: Any) -> None:
    """Take what the results know now into the metrics that stay."""
    if trainer._results is None or trainer.sanity_checking:
        return
    found = trainer._results.collect()
    if trainer.move_metrics_to_cpu:
        found = {
            kind: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in metrics.items()}
            for kind, metrics in found.items()
        }
    trainer._callback_metrics.update(found["callback"])
    trainer._logged_metrics.update(found["log"])
    trainer._bar_metrics.update(found["bar"])


def mean_loss(trainer: Any) -> float | None:
    """The mean of the last losses, for the progress bar."""
    if not trainer._losses:
        return None
    return float(torch.stack([loss.float().mean() for loss in trainer._losses]).mean())


class MetricsView:
    """The metrics of a trainer under the name of an object of 1.x; they can be set, too."""

    _NAMES = {  # noqa: RUF012 - read only
        "callback_metrics": "_callback_metrics",
        "logged_metrics": "_logged_metrics",
        "progress_bar_metrics": "_bar_metrics",
    }

    def __init__(self, trainer: Any) -> None:
        """Look at the metrics of a trainer."""
        object.__setattr__(self, "_trainer", trainer)

    def __getattr__(self, name: str) -> Any:
        if name not in self._NAMES:
            raise AttributeError(f"the trainer's logger_connector has no attribute {name!r}")
        return getattr(self._trainer, name)

    def __setattr__(self, name: str, values: Any) -> None:
        setattr(self._trainer, self._NAMES[name], dict(values))


# ── Loggers ───────────────────────────────────────────────────────────────────────────────────────


def log_metrics(trainer: Any, metrics: dict[str, Any], step: int | None = None) -> None:
    """Give values to the logger, as numbers."""
    if not metrics or trainer.sanity_checking:
        return
    if trainer.log_gpu_memory and trainer.on_gpu:
        mode = "all" if trainer.log_gpu_memory is True else trainer.log_gpu_memory
        metrics = {**metrics, **get_memory_profile(mode)}
    trainer._logged_metrics.update(metrics)
    scalars = numbers(metrics)
    if step is None:
        given = scalars.pop("step", None)
        if given is None:
            scalars.setdefault("epoch", trainer.current_epoch)
            trainer._logged_metrics["epoch"] = trainer.current_epoch
            step = max(trainer._steps_done - 1, 0)
        else:
            step = int(given)
    logger = trainer._logger
    if logger is None or not trainer.is_global_zero:
        return
    (getattr(logger, "agg_and_log_metrics", None) or logger.log_metrics)(scalars, step=step)
    if (step + 1) % trainer.flush_logs_every_n_steps == 0 and hasattr(logger, "save"):
        logger.save()


def log_hyperparameters(trainer: Any) -> None:
    """Give the logger the hyper-parameters of the data module and the module, and the graph."""
    logger = trainer._logger
    if logger is None or not trainer.is_global_zero:
        return
    found: dict[str, Any] = {}
    for owner in (trainer.datamodule, trainer._module):
        if owner is not None and owner.__dict__.get("_log_hyperparams", True):
            hparams = owner.__dict__.get("_hparams_initial") or owner.__dict__.get("_hparams")
            found.update(hparams or {})
    logger.log_hyperparams(found)
    if hasattr(logger, "log_graph"):
        logger.log_graph(trainer._module)
    if hasattr(logger, "save"):
        logger.save()


def finish_loggers(trainer: Any) -> None:
    """Say that a run has ended."""
    logger = trainer._logger
    if logger is None or not trainer.is_global_zero:
        return
    if hasattr(logger, "save"):  # what waits to be joined with values of the same step
        logger.save()
    if hasattr(logger, "finalize"):
        logger.finalize("success")


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────


def print_results(stage: str, found: list[dict[str, Any]]) -> None:
    """Print what a validation or test has found, a table for each loader."""
    for number, metrics in enumerate(found):
        rows = (f"{name!r}: {value!r}" for name, value in sorted(metrics.items()))
        print("-" * 80)
        print(f"DATALOADER:{number} {stage.upper()} RESULTS")
        print("{" + ",\n ".join(rows) + "}")
    if found:
        print("-" * 80)
