"""The way of a batch from its loader to the module: its dtype, its device, and hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from puretrain.lightning.trainer.calls import implements, takes
from puretrain.lightning.utilities.apply_func import apply_to_collection

__all__ = ["find_transfer", "moved"]

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def find_transfer(trainer: Any) -> None:
    """Find out once per run who moves batches, if anybody has to."""
    owners = [owner for owner in (trainer.datamodule, trainer._module) if owner is not None]
    found = [
        next((getattr(owner, name) for owner in owners if implements(owner, name)), None)
        for name in _HOOKS
    ]
    if trainer._device.type != "cpu" and found[1] is None:
        found[1] = trainer._module.transfer_batch_to_device
    needed = any(found) or trainer._dtype is not None
    trainer._transfer = tuple(found) if needed else None


def moved(trainer: Any, batch: Any, number: int) -> Any:
    """A batch where and as the module wants it.

    Args:
        trainer: whose module.
        batch: of a loader.
        number: of the loader.
    """
    transfer = trainer._transfer
    if batch is None or transfer is None:
        return batch
    dtype = trainer._dtype
    if dtype is not None:
        batch = apply_to_collection(
            batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t
        )
    before, method, after = transfer
    if before is not None:
        batch = before(*(batch, number)[: takes(before)])
    if method is not None:
        batch = method(*(batch, trainer._device, number)[: takes(method)])
    if after is not None:
        batch = after(*(batch, number)[: takes(after)])
    return batch
