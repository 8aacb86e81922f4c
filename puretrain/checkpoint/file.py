"""Checkpoint files: written atomically, read with every byte checked."""

from __future__ import annotations

import codecs
import datetime
import mmap as memory_map
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import torch
import xxhash
from torch import Tensor

from puretrain.checkpoint.blocks import (
    CHUNK,
    SHARED,
    check_block,
    coded,
    digest,
    fill,
    open_block,
    provide,
    shared_place,
    write_block,
)
from puretrain.checkpoint.format import (
    AGAIN,
    DTYPES,
    EMPTY,
    HEADER_LENGTH,
    STORED,
    VERSION,
    Entry,
    Index,
    aligned,
    decode_header,
    decode_index,
    encode_head,
    encode_index,
    placed,
    required,
)
from puretrain.checkpoint.pieces import read_range
from puretrain.checkpoint.places import (
    Location,
    file_name,
    is_url,
    join,
    names,
    parent,
    reading,
    replacing,
    reported,
    shown,
)
from puretrain.checkpoint.structure import Content, arrange, flatten, select
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import FrozenDict, path_string, tensor_bytes, tree_leaves, tree_map

__all__ = [
    "MIN_SHARED",
    "Found",
    "checkpoint_files",
    "find_checkpoint",
    "latest",
    "load",
    "opened",
    "read_index",
    "read_leaf",
    "read_range_of",
    "save",
    "verify",
    "write",
    "write_apart",
    "write_entries",
]

MIN_SHARED = 1 << 16
"""Smaller leaves are not worth a file of their own."""
_LARGE = 1 << 20  # worth a thread of its own
_MAX_THREADS = 4


# ── Saving ────────────────────────────────────────────────────────────────────────────────────────


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    compression: Literal["zstd"] | None = None,
) -> None:
    """Write a tree to a file, all of it or nothing.

    The bytes go to a temporary file in the same directory, which takes the file's place when they
    are on the disk. Whatever happens before leaves an existing file as it is: an exception removes
    the temporary file, and a killed process leaves one (``.puretrain-….tmp``) that may be deleted.
    Directories that do not exist are created. Needs next to no memory besides the tree.

    Leaves are tensors on any device, numpy arrays (they come back as tensors), bool, int, float,
    str, bytes and None. Of a tensor its values are kept, not ``requires_grad``, strides or device.
    Tensors that are the same memory (tied weights) are written once and come back as one tensor.

    Args:
        path: the file; an existing one is replaced. Or a URL that fsspec knows, such as
            ``s3://bucket/a.ckpt``.
        tree: what to save, for example a :class:`~puretrain.TrainState`.
        metadata: further facts, to be found in ``read_index(path).metadata``: None, bool, int of 64
            bits, float, str, bytes, and lists and dicts of them.
        compression: ``'zstd'`` compresses the tensors that get smaller by it (needs
            ``puretrain[zstd]``); it takes longer than writing them.

    Raises:
        CheckpointError: a leaf can't be saved (names its path), or the file can't be written.

    Example:
        >>> import tempfile, puretrain as pt
        >>> directory = tempfile.TemporaryDirectory()
        >>> path = f"{directory.name}/a.ckpt"
        >>> save(path, {"w": torch.ones(2), "steps": [1, 2]}, metadata={"note": "first"})
        >>> load(path)
        {'steps': (1, 2), 'w': f32[2]}
        >>> read_index(path).metadata["note"]
        'first'
        >>> save(path, {"w": torch.ones(2), "hook": print})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        puretrain.errors.CheckpointError: ...a.ckpt: hook is a builtins.builtin_function...
        >>> directory.cleanup()
    """
    write(path, tree, metadata or {}, compression=compression)


