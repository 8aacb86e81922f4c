"""How to train on several devices, in the words of later versions."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.plugins import (
    DataParallelPlugin,
    DDPPlugin,
    DDPSpawnPlugin,
    SingleDevicePlugin,
    TrainingTypePlugin,
)
from puretrain.lightning.utilities.unavailable import unavailable

__all__ = [
    "DDPSpawnStrategy",
    "DDPStrategy",
    "DataParallelStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "SingleDeviceStrategy",
    "Strategy",
]


class Strategy(TrainingTypePlugin):
    """The base of strategies."""


class SingleDeviceStrategy(SingleDevicePlugin, Strategy):
    """One device."""


class DDPStrategy(DDPPlugin, Strategy):
    """A process for each device, with synchronized gradients."""


class DDPSpawnStrategy(DDPSpawnPlugin, Strategy):
    """The same, with processes started by this one."""


class DataParallelStrategy(DataParallelPlugin, Strategy):
    """One process that splits each batch over its devices."""


def _no(name: str, reason: str) -> Any:
    return unavailable(name, __name__, reason, Strategy)


_SHARDED = "use puretrain's own sharding, or strategy='ddp'"

FSDPStrategy = _no("FSDPStrategy", _SHARDED)
DeepSpeedStrategy = _no("DeepSpeedStrategy", f"DeepSpeed is not used; {_SHARDED}")
