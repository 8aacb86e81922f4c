"""Checkpoint files: written atomically, read with every byte checked."""

from __future__ import annotations

import codecs
import contextlib
import datetime
import errno
import mmap as memory_map
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from puretrain.checkpoint.format import (
    DTYPES,
    EMPTY,
    HEADER_LENGTH,
    STORED,
    Entry,
    Index,
    decode_header,
    decode_index,
    encode_head,
    encode_index,
)
from puretrain.checkpoint.structure import Content, arrange, flatten, select
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import FrozenDict, path_string, tensor_bytes, tree_leaves, tree_map

__all__ = ["Found", "find_checkpoint", "load", "newest", "read_index", "save", "verify"]

# Bytes are hashed while they are still in the processor's cache; a megabyte at a time is copied of
# what is not in memory as it goes into the file. What is larger than the buffer bypasses it.
_CHUNK = 1 << 18
_PIECE = 1 << 20
_BUFFER = 1 << 16


# ── Saving ────────────────────────────────────────────────────────────────────────────────────────


def save(
    path: str | os.PathLike[str], tree: Any, *, metadata: Mapping[str, Any] | None = None
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
        path: the file; an existing one is replaced.
        tree: what to save, for example a :class:`~puretrain.TrainState`.
        metadata: further facts, to be found in ``read_index(path).metadata``: None, bool, int of 64
            bits, float, str, bytes, and lists and dicts of them.

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
    name = os.fspath(path)
    entries, contents = flatten(tree, name)
    writer = _writer()
    length = len(encode_index(entries, metadata or {}, writer, name))
    data_offset = len(encode_head(bytes(length), 0))
    try:
        with _replacing(Path(path)) as file:
            file.seek(data_offset)
            entries = _write_data(file, entries, contents)
            data_length = file.tell() - data_offset
            file.seek(0)
            index = encode_index(entries, metadata or {}, writer, name)
            file.write(encode_head(index, data_length))
    except OSError as error:
        raise CheckpointError(f"{name} can't be written: {_reason(error)}") from error


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
        if content is not None:
            file.write(bytes(entry.offset - end))
            hasher = xxhash.xxh3_128()
            for piece in _pieces(content):
                for start in range(0, len(piece), _CHUNK):
                    chunk = piece[start : start + _CHUNK]
                    hasher.update(chunk)
                    file.write(chunk)
            entry = entry.replace(checksum=hasher.digest())
            end = entry.offset + entry.nbytes
        written.append(entry)
    return written


def _pieces(content: Tensor | bytes) -> Iterator[memoryview]:
    """The bytes of a tensor in order; only what is not in memory like that is copied, in pieces."""
    if isinstance(content, bytes):
        yield memoryview(content)
        return
    tensor = content.detach()
    as_it_is = (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or sys.byteorder == "big")
    )
    nbytes = tensor.numel() * tensor.element_size()
    if as_it_is or nbytes <= _PIECE:
        yield tensor_bytes(tensor)
        return
    if tensor.is_contiguous():
        tensor = tensor.reshape(-1)
    rows = _PIECE * len(tensor) // nbytes
    for start in range(0, len(tensor), max(rows, 1)):
        yield from _pieces(tensor[start : start + rows] if rows else tensor[start])


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` when the block ends without an exception."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _make_directory(path.parent)
    temporary = path.with_name(f".puretrain-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with open(descriptor, "wb", buffering=_BUFFER) as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def _make_directory(path: Path) -> None:
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    if os.name == "nt":  # pragma: no cover - Windows has no such thing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that can't, and needn't, do this
            raise
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    where = f": {error.filename}" if error.filename is not None else ""
    return (error.strerror or str(error)) + where


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────


def load(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    only: str | None = None,
    mmap: bool = False,
    device: torch.device | str | None = None,
    checksums: bool = True,
) -> Any:
    """Read a checkpoint.

    Args:
        path: the file.
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

    Raises:
        CheckpointError: the file can't be read, is damaged, or does not fit ``like``.
        PatternError: ``only`` matches no leaf.
        ConfigurationError: both ``like`` and ``only`` are given.

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
    name = os.fspath(path)
    with _reading(path) as (file, index):
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
        for number, content in read(file, index, blocks, name, whole=whole, checksums=checksums):
            if isinstance(content, Tensor):
                content = content.to(device or devices.get(number, "cpu"))
            contents[number] = content
    return tree_map(lambda number: _leaf(entries, number, contents), tree)


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
    file: IO[bytes], index: Index, blocks: Sequence[int], name: str, *, whole: bool, checksums: bool
) -> Iterator[tuple[int, Any]]:
    """Read blocks into memory of their own."""
    position = index.data_offset
    for number in blocks:
        entry = index.entries[number]
        start = index.data_offset + entry.offset
        if whole:
            _read_gap(file, position, start, name)
        else:
            file.seek(start)
        position = start + entry.nbytes
        content, view = _memory_for(entry)
        hasher = xxhash.xxh3_128()
        for i in range(0, entry.nbytes, _CHUNK):
            _fill(file, view[i : i + _CHUNK], name)
            if checksums:
                hasher.update(view[i : i + _CHUNK])
        if checksums:
            _check_digest(hasher.digest(), entry, index, name)
        yield number, _finished(content, entry, name)


def _map_blocks(
    file: IO[bytes], index: Index, blocks: Sequence[int], name: str, *, whole: bool, checksums: bool
) -> Iterator[tuple[int, Any]]:
    """Map blocks, as they lie in the file, into memory that is copied when it is written to."""
    mapped = memory_map.mmap(file.fileno(), index.file_length, access=memory_map.ACCESS_COPY)
    view = memoryview(mapped)
    position = index.data_offset
    for number in blocks:
        entry = index.entries[number]
        start = index.data_offset + entry.offset
        if whole:
            _check_gap(view[position:start], position, name)
        position = start + entry.nbytes
        if checksums:
            _check_digest(xxhash.xxh3_128_digest(view[start:position]), entry, index, name)
        content: Any = view[start:position]
        if entry.kind == "tensor":
            content = torch.empty(entry.shape if not entry.nbytes else 0, dtype=DTYPES[entry.dtype])
            if entry.nbytes:
                # Not a view of another tensor, as it would be after frombuffer and reshape.
                raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.nbytes, offset=start)
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
    name = os.fspath(path)
    with _reading(path) as (file, index):
        scratch = memoryview(bytearray(_CHUNK))
        position = index.data_offset
        for entry in index.entries:
            if entry.kind not in STORED:
                continue
            start = index.data_offset + entry.offset
            _read_gap(file, position, start, name)
            position = start + entry.nbytes
            hasher, decoder = xxhash.xxh3_128(), codecs.getincrementaldecoder("utf-8")()
            for i in range(0, entry.nbytes, _CHUNK):
                chunk = scratch[: min(entry.nbytes - i, _CHUNK)]
                _fill(file, chunk, name)
                hasher.update(chunk)
                if entry.kind == "str":
                    _decode(decoder.decode, entry, name, chunk, i + len(chunk) == entry.nbytes)
            _check_digest(hasher.digest(), entry, index, name)


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
    with _reading(path) as (_, index):
        return index


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], Index]]:
    """Open a file and read its index; leaves the file at the beginning of the data."""
    name = os.fspath(path)
    try:
        with open(path, "rb", buffering=0, opener=_opener) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{name} can't be read: it is no regular file")
            start = file.read(HEADER_LENGTH)
            header = decode_header(start, status.st_size, name)
            # The lengths are known to fit the file by now, so this takes no more than it has.
            content = bytearray(header.data_offset - HEADER_LENGTH)
            _fill(file, content, name)
            yield file, decode_index(bytes(content), header, name)
    except OSError as error:
        raise CheckpointError(f"{name} can't be read: {_reason(error)}") from error


def _opener(path: str, flags: int) -> int:
    # Opening a pipe would wait for its other end.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _fill(file: IO[bytes], buffer: bytearray | memoryview, name: str) -> None:
    """Read as many bytes as a buffer holds."""
    view = memoryview(buffer)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]  # an unbuffered file has it
        if not count:
            raise CheckpointError(
                f"{name}: the file ends at byte {file.tell():,}: it became shorter while being read"
            )
        view = view[count:]


def _read_gap(file: IO[bytes], start: int, end: int, name: str) -> None:
    gap = bytearray(end - start)
    _fill(file, gap, name)
    _check_gap(gap, start, name)


def _check_gap(gap: bytearray | memoryview, start: int, name: str) -> None:
    if bytes(gap).strip(b"\0"):
        raise CheckpointError(
            f"{name}: the bytes {start:,} to {start + len(gap):,} between two leaves are not zero: "
            "the file is damaged"
        )


def _check_digest(digest: bytes, entry: Entry, index: Index, name: str) -> None:
    if digest != entry.checksum:
        start = index.data_offset + entry.offset
        raise CheckpointError(
            f"{name}: {path_string(entry.keys)} (bytes {start:,} to {start + entry.nbytes:,}) is "
            "damaged: its checksum is wrong"
        )


# ── Choosing ──────────────────────────────────────────────────────────────────────────────────────


class Found(NamedTuple):
    """What :func:`find_checkpoint` found."""

    path: Path | None
    """The newest checkpoint that is whole, if there is one."""
    damaged: tuple[tuple[Path, CheckpointError], ...]
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
    try:
        paths = [path for path in Path(directory).iterdir() if path.suffix == ".ckpt"]
    except FileNotFoundError:
        return Found(None, ())
    except OSError as error:
        raise CheckpointError(f"{os.fspath(directory)} can't be read: {_reason(error)}") from error
    ages, damaged = [], []

    def note(path: Path, error: CheckpointError) -> None:
        if path.exists():  # or else a run that goes on has deleted it by now
            damaged.append((path, error))

    for path in sorted(paths):
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
            return Found(path, tuple(damaged))
    return Found(None, tuple(damaged))


def newest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a directory that is whole; see :func:`find_checkpoint`.

    Damaged checkpoints are passed over, with a warning that names each.

    Returns:
        The path; None if there is none, or no directory either.

    Raises:
        CheckpointError: the directory can't be read.
    """
    found = find_checkpoint(directory)
    for _, error in found.damaged:
        warnings.warn(f"a damaged checkpoint is passed over: {error}", stacklevel=2)
    return found.path


def _age(path: Path) -> tuple[int, int]:
    index = read_index(path)
    step = index.metadata.get("step")
    for leaf in index.leaves:
        if type(step) is not int and leaf.path == ("step",) and leaf.shape == ():
            value = load(path, only="step")["step"]
            step = int(value) if isinstance(value, int) or _is_integer(value) else None
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {_reason(error)}") from error
    return (step if type(step) is int else -1), changed


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
