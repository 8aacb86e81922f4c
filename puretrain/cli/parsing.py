"""A command with its examples, made in one way for all."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from puretrain.cli.output import note

__all__ = ["Paragraphs", "Parser", "add_command"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, and where to read more."""

    def error(self, message: str) -> NoReturn:
        """End the program with the message and the exit status 2."""
        note(f"error: {message} (see {self.prog} --help)")
        self.exit(2)


class Paragraphs(argparse.HelpFormatter):
    """Wraps paragraphs at the width of the terminal, and leaves indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for kept, group in itertools.groupby(
            text.strip().splitlines(), lambda line: not line or line.startswith(" ")
        ):
            block = list(group)
            lines += block if kept else textwrap.wrap(" ".join(block), width)
        return "\n".join(indent + line for line in lines)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    examples: str,
    *,
    foreign_code: bool = False,
    json: str | None = "print JSON",
) -> argparse.ArgumentParser:
    """Add a command to the parser.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned.
        name: what is typed after ``puretrain``.
        run: what does it: options to the exit status.
        summary: one line for the list of commands.
        description: what it does, in paragraphs.
        examples: ``examples:`` and some of them, indented, and what the exit status says.
        foreign_code: whether it runs a file of the user, where an error may come from.
        json: what ``--json`` does; None: the command has no such option.

    Returns:
        The parser of the command, for its arguments.
    """
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=Paragraphs,
    )
    parser.set_defaults(run=run, parser=parser, foreign_code=foreign_code)
    printing = parser.add_argument_group("printing")  # a group of its own stands at the end
    if json is not None:
        printing.add_argument("--json", action="store_true", help=json)
    printing.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
