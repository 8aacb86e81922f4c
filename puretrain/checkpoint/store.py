"""A directory of checkpoints of one run: which are kept, which is the newest, what is shared.

The entries are ``step_00001234.ckpt``. Each is complete from the moment it has that name, so the
newest state is the entry of the largest step that is whole. ``LATEST`` names it for people and
scripts; nothing depends on it. Large leaves that several entries have in common are files in
``blocks/``, named by their content.

One run writes to a directory at a time. It may be a URL.
"""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from puretrain.checkpoint.blocks import SHARED
from puretrain.checkpoint.file import MIN_SHARED, read_index, verify, write
from puretrain.checkpoint.format import STORED
from puretrain.checkpoint.places import (
    Location,
    file_name,
    join,
    move,
    names,
    reading,
    remove,
    replacing,
    reported,
    sweep,
)
from puretrain.errors import CheckpointError

__all__ = [
    "LATEST",
    "Problem",
    "Retention",
    "Saved",
    "add",
    "begin",
    "check",
    "collect",
    "entry_path",
    "latest",
    "repair",
    "retained",
    "saved",
    "settle",
]

LATEST = "LATEST"
_NAME = re.compile(r"step_(\d{8,})\.ckpt")
# Also what was set aside still needs its blocks.
_ENTRY = re.compile(r".*\.ckpt(\.old|\.damaged)?")
_BLOCK = re.compile(r"[0-9a-f]{32}-\d+\.(raw|zstd)")


class Retention(NamedTuple):
    """Which entries of a directory are worth keeping; an entry stays if one field says so."""

    last: int | None = 3
    """The newest so many; None keeps all."""
    every: int | None = None
    """Those whose step is a multiple."""
    hours: float | None = None
    """One for every so many hours of the run."""


_KEEP_THREE = Retention()


class Saved(NamedTuple):
    """An entry of a directory."""

    step: int
    path: str
    hour: float = 0.0
    """When it was saved, in hours since 1970; filled in only where it is needed."""


def saved(directory: Location) -> list[Saved]:
    """The entries of a directory, the oldest (smallest step) first.

    Raises:
        CheckpointError: the directory can't be read.
    """
    with reported(directory, "read"):
        found = [(_NAME.fullmatch(name), name) for name in names(directory)]
    return sorted(Saved(int(match[1]), join(directory, name)) for match, name in found if match)


def latest(directory: Location) -> str | None:
    """The newest entry that is whole, from the newest down; None if there is none.

    Damaged entries are passed over, with a warning that names each.

    Raises:
        CheckpointError: the directory can't be read.
    """
    for entry in reversed(saved(directory)):
        try:
            verify(entry.path)
        except CheckpointError as error:
            warnings.warn(f"a damaged checkpoint is passed over: {error}", stacklevel=2)
        else:
            return entry.path
    return None


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def begin(directory: Location, step: int) -> list[Saved]:
    """Make a directory ready for a run that begins or goes on at a step.

    Entries of later steps, of a run that was resumed further back, become ``*.ckpt.old``; what
    killed processes have left half written is deleted.

    Returns:
        The entries that were set aside.

    Raises:
        CheckpointError: the directory can't be read or changed.
    """
    with reported(directory, "written"):
        later = [entry for entry in saved(directory) if entry.step > step]
        for entry in reversed(later):
            move(entry.path, f"{entry.path}.old")
        if later:
            _point(directory, saved(directory))
        for place in (directory, join(directory, SHARED)):
            sweep(place)
    return later


def add(
    directory: Location,
    step: int,
    tree: Any,
    *,
    metadata: Mapping[str, Any],
    retention: Retention = _KEEP_THREE,
    best: Collection[int] = (),
    share: bool = False,
    compression: Literal["zstd"] | None = None,
) -> str:
    """Save a tree as the entry of a step, and then delete what need not be kept.

    Whatever fails, or kills the process, leaves the older entries and perhaps the new one, whole.

    Args:
        directory: where; made if needed.
        step: the step; an entry of the same step is replaced.
        tree: what to save.
        metadata: facts for the entry.
        retention: which entries to keep.
        best: the steps of entries to keep besides.
        share: write large leaves that are the same in the entry before only once, to ``blocks/``.
        compression: as for :func:`puretrain.save`.

    Returns:
        The path of the entry.

    Raises:
        CheckpointError: the entry can't be written; or it is, and ``LATEST`` or an old entry can't
            be changed.
    """
    path = entry_path(directory, step)
    before = [entry for entry in saved(directory) if entry.step < step] if share else []
    write(path, tree, metadata, compression=compression, unchanged=_blocks(before[-1:]))
    settle(directory, retention, best)
    return path


def entry_path(directory: Location, step: int) -> str:
    """The path of the entry of a step.

    >>> entry_path("runs/a", 1234)
    'runs/a/step_00001234.ckpt'
    """
    return join(directory, f"step_{step:08}.ckpt")


def settle(directory: Location, retention: Retention, best: Collection[int] = ()) -> None:
    """After an entry was written: let LATEST name it, and delete what need not be kept.

    Raises:
        CheckpointError: ``LATEST`` or an old entry can't be changed.
    """
    with reported(directory, "written"):
        _point(directory, saved(directory))
        collect(directory, retention, best)


def _blocks(entries: Iterable[Saved]) -> set[tuple[bytes, int]]:
    """The contents of the large leaves of an entry; nothing if it is damaged."""
    found: set[tuple[bytes, int]] = set()
    for saved_entry in entries:
        try:
            index = read_index(saved_entry.path)
        except CheckpointError:  # whoever loads or verifies it is told; here it only costs space
            continue
        found |= {
            (entry.checksum, entry.nbytes)
            for entry in index.entries
            if entry.kind in STORED and entry.nbytes >= MIN_SHARED and not entry.pieces
        }
    return found


