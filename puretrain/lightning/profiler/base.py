"""What all profilers have in common, and the one that does nothing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puretrain.lightning.utilities.distributed import rank_zero_info

__all__ = ["AbstractProfiler", "BaseProfiler", "PassThroughProfiler", "Profiler"]


class BaseProfiler(ABC):
    """Measures named actions; one's own needs ``start``, ``stop`` and ``summary``.

    Example:
        >>> class Counter(BaseProfiler):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.count = 0
        ...     def start(self, action_name):
        ...         self.count += 1
        ...     def stop(self, action_name):
        ...         pass
        ...     def summary(self):
        ...         return f"{self.count} actions"
        >>> counter = Counter()
        >>> with counter.profile("load"):
        ...     pass
        >>> counter.summary()
        '1 actions'
    """

    # a profiler that does not call super().__init__() works as well
    dirpath: str | None = None
    filename: str | None = None
    _output: str | None = None
    _local_rank: int | None = None
    _log_dir: str | None = None
    _stage: str | None = None
    _lightning_module: Any = None

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        output_filename: str | os.PathLike[str] | None = None,
        output_streams: list[Callable[[str], Any]] | tuple[Callable[[str], Any], ...] | None = None,
    ) -> None:
        """Say where the report goes; by default to the log.

        Args:
            dirpath: a directory; by default the run's own.
            filename: the report is ``STAGE-FILENAME.txt`` in it.
            output_filename: the file, in full, instead.
            output_streams: functions that take the report, instead.
        """
        super().__init__()
        if dirpath is not None and filename is None and Path(dirpath).suffix:
            # the first argument was once the file
            dirpath, output_filename = None, dirpath
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        self.filename = filename
        self._output = None if output_filename is None else os.fspath(output_filename)
        self.write_streams = list(output_streams or [])

    @abstractmethod
    def start(self, action_name: str) -> None:
        """When an action begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """When an action ends."""

    @abstractmethod
    def summary(self) -> str:
        """The report."""

    @contextmanager
    def profile(self, action_name: str) -> Generator[str, None, None]:
        """Measure a block.

        Args:
            action_name: under which it is in the report.
        """
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def profile_iterable(
        self, iterable: Iterable[Any], action_name: str
    ) -> Generator[Any, None, None]:
        """Measure how long each item of an iterable takes to come.

        Args:
            iterable: the iterable.
            action_name: under which it is in the report.
        """
        iterator = iter(iterable)
        while True:
            with self.profile(action_name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def setup(
        self, stage: str | None = None, local_rank: int | None = None, log_dir: str | None = None
    ) -> None:
        """When a run begins.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            local_rank: of this process if there are several, else None.
            log_dir: the directory of the run.
        """
        self._stage = getattr(stage, "value", stage)
        self._local_rank = local_rank
        self._log_dir = log_dir

    def teardown(self, stage: str | None = None) -> None:
        """When a run ends."""

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return self._local_rank or 0

    @property
    def output_fname(self) -> str | None:
        """The file of the report, None if it goes to the log."""
        return self._output or self._report_file(".txt")

    def _prepare_filename(self, extension: str = ".txt") -> str:
        """``STAGE-FILENAME-RANK.txt``, of which each part may be missing."""
        parts = [self._stage, self.filename]
        if self._local_rank is not None:
            parts.append(str(self._local_rank))
        return "-".join(part for part in parts if part) + extension

    def _report_file(self, extension: str) -> str | None:
        if not self.filename:
            return None
        folder = self.dirpath or self._log_dir or "."
        return os.path.join(folder, self._prepare_filename(extension))

    def describe(self) -> None:
        """Give the report to the file, the streams, or the log."""
        report = self.summary()
        if not report:
            return
        streams = getattr(self, "write_streams", [])
        path = self.output_fname
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(report)
        elif not streams:
            rank_zero_info(report)
        for stream in streams:
            stream(report)

    def _title(self) -> str:
        stage = f"{self._stage.upper()} " if self._stage else ""
        return f"{stage}Profiler Report"


AbstractProfiler = BaseProfiler
Profiler = BaseProfiler


class PassThroughProfiler(BaseProfiler):
    """Measures nothing."""

    def start(self, action_name: str) -> None:
        """Do nothing."""

    def stop(self, action_name: str) -> None:
        """Do nothing."""

    def summary(self) -> str:
        """Empty."""
        return ""
