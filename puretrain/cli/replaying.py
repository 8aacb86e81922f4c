"""``puretrain replay``, ``bisect`` and ``report``: what can be done with the journal of a run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puretrain.cli.checkpoints import write_differences
from puretrain.cli.output import note, printable, write, write_json, write_table
from puretrain.cli.parsing import add_command
from puretrain.cli.training import given_arguments
from puretrain.replay import ChangedLeaf, FactDifference, Recorded, bisect, open_run, write_report
from puretrain.replay.program import load_run, split_target
from puretrain.run import Run
from puretrain.sharding import distribute, processes
from puretrain.sharding.launch import is_worker, launch, telling_launcher
from puretrain.tree import LeafDifference

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["add_commands"]

_REPLAY = """\
Take steps of a run again, from the nearest checkpoint at or before step N, and compare each with
the run's journal: the batch, the metrics, and the digests of the state. Nothing is written: the
observers are left out. The number of threads and the deterministic flags are those of the run,
unless --own-settings. A run with --logical-shards is taken again in one process, with the same
bits; any other run of several processes in as many.
"""
_REPLAY_EXAMPLES = """\
examples:
  puretrain replay runs/digits
  puretrain replay runs/digits --from 200 --to 300
  puretrain replay runs/digits --file examples/digits.py --set batch_size=50

exit status: 0 if all steps are identical, 1 if one differs, 2 after an error
"""
_BISECT = """\
Find the first step at which two runs part, then the leaf, and say what parted first: the batch, the
key, the parameters, the buffers or the optimizer's state. Where the journals leave a gap, both runs
are replayed from a common checkpoint, in this process: not if one of them is a run of several
processes without --logical-shards.
"""
_BISECT_EXAMPLES = """\
example:
  puretrain bisect runs/a runs/b

exit status: 0 if they are the same as far as both go, 1 if they part, 2 after an error
"""
_REPORT = """\
Write a page about a run: curves, learning rate, checkpoints, restarts, environment. It is one HTML
file that needs nothing else, in light and dark. Drawing needs puretrain[report].
"""
_REPORT_EXAMPLES = """\
examples:
  puretrain report runs/digits                    writes runs/digits/report.html
  puretrain report runs/digits --output page.html
"""
_SHOWN = 12  # leaves in a table, without --all


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    replay = add_command(
        commands,
        "replay",
        _replay,
        "take steps of a run again",
        _REPLAY,
        _REPLAY_EXAMPLES,
        foreign_code=True,
    )
    replay.add_argument("place", metavar="RUN", help="the directory of the run")
    replay.add_argument(
        "--from", type=int, default=0, dest="begin", metavar="N", help="begin after step N"
    )
    replay.add_argument("--to", type=int, dest="end", metavar="M", help="end after step M")
    replay.add_argument("--file", metavar="FILE[:NAME]", help="what makes the run, as for fit")
    replay.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument for the function; may be repeated",
    )
    replay.add_argument(
        "--own-settings",
        action="store_true",
        help="compute with the threads and flags of this process, not those of the run",
    )
    part = add_command(
        commands,
        "bisect",
        _bisect,
        "find where two runs part",
        _BISECT,
        _BISECT_EXAMPLES,
        foreign_code=True,
    )
    part.add_argument("a", metavar="RUN_A", help="the directory of a run")
    part.add_argument("b", metavar="RUN_B", help="of another")
    part.add_argument("--file-a", metavar="FILE[:NAME]", help="what makes RUN_A")
    part.add_argument("--file-b", metavar="FILE[:NAME]", help="what makes RUN_B")
    for parser in (replay, part):
        parser.add_argument("--all", action="store_true", help="show every leaf that differs")
    report = add_command(
        commands, "report", _report, "write a page about a run", _REPORT, _REPORT_EXAMPLES
    )
    report.add_argument("place", metavar="RUN", help="the directory of the run")
    report.add_argument("--output", metavar="FILE", help="the page; by default RUN/report.html")


def _open(
    directory: str, file: str | None, given: dict[str, Any], mesh: DeviceMesh | None = None
) -> Recorded:
    if file is not None:
        split_target(file)  # says at once if it is not there
        recorded = open_run(directory, functools.partial(_made, file, given, mesh))
    else:
        recorded = open_run(directory, None, **given)
        program = recorded.journal.segments[-1].program
        if mesh is not None and program is not None and "mesh" in program.left_out:
            recorded = open_run(directory, None, mesh=mesh, **given)
    division = recorded.division(recorded.last)
    if mesh is None or not division:
        return recorded
    return recorded._replace(make=functools.partial(_divided, recorded, mesh, division))


def _made(file: str, given: dict[str, Any], mesh: DeviceMesh | None, **more: Any) -> Run:
    return load_run(file, {**given, **more}, {} if mesh is None else {"mesh": mesh})


def _divided(recorded: Recorded, mesh: DeviceMesh, division: Mapping[str, Any], **more: Any) -> Run:
    run = recorded.make(**more)
    if run.together is not None:
        return run
    return distribute(run, mesh, logical_shards=division.get("logical_shards"))


@contextlib.contextmanager
def _printing_to_stderr(mesh: DeviceMesh | None) -> Iterator[None]:
    """The user's file may print; on stdout there is only the result. One process prints."""
    if mesh is None or mesh.get_rank() == 0:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ── replay ────────────────────────────────────────────────────────────────────────────────────────


