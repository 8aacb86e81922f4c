"""Saving when SIGTERM has come, although a step has not ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from puretrain.errors import ConfigurationError, DonatedStateError
from puretrain.loop import Event

__all__ = ["Preemption"]

_GRACE = 1.0
_RETRY = 0.005


class Preemption:
    """A thread that hears of SIGTERM at once, also while the main thread is inside of a kernel.

    Most steps end soon after the signal, and then the loop saves its state as after any signal. If
    one does not end within a second (or a tenth of the budget, if that is less), the thread saves
    the state before it. A step decides whether to use up its state only when it has its gradients,
    so that the lease of this thread comes in time; and if the step is already overwriting the
    state, it is about to end.
    """

    def __init__(
        self,
        seconds: float,
        rescue: Callable[[Any, Event], None],
        is_written: Callable[[float], bool],
    ) -> None:
        self._seconds, self._rescue, self._is_written = seconds, rescue, is_written
        self._last: tuple[Any, Event] | None = None
        self._heard: float | None = None
        self._interrupted = threading.Event()
        self._thread: threading.Thread | None = None
        self._ends: tuple[int, int] = (-1, -1)
        self._before = -1

    def begin(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: signals can't be heard here.
        """
        in_main = threading.current_thread() is threading.main_thread()
        if os.name == "nt" or not in_main or signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            raise ConfigurationError(
                "preemption_seconds needs fit(handle_signals=True) in the main thread of a "
                "process, and an operating system that has SIGTERM"
            )
        self.close()
        self._interrupted.clear()
        self._heard = None
        self._ends = os.pipe()
        os.set_blocking(self._ends[1], False)
        # Python writes the number of each signal there before any handler can run.
        self._before = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(
            target=self._listen, args=(self._ends[0],), name="puretrain-preemption", daemon=True
        )
        self._thread.start()

    def show(self, state: Any, event: Event) -> None:
        """Note a complete state; after the loop has heard of the signal it saves by itself."""
        self._last = (state, event)
        if event.kind in ("interrupt", "fit_end"):
            self._interrupted.set()

    def tell(self, event: Event) -> None:
        """Say that the loop has saved its state after the signal."""
        if self._heard is not None:
            passed = time.monotonic() - self._heard
            late = "" if passed <= self._seconds else f", later than the {self._seconds:g} s it has"
            _say(f"the state of step {event.step} is saved {passed:.1f} s after the signal{late}")

    def close(self) -> None:
        """Listen no more."""
        if self._thread is None:
            return
        self._interrupted.set()
        signal.set_wakeup_fd(self._before)
        os.close(self._ends[1])
        self._thread.join()
        os.close(self._ends[0])
        self._thread = self._last = None

    def _listen(self, descriptor: int) -> None:
        while received := os.read(descriptor, 256):
            if self._before >= 0:  # somebody else listens as well, such as an event loop
                with contextlib.suppress(OSError):
                    os.write(self._before, received)
            if signal.SIGTERM in received and not self._interrupted.is_set():
                self._heard = time.monotonic()
                self._act(self._heard)

    def _act(self, heard: float) -> None:
        if self._interrupted.wait(min(_GRACE, self._seconds / 10)):
            return
        event = None
        while event is None and time.monotonic() < heard + self._seconds:
            last = self._last
            try:
                if last is not None:
                    self._rescue(*last)
                    event = last[1]
            except DonatedStateError:  # the step is about to end
                if self._interrupted.wait(_RETRY):
                    return
        saved = event is not None and self._is_written(heard + self._seconds - time.monotonic())
        passed = time.monotonic() - heard
        if event is not None and saved:
            text = (
                f"the state of step {event.step}, the last complete one, is saved "
                f"{passed:.1f} s after the signal; the next step has not ended"
            )
        else:
            text = f"no state could be saved within {self._seconds:g} s"
        _say(text)


def _say(text: str) -> None:
    print(f"puretrain: SIGTERM: {text}", file=sys.stderr, flush=True)
