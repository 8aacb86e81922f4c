"""``puretrain fit`` and ``lr-find``: run what a Python file describes, or try learning rates."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from puretrain.checkpoint import Found, find_checkpoint, load, save
from puretrain.checkpoint.places import file_name, is_url, shown
from puretrain.cli.checkpoints import note_damaged
from puretrain.cli.output import (
    format_number,
    note,
    write,
    write_json,
    write_parts,
)
from puretrain.cli.parsing import add_command
from puretrain.errors import ConfigurationError
from puretrain.loop import Event, Interrupted
from puretrain.metrics import compute_all
from puretrain.replay.program import load_run, split_target
from puretrain.run import Run, command_line
from puretrain.sharding import distribute, processes
from puretrain.sharding.launch import is_worker, launch, telling_launcher
from puretrain.state import TrainState
from puretrain.tree import tree_digest
from puretrain.tuning import lr_find

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["add_commands"]

T = TypeVar("T")

_TIMEOUT = 600.0
_PROCESS_OPTIONS = {
    "nproc": None,
    "logical_shards": None,
    "nnodes": "1",
    "rdzv_endpoint": None,
    "rdzv_id": None,
    "max_restarts": 0,
    "timeout": _TIMEOUT,
}

_FIT = """\
Train what a Python file describes. The file makes a puretrain.Run: either a variable that is one,
or a function that returns one and can be called without arguments. `FILE:NAME` says which; without
a name it is `run`, or else the file's only variable that is a Run.

An option that the function has a parameter for (--directory, --seed, --epochs, --steps, and any
with --set) is passed to it. --epochs and --steps replace the run's own otherwise.
"""
_FIT_EXAMPLES = """\
examples:
  puretrain fit examples/digits.py
  puretrain fit examples/digits.py --directory runs/slow --set lr=1e-4
  puretrain fit examples/digits.py --directory runs/slow --set lr=1e-4 --resume
  puretrain fit train.py --nproc 4
  puretrain fit train.py --nproc 4 --logical-shards 8 --resume --max-restarts 3

exit status: 0 at the end of the run, 2 after an error, 130 after Ctrl-C and 143 after SIGTERM; the
state is saved then, and --resume goes on from it.
"""

_LR_FIND = """\
Train what a Python file describes for a little while, with a learning rate that grows from update
to update, and draw the loss over it. Where the loss falls most steeply is a good learning rate.
Nothing is written, and the run is left as it is. The file makes a puretrain.Run as for
`puretrain fit`; its optimizer is made with puretrain.optim.inject_hyperparams, so that the learning
rate is a part of the state.
"""
_LR_FIND_EXAMPLES = """\
examples:
  puretrain lr-find train.py
  puretrain lr-find train.py:run --set batch_size=64 --min 1e-5 --max 10
"""


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    parser = add_command(
        commands,
        "fit",
        _fit,
        "train what a Python file describes",
        _FIT,
        _FIT_EXAMPLES,
        foreign_code=True,
        json="print the result as JSON",
    )
    parser.add_argument("target", metavar="FILE[:NAME]", help="the Python file, and what in it")
    parser.add_argument("--epochs", type=int, metavar="N", help="end after N epochs in all")
    parser.add_argument("--steps", type=int, metavar="N", help="end after N steps in all")
    parser.add_argument("--directory", metavar="DIR", help="keep logs and checkpoints there")
    add_run_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CKPT",
        help="go on from this checkpoint, or the newest good one of this or the run's directory",
    )
    _add_process_options(parser)
    _add_lr_find(commands)


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes", "as of torchrun, which may start `-m puretrain fit` as well"
    )
    group.add_argument("--nproc", type=int, metavar="N", help="processes on this host")
    group.add_argument(
        "--logical-shards",
        type=int,
        metavar="L",
        help="divide batches into L parts, for the same bits with any N that divides L",
    )
    group.add_argument(
        "--nnodes", default="1", metavar="MIN[:MAX]", help="hosts, each with this command"
    )
    group.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help="where the hosts meet: one of them"
    )
    group.add_argument("--rdzv-id", metavar="ID", help="the name of the run there")
    group.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="R",
        help="start all again up to R times when one has failed; with --resume",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT,
        metavar="SECONDS",
        help="end when a process has let the others wait for so long; default: 600",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what a function that makes a run may be given: ``--seed`` and ``--set``."""
    parser.add_argument("--seed", type=int, metavar="N", help="the seed of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="pass an argument to the function; may be repeated",
    )


