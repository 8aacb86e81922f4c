"""Saving in the background: jobs that a thread does one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Job", "Writer"]


class Job(NamedTuple):
    """Something to be done in the background."""

    run: Callable[[], None]
    done: Callable[[], None]
    """Called afterwards, whatever happened, and also if the job is dropped."""


class Writer:
    """Does jobs in a thread, one after the other; keeps what they raise until somebody asks.

    There is a thread only while there is something to do.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Job | None = None
        self._busy = False
        self._errors: list[BaseException] = []

    def submit(self, job: Job, *, replace: bool) -> bool:
        """Begin a job, or put it behind the one that is being done.

        Args:
            job: what to do.
            replace: while one is being done, take the place of the one that waits, if there is
                one. Otherwise wait until nothing is being done.

        Returns:
            Whether a waiting job was dropped.
        """
        with self._changed:
            if not replace:
                self._changed.wait_for(lambda: not self._busy)
            dropped, self._waiting = self._waiting, job
            start = not self._busy
            self._busy = True
        if dropped is not None:
            dropped.done()
        if start:
            threading.Thread(target=self._work, name="puretrain-checkpoints", daemon=True).start()
        return dropped is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; whether that was so in time (in seconds)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, timeout)

    @property
    def has_failed(self) -> bool:
        """Whether there are errors that nobody has asked for."""
        return bool(self._errors)

    def errors(self) -> list[BaseException]:
        """What jobs have raised since the last call."""
        with self._changed:
            errors, self._errors = self._errors, []
        return errors

    def _work(self) -> None:
        while True:
            with self._changed:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
            try:
                job.run()
            except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for errors
                with self._changed:
                    self._errors.append(error)
            finally:
                job.done()
                del job  # and with it the state
