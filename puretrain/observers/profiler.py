"""Where the time of a few steps goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from puretrain.errors import check_whole
from puretrain.loop import Event, Observer
from puretrain.observers.folder import make_folder

__all__ = ["profiler"]


def profiler(
    directory: str | os.PathLike[str],
    *,
    wait: int = 5,
    warmup: int = 2,
    active: int = 3,
    rows: int = 15,
) -> Observer:
    """Profile a few steps with :mod:`torch.profiler`, then leave the run alone.

    Writes ``steps_FIRST-LAST.pt.trace.json`` with a timeline of the active steps, which
    https://ui.perfetto.dev, ``chrome://tracing`` and TensorBoard's profiler plugin show, and at the
    end of the run prints a table of the operators that took most time. The profiled steps are
    slower; the numbers in the state are the same.

    Args:
        directory: where the trace goes; made if needed.
        wait: how many steps to let pass after the start of the run.
        warmup: how many steps to profile without recording them.
        active: how many steps to record.
        rows: how many operators the table has.

    Raises:
        ConfigurationError: an argument is out of its range.
    """
    for name, value, least in (("wait", wait, 0), ("warmup", warmup, 0), ("active", active, 1)):
        check_whole(name, value, least)
    return _Profiler(Path(directory), wait, warmup, active, rows)


class _Profiler:
    """See :func:`profiler`."""

    def __init__(self, directory: Path, wait: int, warmup: int, active: int, rows: int) -> None:
        self._directory, self._rows = directory, rows
        self._wait, self._warmup, self._active = wait, warmup, active
        self._profile: Any = None
        self._first = self._last = 0
        self._table = ""

    def __call__(self, state: Any, event: Event) -> None:
        if event.kind == "fit_start":
            self._begin(event.step)
        elif event.kind == "step" and self._profile is not None:
            self._last = event.step
            self._profile.step()
            if event.step >= self._first + self._active - 1:
                self._end()
        elif event.kind in ("fit_end", "interrupt"):
            self.close()

    def close(self) -> None:
        if self._profile is not None and self._last < self._first:
            self._table = f"profiler: the run ended before step {self._first}, the first to record"
        self._end()
        if self._table:
            print(self._table, flush=True)
            self._table = ""

    def _begin(self, step: int) -> None:
        from torch import profiler as torch_profiler

        self._end()
        self._first = step + self._wait + self._warmup + 1
        activities = [torch_profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch_profiler.ProfilerActivity.CUDA)
        self._profile = torch_profiler.profile(
            activities=activities,
            schedule=torch_profiler.schedule(
                wait=self._wait, warmup=self._warmup, active=self._active, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _end(self) -> None:
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.stop()

    def _write(self, profile: Any) -> None:
        make_folder(self._directory)
        name = f"steps_{self._first:08}-{self._last:08}.pt.trace.json"
        profile.export_chrome_trace(str(self._directory / name))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self._table = profile.key_averages().table(sort_by=key, row_limit=self._rows)
