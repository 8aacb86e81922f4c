"""In which precision a trainer computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["cast_to_half", "set_precision"]

_KINDS = {
    "32": "32", "32-true": "32", "64": "64", "64-true": "64", "16": "16", "16-mixed": "16",
    "bf16": "bf16", "bf16-mixed": "bf16", "16-true": "16-true", "bf16-true": "bf16-true",
}  # fmt: skip
_DTYPES = {"64": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}


def set_precision(trainer: Any, precision: Any) -> None:
    """Read the argument ``precision``, for the device of a trainer.

    Raises:
        MisconfigurationException: there is no such precision, or not on this device.
    """
    kind = _KINDS.get(str(precision if precision is not None else 32))
    device = trainer._device.type
    if kind is None:
        raise MisconfigurationException(
            f"precision={precision!r} is not one of 32, 64, 16, 'bf16', and their spellings "
            "'32-true', '64-true', 'bf16-mixed', 'bf16-true'"
        )
    if kind == "16" and device == "cpu":
        if precision != "16-mixed":
            raise MisconfigurationException(
                "You have asked for native AMP on CPU, but AMP is only available on GPU: "
                "precision=16 needs a GPU; on the CPU use precision='bf16'"
            )
        rank_zero_warn(
            "You passed `Trainer(accelerator='cpu', precision='16-mixed')` but AMP with fp16 "
            "is not supported on CPU. Using `precision='bf16-mixed'` instead."
        )
        kind, precision = "bf16", "bf16-mixed"
    trainer.precision = precision
    trainer._dtype = _DTYPES.get(kind)  # of parameters and batches; None: as they are
    trainer._casting = trainer._scaler = None
    if kind == "16":
        cast_to_half(trainer, device)
    elif kind == "bf16":
        trainer._casting = partial(torch.autocast, device, dtype=torch.bfloat16)
    elif trainer._dtype is not None:
        trainer._casting = partial(_default_dtype, trainer._dtype)


def cast_to_half(trainer: Any, device: str) -> None:
    """Compute in float16 where that is good enough, with a loss scale."""
    trainer._casting = partial(torch.autocast, device, dtype=torch.float16)
    trainer._scaler = torch.amp.GradScaler(device)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
