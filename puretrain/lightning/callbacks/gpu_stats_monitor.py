"""Log what ``nvidia-smi`` knows of the GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import Any

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["GPUStatsMonitor"]


class GPUStatsMonitor(Callback):
    """Logs memory and load of the GPU, and the time of steps."""

    def __init__(
        self,
        memory_utilization: bool = True,
        gpu_utilization: bool = True,
        intra_step_time: bool = False,
        inter_step_time: bool = False,
        fan_speed: bool = False,
        temperature: bool = False,
    ) -> None:
        """Take what is to be logged.

        Raises:
            MisconfigurationException: there is no ``nvidia-smi``.
        """
        super().__init__()
        self._program = shutil.which("nvidia-smi")
        if self._program is None:
            raise MisconfigurationException(
                "Cannot use GPUStatsMonitor callback because NVIDIA driver is not installed."
            )
        self._intra, self._inter = intra_step_time, inter_step_time
        self._at_start = [("utilization.gpu", "%")] if gpu_utilization else []
        if memory_utilization:
            self._at_start += [
                ("memory.used", "MB"),
                ("memory.free", "MB"),
                ("utilization.memory", "%"),
            ]
        self._at_end = list(self._at_start)
        if fan_speed:
            self._at_end.append(("fan.speed", "%"))
        if temperature:
            self._at_end += [("temperature.gpu", "°C"), ("temperature.memory", "°C")]
        self._started: float | None = None
        self._ended: float | None = None

    def on_train_start(self, trainer, pl_module):
        if not trainer.logger:
            raise MisconfigurationException(
                "Cannot use GPUStatsMonitor callback with Trainer that has no logger."
            )
        if not trainer.on_gpu:
            raise MisconfigurationException(
                "You are using GPUStatsMonitor but are not running on GPU since gpus attribute in "
                f"Trainer is set to {trainer.data_parallel_device_ids}."
            )

    def on_train_epoch_start(self, trainer, pl_module):
        self._started = self._ended = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._started = time.monotonic()
        if not _is_due(trainer):
            return
        found = self._stats(trainer.root_device.index, self._at_start)
        if self._inter and self._ended is not None:
            found["batch_time/inter_step (ms)"] = (time.monotonic() - self._ended) * 1000
        trainer.logger.log_metrics(found, step=trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._ended = time.monotonic()
        if not _is_due(trainer):
            return
        found = self._stats(trainer.root_device.index, self._at_end)
        if self._intra and self._started is not None:
            found["batch_time/intra_step (ms)"] = (time.monotonic() - self._started) * 1000
        trainer.logger.log_metrics(found, step=trainer.global_step)

    def _stats(self, index: int, queries: list[tuple[str, str]]) -> dict[str, float]:
        """What nvidia-smi says of a GPU, by the names that are logged."""
        if not queries:
            return {}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        device = shown.split(",")[index].strip() if shown else str(index)
        done = subprocess.run(
            [
                str(self._program),
                f"--query-gpu={','.join(name for name, _ in queries)}",
                "--format=csv,nounits,noheader",
                f"--id={device}",
            ],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        values = [_number(value) for value in done.stdout.strip().split(", ")]
        return {
            f"gpu_id: {device}/{name} ({unit})": value
            for (name, unit), value in zip(queries, values, strict=True)
        }


def _number(text: str) -> float:
    """A value of nvidia-smi; 0 where a GPU has no such gauge and it says so in words."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _is_due(trainer: Any) -> bool:
    every = trainer.log_every_n_steps
    return bool(every and (trainer.global_step + 1) % every == 0) or trainer.should_stop
