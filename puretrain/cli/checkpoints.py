"""``puretrain inspect``, ``diff`` and ``verify``: look at checkpoints."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puretrain.checkpoint import Entry, Found, Index, find_checkpoint, load, read_index, verify
from puretrain.checkpoint.file import checkpoint_files
from puretrain.checkpoint.places import is_url, join, shown
from puretrain.checkpoint.store import repair
from puretrain.cli.output import (
    format_bytes,
    format_number,
    note,
    one_line,
    printable,
    write,
    write_json,
    write_parts,
    write_table,
)
from puretrain.cli.parsing import add_command
from puretrain.errors import CheckpointError
from puretrain.tree import (
    LeafDifference,
    match_paths,
    path_string,
    tree_diff,
    tree_leaves,
    tree_paths,
)
from puretrain.tree import Path as TreePath

__all__ = ["add_commands", "checkpoint_at", "note_damaged", "write_differences"]

_STATISTICS = ("min", "max", "mean", "norm")

_INSPECT = """\
List what is in a checkpoint: the path, dtype, shape and size of every leaf. Reads only the index,
unless --stats asks for the values. For a directory, its newest good checkpoint is shown.
"""
_INSPECT_EXAMPLES = """\
examples:
  puretrain inspect runs/digits
  puretrain inspect runs/digits --only 'params/**' --stats
  puretrain inspect runs/digits --json | jq '.leaves[].path'
"""
_DIFF = """\
Compare two checkpoints bit for bit. Prints a line per leaf that differs: how, the largest absolute
difference, the largest distance in units in the last place (ulps), and how many elements differ.
"""
_DIFF_EXAMPLES = """\
examples:
  puretrain diff runs/a runs/b --only 'params/**'
  puretrain diff runs/a/step_00000100.ckpt runs/b/step_00000100.ckpt

exit status: 0 if they are identical, 1 if they differ, 2 after an error
"""
_VERIFY = """\
Read checkpoints whole and check every byte against its checksum. In a directory, every checkpoint
in it and below is checked.
"""
_VERIFY_EXAMPLES = """\
examples:
  puretrain verify runs/digits/step_00000100.ckpt
  puretrain verify runs