def _add_lr_find(commands: Any) -> None:
    parser = add_command(
        commands,
        "lr-find",
        _lr_find,
        "look for a learning rate",
        _LR_FIND,
        _LR_FIND_EXAMPLES,
        foreign_code=True,
        json="print the points as JSON",
    )
    parser.add_argument("target", metavar="FILE[:NAME]", help="the Python file, and what in it")
    parser.add_argument("--min", type=float, default=1e-6, metavar="LR", help="default: 1e-6")
    parser.add_argument("--max", type=float, default=1.0, metavar="LR", help="default: 1")
    parser.add_argument(
        "--updates", type=int, default=100, metavar="N", help="learning rates to try; default: 100"
    )
    parser.add_argument("--linear", action="store_true", help="equal steps instead of factors")
    parser.add_argument(
        "--hyperparameter", default="lr", help="its name; default: lr", metavar="NAME"
    )
    add_run_options(parser)


def _lr_find(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        run = _load_run(options)
        test = lr_find(
            run.state,
            run.step,
            run.batches,
            min_lr=options.min,
            max_lr=options.max,
            updates=options.updates,
            mode="linear" if options.linear else "exponential",
            hyperparameter=options.hyperparameter,
        )
    suggestion = test.suggestion()
    if options.json:
        points = {"lr": test.lr, "loss": test.loss, "raw": test.raw}
        write_json({"suggestion": suggestion, "diverged": test.diverged, **points})
        return 0
    write(test.chart())
    ended = "diverged" if test.diverged else "went on to the end"
    write(f"loss over learning rate, smoothed: {len(test.lr)} updates, {ended}")
    if suggestion is None:
        write("suggestion  none: too few finite losses; give a lower --min, or more --updates")
    else:
        write(
            f"suggestion  {options.hyperparameter} {format_number(suggestion)}, "
            "where the loss falls fastest"
        )
    return 0


def _fit(options: argparse.Namespace) -> int:
    if is_worker():
        # Twice: what fails here is told before the others hear of it, by a closed connection, and
        # fail as well; and joining them can fail too.
        with telling_launcher(), processes(timeout=options.timeout) as mesh, telling_launcher():
            return _train(options, mesh)
    if options.max_restarts and options.resume is not True:
        raise ConfigurationError(
            "--max-restarts needs --resume (without a file): when the processes are started again, "
            "they go on from the newest checkpoint of the run's directory"
        )
    split_target(options.target)  # says at once if it is not there
    nproc = 1 if options.nproc is None else options.nproc
    if nproc != 1 or options.nnodes != "1" or options.max_restarts:
        return launch(
            ["-m", "puretrain", *options.arguments],
            nproc=nproc,
            nnodes=options.nnodes,
            rdzv_endpoint=options.rdzv_endpoint,
            rdzv_id=options.rdzv_id,
            max_restarts=options.max_restarts,
            patience=options.timeout + 30,
            debug=options.debug,
        )
    if options.nproc is None and options.logical_shards is None:
        return _train(options, None)
    if options.logical_shards is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as several processes would have it: the bits depend on it
    with processes(timeout=options.timeout) as mesh:
        return _train(options, mesh)


def _train(options: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    with _output(options, mesh):
        run = _load_run(options, mesh)
        last: dict[str, Any] = {}
        seen: set[str] = set()

        def remember(state: Any, event: Event) -> None:
            seen.add(event.kind)
            if event.kind in ("validation", "epoch_end"):
                last.update(event.metrics)

        run = run.replace(observers=(*run.observers, remember))
        if mesh is not None:
            run = distribute(run, mesh, logical_shards=options.logical_shards)
        resume = _decide(run, lambda: _resume_from(run, options.resume))
        try:
            state, signal_number = run.fit(resume), 0
        except Interrupted as interrupted:
            state, signal_number = interrupted.state, interrupted.signal_number

    def ending() -> None:
        """What one process does at the end, while the others wait for it."""
        result = {
            "interrupted": signal.Signals(signal_number).name if signal_number else None,
            "step": int(state.step),
            "epoch": int(state.cursor.epoch),
            "metrics": {
                name: value.tolist()
                for name, value in {**compute_all(state.metrics), **last}.items()
            },
            "digest": tree_digest(state),
            "checkpoint": _newest_or_saved(run, state, save_it=signal_number != 0),
            "resume": _resume_command(options, further=signal_number == 0),
        }
        if signal_number:
            _report_interrupt(signal_number, result)
        elif "step" not in seen:
            note("no step was left to take: the run was at its end already")
        if options.json:
            write_json(result)
        elif not signal_number:
            _report(result)

    _decide(run, ending)
    return 128 + signal_number if signal_number else 0


def _decide(run: Run, function: Callable[[], T]) -> T:
    """Call a function; of several processes only the first one does, for all."""
    if run.together is None:
        return function()
    decided: T = run.together.decide(function)
    return decided


@contextlib.contextmanager
def _output(options: argparse.Namespace, mesh: DeviceMesh | None) -> Iterator[None]:
    """Where the user's file and the observers print to: of several processes only one does.

    With --json only the result goes to stdout.
    """
    if mesh is not None and mesh.get_rank():
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    elif options.json:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    else:
        yield


def _newest_or_saved(run: Run, state: TrainState, *, save_it: bool) -> str | None:
    """The newest checkpoint of the run; after an interrupt one of the very last state."""
    if run.directory is None:
        return None
    newest = find_checkpoint(run.directory).path
    if save_it and (newest is None or int(load(newest, only="step")["step"]) != int(state.step)):
        # The run has no observer that saves on an interrupt.
        newest = Path(run.directory) / f"step_{int(state.step):08}.ckpt"
        save(newest, state)
    return None if newest is None else str(newest)


def _report(result: Mapping[str, Any]) -> None:
    metrics = [
        f"{name} {format_number(value)}"
        for name, value in result["metrics"].items()
        if not isinstance(value, list)  # a confusion matrix, or a member each of an ensemble
    ]
    write_parts([f"step {result['step']}, epoch {result['epoch']}:", *metrics])
    write(f"state       {result['digest']}")
    if result["checkpoint"] is None:
        write("checkpoint  none: the run has no observer that writes one to its directory")
        return
    write(f"checkpoint  {result['checkpoint']}")
    write(f"inspect     {command_line('puretrain', 'inspect', result['checkpoint'])}")
    write(f"go on       {result['resume']}")


def _report_interrupt(signal_number: int, result: Mapping[str, Any]) -> None:
    name = "Ctrl-C" if signal_number == signal.SIGINT else "SIGTERM"
    ending = f"{name} after step {result['step']}"
    if result["checkpoint"] is None:
        note(f"{ending}; not saved, as the run has no directory (give --directory DIR)")
    else:
        note(f"{ending}; saved in {result['checkpoint']}; go on with: {result['resume']}")


def _resume_command(options: argparse.Namespace, *, further: bool) -> str:
    """The command that goes on with this run; with ``further`` beyond where it was to end."""
    words = ["fit", options.target]
    for option in ("directory", "seed", "epochs", "steps"):
        value = getattr(options, option)
        if value is not None and not (further and option in ("epochs", "steps")):
            words += [f"--{option}", str(value)]
    words += [word for assignment in options.set for word in ("--set", assignment)]
    for option, default in _PROCESS_OPTIONS.items():
        value = getattr(options, option)
        if value != default:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return command_line("puretrain", *words, "--resume") + (" --epochs N" if further else "")


# ── The file ──────────────────────────────────────────────────────────────────────────────────────


def _load_run(options: argparse.Namespace, mesh: DeviceMesh | None = None) -> Run:
    offered = {} if mesh is None else {"mesh": mesh}
    return load_run(options.target, given_arguments(options), offered)


def given_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of the command line set about a run, by name."""
    given: dict[str, Any] = dict(map(_split_assignment, options.set))
    for option in ("directory", "seed", "epochs", "steps"):
        if getattr(options, option, None) is not None:
            given[option] = getattr(options, option)
    return given


def _split_assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigurationError(f"--set takes NAME=VALUE, not {text!r}")
    return name, value


# ── Resuming ──────────────────────────────────────────────────────────────────────────────────────


def _resume_from(run: Run, resume: bool | str) -> Path | str | bool:
    """What to resume from; says so, on stderr."""
    if resume is False:
        if run.directory is not None and (found := find_checkpoint(run.directory)).path is not None:
            raise ConfigurationError(
                f"{shown(run.directory)} has the checkpoints of an earlier run (the newest is "
                f"{file_name(found.path)}): go on with --resume, or begin elsewhere with "
                "--directory DIR"
            )
        return False
    place = run.directory if resume is True else resume
    if place is None:
        raise ConfigurationError(
            "the run has no directory to look for checkpoints in: give --directory DIR or "
            "--resume CKPT"
        )
    found = (
        Found(Path(place), ())
        if not is_url(place) and os.path.isfile(place)
        else find_checkpoint(place)
    )
    note_damaged(found)
    if found.path is not None:
        note(f"resuming from {shown(found.path)}")
        return found.path
    if resume is True:
        note(f"no good checkpoint in {os.fspath(place)}: beginning anew")
        return False
    raise ConfigurationError(
        f"--resume {resume}: no such file, nor a good checkpoint in there; "
        "give a checkpoint (*.ckpt) or the directory of a run"
    )
