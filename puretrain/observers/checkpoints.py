"""Saving states to a directory while a run goes on, and deleting those that are not needed."""

from __future__ import annotations

import datetime
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch

from puretrain.checkpoint import store
from puretrain.checkpoint.places import plain
from puretrain.checkpoint.writer import Job, Writer
from puretrain.errors import CheckpointError, ConfigurationError, check_choice, check_whole
from puretrain.loop import Event, Observer
from puretrain.observers.preemption import Preemption
from puretrain.observers.scalars import by_member, scalars
from puretrain.reducers import Best
from puretrain.state import lease
from puretrain.tree import tree_leaves

__all__ = ["Ways", "checkpoints", "observer"]


class Ways(NamedTuple):
    """How a run writes to its directory; a run of several processes has ways of its own."""

    begin: Callable[[str, int], list[store.Saved]] = store.begin
    """Make the directory ready; as :func:`puretrain.checkpoint.store.begin`."""
    add: Callable[..., Any] = store.add
    """Save an entry and delete old ones; as :func:`puretrain.checkpoint.store.add`."""
    agree: Callable[[bool], bool] | None = None
    """Whether something holds in any of the processes; each must ask at the same events. Then
    what depends on time is decided together, and the error of a save in the background is raised
    at the next save or at the end, where all processes have it. None: there is one process."""


def checkpoints(
    directory: str | os.PathLike[str],
    *,
    every: int | None = None,
    every_minutes: float | None = None,
    every_epochs: int | None = None,
    keep: int | None = 3,
    keep_every: int | None = None,
    keep_hours: float | None = None,
    asynchronous: bool = False,
    when_busy: Literal["wait", "skip"] = "wait",
    on_error: Literal["raise", "warn"] = "raise",
    share: bool = False,
    compression: Literal["zstd"] | None = None,
    preemption_seconds: float | None = None,
) -> Observer:
    """Save the state to ``step_00001234.ckpt`` in a directory, and keep what is worth keeping.

    States are saved as the arguments say (at the end of every epoch if they say nothing), at the
    end of the run, on Ctrl-C and SIGTERM, and whenever a reducer :func:`puretrain.reducers.best_k`
    counts the step among its best. Put this observer last: then the logs of the others hold
    everything up to the state that is saved.

    A file is deleted only after another one is safely on the disk, if nothing says that it is to be
    kept: it is not among the newest ``keep``, its step is no multiple of ``keep_every``, it is not
    the one of its ``keep_hours``, and no ``best_k`` in the state wants it. Files of steps that
    the run has not reached, from a run that was resumed further back, are neither loaded nor
    counted: at the start they are set aside as ``*.ckpt.old``.

    The metadata of a file has the step, the epoch, the last metrics as plain numbers, what
    happened when it was saved, the time (UTC) and the command line.

    Args:
        directory: where to; made if needed. Or a URL that fsspec knows, ``s3://bucket/run``.
        every: save after every so many steps.
        every_minutes: save after a step when the last save is so many minutes ago.
        every_epochs: save at the end of every so many epochs.
        keep: how many of the newest files to keep, at least 1; None keeps all.
        keep_every: keep the files of steps that are multiples of this, too.
        keep_hours: keep one file for every so many hours, too.
        asynchronous: save in a thread while the run goes on. The state is not copied: it is under a
            :func:`puretrain.lease` until it is on the disk, so that the next step computes its
            result in new memory. That takes room for one more state.
        when_busy: with ``asynchronous``, what to do when a save is due before the last one is done:
            ``'wait'`` for it, or go on and let the newer state take the place of an older one that
            has not begun to be written (``'skip'``; takes room for up to two more states).
        on_error: ``'raise'`` ends the run when a state can't be saved; in the background, at the
            next event, or at the end. ``'warn'`` warns, and tries again when the next save is due.
        share: write large tensors that are the same in the checkpoint before only once, to
            ``blocks/`` in the directory: for frozen weights. See ``docs/checkpoints.md``.
        compression: as for :func:`puretrain.save`.
        preemption_seconds: on SIGTERM, save within so many seconds, also if a step takes longer:
            then the last complete state is saved while that step goes on. Needs the main thread
            and ``handle_signals=True`` of :func:`puretrain.fit`.

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
        >>> sorted(os.listdir(directory))
        ['LATEST', 'step_00000004.ckpt', 'step_00000005.ckpt']
        >>> pt.load(os.path.join(directory, "step_00000004.ckpt"), like=state).params["w"]
        tensor(4.)
    """
    return observer(
        Ways(),
        directory,
        every=every,
        every_minutes=every_minutes,
        every_epochs=every_epochs,
        keep=keep,
        keep_every=keep_every,
        keep_hours=keep_hours,
        asynchronous=asynchronous,
        when_busy=when_busy,
        on_error=on_error,
        share=share,
        compression=compression,
        preemption_seconds=preemption_seconds,
    )


