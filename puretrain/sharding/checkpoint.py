"""Checkpoints of a state that several processes hold together.

Every process writes what it holds, to files of their own in ``blocks/``, and the first one writes
the file that names them, last of all. So there is a whole checkpoint or none, and it is one like
any other: one process can read it, and so can any number of them with any placements.

Tensors of less than 64 KiB stand in the file itself. What several processes hold is divided among
them by size, so that nothing is written twice.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import math
import os
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from puretrain.checkpoint import store
from puretrain.checkpoint.blocks import SHARED, digest, shared_place
from puretrain.checkpoint.file import (
    MIN_SHARED,
    opened,
    read_leaf,
    read_range_of,
    write_apart,
    write_entries,
)
from puretrain.checkpoint.format import DTYPES, Entry, Piece, placed
from puretrain.checkpoint.places import join, names, parent, plain, reading, reported, shown
from puretrain.checkpoint.structure import Content, arrange, flatten
from puretrain.errors import CheckpointError, ConfigurationError, PuretrainError
from puretrain.loop import Observer
from puretrain.observers.checkpoints import Ways, observer
from puretrain.sharding.placements import chunk
from puretrain.tree import (
    path_string,
    tensor_bytes,
    tree_leaves,
    tree_map,
    tree_map_with_path,
    tree_paths,
)

if TYPE_CHECKING:  # it takes half as long to import as torch
    from torch.distributed.tensor import Placement

__all__ = ["checkpoints", "latest", "load", "save"]

T = TypeVar("T")
_TIMEOUT = 1800.0
# An entry of an index has room for some more.
_MAX_PIECES = 1400


class Placements(Protocol):
    """Says where each leaf of a state is."""

    def of(self, path: str, /) -> Placement:
        """``Replicate()`` or ``Shard(dim)`` for a path such as ``params/encoder.weight``."""
        ...


def _dim_of(placements: Placements | Mapping[str, Placement], path: str, ndim: int) -> int | None:
    """Along which dimension a leaf is sharded; None if all processes hold it whole."""
    from torch.distributed.tensor import Replicate, Shard

    placement: Placement
    if isinstance(placements, Mapping):
        placement = placements.get(path, Replicate())
    else:
        placement = placements.of(path)
    if type(placement) is Replicate:
        return None
    if type(placement) is not Shard or not -ndim <= placement.dim < ndim:
        raise ConfigurationError(
            f"the placement of {path}, a leaf of {ndim} dimensions, is {placement}; a placement is "
            "Replicate(), or Shard(dim) of one of them"
        )
    return placement.dim % ndim


# ── Saving ────────────────────────────────────────────────────────────────────────────────────────


def save(
    path: str | os.PathLike[str],
    state: Any,
    placements: Placements | Mapping[str, Placement],
    mesh: DeviceMesh,
    *,
    metadata: Mapping[str, Any] | None = None,
    timeout: float = _TIMEOUT,
) -> None:
    """Save a state that several processes hold together; all of them call this.

    Whatever fails in one of the processes, and also if one is killed, an existing file stays as it
    is, and every process that is left raises (if the first one is killed at the very end, the new
    file may be there all the same). Files in ``blocks/`` that are then of no use are
    deleted by :func:`puretrain.checkpoint.store.collect`, as the observer :func:`checkpoints` does
    it.

    Args:
        path: the file, ``*.ckpt``; on a file system that all processes see. An existing one is
            replaced. Or a URL that fsspec knows.
        state: what to save: of a sharded leaf each process has its own shard, as a plain tensor,
            cut as :func:`torch.chunk` does it.
        placements: for each path ``Shard(dim)`` (over the dimension ``shard`` of the mesh) or
            ``Replicate()``. In a mapping, paths that are missing are replicated.
        mesh: all processes, with a dimension named ``shard``.
        metadata: further facts, see :func:`puretrain.save`; those of the first process are written.
        timeout: for how many seconds to wait for a process that does not answer.

    Raises:
        CheckpointError: in every process, if in one of them a leaf can't be saved or written, or
            if one is gone; says which, and why.
        ConfigurationError: the mesh does not have all processes.
    """
    _save(_calls(mesh, timeout), path, state, placements, mesh, metadata or {})


def _save(
    talk: _Talk,
    path: str | os.PathLike[str],
    state: Any,
    placements: Placements | Mapping[str, Placement],
    mesh: DeviceMesh,
    metadata: Mapping[str, Any],
    after: Callable[[], None] = lambda: None,
) -> None:
    name = shown(path)
    held: list[_Held] = []

    def describe() -> dict[str, Any]:
        if not plain(path).endswith(".ckpt"):
            raise ConfigurationError(
                f"{name}: a checkpoint of several processes is named *.ckpt, so that the files "
                "that it needs are known to be in use"
            )
        held.extend(_held(state, placements, name))
        return {
            "coordinate": mesh.get_local_rank("shard"),
            "step": metadata.get("step"),
            "leaves": [zlib.crc32(repr(leaf.signature).encode()) for leaf in held],
            "lengths": [leaf.length for leaf in held if leaf.dim is not None],
        }

    def compare(told: list[dict[str, Any]]) -> dict[str, Any]:
        coordinates = [one["coordinate"] for one in told]
        _check_alike(told, held, name)
        lengths = [one["lengths"] for one in told]
        totals = _totals(lengths, coordinates, [e for e in held if e.dim is not None], name)
        tied = [number for number, leaf in enumerate(held) if leaf.entry.kind == "tied"]
        return {"coordinates": coordinates, "totals": totals, "tied": tied}

    agreed = _consult(talk, describe, compare)
    totals, tied = iter(agreed["totals"]), set(agreed["tied"])
    leaves = [leaf if leaf.dim is None else leaf.of_total(next(totals)) for leaf in held]
    wanted = [number for number in range(len(leaves)) if number not in tied]

    def write_own() -> dict[str, Any]:
        return _write_own(talk, path, leaves, wanted, agreed["coordinates"])

    def write_file(told: list[dict[str, Any]]) -> None:
        entries, contents = _assembled(leaves, tied, told)
        _check_seen(path, entries)
        write_entries(path, placed(entries), contents, metadata)
        after()

    _consult(talk, write_own, write_file)


class _Held(NamedTuple):
    """What a process holds of a leaf."""

    entry: Entry
    """With the shape of the whole leaf, as soon as that is known."""
    content: Content
    """What it holds."""
    dim: int | None
    """The dimension along which the leaf is sharded."""
    length: int = 0
    """How long the own shard is along it."""

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same in all processes."""
        shape = list(self.entry.shape)
        if self.dim is not None:
            shape[self.dim] = -1
        kind = "tensor" if self.entry.kind == "tied" else self.entry.kind
        return self.entry.keys, kind, self.entry.dtype, shape, self.dim

    def of_total(self, size: int) -> _Held:
        """With the shape of the whole leaf."""
        dim, shape = self.dim or 0, list(self.entry.shape)
        shape[dim] = size
        nbytes = math.prod(shape) * DTYPES[self.entry.dtype].itemsize
        nbytes = 0 if self.entry.kind == "tied" else nbytes
        return self._replace(entry=self.entry.replace(shape=tuple(shape), nbytes=nbytes))

    @property
    def is_apart(self) -> bool:
        """Whether the leaf is written to files of its own."""
        return self.nbytes >= MIN_SHARED

    @property
    def nbytes(self) -> int:
        """The size of the whole leaf, if it is a tensor."""
        if not isinstance(self.content, Tensor):
            return 0
        return math.prod(self.entry.shape) * self.content.element_size()


