"""The batch size finder: larger and larger batches, until memory is used up."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.tuner.trials import attach, trial
from puretrain.lightning.utilities.distributed import rank_zero_info, rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.memory import garbage_collection_cuda, is_oom_error
from puretrain.lightning.utilities.parsing import (
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
)

__all__ = ["scale_batch_size"]


def scale_batch_size(
    trainer: Any,
    model: Any,
    mode: str = "power",
    steps_per_trial: int = 3,
    init_val: int = 2,
    max_trials: int = 25,
    batch_arg_name: str = "batch_size",
    train_dataloader: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
) -> int | None:
    """Find the largest batch that memory has room for, and set the attribute to it.

    Afterwards the module, the trainer and the random generators are as they were.

    Args:
        trainer: the trainer.
        model: the module.
        mode: ``power`` doubles the size until memory is used up; ``binsearch`` then searches
            between the last good size and the first bad one.
        steps_per_trial: steps to make with each size.
        init_val: the first size.
        max_trials: how many times the size may grow.
        batch_arg_name: the attribute of the module, its hyper-parameters or its data module.
        train_dataloader: must be None: a loader has its batch size already.
        val_dataloaders: as for ``trainer.fit``.
        datamodule: as for ``trainer.fit``.

    Returns:
        The size; each size that is returned has been tried. None in a ``fast_dev_run``.

    Raises:
        MisconfigurationException: there is no such attribute, or no such mode.
    """
    if trainer.fast_dev_run:
        rank_zero_warn("Skipping batch size scaler since fast_dev_run is enabled.")
        return None
    if mode not in {"power", "binsearch"}:
        raise MisconfigurationException(
            f"mode of scale_batch_size is 'power' or 'binsearch', not {mode!r}"
        )
    if hasattr(train_dataloader, "prepare_data"):
        train_dataloader, datamodule = None, train_dataloader
    if train_dataloader is not None:
        raise MisconfigurationException(
            "The batch scaling feature cannot be used with dataloaders passed directly to "
            "`.fit()`. Please disable the feature or incorporate the dataloader into the model."
        )
    attach(trainer, model, datamodule)
    if not lightning_hasattr(model, batch_arg_name):
        raise MisconfigurationException(
            f"Field {batch_arg_name} not found in both `model` and `model.hparams`"
        )
    if hasattr(model, batch_arg_name) and batch_arg_name in getattr(model, "hparams", {}):
        rank_zero_warn(
            f"Field `model.{batch_arg_name}` and `model.hparams.{batch_arg_name}` are mutually "
            "exclusive! Both will be set to the found value."
        )

    before = lightning_getattr(model, batch_arg_name)

    def fits(size: int) -> int:
        """Try a size; returns the number of samples, or raises for want of memory."""
        garbage_collection_cuda()
        lightning_setattr(model, batch_arg_name, size)
        return trial(trainer, model, None, val_dataloaders, datamodule, [],
                     max_steps=steps_per_trial, limit_train_batches=1.0)  # fmt: skip

    good: int | None = None
    bad: int | None = None
    size, grown = init_val, 0
    while True:
        error: BaseException | None = None
        samples = 0
        try:
            samples = fits(size)
        except (RuntimeError, MemoryError) as found:
            if not is_oom_error(found):
                lightning_setattr(model, batch_arg_name, before)
                raise
            error = found.with_traceback(None)  # its frames would keep what memory they hold
            error.__context__ = error.__cause__ = None
        if error is None:
            good = size
            if bad is None and 0 < samples <= size:
                rank_zero_info(
                    f"The batch size {size} is greater or equal than the length of your dataset."
                )
                break
        else:
            bad = size
            if size == 1:
                lightning_setattr(model, batch_arg_name, before)
                raise error
        following = _next(mode, good, bad)
        if following is None or (following > size and grown >= max_trials):
            break
        grown += following > size
        outcome = "succeeded" if error is None else "failed"
        rank_zero_info(f"Batch size {size} {outcome}, trying batch size {following}")
        size = following
    garbage_collection_cuda()
    lightning_setattr(model, batch_arg_name, good)
    rank_zero_info(
        f"Finished batch size finder, will continue with full run using batch size {good}"
    )
    return good


def _next(mode: str, good: int | None, bad: int | None) -> int | None:
    """The size to try next; None at the end."""
    if bad is None:
        return None if good is None else good * 2
    if good is None:
        return max(bad // 2, 1)
    if mode == "power" or bad - good <= 1:
        return None
    return (good + bad) // 2
