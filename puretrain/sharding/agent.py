"""Torchrun's agent, which starts the processes of one host: who failed first, and an end in time.

This module imports ``torch.distributed.elastic``, which takes its time; so it is loaded on use.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

__all__ = ["Agent"]

_GRACE = 10.0
_LAST_WORDS = 2


class Agent(LocalElasticAgent):
    """Ends all processes soon after one has failed, and tells which was the first."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: LogsSpecs,
        patience: int,
        tell: Callable[[Mapping[int, Any], int], None],
    ) -> None:
        super().__init__(spec, logs, shutdown_timeout=patience)
        self._tell = tell
        self._failed_at_once: set[int] = set()
        self._signalled = False

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        failed = {
            rank for rank, process in self._processes().items() if process.poll() not in (None, 0)
        }
        if failed:
            # Torch waits for 30 seconds here; and a process that hangs should say where.
            self._failed_at_once = failed
            self._end_survivors(worker_group)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            self._tell(result.failures, self.first_failure(result.failures)[0])
        return result

    def _end_survivors(self, worker_group: WorkerGroup) -> None:
        """SIGTERM, a little time, and then a signal at which Python prints its stack and ends."""
        alive = {rank: p for rank, p in self._processes().items() if p.poll() is None}
        for process in alive.values():
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and any(p.poll() is None for p in alive.values()):
            time.sleep(0.02)
        for local_rank, process in alive.items():
            if process.poll() is None:
                rank = worker_group.workers[local_rank].global_rank
                print(
                    f"puretrain: the process of rank {rank} (pid {process.pid}) does not end and "
                    "is killed; where it is:",
                    file=sys.stderr,
                    flush=True,
                )
                self._send(process, signal.SIGABRT)
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGABRT, _LAST_WORDS)

    @staticmethod
    def _send(process: Any, number: signal.Signals) -> None:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed next
            process.wait(_LAST_WORDS)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # The first signal ends the processes in an orderly way. When another one comes meanwhile,
        # `run` calls this again: then at once.
        if self._signalled:
            death_sig = signal.SIGKILL
        self._signalled = self._signalled or timeout == self._shutdown_timeout
        super()._shutdown(death_sig, timeout)

    def _processes(self) -> dict[int, Any]:
        """The processes by their local rank."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return {rank: handler.proc for rank, handler in handlers.items()}

    def all_succeeded(self) -> bool:
        """Whether all processes ended well."""
        return all(process.poll() == 0 for process in self._processes().values())

    def first_failure(self, failures: Mapping[int, Any]) -> tuple[int, Any]:
        """The rank and the failure of the process that failed first.

        One that was killed could not tell when: it was the first, since it is seldom killed because
        of another. The others have told, perhaps some time before they ended. What was ended by
        the agent comes last.
        """

        def order(item: tuple[int, Any]) -> tuple[int, int]:
            failure = item[1]
            message = failure.error_file_data.get("message")
            facts = message.get("extraInfo", {}) if isinstance(message, dict) else {}
            if "nanoseconds" in facts:
                return 1, facts["nanoseconds"]
            return (0 if failure.local_rank in self._failed_at_once else 2), 0

        return min(failures.items(), key=order)
