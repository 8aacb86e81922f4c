"""Log how busy the device is."""

from __future__ import annotations

import os
from typing import Any

import torch

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["DeviceStatsMonitor"]


class DeviceStatsMonitor(Callback):
    """Logs the load and memory of the CPU, and what the GPU's allocator counts."""

    def __init__(self, cpu_stats: bool | None = None) -> None:
        """Take what is to be logged.

        Args:
            cpu_stats: log those of the CPU; None: if the training is on the CPU.
        """
        super().__init__()
        self._cpu_stats = cpu_stats
        self._last: tuple[int, int] | None = None

    def setup(self, trainer, pl_module, stage=None):
        if stage not in (None, "fit"):
            return
        if not trainer.logger:
            raise MisconfigurationException(
                "Cannot use `DeviceStatsMonitor` callback with `Trainer(logger=False)`."
            )
        if self._wants_cpu(trainer) and not os.path.exists("/proc/stat"):
            raise MisconfigurationException(
                "DeviceStatsMonitor reads the CPU's load from /proc, which this system does not "
                "have; give cpu_stats=False"
            )

    def _wants_cpu(self, trainer: Any) -> bool:
        return trainer.root_device.type == "cpu" if self._cpu_stats is None else self._cpu_stats

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._log(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._log(trainer, "on_train_batch_end")

    def _log(self, trainer: Any, hook: str) -> None:
        every = trainer.log_every_n_steps
        if not trainer.logger or not every or (trainer.global_step + 1) % every:
            return
        found: dict[str, float] = {}
        if trainer.root_device.type == "cuda":
            found |= torch.cuda.memory_stats(trainer.root_device)
        if self._wants_cpu(trainer):
            found |= self._cpu()
        named = {f"DeviceStatsMonitor.{hook}/{name}": value for name, value in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    def _cpu(self) -> dict[str, float]:
        """Percentages: the load since the last call, and the memory and swap in use."""
        with open("/proc/stat", encoding="ascii") as file:
            times = list(map(int, file.readline().split()[1:9]))
        total, idle = sum(times), times[3] + times[4]
        before = self._last or (0, 0)
        self._last = total, idle
        passed = total - before[0]
        busy = 100.0 * (1 - (idle - before[1]) / passed) if passed else 0.0
        with open("/proc/meminfo", encoding="ascii") as file:
            memory = {line.split(":")[0]: int(line.split()[1]) for line in file}
        swap = memory["SwapTotal"]
        return {
            "cpu_percent": busy,
            "cpu_vm_percent": 100.0 * (1 - memory["MemAvailable"] / memory["MemTotal"]),
            "cpu_swap_percent": 100.0 * (1 - memory["SwapFree"] / swap) if swap else 0.0,
        }