def _held(
    state: Any, placements: Placements | Mapping[str, Placement], name: str
) -> Iterator[_Held]:
    entries, contents = flatten(state, name)
    for entry, content in zip(entries, contents, strict=True):
        if entry.tied_to is not None:
            # Which leaves are tied is what the first process says: of two empty shards nobody
            # knows.
            content = contents[entry.tied_to]
        dim = None
        if isinstance(content, Tensor):
            dim = _dim_of(placements, path_string(entry.path), content.dim())
        yield _Held(entry, content, dim, 0 if dim is None else entry.shape[dim])


def _check_alike(told: list[dict[str, Any]], held: Sequence[_Held], name: str) -> None:
    """Compare what the processes say of their states with what the first one says."""
    first = told[0]
    for rank, one in enumerate(told):
        if one["step"] != first["step"]:
            raise CheckpointError(
                f"{name}: process {rank} saves the state of step {one['step']}, and process 0 that "
                f"of step {first['step']}; all must save the same"
            )
        pairs = zip(one["leaves"], first["leaves"], strict=False)
        for number, (its, mine) in enumerate(pairs):
            if its != mine:
                leaf = held[number]
                raise CheckpointError(
                    f"{name}: process {rank} has another leaf or placement than process 0, which "
                    f"has {path_string(leaf.entry.keys)} ({leaf.entry.dtype}"
                    f"{list(leaf.entry.shape)}, "
                    f"{'replicated' if leaf.dim is None else f'sharded along {leaf.dim}'})"
                )
        if len(one["leaves"]) != len(first["leaves"]):
            raise CheckpointError(
                f"{name}: process {rank} has {len(one['leaves'])} leaves, and process 0 "
                f"{len(first['leaves'])}; all must save the same"
            )