exit status: 0 if all are good (or, with --repair, are set aside), 1 if one is damaged, 2 after an
error
"""


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    inspect = add_command(
        commands,
        "inspect",
        _inspect,
        "list what is in a checkpoint",
        _INSPECT,
        _INSPECT_EXAMPLES,
    )
    inspect.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a directory of such")
    inspect.add_argument("--only", metavar="PATTERN", help="only the leaves whose paths match")
    inspect.add_argument("--stats", action="store_true", help="minimum, maximum, mean and norm")
    diff = add_command(
        commands, "diff", _diff, "compare two checkpoints bit for bit", _DIFF, _DIFF_EXAMPLES
    )
    diff.add_argument("a", metavar="A", help="a checkpoint, or a directory: its newest good one")
    diff.add_argument("b", metavar="B", help="another")
    diff.add_argument("--only", metavar="PATTERN", help="only the leaves whose paths match")
    check = add_command(
        commands,
        "verify",
        _verify,
        "check that checkpoints are whole",
        _VERIFY,
        _VERIFY_EXAMPLES,
    )
    check.add_argument("checkpoints", metavar="CKPT", nargs="+", help="a checkpoint or a directory")
    check.add_argument(
        "--repair",
        action="store_true",
        help="set damaged entries of directories aside, as *.ckpt.damaged, and clean up",
    )


def checkpoint_at(name: str) -> Path | str:
    """The file that an argument names: itself, or of a directory the newest good checkpoint."""
    if is_url(name) and name.endswith(".ckpt"):
        return name
    path: Path | str = name if is_url(name) else Path(name)
    if isinstance(path, Path) and not path.is_dir():
        return path
    found = find_checkpoint(path)
    note_damaged(found)
    if found.path is None:
        raise CheckpointError(
            f"{shown(path)} is a directory without a good checkpoint; name a file"
        )
    return found.path


def note_damaged(found: Found) -> None:
    """Say on stderr which checkpoints were passed over, and why."""
    for passed, error in found.damaged:
        name, reason = shown(passed), one_line(error)
        note("skipped the damaged " + (reason if name in reason else f"{name}: {reason}"))


# ── inspect ───────────────────────────────────────────────────────────────────────────────────────


def _inspect(options: argparse.Namespace) -> int:
    path = checkpoint_at(options.checkpoint)
    index = read_index(path)
    entries = index.leaves
    if options.only is not None:
        wanted = set(match_paths(options.only, [entry.path for entry in entries]))
        entries = tuple(entry for entry in entries if entry.path in wanted)
    statistics = _statistics(path, options.only) if options.stats else {}
    leaves = [{**_describe(entry, index), **statistics.get(entry.path, {})} for entry in entries]
    total = {
        "leaves": len(leaves),
        "elements": sum(leaf["elements"] for leaf in leaves),
        "bytes": sum(leaf["bytes"] for leaf in leaves),
    }
    if options.json:
        about = {"path": path, "version": index.version, "writer": dict(index.writer)}
        write_json({**about, "metadata": dict(index.metadata), "total": total, "leaves": leaves})
        return 0
    write(printable(shown(path)))
    written = ", ".join(f"{key} {value}" for key, value in index.writer.items())
    write(printable(f"format {index.version}, {written}"))
    for key, value in index.metadata.items():
        write_parts(printable(f"{key}: {_brief(value)}").split(", "), ", ")
    names = _STATISTICS if options.stats else ()
    write("")
    write_table(
        ["path", "dtype", "shape", "size", *names],
        [
            (
                leaf["path"],
                leaf["dtype"],
                ",".join(map(str, leaf["shape"])) or format_number(leaf.get("value")),
                _size(leaf),
                *(format_number(leaf.get(name)) for name in names),
            )
            for leaf in leaves
        ],
        right=["size", *names],
    )
    count = "1 leaf" if len(leaves) == 1 else f"{len(leaves)} leaves"
    write(f"\n{count}, {total['elements']:,} elements, {format_bytes(total['bytes'])}")
    return 0


def _size(leaf: Mapping[str, Any]) -> str:
    """How much room a leaf takes, and in how many pieces of which dimension.

    >>> _size({"bytes": 4096, "dim": 0, "pieces": [{}, {}]})
    '4.1 kB in 2 pieces of dim 0'
    """
    if "tied_to" in leaf:
        return "tied"
    size = format_bytes(leaf["bytes"])
    if "pieces" not in leaf:
        return size
    count = len(leaf["pieces"])
    return f"{size} in {count} {'piece' if count == 1 else 'pieces'} of dim {leaf['dim']}"


def _brief(value: Any) -> str:
    """A value of the metadata as people would write it.

    >>> _brief({"loss": 0.1960936, "command": ["fit", "a b.py"]})
    "loss 0.1961, command fit 'a b.py'"
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return shlex.join(value)
    if isinstance(value, list):
        return ", ".join(map(_brief, value))
    return format_number(value) if isinstance(value, float) else str(value)


def _describe(entry: Entry, index: Index) -> dict[str, Any]:
    stored = entry if entry.tied_to is None else index.entries[entry.tied_to]
    described: dict[str, Any] = {
        "path": path_string(entry.path),
        "dtype": stored.dtype,
        "shape": list(stored.shape),
        "elements": math.prod(entry.shape) if entry.kind == "tensor" else 0,
        "bytes": entry.nbytes,
    }
    if entry.pieces:
        described["dim"] = entry.dim
        described["pieces"] = [
            {"start": part.start, "length": part.length, "bytes": part.nbytes, "file": name}
            for part, name in zip(
                entry.pieces, (block.shared_name for block in entry.blocks), strict=True
            )
        ]
    if entry.value is not None:
        described["value"] = entry.value
    if entry.tied_to is not None:
        described["tied_to"] = path_string(stored.path)
    return described


def _statistics(path: Path | str, only: str | None) -> dict[TreePath, dict[str, float]]:
    """Smallest, largest, mean and Euclidean norm of the numeric leaves, in float64."""
    tree = load(path, only=only, mmap=not is_url(path))
    found = {}
    for place, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
        if not isinstance(leaf, Tensor) or not leaf.numel() or leaf.is_complex():
            continue
        values = leaf.to(torch.float64)
        numbers = (values.min(), values.max(), values.mean(), values.norm())
        found[tuple(map(str, place))] = dict(zip(_STATISTICS, map(float, numbers), strict=True))
    return found