def _replay(options: argparse.Namespace) -> int:
    if is_worker():
        with telling_launcher(), processes() as mesh, telling_launcher():
            return _replay_here(options, mesh)
    read = open_run(options.place)
    division = read.division(read.last if options.end is None else options.end)
    if not division:
        return _replay_here(options, None)
    count = division["processes"]
    if count > 1 and "logical_shards" not in division:
        note(f"starting {count} processes, as the run had")
        command = ["-m", "puretrain", *options.arguments]
        return launch(command, nproc=count, debug=options.debug, answers=(1,))
    with processes() as mesh:
        return _replay_here(options, mesh)


def _replay_here(options: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    first = mesh is None or mesh.get_rank() == 0
    with _printing_to_stderr(mesh):
        recorded = _open(options.place, options.file, given_arguments(options), mesh)
        if first:
            _note_damage(recorded)
        found = recorded.replay(
            options.begin, options.end, recorded_settings=not options.own_settings
        )
    if not first:
        return 0
    difference = found.difference
    if options.json:
        write_json(_plain(found))
        return 1 if difference else 0
    place = "the start of the run" if found.checkpoint is None else str(found.checkpoint.path)
    write(printable(f"from        step {found.begin}, {place}"))
    write(f"to          step {found.end}")
    steps = f"{found.compared} {'step' if found.compared == 1 else 'steps'}"
    write(f"identical   for {steps}, the whole state at {found.states} of them")
    if difference is not None:
        if difference.step == 0:
            write("DIFFERS     the run begins with another state")
        else:
            write(
                f"DIFFERS     at step {difference.step}; "
                f"the whole state was last the same at step {difference.since}"
            )
        if difference.batch:
            write("batch       is another one")
        for name, then, now in difference.metrics:
            write(printable(f"metric      {name}: {then!r} recorded, {now!r} now"))
        _write_changed(difference.leaves, options.all)
        if difference.stored is not None:
            stored = difference.stored.checkpoint
            write("")
            write(printable(f"against the checkpoint of step {stored.step}, {stored.path}:"))
            _write_leaves(difference.stored.leaves, options.all)
    _write_facts(found.facts, "recorded", "now")
    return 1 if difference else 0


def _note_damage(recorded: Recorded) -> None:
    for damage in recorded.journal.damage:
        if damage.tail:
            what = "an unfinished record at the end"
        else:
            what = f"{damage.length} damaged bytes at byte {damage.offset}"
        note(f"{recorded.journal.path} has {what}, left out")


# ── bisect ────────────────────────────────────────────────────────────────────────────────────────


def _bisect(options: argparse.Namespace) -> int:
    read = [open_run(directory) for directory in (options.a, options.b)]
    if not any(recorded.division(recorded.last) for recorded in read):
        return _bisect_here(options, None)
    with processes() as mesh:
        return _bisect_here(options, mesh)


def _bisect_here(options: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    with _printing_to_stderr(mesh):
        a, b = (
            _open(directory, file, {}, mesh)
            for directory, file in ((options.a, options.file_a), (options.b, options.file_b))
        )
        for recorded in (a, b):
            _note_damage(recorded)
        found = bisect(a, b)
    if options.json:
        write_json(_plain(found))
        return 0 if found.step is None else 1
    if found.step is None:
        write(f"identical   for the {found.common} steps that both have")
    elif found.step == 0:
        write("PARTED      from the beginning: the first states differ")
    elif found.exact:
        write(f"PARTED      at step {found.step}; after step {found.since} they were the same")
    else:
        write(f"PARTED      between steps {found.since + 1} and {found.step}")
    if found.step is not None:
        write(f"first       {found.what}")
        if found.leaves:
            _write_leaves(found.leaves, options.all)
        else:
            _write_changed(found.changed, options.all)
    for remark in found.notes:
        write(printable(f"note        {remark}"))
    _write_facts(found.facts, "A", "B")
    return 0 if found.step is None else 1


# ── Output ────────────────────────────────────────────────────────────────────────────────────────


def _write_changed(leaves: Sequence[ChangedLeaf], everything: bool) -> None:
    if not leaves:
        return
    write(printable(f"first leaf  {leaves[0].path}"))
    shown = leaves if everything else leaves[:_SHOWN]
    write("")
    write_table(
        ["path", "leaf"],
        [
            (leaf.path, leaf.now if leaf.now == leaf.recorded else f"{leaf.recorded} -> {leaf.now}")
            for leaf in shown
        ],
    )
    _write_more(len(leaves) - len(shown))


def _write_leaves(leaves: Sequence[LeafDifference], everything: bool) -> None:
    if not leaves:
        write("no leaf differs there")
        return
    shown = leaves if everything else leaves[:_SHOWN]
    write("")
    write_differences(shown)
    _write_more(len(leaves) - len(shown))


def _write_more(count: int) -> None:
    if count:
        write(f"and {count} more (--all shows them)")


def _write_facts(facts: Iterable[FactDifference], then: str, now: str) -> None:
    rows = [(fact.name, _shown(fact.recorded), _shown(fact.now)) for fact in facts]
    if rows:
        write("\nfacts that differ:")
        write_table(["fact", then, now], rows)


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _plain(value: Any) -> Any:
    """Named tuples and records as dicts, for JSON."""
    if isinstance(value, LeafDifference):
        return {name: getattr(value, name) for name in value._names}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# ── report ────────────────────────────────────────────────────────────────────────────────────────


def _report(options: argparse.Namespace) -> int:
    recorded = open_run(options.place)
    _note_damage(recorded)
    path = Path(options.output or recorded.directory / "report.html")
    write_report(recorded, path)
    if options.json:
        write_json({"report": path})
    else:
        write(printable(f"report      {path}"))
    return 0