def _totals(
    lengths: list[list[int]], coordinates: list[int], leaves: Sequence[_Held], name: str
) -> list[int]:
    """How long each sharded leaf is as a whole."""
    count = max(coordinates) + 1
    representative = {coordinate: rank for rank, coordinate in enumerate(coordinates)}
    totals = []
    for number, leaf in enumerate(leaves):
        total = sum(lengths[representative[coordinate]][number] for coordinate in range(count))
        for rank, coordinate in enumerate(coordinates):
            if lengths[rank][number] != chunk(total, count, coordinate)[1]:
                found = [lengths[rank][number] for rank in range(len(coordinates))]
                raise CheckpointError(
                    f"{name}: {path_string(leaf.entry.keys)} is sharded along dimension {leaf.dim} "
                    f"over {count} processes, but the lengths of the shards, {found}, are not "
                    "those of torch.chunk; divide it with that, or save it as Replicate()"
                )
        totals.append(total)
    return totals


class _Unit(NamedTuple):
    """Something that one process writes."""

    number: int
    """Of which leaf."""
    dim: int
    start: int
    """From where on along the dimension, in the whole leaf."""
    length: int
    nbytes: int


def _write_own(
    talk: _Talk,
    path: str | os.PathLike[str],
    leaves: Sequence[_Held],
    wanted: Sequence[int],
    coordinates: Sequence[int],
) -> dict[str, Any]:
    """Write what falls to this process; returns what the first one must know of it."""
    coordinate, count = coordinates[talk.rank], max(coordinates) + 1
    peers = [rank for rank, other in enumerate(coordinates) if other == coordinate]
    sharded, replicated, small = [], [], []
    for number in wanted:
        leaf = leaves[number]
        if leaf.dim is not None and not leaf.is_apart and peers[0] == talk.rank:
            small.append([number, coordinate, bytes(tensor_bytes(_tensor(leaf)))])
        elif leaf.dim is not None and leaf.is_apart and leaf.length:
            start, length = chunk(leaf.entry.shape[leaf.dim], count, coordinate)
            nbytes = leaf.nbytes // leaf.entry.shape[leaf.dim] * length
            sharded.append(_Unit(number, leaf.dim, start, length, nbytes))
        elif leaf.dim is None and leaf.is_apart:
            shape = leaf.entry.shape
            dim = max(range(len(shape)), key=shape.__getitem__)
            dim = 0 if shape[0] >= talk.size else dim
            replicated.append(_Unit(number, dim, 0, shape[dim], leaf.nbytes))
    own = _share(sharded, peers, count)[talk.rank]
    own += _share(replicated, range(talk.size), 1)[talk.rank]
    there = set(names(join(parent(path), SHARED)))
    pieces = []
    for unit in own:
        leaf = leaves[unit.number]
        offset = 0 if leaf.dim is None else chunk(leaf.entry.shape[leaf.dim], count, coordinate)[0]
        tensor = _tensor(leaf).narrow(unit.dim, unit.start - offset, unit.length)
        entry = leaf.entry.replace(
            shape=tuple(tensor.shape), nbytes=unit.nbytes, checksum=digest(tensor), shared=True
        )
        with reported(path, "written"):
            write_apart(path, entry, tensor, there)
        pieces.append([unit.number, unit.dim, unit.start, unit.length, unit.nbytes, entry.checksum])
    return {"pieces": pieces, "small": small}