def _point(directory: Location, entries: Sequence[Saved]) -> None:
    """Write the name of the newest entry to LATEST."""
    path = join(directory, LATEST)
    if not entries:
        remove(path)
        return
    with replacing(path) as file:
        file.write(file_name(entries[-1].path).encode() + b"\n")


# ── Deleting ──────────────────────────────────────────────────────────────────────────────────────


def retained(
    entries: Sequence[Saved], retention: Retention, best: Collection[int] = ()
) -> set[int]:
    """The steps to keep; the newest is always among them.

    What is chosen by the hour does not depend on what was deleted in between: from the oldest on,
    the next one that is so many hours younger.

    >>> entries = [Saved(step, "", hour) for step, hour in ((10, 0.0), (20, 0.4), (30, 1.1))]
    >>> sorted(retained(entries, Retention(1, hours=1.0), best={20}))
    [10, 20, 30]
    >>> sorted(retained(entries, Retention(1, every=20)))
    [20, 30]
    """
    if retention.last is None:
        return {entry.step for entry in entries}
    kept = {entry.step for entry in entries[-max(retention.last, 1) :]}
    kept |= {entry.step for entry in entries if entry.step in best}
    if retention.every is not None:
        kept |= {entry.step for entry in entries if not entry.step % retention.every}
    if retention.hours is not None:
        since = float("-inf")
        for entry in entries:
            if entry.hour >= since + retention.hours:
                kept.add(entry.step)
                since = entry.hour
    return kept


def collect(directory: Location, retention: Retention, best: Collection[int] = ()) -> list[str]:
    """Delete the entries that need not be kept, and the blocks that no entry uses any more.

    Nothing is deleted while the newest entry can't be read.

    Returns:
        The names of what was deleted.

    Raises:
        CheckpointError: the newest entry is damaged.
    """
    entries = saved(directory)
    if not entries:
        return []
    if retention.hours is not None:
        entries = [entry._replace(hour=_hour(entry.path)) for entry in entries]
    kept = retained(entries, retention, best)
    deleted = [entry.path for entry in entries if entry.step not in kept]
    if deleted:
        read_index(entries[-1].path)
        for path in deleted:
            remove(path)
    unused = _unused_blocks(directory)
    for name in unused:
        remove(join(directory, SHARED, name))
    return [*map(file_name, deleted), *(f"{SHARED}/{name}" for name in unused)]


def _hour(path: str) -> float:
    """When an entry was saved; an entry that can't tell counts as the oldest, and is kept."""
    try:
        time = read_index(path).metadata.get("time")
        return datetime.datetime.fromisoformat(str(time)).timestamp() / 3600
    except (CheckpointError, ValueError):
        return float("-inf")


def _unused_blocks(directory: Location) -> list[str]:
    """The blocks that no entry uses; none if an entry can't tell what it uses."""
    blocks = [name for name in names(join(directory, SHARED)) if _BLOCK.fullmatch(name)]
    if not blocks:
        return []
    used: set[str] = set()
    for name in names(directory):
        if not _ENTRY.fullmatch(name):
            continue
        try:
            index = read_index(join(directory, name))
        except CheckpointError:
            return []
        used |= {
            block.shared_name for entry in index.entries for block in entry.blocks if block.shared
        }
    return [name for name in blocks if name not in used]


# ── Checking ──────────────────────────────────────────────────────────────────────────────────────


class Problem(NamedTuple):
    """Something in a directory that is not as it should be."""

    name: str
    """The file."""
    reason: str
    cure: Literal["set aside", "delete", "rewrite"]
    """What :func:`repair` does."""


def check(directory: Location) -> list[Problem]:
    """Read a directory whole, and say what is not as it should be.

    Leftovers of a killed process are no damage: the next run into the directory clears them away.

    Raises:
        CheckpointError: the directory can't be read.
    """
    problems, whole = [], []
    for entry in saved(directory):
        try:
            verify(entry.path)
        except CheckpointError as error:
            problems.append(Problem(file_name(entry.path), str(error), "set aside"))
        else:
            whole.append(file_name(entry.path))
    with reported(directory, "read"):
        found = names(directory)
        pointed = None
        if LATEST in found:
            with reading(join(directory, LATEST)) as (file, length):
                pointed = file.read(min(length, 256)).decode(errors="replace").strip()
        expected = whole[-1] if whole else None
        if pointed != expected:
            reason = f"it names {pointed}, and the newest whole entry is {expected}"
            problems.append(Problem(LATEST, reason, "rewrite"))
        problems.extend(
            Problem(name, "a process was killed while it wrote this", "delete")
            for name in found
            if name.startswith(".puretrain-")
        )
        problems.extend(
            Problem(f"{SHARED}/{name}", "no entry uses it", "delete")
            for name in _unused_blocks(directory)
        )
    return problems


def repair(directory: Location) -> list[Problem]:
    """Set damaged entries aside, delete leftovers, and let LATEST name the newest whole entry.

    No entry is deleted: a damaged one is renamed to ``*.ckpt.damaged``. Call it only while no run
    writes to the directory.

    Returns:
        What :func:`check` had found.

    Raises:
        CheckpointError: the directory can't be read or changed.
    """
    problems = check(directory)
    with reported(directory, "written"):
        for problem in problems:
            path = join(directory, problem.name)
            if problem.cure == "set aside":
                move(path, f"{path}.damaged")
            elif problem.cure == "delete" and not problem.name.startswith(".puretrain-"):
                remove(path)
        for place in (directory, join(directory, SHARED)):
            sweep(place)
        if any(problem.cure != "delete" for problem in problems):
            _point(directory, saved(directory))
    return problems
