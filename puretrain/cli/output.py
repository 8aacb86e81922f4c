"""What the commands print: tables, sizes, numbers, JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import IO, Any

from puretrain.observers.progress import folded

__all__ = [
    "format_bytes",
    "format_number",
    "note",
    "one_line",
    "printable",
    "write",
    "write_json",
    "write_parts",
    "write_table",
]


def write(text: str) -> None:
    """Print a line to stdout; end quietly when its reader has left, as with ``| head``."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would try to flush stdout once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def write_parts(parts: Sequence[str], separator: str = "  ") -> None:
    """Print parts on a line; in a terminal on as many as they need there, never cut in a part."""
    write(folded(parts, _width(sys.stdout), separator))


def note(text: str) -> None:
    """Print a line to stderr, in the name of the program; a terminal gets it folded at words."""
    words = printable(f"puretrain: {text}").split(" ")
    print(folded(words, _width(sys.stderr), " "), file=sys.stderr, flush=True)


def _width(stream: IO[str]) -> int:
    """The columns of the terminal; there is no end to those of a file or a pipe."""
    return shutil.get_terminal_size().columns if stream.isatty() else sys.maxsize


def write_json(value: Any) -> None:
    """Print a value as strict JSON; NaN and infinities, which JSON lacks, become strings."""
    write(json.dumps(_jsonable(value), indent=2, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return format_number(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def write_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()
) -> None:
    """Print a table.

    Where the terminal is too narrow, the first column gets a line of its own above the others. A
    file or a pipe gets each row on one line, however long.

    Args:
        header: the names of the columns.
        rows: the cells, plain text.
        right: the columns to align to the right.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    # FORCE_COLOR makes Rich take a pipe for a terminal; the lines of a pipe stay whole.
    terminal = console.is_terminal and console.file.isatty()
    stacked = terminal and sum(widths) + 2 * (len(widths) - 1) > console.width

    def line(cells: Sequence[str]) -> str:
        aligned = [
            " " * (width - cell_len(cell)) + cell if name in right else set_cell_size(cell, width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        if stacked:
            aligned[0] = cells[0] + "\n  "
        return "  ".join(aligned).rstrip()

    with console.capture() as captured:
        console.print(Text(line(header), style="bold"), soft_wrap=True)
        for row in rows:
            console.print(Text(line(row)), soft_wrap=True)
    write(captured.get().rstrip("\n"))


def printable(text: str) -> str:
    r"""Escape what would not print: a checkpoint's names may come from anywhere.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def one_line(error: BaseException) -> str:
    """The message of an exception on a single line."""
    return printable(" ".join(str(error).split()))


def format_number(value: float | int | None) -> str:
    """A number in four significant digits.

    >>> [format_number(x) for x in (0.000123456, 12, float("inf"), None)]
    ['0.0001235', '12', 'Infinity', '']
    """
    if value is None:
        return ""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def format_bytes(size: int) -> str:
    """A size in bytes, with the unit that fits.

    >>> [format_bytes(x) for x in (12, 4096, 999_960)]
    ['12 B', '4.1 kB', '1.0 MB']
    """
    if size < 1000:
        return f"{size} B"
    power = 1
    while power < 4 and size >= 999.95 * 1000**power:
        power += 1
    return f"{size / 1000**power:.1f} {['kB', 'MB', 'GB', 'TB'][power - 1]}"
