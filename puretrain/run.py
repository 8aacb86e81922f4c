"""A run as a value: what is trained on what, for how long, watched by whom, and kept where."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from puretrain.checkpoint import latest, load
from puretrain.checkpoint.places import file_name, is_url, plain, shown
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.loop import Event, Observer, Reducer, Validation, fit, prepare
from puretrain.state import TrainState
from puretrain.step import Step

__all__ = ["Run", "Together", "command_line", "new_directory"]

T = TypeVar("T")


class Together(NamedTuple):
    """What the processes of a run must do as one; see :func:`puretrain.sharding.distribute`."""

    agree: Callable[[int], int]
    """After which step to end: ``agree`` of :func:`puretrain.fit`."""
    decide: Callable[[Callable[[], Any]], Any]
    """Calls a function in the first process only. All return what it returned there, a plain
    value, or raise what it raised."""


class Run(NamedTuple):
    """The arguments of :func:`puretrain.fit` as one value, and the directory that keeps the run.

    A Python file that makes one is what ``puretrain fit FILE`` runs. Change a field with
    ``run.replace(epochs=20)``.

    Example:
        >>> import torch, puretrain as pt
        >>> def make() -> Run:
        ...     optimizer = pt.optim.sgd(lr=0.5)
        ...     return Run(
        ...         state=pt.TrainState.create({"w": torch.zeros(4)}, None, optimizer,
        ...                                    key=pt.random.key(0)),
        ...         step=pt.train_step(lambda p, b, x, key: ((x - p["w"]) ** 2).sum(), optimizer),
        ...         batches=pt.batches(torch.ones(8, 4), batch_size=1),
        ...         epochs=1)
        >>> make().fit().params["w"]
        tensor([1., 1., 1., 1.])
        >>> make().replace(epochs=2).fit().step
        tensor(16)
    """

    state: TrainState
    """Where the run begins."""
    step: Step
    """``step(state, batch) -> state``, made by :func:`puretrain.train_step`."""
    batches: Any
    """The data, made by :func:`puretrain.batches`, or an iterable of ready batches."""
    epochs: int | None = None
    """End after so many epochs, counted from the beginning of the run."""
    steps: int | None = None
    """End after so many steps, counted from the beginning of the run."""
    reducers: Sequence[Reducer | Callable[[Any, Event], Any]] = ()
    """Pure callbacks."""
    observers: Sequence[Observer] = ()
    """Callbacks with effects. One that writes checkpoints writes them to ``directory``."""
    validation: Validation | None = None
    """What to validate on, and when."""
    directory: str | os.PathLike[str] | None = None
    """Where the checkpoints of the run are, a path or a URL; needed to resume it."""
    together: Together | None = None
    """What the processes of the run do as one. It is in the run, since :meth:`fit` ends by it, and
    :meth:`resumed` must find the same checkpoint in all. None: there is one process."""

    def replace(self, **changes: Any) -> Run:
        """The same run with some fields changed.

        Raises:
            ConfigurationError: a name in ``changes`` is no field.
        """
        unknown = changes.keys() - set(self._fields)
        if unknown:
            raise ConfigurationError(
                f"a Run has no field {', '.join(sorted(unknown))}; it has {', '.join(self._fields)}"
            )
        return self._replace(**changes)

    def fit(self, resume: bool | str | os.PathLike[str] = False) -> TrainState:
        """Train to the end, from the beginning or from a checkpoint.

        Args:
            resume: False begins anew. True goes on from the newest good checkpoint in the run's
                directory, or begins if there is none. A path goes on from that checkpoint, or from
                the newest good one in that directory, and it is an error if there is none.

        Returns:
            The last state.

        Raises:
            CheckpointError: the checkpoint asked for is damaged, is missing, or does not fit.
            ConfigurationError: the run is to begin in a directory that has checkpoints already;
                a later resume could not tell the two runs apart.
            Interrupted: Ctrl-C or SIGTERM came; see :func:`puretrain.fit`.
        """
        run = self.resumed(resume)
        return fit(
            run.state,
            run.step,
            run.batches,
            epochs=run.epochs,
            steps=run.steps,
            reducers=run.reducers,
            observers=run.observers,
            validation=run.validation,
            agree=None if run.together is None else run.together.agree,
        )

    def resumed(self, resume: bool | str | os.PathLike[str] = True) -> Run:
        """The same run with the state of a checkpoint; arguments and errors as for :meth:`fit`."""
        path = self._decide(lambda: self._found(resume))
        return self if path is None else self._from(path)

    def _decide(self, function: Callable[[], T]) -> T:
        if self.together is None:
            return function()
        decided: T = self.together.decide(function)
        return decided

    def _found(self, resume: bool | str | os.PathLike[str]) -> str | None:
        """The checkpoint to go on from, if there is one."""
        if not isinstance(resume, bool):
            return os.fspath(_existing(resume))
        if self.directory is None:
            if resume:
                raise ConfigurationError(
                    "the run has no directory to look for checkpoints in: give Run(directory=…), "
                    "or the path of a checkpoint to resume from"
                )
            return None
        path = latest(self.directory)
        if path is not None and not resume:
            raise ConfigurationError(
                f"{shown(self.directory)} has the checkpoints of an earlier run (the newest is "
                f"{file_name(path)}): resume it with fit(resume=True), or begin in "
                "another with Run(directory=…)"
            )
        return None if path is None else os.fspath(path)

    def _from(self, path: Path | str) -> Run:
        return self._replace(state=load(path, like=prepare(self.state, self.reducers)))


def _existing(path: str | os.PathLike[str]) -> Path | str:
    is_file = file_name(path).endswith(".ckpt") if is_url(path) else not Path(plain(path)).is_dir()
    if is_file:
        return plain(path)
    found = latest(path)
    if found is None:
        raise CheckpointError(
            f"{shown(path)} is a directory without a good checkpoint; name a file"
        )
    return found


def new_directory(path: str | os.PathLike[str]) -> Path:
    """The path itself if nothing is there yet, or else the first of ``path-2``, ``path-3``, ….

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = Path(place, "digits").mkdir()
    ...     _ = Path(place, "digits", "log").write_text("…")
    ...     new_directory(f"{place}/digits").name, new_directory(f"{place}/other").name
    ('digits-2', 'other')
    """
    path, number = Path(path), 1
    candidate = path
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def command_line(
    program: str, *arguments: str | os.PathLike[str], directory: str | os.PathLike[str] = "."
) -> str:
    """What to type in a shell, here and now, to run a program of this Python environment.

    The program goes by its name where the shell finds the one of this environment, and otherwise by
    its path, so that the advice that a run prints at its end works as it stands.

    Args:
        program: ``"python"``, ``"puretrain"``, ``"tensorboard"``, ….
        *arguments: its arguments, not yet quoted.
        directory: where it will be typed, if not here.

    >>> command_line("python", "a file.py", "--resume").endswith("python 'a file.py' --resume")
    True
    """
    folder = os.path.dirname(os.path.abspath(sys.executable))
    found = shutil.which(program)
    if found is None or os.path.dirname(os.path.abspath(found)) != folder:
        beside = shutil.which(program, path=folder)
        if beside is not None:
            near = os.path.relpath(beside, directory)
            program = os.path.abspath(beside) if near.startswith(os.pardir) else near
    return shlex.join([program, *(os.fspath(argument) for argument in arguments)])