def observer(
    ways: Ways,
    directory: str | os.PathLike[str],
    *,
    every: int | None,
    every_minutes: float | None,
    every_epochs: int | None,
    keep: int | None,
    keep_every: int | None,
    keep_hours: float | None,
    asynchronous: bool,
    when_busy: Literal["wait", "skip"],
    on_error: Literal["raise", "warn"],
    share: bool = False,
    compression: Literal["zstd"] | None = None,
    preemption_seconds: float | None = None,
) -> Observer:
    """What :func:`checkpoints` does, with other ways to write; see there for the arguments."""
    counts = {"every": every, "every_epochs": every_epochs, "keep": keep, "keep_every": keep_every}
    for name, value in counts.items():
        if value is not None:
            check_whole(name, value)
    amounts = {
        "every_minutes": every_minutes,
        "keep_hours": keep_hours,
        "preemption_seconds": preemption_seconds,
    }
    for name, amount in amounts.items():
        if amount is not None and not amount > 0:
            raise ConfigurationError(f"{name} is more than 0, or None; not {amount!r}")
    check_choice("when_busy", when_busy, ("wait", "skip"))
    check_choice("on_error", on_error, ("raise", "warn"))
    check_choice("compression", compression, ("zstd", None))
    if every is None and every_minutes is None and every_epochs is None:
        every_epochs = 1
    seconds = None if every_minutes is None else 60.0 * every_minutes
    retention = store.Retention(keep, keep_every, keep_hours)
    return _Checkpoints(
        ways,
        plain(directory),
        _When(every, seconds, every_epochs),
        _How(retention, asynchronous, when_busy, on_error, share, compression),
        preemption_seconds,
    )


class _When(NamedTuple):
    """When a save is due."""

    steps: int | None
    seconds: float | None
    epochs: int | None


class _How(NamedTuple):
    """How to save."""

    retention: store.Retention
    asynchronous: bool
    when_busy: Literal["wait", "skip"]
    on_error: Literal["raise", "warn"]
    share: bool
    compression: Literal["zstd"] | None