def write(
    path: Location,
    tree: Any,
    metadata: Mapping[str, Any],
    *,
    compression: Literal["zstd"] | None = None,
    unchanged: Container[tuple[bytes, int]] = frozenset(),
) -> Index:
    """Save a tree, and what is unchanged in files of its own; see :func:`save`.

    Args:
        path: the file or URL.
        tree: what to save.
        metadata: further facts.
        compression: as for :func:`save`.
        unchanged: the checksums and lengths of leaves that are shared with other checkpoints in the
            same directory.

    Returns:
        The index that was written.
    """
    if compression not in {None, "zstd"}:
        raise ConfigurationError(f"compression is 'zstd' or None, not {compression!r}")
    name = shown(path)
    entries, contents = flatten(tree, name)
    if compression:
        entries = coded(entries, contents)
    with reported(path, "written"):
        if unchanged:
            entries = _shared(path, entries, contents, unchanged)
    return write_entries(path, entries, contents, metadata)


def write_entries(
    path: Location,
    entries: list[Entry],
    contents: Sequence[Content],
    metadata: Mapping[str, Any],
) -> Index:
    """Write a file out of the entries of a tree; what is shared or in pieces is written already.

    Args:
        path: the file or URL.
        entries: placed one after the other.
        contents: what each has in the data.
        metadata: further facts.

    Returns:
        The index that was written.
    """
    name = shown(path)
    with reported(path, "written"):
        writer = _writer()
        if not is_url(path):
            with replacing(path) as file:
                return _write_file(file, entries, contents, metadata, writer, name)
        # What is far away is written from the first byte to the last. The checksums in front need
        # a first pass over the leaves, and compressed leaves a file here.
        if "zstd" in required(entries):
            with replacing(path) as file, tempfile.TemporaryFile() as near:
                index = _write_file(near, entries, contents, metadata, writer, name)
                near.seek(0)
                shutil.copyfileobj(near, file, CHUNK)
            return index
        entries = [
            entry.replace(checksum=digest(content))
            if content is not None and entry.is_placed
            else entry
            for entry, content in zip(entries, contents, strict=True)
        ]
        head, index = _head(entries, metadata, writer, name)
        with replacing(path) as file:
            file.write(head)
            checksums = [entry.checksum for entry in _write_data(file, entries, contents)]
            if checksums != [entry.checksum for entry in entries]:
                raise CheckpointError(
                    f"{name}: a tensor was changed while it was being saved; take a "
                    "lease on the state for so long"
                )
        return index


def _write_file(
    file: IO[bytes],
    entries: list[Entry],
    contents: Sequence[Content],
    metadata: Mapping[str, Any],
    writer: Mapping[str, Any],
    name: str,
) -> Index:
    length = len(encode_index(entries, metadata, writer, name))
    file.seek(len(encode_head(bytes(length), 0)))
    entries = _write_data(file, entries, contents)
    head, index = _head(entries, metadata, writer, name)
    file.seek(0)
    file.write(head)
    return index


def _head(
    entries: Sequence[Entry], metadata: Mapping[str, Any], writer: Mapping[str, Any], name: str
) -> tuple[bytes, Index]:
    """Everything in front of the data, and the same as a value."""
    data_length = max((e.offset + e.stored_nbytes for e in entries if e.is_placed), default=0)
    head = encode_head(encode_index(entries, metadata, writer, name), data_length)
    length = len(head) + data_length
    return head, Index(VERSION, length, len(head), writer, metadata, tuple(entries))


def _shared(
    path: Location,
    entries: Sequence[Entry],
    contents: Sequence[Content],
    unchanged: Container[tuple[bytes, int]],
) -> list[Entry]:
    """Put the leaves that are unchanged into files of their own, unless they are there already."""
    there = set(names(join(parent(path), SHARED)))
    found = []
    for entry, content in zip(entries, contents, strict=True):
        if content is not None and entry.nbytes >= MIN_SHARED:
            checksum = digest(content)
            if (checksum, entry.nbytes) in unchanged:
                # Uncompressed: its length follows from the leaf, so that a cut one is found out.
                entry = entry.replace(shared=True, offset=0, checksum=checksum, coding="")
                write_apart(path, entry, content, there)
        found.append(entry)
    return placed(found)