# ── diff ──────────────────────────────────────────────────────────────────────────────────────────


def _diff(options: argparse.Namespace) -> int:
    a, b = (checkpoint_at(name) for name in (options.a, options.b))
    found = tree_diff(load(a, only=options.only), load(b, only=options.only))
    if options.json:
        differences = [{name: getattr(leaf, name) for name in leaf._names} for leaf in found]
        write_json({"a": a, "b": b, "identical": not found, "differences": differences})
    elif found:
        write_differences(found)
        write(f"{len(found)} {'leaf differs' if len(found) == 1 else 'leaves differ'}")
    else:
        write("identical")
    return 1 if found else 0


def write_differences(leaves: Sequence[LeafDifference]) -> None:
    """Print a table of leaves that differ."""
    write_table(
        ["path", "kind", "leaf", "max abs", "ulps", "count"],
        [
            (
                leaf.path,
                leaf.kind,
                _change(leaf.a, leaf.b),
                format_number(leaf.max_abs),
                _magnitude(leaf.max_ulps),
                format_number(leaf.count),
            )
            for leaf in leaves
        ],
        right=["max abs", "ulps", "count"],
    )


def _change(a: str, b: str) -> str:
    """What a leaf was and became.

    >>> _change("f32 0.1960936039686203", "f32 0.25"), _change("f32[2]", "i64[2]")
    ('f32 0.1960936 -> 0.25', 'f32[2] -> i64[2]')
    """
    if a == b:
        return a
    dtype, space, _ = a.partition(" ")
    if space and b.startswith(dtype + space):
        b = b.removeprefix(dtype + space)
    # A float32 is known by nine digits at most; its double has twice as many.
    return re.sub(r"\d+\.\d{8,}", lambda found: f"{float(found[0]):.7g}", f"{a} -> {b}")


def _magnitude(value: int | None) -> str:
    """A count, in full only while it can be read at a glance."""
    return format_number(value if value is None or value < 1_000_000 else float(value))


# ── verify ────────────────────────────────────────────────────────────────────────────────────────


def _verify(options: argparse.Namespace) -> int:
    results: list[tuple[Path | str, str | None]] = []
    for path in _files(options.checkpoints):
        try:
            verify(path)
            results.append((path, None))
        except CheckpointError as error:
            results.append((path, one_line(error)))
        if not options.json:  # reading gigabytes takes a while: show each when it is known
            reason = results[-1][1]
            line = f"ok       {shown(path)}" if reason is None else f"DAMAGED  {reason}"
            write_parts(printable(line).split(" "), " ")
    repaired = _repair(options) if options.repair else []
    if options.json:
        write_json(
            [
                {"path": path, "ok": not why, "reason": why, "repaired": path in repaired}
                for path, why in results
            ]
        )
    return 1 if any(why for path, why in results if path not in repaired) else 0


def _repair(options: argparse.Namespace) -> list[Path | str]:
    """Repair each directory that has entries of a run; returns what was set aside."""
    aside: list[Path | str] = []
    for name in options.checkpoints:
        if is_url(name):
            directories = set() if name.endswith(".ckpt") else {name}
        elif Path(name).is_dir():
            directories = {str(path.parent) for path in Path(name).rglob("step_*.ckpt")}
        else:
            continue
        for directory in sorted(directories):
            for problem in repair(directory):
                place = join(directory, problem.name)
                if problem.cure == "set aside":
                    aside.append(place if is_url(place) else Path(place))
                if not options.json:
                    where = printable(shown(place))
                    write(f"repaired {where}: {problem.cure}: {printable(problem.reason)}")
    return aside


def _files(given: Iterable[str]) -> Iterator[Path | str]:
    for name in given:
        if is_url(name):
            found = [name] if name.endswith(".ckpt") else checkpoint_files(name)
            if not found:
                raise CheckpointError(f"there is no checkpoint (*.ckpt) in {shown(name)}")
            yield from found
            continue
        path = Path(name)
        if not os.path.lexists(path):
            raise CheckpointError(f"there is no file or directory {name}")
        if not path.is_dir():
            yield path
            continue
        files = sorted(path.rglob("*.ckpt"))
        if not files:
            raise CheckpointError(f"there is no checkpoint (*.ckpt) in the directory {name}")
        yield from files
