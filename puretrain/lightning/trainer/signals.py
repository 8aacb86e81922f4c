"""Ctrl-C and SIGTERM during a run: they wait for the end of the batch, in all processes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["agree", "interrupt", "noted"]


@contextlib.contextmanager
def noted(trainer: Any) -> Iterator[None]:
    """Let Ctrl-C wait for the end of the batch; a second one does not wait."""
    trainer._signals = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and trainer._signals:
            trainer._processes.disconnect()  # the others may be anywhere
            raise KeyboardInterrupt
        trainer._signals.append(number)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def interrupt(trainer: Any) -> None:
    """Do what the first signal asks for.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: after another signal.
    """
    number = trainer._signals.pop(0)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def agree(trainer: Any) -> None:
    """Let all processes stop, or note a signal, after the same step."""
    if not trainer._processes.connected:
        return
    stop, number = trainer._processes.largest(
        int(bool(trainer.should_stop)), max(trainer._signals, default=0)
    )
    trainer.should_stop = bool(stop)
    if number and not trainer._signals:
        trainer._signals.append(number)