def write_apart(path: Location, entry: Entry, content: Tensor | bytes, there: set[str]) -> None:
    """Write the bytes of an entry to a file of its own in ``blocks/``, unless it is there.

    Args:
        path: the checkpoint beside which that directory is.
        entry: a leaf or a piece of one, with its checksum; shared.
        content: its bytes.
        there: the names of the files in that directory; gets the new one.
    """
    place = shared_place(path, entry)
    if entry.shared_name in there:
        with reading(place) as (_, length):
            if length == entry.nbytes:
                return
    with replacing(place) as file:
        written = write_block(file, entry, content)
        if written.checksum != entry.checksum:
            raise CheckpointError(
                f"{shown(path)}: {path_string(entry.keys)} was changed while it was "
                "being saved; take a lease on the state for so long"
            )
    there.add(entry.shared_name)


def _writer() -> dict[str, str]:
    from puretrain import __version__

    now = datetime.datetime.now(datetime.UTC)
    return {
        "puretrain": __version__,
        "torch": str(torch.__version__),
        "created": now.isoformat(timespec="seconds"),
    }


def _write_data(
    file: IO[bytes], entries: Sequence[Entry], contents: Sequence[Content]
) -> list[Entry]:
    """Write the blocks one after the other; returns the entries with their checksums."""
    written, end = [], 0
    for entry, content in zip(entries, contents, strict=True):
        if content is not None and entry.is_placed:
            file.write(bytes(aligned(end) - end))
            entry = write_block(file, entry.replace(offset=aligned(end)), content)
            end = entry.offset + entry.stored_nbytes
        written.append(entry)
    return written


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────


def load(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    only: str | None = None,
    mmap: bool = False,
    device: torch.device | str | None = None,
    checksums: bool = True,
    dtype: torch.dtype | None = None,
) -> Any:
    """Read a checkpoint.

    Large leaves of a file of this machine are read by up to four threads, a few leaves ahead.

    Args:
        path: the file, or a URL that fsspec knows.
        like: a tree with the node types of the result, for example a state that has not begun. The
            file must have the same leaves with the same dtypes and shapes, except below an open
            field of a record (see :func:`~puretrain.tree.field`): there it may have any, and what
            has other paths than the template comes as frozen dicts. The length of a 1-D uint8
            tensor is free, too. The leaves' values don't matter; they may be on the meta device.
            Without a template, mappings and records come as frozen dicts and sequences as tuples.
        only: read those leaves whose paths match this pattern (see
            :func:`~puretrain.tree.match_paths`), as a tree of frozen dicts.
        mmap: map the file instead of copying it; the tensors are views of private pages. Writing to
            them does not change the file. The file must not be truncated while they are in use, as
            reading a page that is gone kills the process (replacing it with :func:`save` is fine).
        device: where all tensors go; by default each goes to the device of its counterpart in
            ``like``, or to the CPU if there is none.
        checksums: compare every leaf with its checksum. False leaves that out, which makes sense
            with ``mmap``: nothing but the index is then read now. Header and index are always
            checked.
        dtype: convert floating-point tensors to this one.

    Raises:
        CheckpointError: the file can't be read, is damaged, or does not fit ``like``.
        PatternError: ``only`` matches no leaf.
        ConfigurationError: both ``like`` and ``only`` are given, or a URL is to be mapped.

    Example:
        >>> import tempfile, puretrain as pt
        >>> directory = tempfile.TemporaryDirectory()
        >>> path = f"{directory.name}/a.ckpt"
        >>> save(path, {"params": {"w": torch.ones(2), "b": torch.zeros(2)}, "step": 7})
        >>> load(path, only="params/*")
        {'params': {'b': f32[2], 'w': f32[2]}}
        >>> load(path, like={"params": {"w": torch.ones(2)}, "step": 0})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        puretrain.errors.CheckpointError: ...a.ckpt does not fit the template: params/b is only...
        >>> directory.cleanup()
    """
    if like is not None and only is not None:
        raise ConfigurationError("load takes a template (like=) or a pattern (only=), not both")
    if mmap and is_url(path):
        raise ConfigurationError(f"{shown(path)} can't be mapped: it is no file of this machine")
    name = shown(path)
    with opened(path) as (file, index):
        entries = index.entries
        if only is None:
            tree, devices = arrange(entries, like, name)
        else:
            tree, devices = select(entries, only), {}
        needed = {_holder(entries, number) for number in tree_leaves(tree)}
        blocks = [number for number in sorted(needed) if entries[number].kind in STORED]
        read = _map_blocks if mmap else _read_blocks
        contents: dict[int, Any] = {}
        whole = only is None  # a template asks for all blocks, too
        # Closed, so that no thread reads on when the file is closed.
        with closing(read(file, index, blocks, path, whole=whole, checksums=checksums)) as found:
            for number, content in found:
                if isinstance(content, Tensor):
                    to = dtype if content.is_floating_point() else None
                    content = content.to(device or devices.get(number, "cpu"), to)
                contents[number] = content
    return tree_map(lambda number: _leaf(entries, number, contents), tree)