def _tensor(leaf: _Held) -> Tensor:
    if not isinstance(leaf.content, Tensor):  # pragma: no cover - only tensors are asked for
        raise CheckpointError(f"{path_string(leaf.entry.keys)} is no tensor")
    return leaf.content


def _share(
    units: Sequence[_Unit], ranks: Collection[int], already: int
) -> Mapping[int, list[_Unit]]:
    """Divide what several processes hold among them, so that each writes about as much.

    What is larger than a fair share is cut; the largest is given away first, to whom has least.

    Args:
        units: what they all hold.
        ranks: these processes.
        already: in how many pieces a leaf is without being cut here.
    """
    fair = max(sum(unit.nbytes for unit in units) / len(ranks), MIN_SHARED)
    cut = []
    for unit in units:
        count = min(math.ceil(unit.nbytes / fair), unit.length, max(_MAX_PIECES // already, 1))
        for number in range(count):
            start, length = chunk(unit.length, count, number)
            if length:
                nbytes = unit.nbytes // unit.length * length
                cut.append(_Unit(unit.number, unit.dim, unit.start + start, length, nbytes))
    given: dict[int, list[_Unit]] = {rank: [] for rank in ranks}
    loads = [(0, rank) for rank in ranks]
    for unit in sorted(cut, key=lambda unit: -unit.nbytes):
        load, rank = loads[0]
        given[rank].append(unit)
        heapq.heapreplace(loads, (load + unit.nbytes, rank))
    return given


def _assembled(
    leaves: Sequence[_Held], tied: Collection[int], told: Sequence[Mapping[str, Any]]
) -> tuple[list[Entry], list[Content]]:
    """The entries of the file, of what the processes have written, and what stands in it."""
    pieces: dict[int, list[tuple[int, Piece]]] = {}
    shards: dict[int, dict[int, bytes]] = {}
    for one in told:
        for number, dim, start, length, nbytes, checksum in one["pieces"]:
            piece = Piece(start, length, nbytes, checksum)
            pieces.setdefault(number, []).append((dim, piece))
        for number, coordinate, content in one["small"]:
            shards.setdefault(number, {})[coordinate] = content
    entries: list[Entry] = []
    contents: list[Content] = []
    for number, leaf in enumerate(leaves):
        entry, content = leaf.entry, leaf.content
        if number in tied:
            content = None
        elif number in pieces:
            content = None
            found = sorted(pieces[number], key=lambda each: each[1].start)
            if len(found) == 1:
                entry = entry.replace(shared=True, checksum=found[0][1].checksum)
            else:
                entry = entry.replace(dim=found[0][0], pieces=tuple(piece for _, piece in found))
        elif leaf.dim is not None:
            content = _joined(leaf, [shards[number][i] for i in sorted(shards[number])])
        entries.append(entry)
        contents.append(content)
    return entries, contents


def _check_seen(path: str | os.PathLike[str], entries: Sequence[Entry]) -> None:
    """Raise CheckpointError unless the first process sees what the others have written."""
    there = set(names(join(parent(path), SHARED)))
    blocks = [block for entry in entries for block in entry.blocks if block.shared]
    for block in blocks:
        if block.shared_name in there:
            continue
        place = shared_place(path, block)
        try:  # a network file system may list a directory as it was a while ago
            with reading(place):
                pass
        except FileNotFoundError:
            raise CheckpointError(
                f"{shown(path)}: {block.label} was written to {shown(place)} by another process, "
                "and is not there: save to a directory that all processes see"
            ) from None


def _joined(leaf: _Held, shards: Sequence[bytes]) -> bytes:
    """The bytes of a small leaf, of those of its shards."""
    dim, shape = leaf.dim or 0, leaf.entry.shape
    outer, rows = math.prod(shape[:dim]), []
    for row in range(outer):
        for shard in shards:
            width = len(shard) // outer
            rows.append(shard[row * width : (row + 1) * width])
    return b"".join(rows)


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────


def load(
    path: str | os.PathLike[str],
    like: T,
    placements: Placements | Mapping[str, Placement],
    mesh: DeviceMesh,
    *,
    checksums: bool = True,
    timeout: float = _TIMEOUT,
) -> T:
    """Load a state into several processes; all of them call this.

    Each reads what it needs for its own shards and checks it. How many processes have saved the
    state, and with which placements, does not matter; it may be a file of :func:`puretrain.save`.

    Args:
        path: the file, or a URL that fsspec knows.
        like: a tree with the node types of the result, for example a state that has not begun; of a
            sharded leaf the own shard. See :func:`puretrain.load`.
        placements: as for :func:`save`; those that the result is to have.
        mesh: all processes, with a dimension named ``shard``.
        checksums: see :func:`puretrain.read_slice`. Where the shards of the file are not
            those of the placements, a process reads more than it needs, to check it; False reads
            no more, unchecked.
        timeout: for how many seconds to wait for a process that does not answer.

    Returns:
        The own part of the state: plain tensors on the devices of ``like``.

    Raises:
        CheckpointError: in every process, if in one of them the file can't be read, is damaged, or
            does not fit ``like``; or if one is gone.
    """
    results: list[T] = []

    def read() -> None:
        results.append(_load(path, like, placements, mesh, checksums))

    _consult(_calls(mesh, timeout), read, lambda told: None)
    return results[0]


def _load(
    path: str | os.PathLike[str],
    like: T,
    placements: Placements | Mapping[str, Placement],
    mesh: DeviceMesh,
    checksums: bool,
) -> T:
    count, coordinate = dist.get_world_size(mesh.get_group("shard")), mesh.get_local_rank("shard")
    with opened(path) as (file, index):
        entries = index.entries
        shapes = {path_string(entry.path): entry.shape for entry in entries}

        def own(name: str) -> tuple[int, int, int] | None:
            """Which slice of a leaf of the file this process has: dimension, start, length."""
            shape = shapes[name]
            dim = _dim_of(placements, name, len(shape)) if shape else None
            return None if dim is None else (dim, *chunk(shape[dim], count, coordinate))

        def whole(keys: Any, leaf: Any) -> Any:
            """The template of the whole leaf, if the own shard has the shape of the template."""
            name = path_string(keys)
            part = own(name) if name in shapes and isinstance(leaf, Tensor) else None
            if part is None:
                return leaf
            shape = list(shapes[name])
            shape[part[0]] = part[2]
            if list(leaf.shape) != shape:
                raise CheckpointError(
                    f"{shown(path)} does not fit the template: {name} has the shape "
                    f"{list(shapes[name])} in the file, of which process {coordinate} of {count} "
                    f"along the dimension 'shard' has {shape}, and the template {list(leaf.shape)}"
                )
            return torch.empty(shapes[name], dtype=leaf.dtype, device="meta")

        tree, _ = arrange(entries, tree_map_with_path(whole, like), shown(path))
        devices = {
            path_string(keys): leaf.device
            for keys, leaf in zip(tree_paths(like), tree_leaves(like), strict=True)
            if isinstance(leaf, Tensor) and not leaf.is_meta
        }
        found: dict[Any, Any] = {}

        def leaf_of(number: int) -> Any:
            entry = entries[number]
            name = path_string(entry.path)
            part = own(name)
            key = (number if entry.tied_to is None else entry.tied_to, part)
            if key not in found:
                content = (
                    read_leaf(file, index, number, path)
                    if part is None
                    else read_range_of(file, index, number, path, *part, checksums=checksums)
                )
                if isinstance(content, Tensor):
                    content = content.to(devices.get(name, "cpu"))
                found[key] = content
            return found[key]

        result: T = tree_map(leaf_of, tree)
        return result


def latest(directory: str | os.PathLike[str], mesh: DeviceMesh) -> str | None:
    """The newest entry of a directory that is whole, the same in all processes; all call this.

    The first process looks for it; see :func:`puretrain.checkpoint.store.latest`.

    Returns:
        Its path; None if there is none.

    Raises:
        CheckpointError: in every process, if the first one can't read the directory.
    """
    talk = _calls(mesh, _TIMEOUT)

    def look() -> str | None:
        return None if talk.rank else store.latest(directory)

    found: str | None = _consult(talk, look, lambda told: told[0])
    return found


# ── While a run goes on ───────────────────────────────────────────────────────────────────────────


def checkpoints(
    directory: str | os.PathLike[str],
    placements: Placements | Mapping[str, Placement],
    mesh: DeviceMesh,
    *,
    every: int | None = None,
    every_minutes: float | None = None,
    every_epochs: int | None = None,
    keep: int | None = 3,
    keep_every: int | None = None,
    keep_hours: float | None = None,
    asynchronous: bool = False,
    when_busy: Literal["wait", "skip"] = "wait",
    on_error: Literal["raise", "warn"] = "raise",
    timeout: float = _TIMEOUT,
) -> Observer:
    """:func:`puretrain.checkpoints` for a state that several processes hold together.

    All processes make this observer, and see the same events of the same steps. Each writes what it
    holds, as :func:`save` does; the first one looks after the directory, which all must see.

    With ``asynchronous`` each process writes in a thread, from a leased state. The threads talk
    through a process group of their own, so that they never meet what the steps send each other.

    Args:
        directory: where to; made if needed. Or a URL that fsspec knows.
        placements: as for :func:`save`.
        mesh: as for :func:`save`.
        every: see :func:`puretrain.checkpoints`, here and for the arguments down to ``keep_hours``.
        every_minutes: of the process whose clock says so first. The processes ask each other after
            every step, which takes a round of messages.
        every_epochs: at the end of every so many epochs.
        keep: how many of the newest files to keep.
        keep_every: keep those of steps that are multiples of this, too.
        keep_hours: keep one for every so many hours, too.
        asynchronous: save in a thread while the run goes on.
        when_busy: what to do when a save is due and a process is not done with the last one:
            ``'wait'`` for it, or leave the new one out (``'skip'``).
        on_error: as for :func:`puretrain.checkpoints`. What fails in the background is raised in
            all processes at the same event: when the next save is due, or at the end.
        timeout: for how many seconds to wait for a process that does not answer.

    Raises:
        ConfigurationError: an argument is out of its range, or the mesh does not have all
            processes.
        CheckpointError: (in the loop) the state can't be saved; in every process.
    """
    here, behind = _calls(mesh, timeout), _new_talk(mesh, timeout)

    def begin(place: str, step: int) -> list[store.Saved]:
        later: list[store.Saved] = []

        def prepare() -> None:
            if not here.rank:
                later.extend(store.begin(place, step))

        _consult(here, prepare, lambda told: None)
        return later

    def add(
        place: str,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any],
        retention: store.Retention,
        best: Collection[int],
        share: bool,
        compression: Literal["zstd"] | None,
    ) -> None:
        path = store.entry_path(place, step)
        _save(
            behind,
            path,
            state,
            placements,
            mesh,
            metadata,
            after=lambda: store.settle(place, retention, best),
        )

    return observer(
        Ways(begin, add, lambda flag: _any(here, flag)),
        directory,
        every=every,
        every_minutes=every_minutes,
        every_epochs=every_epochs,
        keep=keep,
        keep_every=keep_every,
        keep_hours=keep_hours,
        asynchronous=asynchronous,
        when_busy=when_busy,
        on_error=on_error,
    )


# ── Talking ───────────────────────────────────────────────────────────────────────────────────────
#
# The messages are msgpack, never pickles, and go from each process to the first one and back. A
# collective would leave it to chance who hears of a process that is gone; the first process finds
# it out, and tells the others.


class _Talk(NamedTuple):
    """How the processes of a mesh talk about files."""

    group: dist.ProcessGroup | None
    """Through gloo; None if there is one process."""
    rank: int
    size: int
    timeout: float


_groups: weakref.WeakKeyDictionary[Any, dict[float, _Talk]] = weakref.WeakKeyDictionary()


def _calls(mesh: DeviceMesh, timeout: float) -> _Talk:
    """For what is called in the main thread."""
    world = dist.group.WORLD
    if world is None:
        raise ConfigurationError(
            "the process group of the mesh has been destroyed: save and load "
            "before destroy_process_group()"
        )
    talks = _groups.setdefault(world, {})
    if timeout not in talks:
        talks[timeout] = _new_talk(mesh, timeout)
    return talks[timeout]


def _new_talk(mesh: DeviceMesh, timeout: float) -> _Talk:
    if mesh.size() != dist.get_world_size():
        raise ConfigurationError(
            f"the mesh has {mesh.size()} of the {dist.get_world_size()} processes; a state is "
            "saved and loaded by all of them"
        )
    if not timeout > 0:
        raise ConfigurationError(f"timeout is more than 0 seconds, not {timeout!r}")
    if mesh.size() == 1:
        return _Talk(None, 0, 1, timeout)
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    return _Talk(group, dist.get_rank(), dist.get_world_size(), timeout)


def _consult(talk: _Talk, act: Callable[[], Any], decide: Callable[[list[Any]], Any]) -> Any:
    """Let each process do something, and the first one decide upon what they say of it.

    Args:
        talk: how they talk.
        act: what each does; returns plain values.
        decide: is given what they say, by rank; only in the first process, and only if none failed.

    Returns:
        What was decided; in all of them.

    Raises:
        CheckpointError: something failed in one of them, or one is gone; in all of them.
    """
    mine, error = _attempt(talk, act)
    if talk.rank:
        try:
            _send(talk, 0, mine)
            answer = _receive(talk, 0)
        except RuntimeError as gone:
            answer = _gone(talk, 0, gone)
    else:
        heard = [mine]
        for rank in range(1, talk.size):
            try:
                heard.append(_receive(talk, rank))
            except RuntimeError as gone:
                heard.append(_gone(talk, rank, gone))
        failed = [one for one in heard if "error" in one]
        if failed:
            answer = failed[0]
        else:
            answer, error = _attempt(talk, lambda: decide([one["said"] for one in heard]))
        for rank in range(1, talk.size):
            with contextlib.suppress(RuntimeError):  # it is gone, and the error says so
                _send(talk, rank, answer)
    if error is not None:
        raise error
    if "error" in answer:
        kind = CheckpointError if answer["is_ours"] else PuretrainError
        raise kind(answer["error"])
    return answer["said"]


def _attempt(talk: _Talk, act: Callable[[], Any]) -> tuple[dict[str, Any], BaseException | None]:
    try:
        return {"said": act()}, None
    except BaseException as error:  # noqa: BLE001 - raised again when the others know of it
        what = str(error)
        if not isinstance(error, PuretrainError):
            what = f"{type(error).__name__}: {what}"
        is_ours = isinstance(error, CheckpointError)
        return {"error": f"in process {talk.rank}: {what}", "is_ours": is_ours}, error


def _gone(talk: _Talk, rank: int, error: RuntimeError) -> dict[str, Any]:
    reason = (str(error).strip().splitlines() or [""])[0]
    message = f"process {rank} is gone, or has not answered in {talk.timeout:g} seconds: {reason}"
    return {"error": message, "is_ours": True}


def _send(talk: _Talk, rank: int, message: dict[str, Any]) -> None:
    content = bytearray(msgpack.packb(message))
    dist.send(torch.tensor([len(content)]), rank, talk.group)
    dist.send(torch.frombuffer(content, dtype=torch.uint8), rank, talk.group)


def _receive(talk: _Talk, rank: int) -> dict[str, Any]:
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, rank, talk.group)
    content = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(content, rank, talk.group)
    message: dict[str, Any] = msgpack.unpackb(content.numpy().tobytes())
    return message


def _any(talk: _Talk, flag: bool) -> bool:
    """Whether one of the processes says yes."""
    if talk.group is None:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    try:
        dist.all_reduce(flags, dist.ReduceOp.MAX, talk.group)
    except RuntimeError as error:
        raise CheckpointError(
            f"a process is gone, or has not answered within {talk.timeout:g} seconds ({error})"
        ) from error
    return bool(flags)
