"""The command line: ``puretrain fit``, ``inspect``, ``replay`` and the others.

What goes wrong on purpose (a :class:`~puretrain.errors.PuretrainError`) is one line on stderr,
folded in a terminal, and the exit status 2. An exception of somebody else's code keeps its
traceback, from that person's file on, and is 2 as well.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from puretrain import __version__
from puretrain.cli import (
    checkpoints,
    completing,
    conversion,
    explaining,
    replaying,
    starting,
    training,
)
from puretrain.cli.output import note, one_line
from puretrain.cli.parsing import Paragraphs, Parser
from puretrain.errors import PuretrainError

__all__ = ["main"]

_DESCRIPTION = "Train a model as a pure function of one state, and look at the states."
_EPILOG = """\
examples:
  puretrain new spirals                       write a project to begin with
  puretrain fit examples/digits.py            train what the file describes
  puretrain fit examples/digits.py --resume   go on where it stopped
  puretrain lr-find train.py                  look for a learning rate
  puretrain inspect runs/digits               look at its newest checkpoint
  puretrain replay runs/digits                take its steps again and compare
  puretrain explain examples/digits.py        look into one step
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what was typed after ``puretrain``; by default the process's own arguments.

    Returns:
        The exit status, 0 when all is well, 1 when checkpoints or runs differ or one is damaged, 2
        after an error, 130 and 143 when Ctrl-C or SIGTERM ended a run.
    """
    parser = Parser(
        "puretrain",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=Paragraphs,
    )
    parser.add_argument("--version", action="version", version=f"puretrain {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    rooms = (starting, training, checkpoints, conversion, replaying, explaining)
    for room in rooms:
        room.add_commands(commands)
    completing.add_commands(commands, parser)
    given = sys.argv[1:] if arguments is None else [*arguments]
    options, unknown = parser.parse_known_args(
        given or ["--help"], argparse.Namespace(arguments=given)
    )
    if unknown:  # the command says so, not the parser of them all: its help is what is needed
        options.parser.error(f"unknown arguments: {' '.join(unknown)}")
    try:
        return int(options.run(options))
    except PuretrainError as error:
        if options.debug:
            traceback.print_exc()
        hint = " (--debug shows where)" if options.foreign_code and not options.debug else ""
        note(f"error: {one_line(error)}{hint}")
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except Exception as error:  # noqa: BLE001  # nothing is hidden: it is the end of the program
        # Python's exit status would be 1, which says something else here.
        traceback.print_exception(error if options.debug else _from_the_file(error, options))
    return 2


def _from_the_file(error: Exception, options: argparse.Namespace) -> Exception:
    """The exception without the calls that lead to the user's file, if it comes from there."""
    target = getattr(options, "target", "")  # FILE or FILE:NAME
    files = {str(Path(target)), str(Path(target.rpartition(":")[0]))}
    calls: TracebackType | None = error.__traceback__
    while calls is not None and calls.tb_frame.f_code.co_filename not in files:
        calls = calls.tb_next
    if calls is None and not (isinstance(error, SyntaxError) and error.filename in files):
        return error
    return error.with_traceback(calls)