def read_leaf(file: IO[bytes], index: Index, number: int, path: Location) -> Any:
    """Read one leaf of an open checkpoint, and check it."""
    holder = _holder(index.entries, number)
    blocks = [holder] if index.entries[holder].kind in STORED else []
    with reported(path, "read"):
        contents = dict(_read_blocks(file, index, blocks, path, whole=False, checksums=True))
    return _leaf(index.entries, number, contents)


def read_range_of(
    file: IO[bytes],
    index: Index,
    number: int,
    path: Location,
    dim: int,
    start: int,
    length: int,
    *,
    checksums: bool = True,
) -> Tensor:
    """Read a slice of a tensor of an open checkpoint; see :func:`puretrain.read_slice`.

    Raises:
        CheckpointError: the leaf is no tensor, or is damaged.
        ConfigurationError: the tensor has no such slice.
    """
    entry = index.entries[_holder(index.entries, number)]
    where = f"{shown(path)}: {path_string(index.entries[number].keys)}"
    if entry.kind != "tensor":
        raise CheckpointError(
            f"{where} is a {entry.kind}; only a tensor has slices: read it with load(…, only=)"
        )
    if not 0 <= dim < len(entry.shape) or not 0 <= start <= start + length <= entry.shape[dim]:
        raise ConfigurationError(
            f"{where} has the shape {list(entry.shape)}, and no slice of {length} from {start} on "
            f"along dimension {dim}"
        )
    with reported(path, "read"):
        content = read_range(file, index, entry, path, dim, start, length, checksums=checksums)
    return _finished(content, entry, shown(path))  # type: ignore[no-any-return]


def _holder(entries: Sequence[Entry], number: int) -> int:
    tied_to = entries[number].tied_to
    return number if tied_to is None else tied_to


def _leaf(entries: Sequence[Entry], number: int, contents: Mapping[int, Any]) -> Any:
    entry = entries[number]
    if entry.kind in EMPTY:
        return {"none": None, "map": FrozenDict(), "list": ()}[entry.kind]
    if entry.kind in STORED or entry.tied_to is not None:
        return contents[_holder(entries, number)]
    return entry.value