class _Checkpoints:
    """See :func:`checkpoints`."""

    def __init__(
        self,
        ways: Ways,
        directory: str,
        when: _When,
        how: _How,
        preemption_seconds: float | None,
    ) -> None:
        self._ways = ways
        self.on_every_process = ways.agree is not None
        self._directory, self._when, self._how = directory, when, how
        self._saved: tuple[int, ...] | None = None  # what the last file holds
        self._since = time.monotonic()
        self._metrics: dict[str, float | int | bool] = {}  # the last of validations and epochs
        self._best: list[str] = []  # the names of the reducers made by best_k
        self._writer = Writer()
        self._preemption = (
            None
            if preemption_seconds is None
            else Preemption(preemption_seconds, self._rescue, self._is_written)
        )

    def __call__(self, state: Any, event: Event) -> None:
        kind = event.kind
        final = kind in ("interrupt", "fit_end")
        if self._ways.agree is None:
            self._tell_of_errors()
        elif final:  # when a thread is done is not the same in all processes, but this is
            self._writer.wait()
            self._tell_of_errors()
        if kind == "fit_start":
            self._begin(state, event.step)
        if self._preemption is not None:
            self._preemption.show(state, event)
        if kind == "step":
            due = self._is_due(event.step)
        elif kind == "epoch_end":
            every = self._when.epochs
            due = bool(every and not (event.epoch + 1) % every)
        elif kind in ("validation", "interrupt", "fit_end"):
            due = kind != "validation"
        else:
            return
        if kind in ("validation", "epoch_end"):
            self._metrics.update(scalars(by_member(state, event.metrics)))
        if due or (self._best and event.step in self._best_steps(state)):
            holds = (event.step, int(state.validated), int(state.cursor.epoch))
            # A step is saved once: what follows from its state at the end of an epoch follows again
            # when the state is loaded. But the last file holds the very state that fit returns.
            done = self._saved is not None and (
                self._saved == holds if kind == "fit_end" else self._saved[0] == event.step
            )
            wait = final or not self._how.asynchronous
            if not done and not self._is_left_out(wait):
                self._saved, self._since = holds, time.monotonic()
                self._save(state, event, wait=wait)
        if final:
            self._writer.wait()
            self._tell_of_errors()
            if self._preemption is not None and kind == "interrupt":
                self._preemption.tell(event)

    def _is_written(self, timeout: float) -> bool:
        return self._writer.wait(timeout) and not self._writer.has_failed

    def close(self) -> None:
        """Wait for what is being written; the loop calls it at the end, also after an error."""
        if self._preemption is not None:
            self._preemption.close()
        self._writer.wait()
        self._tell_of_errors()

    def _is_due(self, step: int) -> bool:
        every, seconds = self._when.steps, self._when.seconds
        if every is not None and not step % every:
            return True
        if seconds is None:
            return False
        due = time.monotonic() - self._since >= seconds
        return due if self._ways.agree is None else self._ways.agree(due)

    def _is_left_out(self, wait: bool) -> bool:
        """Whether a save of several processes is left out, as one of them is busy with the last."""
        agree = self._ways.agree
        if agree is None:
            return False
        if self._how.when_busy == "skip" and not wait and agree(not self._writer.wait(0)):
            return True
        self._writer.wait()
        self._tell_of_errors()
        return False

    def _begin(self, state: Any, step: int) -> None:
        self._best = [name for name, memory in state.reducers.items() if isinstance(memory, Best)]
        self._saved, self._since = None, time.monotonic()
        later = self._ways.begin(self._directory, step)
        if later:
            warnings.warn(
                f"{self._directory} had {len(later)} checkpoints of steps after {step}, where this "
                f"run begins (the last was that of step {later[-1].step}); they are named "
                "*.ckpt.old now",
                stacklevel=2,
            )
        if self._preemption is not None:
            self._preemption.begin()

    def _save(self, state: Any, event: Event, *, wait: bool) -> None:
        # Always in the same thread, so that only one ever writes to the directory.
        self._writer.submit(
            self._job(state, event), replace=self._how.when_busy == "skip" and not wait
        )
        if wait:
            self._writer.wait()
            self._tell_of_errors()

    def _rescue(self, state: Any, event: Event) -> None:
        """Save a state from another thread than the loop's."""
        if self._saved is None or self._saved[0] != event.step:
            self._writer.submit(self._job(state, event), replace=True)

    def _job(self, state: Any, event: Event) -> Job:
        held = lease(state)
        metadata = {
            "step": event.step,
            "epoch": event.epoch,
            "event": event.kind,
            "metrics": {**scalars(by_member(state, state.metrics)), **self._metrics},
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": [str(word) for word in sys.argv],
        }
        best, computed = self._best_steps(state), _computed(state)

        def run() -> None:
            with _beside(computed):
                self._ways.add(
                    self._directory,
                    event.step,
                    state,
                    metadata=metadata,
                    retention=self._how.retention,
                    best=best,
                    share=self._how.share,
                    compression=self._how.compression,
                )

        return Job(run, held.release)

    def _best_steps(self, state: Any) -> set[int]:
        return {step for name in self._best for step in state.reducers[name].steps.tolist()}

    def _tell_of_errors(self) -> None:
        for error in self._writer.errors():
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._saved = None  # so that it is tried again
        if self._how.on_error == "raise" or not isinstance(error, CheckpointError):
            raise error
        warnings.warn(f"a checkpoint was not saved: {error}", stacklevel=4)


# ── Devices ───────────────────────────────────────────────────────────────────────────────────────


def _computed(state: Any) -> dict[torch.device, Any]:
    """For each CUDA device, an event that comes when the tensors of a state have their values."""
    found: dict[torch.device, Any] = {}
    for leaf in tree_leaves(state):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda and leaf.device not in found:
            found[leaf.device] = torch.cuda.current_stream(leaf.device).record_event()
    return found


@contextmanager
def _beside(computed: dict[torch.device, Any]) -> Iterator[None]:
    """Copy from CUDA devices beside what is being computed there, not after all of it."""
    with ExitStack() as stack:
        for device, event in computed.items():
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_event(event)
            stack.enter_context(torch.cuda.stream(stream))
        yield
