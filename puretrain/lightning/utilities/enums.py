"""Enumerations that are text as well, and do not mind upper or lower case."""

from __future__ import annotations

from enum import Enum
from typing import Any, Self

__all__ = [
    "AMPType",
    "DeviceType",
    "DistributedType",
    "GradClipAlgorithmType",
    "LightningEnum",
    "ModelSummaryMode",
]


class LightningEnum(str, Enum):  # noqa: UP042 - its str() is that of 1.x
    """Members equal their text, in any case.

    >>> DistributedType.DDP == "ddp", DistributedType.from_str("Dp")
    (True, <DistributedType.DP: 'dp'>)
    """

    @classmethod
    def from_str(cls, value: str) -> Self | None:
        """The member of a name in any case, or None."""
        wanted = value.lower()
        return next((member for member in cls if wanted == member.name.lower()), None)

    def __eq__(self, other: Any) -> bool:
        other = other.value if isinstance(other, Enum) else str(other)
        return bool(self.value.lower() == other.lower())

    def __hash__(self) -> int:
        return hash(self.value.lower())


class AMPType(LightningEnum):
    """Implementations of mixed precision; only torch's own works."""

    APEX = "apex"
    NATIVE = "native"


class DistributedType(LightningEnum):
    """Ways to train on several devices."""

    DP = "dp"
    DDP = "ddp"
    DDP2 = "ddp2"
    DDP_CPU = "ddp_cpu"
    DDP_SPAWN = "ddp_spawn"
    TPU_SPAWN = "tpu_spawn"
    DEEPSPEED = "deepspeed"
    HOROVOD = "horovod"
    DDP_SHARDED = "ddp_sharded"
    DDP_SHARDED_SPAWN = "ddp_sharded_spawn"
    RPC_SEQUENTIAL_PLUGIN = "rpc_sequential"


class DeviceType(LightningEnum):
    """Kinds of devices."""

    CPU = "CPU"
    GPU = "GPU"
    TPU = "TPU"


class GradClipAlgorithmType(LightningEnum):
    """What of the gradients is limited."""

    VALUE = "value"
    NORM = "norm"


class ModelSummaryMode(LightningEnum):
    """How much of a model its summary shows."""

    TOP = "top"
    FULL = "full"

    @staticmethod
    def get_max_depth(mode: str) -> int:
        """The number of levels below the model; -1 for all."""
        return 1 if mode == ModelSummaryMode.TOP else -1

    @staticmethod
    def supported_types() -> list[str]:
        """The values."""
        return [member.value for member in ModelSummaryMode]
