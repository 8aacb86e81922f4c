"""Saving states to a directory while a run goes on, and deleting those that are not needed."""

from __future__ import annotations

import datetime
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from puretrain.checkpoint import save
from puretrain.errors import ConfigurationError
from puretrain.loop import Event, Observer
from puretrain.observers.scalars import scalars
from puretrain.reducers import Best

__all__ = ["checkpoints"]

_NAME = re.compile(r"step_(\d{8,})\.ckpt")


def checkpoints(
    directory: str | os.PathLike[str],
    *,
    every: int | None = None,
    every_minutes: float | None = None,
    every_epochs: int | None = None,
    keep: int | None = 3,
) -> Observer:
    """Save the state to ``step_00001234.ckpt`` in a directory, and keep what is worth keeping.

    States are saved as the arguments say (at the end of every epoch if they say nothing), at the
    end of the run, on Ctrl-C and SIGTERM, and whenever a reducer :func:`puretrain.reducers.best_k`
    counts the step among its best. Put this observer last: then the logs of the others hold
    everything up to the state that is saved.

    A file is deleted only after another one is safely on the disk, if it is neither among the
    newest ``keep`` nor of a step that a ``best_k`` in the state wants to keep. Files of steps that
    the run has not reached, from a run that was resumed further back, are neither loaded nor
    counted: at the start they are set aside as ``*.ckpt.old``.

    The metadata of a file has the step, the epoch, the last metrics as plain numbers, what
    happened when it was saved, the time (UTC) and the command line.

    Args:
        directory: where to; made if needed.
        every: save after every so many steps.
        every_minutes: save after a step when the last save is so many minutes ago.
        every_epochs: save at the end of every so many epochs.
        keep: how many of the newest files to keep, at least 1; None keeps all.

    Raises:
        ConfigurationError: an argument is out of its range.
        CheckpointError: (in the loop) the state can't be saved.

    Example:
        >>> import tempfile, torch
        >>> import puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=1.0)
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> directory = tempfile.mkdtemp()
        >>> state = pt.fit(state, step, [torch.tensor(-1.0)] * 5, epochs=1,
        ...                observers=[checkpoints(directory, every=2, keep=2)])
        >>> sorted(path.name for path in Path(directory).iterdir())
        ['step_00000004.ckpt', 'step_00000005.ckpt']
        >>> pt.load(Path(directory, "step_00000004.ckpt"), like=state).params["w"]
        tensor(4.)
    """
    for name, value in (("every", every), ("every_epochs", every_epochs), ("keep", keep)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{name} is a whole number from 1, or None; not {value!r}")
    if every_minutes is not None and not every_minutes > 0:
        raise ConfigurationError(f"every_minutes is more than 0, or None; not {every_minutes!r}")
    if every is None and every_minutes is None and every_epochs is None:
        every_epochs = 1
    seconds = None if every_minutes is None else 60.0 * every_minutes
    return _Checkpoints(Path(directory), every, seconds, every_epochs, keep)


class _Checkpoints:
    """See :func:`checkpoints`."""

    def __init__(
        self,
        directory: Path,
        every: int | None,
        seconds: float | None,
        every_epochs: int | None,
        keep: int | None,
    ) -> None:
        self._directory, self._keep = directory, keep
        self._every, self._seconds, self._every_epochs = every, seconds, every_epochs
        self._saved: tuple[int, ...] | None = None  # what the last file holds
        self._when = time.monotonic()
        self._metrics: dict[str, float | int | bool] = {}  # the last of validations and epochs
        self._best: list[str] = []  # the names of the reducers made by best_k

    def __call__(self, state: Any, event: Event) -> None:
        kind = event.kind
        if kind == "step":
            due = self._is_due(event.step)
        elif kind == "epoch_end":
            due = bool(self._every_epochs and not (event.epoch + 1) % self._every_epochs)
        elif kind in ("validation", "interrupt", "fit_end"):
            due = kind != "validation"
        else:
            if kind == "fit_start":
                self._begin(state, event.step)
            return
        if kind in ("validation", "epoch_end"):
            self._metrics.update(scalars(event.metrics))
        if not due and not (self._best and event.step in self._best_steps(state)):
            return
        holds = (event.step, int(state.validated), int(state.cursor.epoch))
        # A step is saved once: what follows from its state at the end of an epoch follows again
        # when the state is loaded. But the last file holds the very state that fit returns.
        done = self._saved is not None and (
            self._saved == holds if kind == "fit_end" else self._saved[0] == event.step
        )
        if not done:
            self._save(state, event)
            self._saved = holds
            self._delete_others(state, event.step)

    def _is_due(self, step: int) -> bool:
        if self._every is not None and not step % self._every:
            return True
        return self._seconds is not None and time.monotonic() - self._when >= self._seconds

    def _begin(self, state: Any, step: int) -> None:
        self._best = [name for name, memory in state.reducers.items() if isinstance(memory, Best)]
        self._saved, self._when = None, time.monotonic()
        self._directory.mkdir(parents=True, exist_ok=True)
        later = [path for number, path in self._files() if number > step]
        for path in later:
            os.replace(path, path.with_name(f"{path.name}.old"))
        if later:
            warnings.warn(
                f"{self._directory} had {len(later)} checkpoints of steps after {step}, where this "
                f"run begins ({later[-1].name} the last); they are named *.ckpt.old now",
                stacklevel=2,
            )

    def _save(self, state: Any, event: Event) -> None:
        metadata = {
            "step": event.step,
            "epoch": event.epoch,
            "event": event.kind,
            "metrics": {**scalars(state.metrics), **self._metrics},
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": [str(word) for word in sys.argv],
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        save(self._directory / f"step_{event.step:08}.ckpt", state, metadata=metadata)
        self._when = time.monotonic()

    def _delete_others(self, state: Any, step: int) -> None:
        if self._keep is None:
            return
        past = [(number, path) for number, path in self._files() if number <= step]
        best = self._best_steps(state)
        for number, path in past[: -self._keep]:
            if number not in best:
                path.unlink(missing_ok=True)

    def _best_steps(self, state: Any) -> set[int]:
        return {step for name in self._best for step in state.reducers[name].steps.tolist()}

    def _files(self) -> list[tuple[int, Path]]:
        """The checkpoints in the directory and their steps, the oldest first."""
        named = [(_NAME.fullmatch(path.name), path) for path in self._directory.iterdir()]
        return sorted((int(match[1]), path) for match, path in named if match)