def _read_blocks(
    file: IO[bytes],
    index: Index,
    blocks: Sequence[int],
    path: Location,
    *,
    whole: bool,
    checksums: bool,
) -> Generator[tuple[int, Any], None, None]:
    """Read blocks into memory of their own; large ones a little ahead, by several threads."""
    position, name = index.data_offset, shown(path)
    entries = index.entries
    large = [n for n in blocks if entries[n].nbytes >= _LARGE and not entries[n].pieces]
    threads = min(_reading_threads(path), len(large))
    ahead = iter(large if threads > 1 else ())
    begun: dict[int, tuple[Any, Future[None]]] = {}
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for number in blocks:
            entry = entries[number]
            start = index.data_offset + entry.offset
            if whole and entry.is_placed:
                file.seek(position)
                _read_gap(file, position, start, name)
                position = start + entry.stored_nbytes
            while len(begun) <= threads and (other := next(ahead, None)) is not None:
                content, view = _memory_for(entries[other])
                arguments = index, entries[other], path, view, checksums
                begun[other] = content, pool.submit(_read_block, _Positioned(file), *arguments)
            if number in begun:
                content, done = begun.pop(number)
                done.result()
            elif entry.pieces and entry.dim is not None:
                n = entry.shape[entry.dim]
                content = read_range(file, index, entry, path, entry.dim, 0, n, checksums=checksums)
            else:
                content, view = _memory_for(entry)
                _read_block(file, index, entry, path, view, checksums)
            yield number, _finished(content, entry, name)


def _reading_threads(path: Location) -> int:
    """How many threads read a file: what is far away, and Windows, have one position in it."""
    if is_url(path) or not hasattr(os, "preadv"):
        return 1
    if sys.platform == "linux":
        return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return min(os.cpu_count() or 1, _MAX_THREADS)


