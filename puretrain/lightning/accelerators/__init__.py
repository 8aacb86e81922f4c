"""The kinds of devices. The Trainer takes them as words, ``accelerator="gpu"``, not as objects."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.utilities.unavailable import unavailable

__all__ = [
    "Accelerator",
    "CPUAccelerator",
    "CUDAAccelerator",
    "GPUAccelerator",
    "MPSAccelerator",
    "TPUAccelerator",
]


class Accelerator:
    """The base class of accelerators, for ``isinstance``."""


def _no(name: str, reason: str) -> Any:
    return unavailable(name, __name__, reason, Accelerator)


CPUAccelerator = _no("CPUAccelerator", "use Trainer(accelerator='cpu')")
GPUAccelerator = _no("GPUAccelerator", "use Trainer(gpus=…) or Trainer(accelerator='gpu')")
CUDAAccelerator = _no("CUDAAccelerator", "use Trainer(accelerator='gpu')")
MPSAccelerator = _no("MPSAccelerator", "use Trainer(accelerator='mps')")
TPUAccelerator = _no("TPUAccelerator", "TPUs are not supported; use a GPU or the CPU")
