"""Descriptions of how to train on several devices, and in which precision.

What can't work here has a name all the same, and says on use what to take instead.
"""

from __future__ import annotations

from typing import Any

from puretrain.lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from puretrain.lightning.utilities.unavailable import unavailable

__all__ = [
    "ApexMixedPrecisionPlugin",
    "ClusterEnvironment",
    "DDP2Plugin",
    "DDPPlugin",
    "DDPShardedPlugin",
    "DDPSpawnPlugin",
    "DDPSpawnShardedPlugin",
    "DataParallelPlugin",
    "DeepSpeedPlugin",
    "DeepSpeedPrecisionPlugin",
    "DoublePrecisionPlugin",
    "FullyShardedDataParallelPlugin",
    "HorovodPlugin",
    "LightningEnvironment",
    "MixedPrecisionPlugin",
    "NativeMixedPrecisionPlugin",
    "ParallelPlugin",
    "Plugin",
    "PrecisionPlugin",
    "RPCPlugin",
    "RPCSequentialPlugin",
    "SLURMEnvironment",
    "ShardedNativeMixedPrecisionPlugin",
    "SingleDevicePlugin",
    "SingleTPUPlugin",
    "TPUSpawnPlugin",
    "TorchElasticEnvironment",
    "TrainingTypePlugin",
]


class Plugin:
    """The base of what ``Trainer(plugins=…)`` takes."""


class TrainingTypePlugin(Plugin):
    """How to train on several devices.

    The Trainer reads ``accelerator``, the same word as for its argument of that name, and
    ``options``, what the plugin was made with.
    """

    accelerator: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        """Keep the options.

        Args:
            *args: devices and the cluster, which the Trainer finds out itself.
            **options: those of :class:`torch.nn.parallel.DistributedDataParallel`.
        """
        super().__init__()
        self.options = options

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"


class ParallelPlugin(TrainingTypePlugin):
    """Several devices."""


class SingleDevicePlugin(TrainingTypePlugin):
    """One device."""


class DataParallelPlugin(ParallelPlugin):
    """One process that splits each batch over its devices."""

    accelerator = "dp"


class DDPPlugin(ParallelPlugin):
    """A process for each device, with synchronized gradients."""

    accelerator = "ddp"


class DDPSpawnPlugin(ParallelPlugin):
    """The same, with processes started by this one."""

    accelerator = "ddp_spawn"


class DDP2Plugin(ParallelPlugin):
    """A process for each machine, which splits its batches over the devices."""

    accelerator = "ddp2"


class PrecisionPlugin(Plugin):
    """The numbers to compute with; ``precision`` is the Trainer's argument of that name."""

    precision: str | int = 32

    def __init__(self, precision: str | int | None = None, *args: Any, **options: Any) -> None:
        """Keep the precision.

        Args:
            precision: as for the Trainer.
            *args: accepted because programs pass them.
            **options: accepted because programs pass them.
        """
        super().__init__()
        if precision is not None:
            self.precision = precision


class MixedPrecisionPlugin(PrecisionPlugin):
    """Parameters in 32 bits, and computing in 16 where that is good enough."""

    precision: str | int = 16


class NativeMixedPrecisionPlugin(MixedPrecisionPlugin):
    """Mixed precision by torch's autocast."""


class DoublePrecisionPlugin(PrecisionPlugin):
    """64 bits."""

    precision: str | int = 64


def _no(name: str, reason: str, base: type = TrainingTypePlugin) -> Any:
    return unavailable(name, __name__, reason, base)


_SHARDED = "use puretrain's own sharding, or accelerator='ddp'"
_DDP = "use accelerator='ddp'"
_AUTOCAST = "use Trainer(precision=16), which is torch's autocast"

DDPShardedPlugin = _no("DDPShardedPlugin", f"FairScale is not used; {_SHARDED}")
DDPSpawnShardedPlugin = _no("DDPSpawnShardedPlugin", f"FairScale is not used; {_SHARDED}")
FullyShardedDataParallelPlugin = _no("FullyShardedDataParallelPlugin", _SHARDED)
DeepSpeedPlugin = _no("DeepSpeedPlugin", f"DeepSpeed is not used; {_SHARDED}")
HorovodPlugin = _no("HorovodPlugin", f"Horovod is not used; {_DDP}")
RPCPlugin = _no("RPCPlugin", f"there is no pipeline of processes; {_DDP}")
RPCSequentialPlugin = _no("RPCSequentialPlugin", f"there is no pipeline of processes; {_DDP}")
SingleTPUPlugin = _no("SingleTPUPlugin", "TPUs are not supported; use a GPU or the CPU")
TPUSpawnPlugin = _no("TPUSpawnPlugin", "TPUs are not supported; use a GPU or the CPU")
ApexMixedPrecisionPlugin = _no(
    "ApexMixedPrecisionPlugin", f"Apex is not used; {_AUTOCAST}", PrecisionPlugin
)
DeepSpeedPrecisionPlugin = _no(
    "DeepSpeedPrecisionPlugin", f"DeepSpeed is not used; {_AUTOCAST}", PrecisionPlugin
)
ShardedNativeMixedPrecisionPlugin = _no(
    "ShardedNativeMixedPrecisionPlugin", f"FairScale is not used; {_AUTOCAST}", PrecisionPlugin
)