class _Positioned:
    """An open file with a position of its own in it; it may be read by a thread of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._descriptor, self._position = file.fileno(), 0

    def seek(self, position: int) -> int:
        """As of a file."""
        self._position = position
        return position

    def tell(self) -> int:
        """As of a file."""
        return self._position

    def readinto(self, view: memoryview) -> int:
        """As of a file."""
        count = os.preadv(self._descriptor, [view], self._position)
        self._position += count
        return count


def _read_block(
    file: IO[bytes] | _Positioned,
    index: Index,
    entry: Entry,
    path: Location,
    view: memoryview,
    checksums: bool,
) -> None:
    """Read the bytes of a block into memory, and check them while they are in the cache."""
    hasher, name = xxhash.xxh3_128(), shown(path)
    with open_block(cast(IO[bytes], file), index, entry, path) as source:
        for i in range(0, entry.nbytes, CHUNK):
            chunk = view[i : i + CHUNK]
            provide(chunk)
            fill(source, chunk, name)
            if checksums:
                hasher.update(chunk)
    if checksums:
        check_block(hasher.digest(), index, entry, path)


def _map_blocks(
    file: IO[bytes],
    index: Index,
    blocks: Sequence[int],
    path: Location,
    *,
    whole: bool,
    checksums: bool,
) -> Generator[tuple[int, Any], None, None]:
    """Map blocks, as they lie in the file, into memory that is copied when it is written to."""
    mapped = memory_map.mmap(file.fileno(), index.file_length, access=memory_map.ACCESS_COPY)
    view = memoryview(mapped)
    position, name = index.data_offset, shown(path)
    for number in blocks:
        entry = index.entries[number]
        start = index.data_offset + entry.offset
        if whole and entry.is_placed:
            _check_gap(view[position:start], position, name)
            position = start + entry.stored_nbytes
        if entry.coding or entry.pieces:
            yield from _read_blocks(file, index, [number], path, whole=False, checksums=checksums)
            continue
        memory = mapped
        if entry.shared and entry.nbytes:
            with open_block(file, index, entry, path) as source:
                memory, start = (
                    memory_map.mmap(source.fileno(), entry.nbytes, access=memory_map.ACCESS_COPY),
                    0,
                )
        block = memoryview(memory)[start : start + entry.nbytes]
        if checksums:
            check_block(xxhash.xxh3_128_digest(block), index, entry, path)
        content: Any = block
        if entry.kind == "tensor":
            content = torch.empty(entry.shape if not entry.nbytes else 0, dtype=DTYPES[entry.dtype])
            if entry.nbytes:
                # Not a view of another tensor, as it would be after frombuffer and reshape.
                raw = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=start)
                content.set_(raw.untyped_storage(), 0, entry.shape)
        yield number, _finished(content, entry, name)


def _memory_for(entry: Entry) -> tuple[Any, memoryview]:
    """What the bytes of an entry are read into, and these bytes."""
    if entry.kind != "tensor":
        content = bytearray(entry.nbytes)
        return content, memoryview(content)
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return tensor, tensor_bytes(tensor)


def _finished(content: Any, entry: Entry, name: str) -> Any:
    """The leaf that an entry stands for, made of its bytes."""
    if entry.kind == "bytes":
        return bytes(content)
    if entry.kind == "str":
        return _decode(str, entry, name, content, "utf-8")
    if sys.byteorder == "big":  # pragma: no cover - no such machine runs the tests
        width = content.element_size() // (2 if content.is_complex() else 1)
        array = content.reshape(-1).view(torch.uint8).numpy().reshape(-1, width)
        array[:] = array[:, ::-1].copy()
    return content


def _decode(decode: Callable[..., str], entry: Entry, name: str, *arguments: Any) -> str:
    try:
        return decode(*arguments)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{name}: {path_string(entry.keys)} is no UTF-8 text: {error}"
        ) from None


def verify(path: str | os.PathLike[str]) -> None:
    """Read a checkpoint whole and check every byte of it. Needs next to no memory.

    Raises:
        CheckpointError: the file can't be read or is damaged; says where.
    """
    name = shown(path)
    with opened(path) as (file, index):
        scratch = memoryview(bytearray(CHUNK))
        position = index.data_offset
        for entry in index.entries:
            if entry.kind not in STORED:
                continue
            if entry.is_placed:
                start = index.data_offset + entry.offset
                file.seek(position)
                _read_gap(file, position, start, name)
                position = start + entry.stored_nbytes
            for block in entry.blocks:
                _verify_block(file, index, block, path, scratch)


def _verify_block(
    file: IO[bytes], index: Index, block: Entry, path: Location, scratch: memoryview
) -> None:
    name = shown(path)
    hasher, decoder = xxhash.xxh3_128(), codecs.getincrementaldecoder("utf-8")()
    with open_block(file, index, block, path) as source:
        for i in range(0, block.nbytes, CHUNK):
            chunk = scratch[: min(block.nbytes - i, CHUNK)]
            fill(source, chunk, name)
            hasher.update(chunk)
            if block.kind == "str":
                _decode(decoder.decode, block, name, chunk, i + len(chunk) == block.nbytes)
    check_block(hasher.digest(), index, block, path)


def read_index(path: str | os.PathLike[str]) -> Index:
    """Read what a checkpoint says of itself, without its tensors.

    Raises:
        CheckpointError: the file can't be read, or its header or index is damaged.

    Example:
        >>> import tempfile, puretrain as pt
        >>> directory = tempfile.TemporaryDirectory()
        >>> save(f"{directory.name}/a.ckpt", {"w": torch.ones(2, 3), "step": 7})
        >>> for leaf in read_index(f"{directory.name}/a.ckpt").leaves:
        ...     print(leaf.path, leaf.dtype, leaf.shape, leaf.nbytes)
        ('step',) int () 0
        ('w',) float32 (2, 3) 24
        >>> directory.cleanup()
    """
    with opened(path) as (_, index):
        return index


@contextmanager
def opened(path: Location) -> Iterator[tuple[IO[bytes], Index]]:
    """Open a file and read its index; leaves the file at the beginning of the data."""
    name = shown(path)
    with reported(path, "read"), reading(path) as (file, size):
        start = file.read(HEADER_LENGTH)
        header = decode_header(start, size, name)
        # The lengths are known to fit the file by now, so this takes no more than it has.
        content = bytearray(header.data_offset - HEADER_LENGTH)
        fill(file, content, name)
        yield file, decode_index(bytes(content), header, name)


def _read_gap(file: IO[bytes], start: int, end: int, name: str) -> None:
    gap = bytearray(end - start)
    fill(file, gap, name)
    _check_gap(gap, start, name)


def _check_gap(gap: bytearray | memoryview, start: int, name: str) -> None:
    if bytes(gap).strip(b"\0"):
        raise CheckpointError(
            f"{name}: the bytes {start:,} to {start + len(gap):,} between two leaves are not zero: "
            f"the file is damaged; {AGAIN}"
        )


# ── Choosing ──────────────────────────────────────────────────────────────────────────────────────


class Found(NamedTuple):
    """What :func:`find_checkpoint` found."""

    path: Path | str | None
    """The newest checkpoint that is whole, if there is one; at a URL, its URL."""
    damaged: tuple[tuple[Path | str, CheckpointError], ...]
    """Those that are damaged and may be newer, and what is wrong with each."""


def find_checkpoint(directory: str | os.PathLike[str]) -> Found:
    """Look for the newest checkpoint (``*.ckpt``) in a directory that is whole.

    Newest is the one with the largest step, which is the integer ``step`` of its metadata or else
    its leaf of that name; those without a step come after those with one, and among equals the time
    of the file's last change decides. They are read whole and verified, from the newest down.

    Returns:
        Its path (None if there is none, or no directory either), and which damaged ones were passed
        over: those that can't even say their step, and those with a larger one.

    Raises:
        CheckpointError: the directory can't be read.

    Example:
        >>> import tempfile, puretrain as pt
        >>> directory = tempfile.TemporaryDirectory()
        >>> for step in (9, 10):
        ...     save(f"{directory.name}/{step}.ckpt", {"step": step})
        >>> find_checkpoint(directory.name).path.name
        '10.ckpt'
        >>> with open(f"{directory.name}/10.ckpt", "r+b") as file:
        ...     _ = file.truncate(100)
        >>> found = find_checkpoint(directory.name)
        >>> found.path.name, [path.name for path, error in found.damaged]
        ('9.ckpt', ['10.ckpt'])
        >>> directory.cleanup()
    """
    ages: list[tuple[tuple[int, int], str]] = []
    damaged: list[tuple[Path | str, CheckpointError]] = []

    def note(path: str, error: CheckpointError) -> None:
        if file_name(path) in names(directory):  # or else a run that goes on has deleted it by now
            damaged.append((_named(path), error))

    for path in [os.fspath(path) for path in checkpoint_files(directory)]:
        try:
            ages.append((_age(path), path))
        except CheckpointError as error:
            note(path, error)
    for _, path in sorted(ages, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            note(path, error)
        else:
            return Found(_named(path), tuple(damaged))
    return Found(None, tuple(damaged))


def checkpoint_files(directory: str | os.PathLike[str]) -> list[Path | str]:
    """The files in a directory that are named as checkpoints, by name; at a URL, their URLs.

    Raises:
        CheckpointError: the directory can't be read.
    """
    with reported(directory, "read"):
        found = [name for name in names(directory) if name.endswith(".ckpt")]
    return [_named(join(directory, name)) for name in found]


def latest(directory: str | os.PathLike[str]) -> Path | str | None:
    """The newest checkpoint in a directory that is whole; see :func:`find_checkpoint`.

    Damaged checkpoints are passed over, with a warning that names each.

    Returns:
        The path (at a URL, the URL); None if there is none, or no directory either.

    Raises:
        CheckpointError: the directory can't be read.
    """
    found = find_checkpoint(directory)
    for _, error in found.damaged:
        warnings.warn(f"a damaged checkpoint is passed over: {error}", stacklevel=2)
    return found.path


def _named(path: str) -> Path | str:
    return path if is_url(path) else Path(path)


def _age(path: str) -> tuple[int, int]:
    index = read_index(path)
    step = index.metadata.get("step")
    for leaf in index.leaves:
        if type(step) is not int and leaf.path == ("step",) and leaf.shape == ():
            value = load(path, only="step")["step"]
            step = int(value) if isinstance(value, int) or _is_integer(value) else None
    with reported(path, "read"):
        changed = 0 if is_url(path) else os.stat(path).st_mtime_ns
    return (step if type(step) is int else -1), changed


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
