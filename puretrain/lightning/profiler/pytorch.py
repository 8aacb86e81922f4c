"""Which operators of torch the time goes into."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from torch.autograd.profiler import record_function

from puretrain.lightning.profiler.base import BaseProfiler
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["PyTorchProfiler"]

_STEPS = {"training_step_and_backward", "validation_step", "test_step", "predict_step"}


class PyTorchProfiler(BaseProfiler):
    """Runs :mod:`torch.profiler` over the first steps of a run, and reports the operators.

    Each action is a range of the timeline. After ``steps`` steps the recording ends, and the run
    goes on unhindered: a recording of a whole run would not fit into memory.
    """

    RECORD_FUNCTIONS: ClassVar[set[str]] = {
        "training_step_and_backward",
        "training_step",
        "backward",
        "optimizer_step",
        "validation_step",
        "test_step",
        "predict_step",
    }
    AVAILABLE_SORT_KEYS: ClassVar[set[str]] = {
        "cpu_time",
        "cuda_time",
        "cpu_time_total",
        "cuda_time_total",
        "cpu_memory_usage",
        "cuda_memory_usage",
        "self_cpu_memory_usage",
        "self_cuda_memory_usage",
        "count",
    }

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_functions: set[str] | list[str] | None = None,
        record_module_names: bool = True,
        profiled_functions: list[str] | None = None,
        output_filename: str | os.PathLike[str] | None = None,
        steps: int = 10,
        **profiler_kwargs: Any,
    ) -> None:
        """Nothing is recorded before the first action.

        Args:
            dirpath: see :class:`BaseProfiler`; a timeline goes there too.
            filename: see :class:`BaseProfiler`.
            group_by_input_shapes: whether the report keeps calls of other shapes apart.
            emit_nvtx: mark ranges for Nvidia's tools instead of recording.
            export_to_chrome: whether to write a timeline, if there is a ``dirpath``.
            row_limit: how many operators the report has, -1 for all.
            sort_by_key: the column that decides which; by default the total time.
            record_functions: more actions to record.
            record_module_names: accepted because programs pass it.
            profiled_functions: the older name of ``record_functions``.
            output_filename: see :class:`BaseProfiler`.
            steps: how many steps to record.
            **profiler_kwargs: go to :class:`torch.profiler.profile`; those of older versions, such
                as ``use_cuda`` and ``path_to_export_trace``, are understood.

        Raises:
            MisconfigurationException: both names of ``record_functions`` are given, or there is no
                such column.
        """
        super().__init__(dirpath=dirpath, filename=filename, output_filename=output_filename)
        if profiled_functions is not None and record_functions is not None:
            raise MisconfigurationException(
                "You set `PytorchProfiler.profiled_functions` and"
                " `PyTorchProfiler.record_functions`. Please use only the later."
            )
        cuda = torch.cuda.is_available() and bool(profiler_kwargs.pop("use_cuda", True))
        self._sort_by_key = sort_by_key or ("cuda_time_total" if cuda else "cpu_time_total")
        if self._sort_by_key not in self.AVAILABLE_SORT_KEYS:
            raise MisconfigurationException(
                f"Found sort_by_key: {self._sort_by_key}."
                f" Should be within {sorted(self.AVAILABLE_SORT_KEYS)}. "
            )
        self._record_functions = set(record_functions or profiled_functions or ())
        self._group_by_input_shapes = group_by_input_shapes
        self._row_limit = row_limit
        self._emit_nvtx = emit_nvtx
        self._trace_dir = profiler_kwargs.pop("path_to_export_trace", None)
        self._export = export_to_chrome
        for name in ("enabled", "use_kineto", "use_cpu", "local_rank", "record_functions"):
            profiler_kwargs.pop(name, None)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._settings = {
            "activities": activities,
            "record_shapes": group_by_input_shapes,
            **profiler_kwargs,
        }
        self._steps = steps
        self._begin()

    def _begin(self) -> None:
        self._profile: Any = None
        self._report: Any = None
        self._events: Any = None
        self._left = self._steps
        self._open: dict[str, list[Any]] = {}

    def start(self, action_name: str) -> None:
        """When an action begins; the first one starts the recording."""
        if self._left <= 0:
            return
        if self._profile is None:
            if self._emit_nvtx:
                self._profile = torch.autograd.profiler.emit_nvtx()
            else:
                self._profile = torch.profiler.profile(**self._settings)
            self._profile.__enter__()
        span = record_function(action_name)
        span.__enter__()
        self._open.setdefault(action_name, []).append(span)

    def stop(self, action_name: str) -> None:
        """When an action ends; does nothing for one that was not recorded."""
        spans = self._open.get(action_name)
        if not spans:
            return
        spans.pop().__exit__(None, None, None)
        if action_name in _STEPS | self._record_functions:
            if hasattr(self._profile, "step") and "schedule" in self._settings:
                self._profile.step()
            self._left -= 1
            if self._left <= 0:
                self._end()

    def _end(self) -> None:
        """End the recording and keep its report."""
        if self._profile is None:
            return
        for spans in self._open.values():
            while spans:
                spans.pop().__exit__(None, None, None)
        profile, self._profile, self._left = self._profile, None, 0
        profile.__exit__(None, None, None)
        if self._emit_nvtx:
            return
        folder = self._trace_dir or self.dirpath
        if self._export and folder is not None:
            os.makedirs(folder, exist_ok=True)
            profile.export_chrome_trace(
                os.path.join(folder, self._prepare_filename(".pt.trace.json").lstrip("."))
            )
        self._events = profile.events()
        self._report = profile.key_averages(group_by_input_shape=self._group_by_input_shapes)

    @property
    def function_events(self) -> Any:
        """The recorded events; ends the recording."""
        self._end()
        return self._events

    def summary(self) -> str:
        """The report, a table of operators; ends the recording."""
        self._end()
        if self._report is None:
            if self._emit_nvtx:
                rank_zero_warn("emit_nvtx marks ranges for Nvidia's tools and has no report")
            return ""
        table = self._report.table(sort_by=self._sort_by_key, row_limit=self._row_limit)
        return f"{self._title()}\n{table}\n"

    def teardown(self, stage: str | None = None) -> None:
        """End the recording; the next run begins anew."""
        super().teardown(stage)
        self._end()
        self._begin()
