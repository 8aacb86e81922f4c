"""How long each action takes."""

from __future__ import annotations

import os
import time
from collections import defaultdict

from puretrain.lightning.profiler.base import BaseProfiler

__all__ = ["SimpleProfiler"]


class SimpleProfiler(BaseProfiler):
    """Records how long actions take and reports their mean and their sum.

    >>> profiler = SimpleProfiler()
    >>> with profiler.profile("load"):
    ...     pass
    >>> "load" in profiler.summary()
    True
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        extended: bool = True,
        output_filename: str | os.PathLike[str] | None = None,
    ) -> None:
        """Begin without records.

        Args:
            dirpath: see :class:`BaseProfiler`.
            filename: see :class:`BaseProfiler`.
            extended: whether the report has the number of calls and the share of the run.
            output_filename: see :class:`BaseProfiler`.
        """
        super().__init__(dirpath=dirpath, filename=filename, output_filename=output_filename)
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = defaultdict(list)
        self.extended = extended
        self.start_time = time.monotonic()

    def start(self, action_name: str) -> None:
        """When an action begins.

        Raises:
            ValueError: it has begun and not ended.
        """
        if action_name in self.current_actions:
            raise ValueError(f"Attempted to start {action_name} which has already started.")
        self.current_actions[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        """When an action ends.

        Raises:
            ValueError: it has not begun.
        """
        end = time.monotonic()
        if action_name not in self.current_actions:
            raise ValueError(
                f"Attempting to stop recording an action ({action_name}) which was never started."
            )
        self.recorded_durations[action_name].append(end - self.current_actions.pop(action_name))

    def _rows(self) -> tuple[list[list[str]], float]:
        """A row for each action, the longest first, and the time since the beginning."""
        total = time.monotonic() - self.start_time
        durations = sorted(self.recorded_durations.items(), key=lambda item: -sum(item[1]))
        rows = []
        for name, values in durations:
            mean, spent = sum(values) / len(values), sum(values)
            if self.extended:
                share = f"{100 * spent / total:.5}"
                rows.append([name, f"{mean:.5}", str(len(values)), f"{spent:.5}", share])
            else:
                rows.append([name, f"{mean:.5}", f"{spent:.5}"])
        return rows, total

    def summary(self) -> str:
        """The report, a table."""
        rows, total = self._rows()
        if self.extended:
            titles = ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"]
            rows.insert(0, ["Total", "-", "_", f"{total:.5}", "100 %"])
        else:
            titles = ["Action", "Mean duration (s)", "Total time (s)"]
        lines = [self._title()]
        if self.recorded_durations:
            widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
            rule = "-" * (sum(widths) + 5 * len(widths))

            def line(cells: list[str]) -> str:
                padded = (f"{c:<{w}}" for c, w in zip(cells, widths, strict=True))
                return "|  " + "  |  ".join(padded) + "  |"

            lines += [rule, line(titles), rule]
            for number, row in enumerate(rows):
                lines.append(line(row))
                if self.extended and number == 0:
                    lines.append(rule)
            lines.append(rule)
        return "\n\n" + "\n".join(lines) + "\n"
