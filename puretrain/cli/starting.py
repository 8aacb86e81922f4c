"""``puretrain new``: a small project to begin with."""

from __future__ import annotations

import argparse
import importlib.resources
import os
import re
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from puretrain.cli.output import printable, write, write_json, write_parts
from puretrain.cli.parsing import add_command
from puretrain.errors import ConfigurationError
from puretrain.run import command_line

__all__ = ["add_commands"]

_NEW = """\
Write a small, complete project with tests: a file that makes a puretrain.Run for `puretrain fit`,
or, with --style lightning, a Lightning module with a data module and a program. The data are made
by its code. No file that is there already is touched.
"""
_EXAMPLES = """\
examples:
  puretrain new spirals
  puretrain new spirals --style lightning
"""
_STYLES = ("native", "lightning")
_SUFFIX = ".template"  # so that no tool takes the project in the package for a part of the package


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "new", _new, "write a project to begin with", _NEW, _EXAMPLES)
    parser.add_argument("directory", metavar="DIR", help="where; it is made if it is not there")
    parser.add_argument(
        "--style", choices=_STYLES, default="native", help="default: native, a puretrain.Run"
    )


def _new(options: argparse.Namespace) -> int:
    directory = Path(options.directory)
    name = re.sub(r"[^a-z0-9]+", "-", directory.resolve().name.lower()).strip("-") or "project"
    files = {place: text.replace("$name", name) for place, text in _template(options.style)}
    try:
        _write(directory, files)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename or directory} can't be written: {error.strerror}; "
            "give another directory"
        ) from error
    if options.json:
        write_json({"directory": directory, "style": options.style, "files": list(files)})
        return 0
    write_parts([printable(f"made        {directory}:"), *files], " ")
    inside = os.path.abspath(directory)
    if inside != os.getcwd():
        write(printable(f"go there    {command_line('cd', directory)}"))
    train = ("puretrain", "fit") if options.style == "native" else ("python",)
    write(f"train       {command_line(*train, 'train.py', directory=inside)}")
    write(f"test        {command_line('python', '-m', 'pytest', directory=inside)}")
    return 0


def _write(directory: Path, files: dict[str, str]) -> None:
    there = [place for place in files if os.path.lexists(directory / place)]
    if there:
        raise ConfigurationError(
            f"{directory} has {', '.join(there)} already, and nothing is overwritten: give "
            "another directory"
        )
    for place, text in files.items():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)


def _template(style: str) -> list[tuple[str, str]]:
    """The files of a project, by their places in it."""
    root = importlib.resources.files("puretrain.cli") / "templates" / style
    return sorted(_files(root, ""))


def _files(folder: Traversable, place: str) -> Iterator[tuple[str, str]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _files(each, f"{place}{each.name}/")
        elif each.name.endswith(_SUFFIX):
            name = each.name.removesuffix(_SUFFIX)
            name = ".gitignore" if name == "gitignore" else name
            yield place + name, each.read_text(encoding="utf-8")
