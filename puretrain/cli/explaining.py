"""``puretrain explain``: look into one step of a run, or draw the history of what was seen."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from puretrain.cli.output import printable, write, write_json, write_table
from puretrain.cli.parsing import add_command
from puretrain.cli.training import add_run_options, given_arguments
from puretrain.errors import DataError
from puretrain.explain import draw_explanations, explain, read_explanations
from puretrain.loop import as_batches
from puretrain.replay.program import load_run

__all__ = ["add_commands"]

_EXPLAIN = """\
Take one step of what a Python file describes, and say what went on in it: norms of gradients,
parameters and updates by leaf, dead units, and the first value that is not finite. Nothing is
written, and the new state is thrown away. The file makes a puretrain.Run, as for `puretrain fit`.

Given a file that the observer puretrain.explanations has written (.jsonl), draw it. Drawing needs
puretrain[report].
"""
_EXAMPLES = """\
examples:
  puretrain explain examples/digits.py            the first step
  puretrain explain examples/digits.py --resume   after the newest checkpoint
  puretrain explain runs/digits/explained.jsonl   draws explained.svg beside it

exit status: 0 if all values are finite, 1 if one is not, 2 after an error
"""


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "explain",
        _explain,
        "look into one step of a run",
        _EXPLAIN,
        _EXAMPLES,
        foreign_code=True,
    )
    parser.add_argument("target", metavar="FILE[:NAME]", help="what makes the run, or a history")
    parser.add_argument("--directory", metavar="DIR", help="as for fit")
    add_run_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CKPT",
        help="from this checkpoint, or the newest good one of this or the run's directory",
    )
    parser.add_argument("--output", metavar="FILE", help="the picture of a history (.svg, .png)")


def _explain(options: argparse.Namespace) -> int:
    if options.target.endswith(".jsonl"):
        return _draw(options)
    with contextlib.redirect_stdout(sys.stderr):
        run = load_run(options.target, given_arguments(options))
        if options.resume is not False:
            run = run.resumed(options.resume)
        source = as_batches(run.batches)
        with contextlib.closing(source.read(run.state.cursor)) as reads:
            first = next(reads, None)
        if first is None:
            raise DataError(
                "there is no step to explain: the source gave no batch at the "
                "place in the data that the state is at; give another checkpoint "
                "with --resume CKPT"
            )
        found = explain(run.step, run.state, first.batch)
    if options.json:
        leaves = [{**leaf._asdict(), "ratio": leaf.ratio} for leaf in found.leaves]
        activations = [seen._asdict() for seen in found.activations]
        write_json({**found._asdict(), "leaves": leaves, "activations": activations})
        return 0 if found.nonfinite is None else 1
    for line in found.summary():
        write(printable(line))
    for header, rows in (found.columns(), found.activation_columns()):
        if rows:
            write("")
            write_table(header, rows, right={"parameter", "gradient", "update", "ratio", "rms"})
    return 0 if found.nonfinite is None else 1


def _draw(options: argparse.Namespace) -> int:
    history = Path(options.target)
    path = Path(options.output) if options.output else history.with_suffix(".svg")
    draw_explanations(read_explanations(history), path, title=history.stem)
    if options.json:
        write_json({"picture": path})
    else:
        write(printable(f"picture     {path}"))
    return 0
