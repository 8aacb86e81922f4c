"""The callbacks, logger and profiler of a trainer: from its arguments, and from a module."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.trainer.calls import implements
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = [
    "add_module_callbacks",
    "call_each",
    "callbacks_of",
    "listed",
    "logger_of",
    "measures",
    "profiler_of",
    "progress_bar_of",
    "resume_accumulation",
]


def listed(callbacks: Any) -> list[Any]:
    """The argument ``callbacks`` as a list."""
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        return [callbacks]
    return list(callbacks or [])


def call_each(trainer: Any, callbacks: list[Any], name: str) -> None:
    """Call a hook that knows of no module."""
    for callback in callbacks:
        if implements(callback, name):
            getattr(callback, name)(trainer)


def profiler_of(given: Any) -> Any:
    """The profiler that the argument ``profiler`` asks for.

    Raises:
        ValueError: there is none of the name.
    """
    from puretrain.lightning import profiler as rooms

    if given in (None, False):
        return rooms.PassThroughProfiler()
    if given is True:
        return rooms.SimpleProfiler()
    if not isinstance(given, str):
        return given
    kinds = {
        "simple": rooms.SimpleProfiler,
        "advanced": rooms.AdvancedProfiler,
        "pytorch": rooms.PyTorchProfiler,
    }
    if given.lower() not in kinds:
        raise ValueError(
            "When passing string value for the `profiler` parameter of `Trainer`, it can "
            f"only be one of {list(kinds)}"
        )
    return kinds[given.lower()]()


def measures(profiler: Any) -> bool:
    """Whether a profiler has to be told of anything."""
    from puretrain.lightning.profiler import PassThroughProfiler

    return not isinstance(profiler, PassThroughProfiler)


def logger_of(given: Any, folder: str) -> Any:
    """The logger that the argument ``logger`` asks for; None if there is to be none."""
    from puretrain.lightning.loggers import LoggerCollection, TensorBoardLogger

    if given is True:
        return TensorBoardLogger(save_dir=folder, version=None, name="lightning_logs")
    if isinstance(given, (list, tuple)):
        given = given[0] if len(given) == 1 else given and LoggerCollection(given)
    return given or None


# ── Callbacks ─────────────────────────────────────────────────────────────────────────────────────


def callbacks_of(
    given: list[Any],
    *,
    checkpoints: Any,
    progress_bar: bool | None,
    refresh_rate: int | None,
    process_position: int,
    accumulate: Any,
    averaging: bool,
    max_time: Any,
    fast_dev_run: Any,
) -> list[Any]:
    """The callbacks of a trainer: those given, and those that other arguments ask for.

    Raises:
        MisconfigurationException: an argument and a callback do not go together.
    """
    from puretrain.lightning.callbacks import (
        GradientAccumulationScheduler,
        ModelCheckpoint,
        ProgressBar,
        ProgressBarBase,
        StochasticWeightAveraging,
        Timer,
    )

    found = list(given)

    def has(kind: type) -> bool:
        return any(isinstance(callback, kind) for callback in found)

    if not isinstance(checkpoints, bool) and checkpoints is not None:
        if not isinstance(checkpoints, ModelCheckpoint):
            raise MisconfigurationException(
                "Invalid type provided for checkpoint_callback: Expected bool but received "
                f"{type(checkpoints)}."
            )
        found.append(checkpoints)
    if has(ModelCheckpoint) and checkpoints is False:
        raise MisconfigurationException(
            "Trainer was configured with checkpoint_callback=False but found ModelCheckpoint "
            "in callbacks list."
        )
    if not has(ModelCheckpoint) and checkpoints is True and not fast_dev_run:
        found.append(ModelCheckpoint())
    bars = sum(isinstance(callback, ProgressBarBase) for callback in found)
    if bars > 1:
        raise MisconfigurationException(
            "You added multiple progress bar callbacks to the Trainer, but currently only one "
            "progress bar is supported."
        )
    if bars and progress_bar is False:
        raise MisconfigurationException(
            "Trainer was configured with `enable_progress_bar=False` but found a progress bar "
            "in callbacks list."
        )
    rate = 1 if refresh_rate is None else refresh_rate
    if not bars and progress_bar is not False and rate > 0:
        found.append(ProgressBar(refresh_rate=rate, process_position=process_position))
    if isinstance(accumulate, dict):
        if has(GradientAccumulationScheduler):
            raise MisconfigurationException(
                "give either accumulate_grad_batches or a GradientAccumulationScheduler, not both"
            )
        found.append(GradientAccumulationScheduler(accumulate))
    elif not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise MisconfigurationException(
            f"Gradient accumulation supports only int >= 1 and dict types, not {accumulate!r}"
        )
    if averaging and not has(StochasticWeightAveraging):
        found.insert(0, StochasticWeightAveraging())
    if max_time is not None and not has(Timer):
        found.append(Timer(max_time))
    return _checkpoints_last(found)


def progress_bar_of(callbacks: list[Any]) -> Any:
    """The progress bar among the callbacks; None if there is none."""
    from puretrain.lightning.callbacks import ProgressBarBase

    return next((each for each in callbacks if isinstance(each, ProgressBarBase)), None)


def add_module_callbacks(trainer: Any) -> None:
    """Let the callbacks that a module configures take the place of those of their kinds."""
    if not implements(trainer._module, "configure_callbacks"):
        return
    found = listed(trainer._module.configure_callbacks())
    if found:
        kinds = {type(callback) for callback in found}
        kept = [callback for callback in trainer.callbacks if type(callback) not in kinds]
        trainer.callbacks = _checkpoints_last([*kept, *found])


def _checkpoints_last(callbacks: list[Any]) -> list[Any]:
    from puretrain.lightning.callbacks import ModelCheckpoint

    return sorted(callbacks, key=lambda callback: isinstance(callback, ModelCheckpoint))


def resume_accumulation(trainer: Any, epoch: int) -> None:
    """Set ``accumulate_grad_batches`` to what a scheduler of it says of an epoch."""
    from puretrain.lightning.callbacks import GradientAccumulationScheduler

    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(epoch)
