"""The bytes of a leaf: as they are or compressed, in a checkpoint or in a file beside it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from puretrain.checkpoint.format import AGAIN, Entry, Index
from puretrain.checkpoint.places import Location, join, parent, reading, reported, shown
from puretrain.checkpoint.structure import Content
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import path_string, tensor_bytes

__all__ = [
    "CHUNK",
    "SHARED",
    "check_block",
    "coded",
    "digest",
    "fill",
    "open_block",
    "provide",
    "shared_place",
    "write_block",
]

# Bytes are hashed while they are still in the processor's cache; a megabyte at a time is copied of
# what is not in memory as it goes into the file.
CHUNK = 1 << 18
_PIECE = 1 << 20
_SAMPLE = 1 << 16
_WORTH_PROVIDING = 1 << 16  # what is smaller is mostly memory that was there before
_POPULATE_WRITE = 23  # of madvise; the module mmap has no name for it
_LEVEL = 3

SHARED = "blocks"
"""The directory beside checkpoints that has the files which several of them use."""


def chunks(content: Tensor | bytes) -> Iterator[memoryview]:
    """The bytes of a leaf in order, a little at a time."""
    for piece in _pieces(content):
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]


def _pieces(content: Tensor | bytes, scratch: Tensor | None = None) -> Iterator[memoryview]:
    """The bytes of a tensor in order; only what is not in memory like that is copied, in pieces.

    A piece is good until the next one is asked for.
    """
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
        if scratch is not None and not as_it_is:
            # The same memory for all of them: an allocator needn't reuse what was just given back.
            tensor = scratch[:nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        yield tensor_bytes(tensor)
        return
    if scratch is None:
        scratch = torch.empty(_PIECE, dtype=torch.uint8)
    if tensor.is_contiguous():
        tensor = tensor.reshape(-1)
    rows = _PIECE * len(tensor) // nbytes
    for start in range(0, len(tensor), max(rows, 1)):
        yield from _pieces(tensor[start : start + rows] if rows else tensor[start], scratch)


def digest(content: Tensor | bytes) -> bytes:
    """XXH3-128 of the bytes of a leaf."""
    hasher = xxhash.xxh3_128()
    for chunk in chunks(content):
        hasher.update(chunk)
    return hasher.digest()


# ── Compression ───────────────────────────────────────────────────────────────────────────────────


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigurationError(
            "compression='zstd' needs the package zstandard: pip install 'puretrain[zstd]'"
        ) from error
    return zstandard


def coded(entries: Sequence[Entry], contents: Sequence[Content]) -> list[Entry]:
    """Choose the leaves that are worth compressing: a sample of them gets smaller by a tenth."""
    compressor = _zstandard().ZstdCompressor(level=_LEVEL)
    chosen = []
    for entry, content in zip(entries, contents, strict=True):
        if isinstance(content, Tensor) and entry.nbytes >= 1024:
            sample = bytes(next(chunks(content))[:_SAMPLE])
            if len(compressor.compress(sample)) <= 0.9 * len(sample):
                entry = entry.replace(coding="zstd")
        chosen.append(entry)
    return chosen


class _Inflated:
    """The bytes of a compressed block, to be read in order; it ends where the entry says."""

    def __init__(self, stored: bytes, entry: Entry, name: str) -> None:
        self._reader = _zstandard().ZstdDecompressor().stream_reader(io.BytesIO(stored))
        self._entry, self._name = entry, name
        self._left = entry.nbytes

    def readinto(self, view: memoryview) -> int:
        """As of a file."""
        try:
            count = int(self._reader.readinto(view))
            self._left -= count
            too_long = not self._left and self._reader.read(1)
        except _zstandard().ZstdError as error:
            raise CheckpointError(self._damaged(str(error))) from None
        if too_long or not count:
            raise CheckpointError(self._damaged("it has another length"))
        return count

    def tell(self) -> int:
        """As of a file."""
        return int(self._entry.nbytes - self._left)

    def _damaged(self, reason: str) -> str:
        leaf = path_string(self._entry.keys)
        return f"{self._name}: {leaf} can't be decompressed: {reason}; {AGAIN}"


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def write_block(file: IO[bytes], entry: Entry, content: Tensor | bytes) -> Entry:
    """Write the bytes of a leaf; returns the entry with what has become known."""
    hasher = xxhash.xxh3_128()
    if not entry.coding:
        for chunk in chunks(content):
            hasher.update(chunk)
            file.write(chunk)
        return entry.replace(checksum=hasher.digest())
    coded_hasher, length = xxhash.xxh3_128(), 0
    compressor = _zstandard().ZstdCompressor(level=_LEVEL).compressobj(size=entry.nbytes)

    def put(data: bytes) -> None:
        nonlocal length
        coded_hasher.update(data)
        length += len(data)
        file.write(data)

    for chunk in chunks(content):
        hasher.update(chunk)
        put(compressor.compress(chunk))
    put(compressor.flush())
    return entry.replace(
        checksum=hasher.digest(), coded_nbytes=length, coded_checksum=coded_hasher.digest()
    )


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def shared_place(path: Location, entry: Entry) -> str:
    """Where the bytes of a leaf are that a checkpoint shares with others."""
    return join(parent(path), SHARED, entry.shared_name)


@contextlib.contextmanager
def open_block(file: IO[bytes], index: Index, entry: Entry, path: Location) -> Iterator[IO[bytes]]:
    """Something to read the bytes of a leaf from, from the first on.

    Args:
        file: the checkpoint, open.
        index: its index.
        entry: the leaf.
        path: where the checkpoint is.
    """
    with contextlib.ExitStack() as stack:
        name, start = shown(path), index.data_offset + entry.offset
        if entry.shared:
            place, start = shared_place(path, entry), 0
            name = shown(place)
            stack.enter_context(reported(place, "read"))
            try:
                file, length = stack.enter_context(reading(place))
            except FileNotFoundError:
                raise CheckpointError(
                    f"{shown(path)}: {entry.label} is in a file that is not there: "
                    f"{name}. The directory {SHARED!r} belongs to the checkpoints beside it; "
                    "`puretrain convert` makes one that stands on its own"
                ) from None
            if length != entry.stored_nbytes:
                raise CheckpointError(
                    f"{name} is damaged: it has {length:,} bytes, and {shown(path)} expects "
                    f"{entry.stored_nbytes:,} for {entry.label}; {AGAIN}"
                )
        file.seek(start)
        if not entry.coding:
            yield file
            return
        stored = bytearray(entry.coded_nbytes)
        fill(file, stored, name)
        _check_digest(
            xxhash.xxh3_128_digest(stored), entry.coded_checksum, entry, name, start, len(stored)
        )
        yield _Inflated(bytes(stored), entry, name)  # type: ignore[misc]  # as much of a file as is used


def fill(file: IO[bytes], buffer: bytearray | memoryview, name: str) -> None:
    """Read as many bytes as a buffer holds."""
    view = memoryview(buffer)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]  # an unbuffered file has it
        if not count:
            raise CheckpointError(
                f"{name}: the file ends at byte {file.tell():,}: it became shorter while being "
                f"read; {AGAIN}"
            )
        view = view[count:]


def provide(buffer: memoryview) -> None:
    """Have the memory of a buffer there, because all of it is going to be written to.

    Memory that a process has not had before comes page by page, each when it is first written to,
    and such an interruption takes longer than copying the page's bytes. Linux can give many pages
    at once. (Huge pages would need fewer still. But a virtual machine whose host takes back free
    memory must wait for it to come again, which took up to five times as long as small pages.)
    """
    if sys.platform == "linux" and buffer.nbytes >= _WORTH_PROVIDING:
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        before = start % mmap.PAGESIZE
        # A kernel before 5.14 refuses, and the pages come one by one.
        _madvise()(start - before, before + buffer.nbytes, _POPULATE_WRITE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def check_block(found: bytes, index: Index, entry: Entry, path: Location) -> None:
    """Raise CheckpointError unless a checksum is that of a leaf, or of a piece of one."""
    name = shown(shared_place(path, entry) if entry.shared else path)
    start = 0 if entry.shared else index.data_offset + entry.offset
    _check_digest(found, entry.checksum, entry, name, start, entry.stored_nbytes)


def _check_digest(
    found: bytes, expected: bytes, entry: Entry, name: str, start: int, length: int
) -> None:
    if found != expected:
        raise CheckpointError(
            f"{name}: {entry.label} (bytes {start:,} to {start + length:,}) is damaged: its "
            f"checksum is wrong; {AGAIN}"
        )
