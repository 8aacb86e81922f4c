"""Which functions each action spends its time in."""

from __future__ import annotations

import cProfile
import io
import os
import pstats
from typing import Any

from puretrain.lightning.profiler.base import BaseProfiler

__all__ = ["AdvancedProfiler"]


class AdvancedProfiler(BaseProfiler):
    """Runs actions under :mod:`cProfile`.

    Only one profile can be active at a time: while an action is inside another one, the outer one
    does not record.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        output_filename: str | os.PathLike[str] | None = None,
        dump_stats: bool = False,
    ) -> None:
        """Begin without records.

        Args:
            dirpath: see :class:`BaseProfiler`.
            filename: see :class:`BaseProfiler`.
            line_count_restriction: how many functions to report of each action: a number, or a
                fraction of all.
            output_filename: see :class:`BaseProfiler`.
            dump_stats: whether to write each action's statistics to a file ``ACTION.prof`` as
                well, for other tools.
        """
        super().__init__(dirpath=dirpath, filename=filename, output_filename=output_filename)
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self._active: list[str] = []

    def start(self, action_name: str) -> None:
        """When an action begins."""
        if self._active:
            self.profiled_actions[self._active[-1]].disable()
        profile = self.profiled_actions.setdefault(action_name, cProfile.Profile())
        self._active.append(action_name)
        profile.enable()

    def stop(self, action_name: str) -> None:
        """When an action ends.

        Raises:
            ValueError: it has not begun.
        """
        profile = self.profiled_actions.get(action_name)
        if profile is None:
            raise ValueError(
                f"Attempting to stop recording an action ({action_name}) which was never started."
            )
        if action_name not in self._active:
            return
        self.profiled_actions[self._active[-1]].disable()
        self._active.reverse()
        self._active.remove(action_name)
        self._active.reverse()
        if self._active:
            self.profiled_actions[self._active[-1]].enable()

    def summary(self) -> str:
        """The report: the functions of each action, those first that take longest."""
        parts = [self._title()]
        for name, profile in self.profiled_actions.items():
            text = io.StringIO()
            statistics = pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative")
            statistics.print_stats(self.line_count_restriction)
            parts.append(f"Profile stats for: {name}\n{text.getvalue()}")
            if self.dump_stats:
                folder = self.dirpath or self._log_dir or "."
                os.makedirs(folder, exist_ok=True)
                safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
                profile.dump_stats(os.path.join(folder, f"{safe}.prof"))
        return "\n".join(parts)

    def teardown(self, stage: str | None = None) -> None:
        """Forget the records, so that the next run begins anew."""
        super().teardown(stage)
        while self._active:
            self.profiled_actions[self._active.pop()].disable()
        self.profiled_actions = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdvancedProfiler:
        # a profile can't be copied
        return type(self)(
            self.dirpath, self.filename, self.line_count_restriction, self._output, self.dump_stats
        )

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.dirpath, self.filename, self.line_count_restriction)
        return type(self), (*settings, self._output, self.dump_stats)
