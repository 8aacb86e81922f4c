"""Parts of tensors: tensors that are stored in pieces, and slices of what is stored in any way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import IO, NamedTuple

import torch
import xxhash
from torch import Tensor

from puretrain.checkpoint.blocks import CHUNK, check_block, fill, open_block, provide
from puretrain.checkpoint.format import DTYPES, Entry, Index
from puretrain.checkpoint.places import Location, shown

__all__ = ["read_range"]


class _Part(NamedTuple):
    """What is needed of a block: its elements between two places of a dimension."""

    block: Entry
    dim: int
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        """Whether all of the block is needed."""
        return self.end - self.start == self.block.shape[self.dim]

    @property
    def span(self) -> tuple[int, int]:
        """The bytes of the block that have to be in memory at once, to take these elements."""
        shape = self.block.shape
        if self.is_whole or math.prod(shape[: self.dim]) != 1:
            return 0, self.block.nbytes
        row = self.block.nbytes // shape[self.dim]
        return self.start * row, self.end * row


def read_range(
    file: IO[bytes],
    index: Index,
    entry: Entry,
    path: Location,
    dim: int,
    start: int,
    length: int,
    *,
    checksums: bool,
) -> Tensor:
    """Read the elements of a tensor between two places of a dimension.

    Of a tensor in pieces only those pieces are looked at that have such elements.

    Args:
        file: the checkpoint, open.
        index: its index.
        entry: the tensor.
        path: where the checkpoint is.
        dim: the dimension, from 0.
        start: the first place along it.
        length: how many.
        checksums: compare every block that is looked at with its checksum, for which it is read to
            its end. False reads no more bytes than lie between the elements in question.

    Returns:
        A tensor like the one that is stored, but ``length`` long in dimension ``dim``.
    """
    parts = [
        (part, place)
        for part, place in _parts(entry, dim, start, start + length)
        if part.block.nbytes and part.start < part.end
    ]
    if entry.pieces:
        # A lie about the size is found out before memory is taken for it.
        for part, _ in parts:
            with open_block(file, index, part.block, path):
                pass
    shape = (*entry.shape[:dim], length, *entry.shape[dim + 1 :])
    result = torch.empty(shape, dtype=DTYPES[entry.dtype])
    dims = sorted({dim, dim if entry.dim is None else entry.dim})
    target = _folded(result.reshape(-1).view(torch.uint8), shape, dims, result.element_size())
    for part, place in parts:
        where = target
        for d, begin, size in place:
            where = where.narrow(1 + 2 * dims.index(d), begin, size)
        _read_part(file, index, part, path, where, dims, checksums=checksums)
    return result


def _parts(
    entry: Entry, dim: int, start: int, end: int
) -> Iterator[tuple[_Part, list[tuple[int, int, int]]]]:
    """What is needed of each block, and where it goes: dimension, start and length."""
    for block in entry.blocks:
        if not entry.pieces or entry.dim is None:
            yield _Part(block, dim, start, end), []
        elif entry.dim != dim:
            place = [(entry.dim, block.offset, block.shape[entry.dim])]
            yield _Part(block, dim, start, end), place
        else:
            first = max(start, block.offset)
            last = min(end, block.offset + block.shape[dim])
            part = _Part(block, dim, first - block.offset, last - block.offset)
            yield part, [(dim, first - start, last - first)]


def _folded(raw: Tensor, shape: tuple[int, ...], dims: list[int], width: int) -> Tensor:
    """Bytes as a tensor of few dimensions: those in question, and all between them as one each."""
    sizes, before = [], 0
    for d in dims:
        sizes += [math.prod(shape[before:d]), shape[d]]
        before = d + 1
    return raw.view(*sizes, math.prod(shape[before:]) * width)


def _read_part(
    file: IO[bytes],
    index: Index,
    part: _Part,
    path: Location,
    target: Tensor,
    dims: list[int],
    *,
    checksums: bool,
) -> None:
    block, (first, last) = part.block, part.span
    shape = list(block.shape)
    is_narrowed = not part.is_whole and last - first == block.nbytes
    if not is_narrowed:
        shape[part.dim] = part.end - part.start
    direct = target.is_contiguous() and not is_narrowed
    raw = target.view(-1) if direct else torch.empty(last - first, dtype=torch.uint8)
    _read_span(file, index, block, path, memoryview(raw.numpy()), first, checksums=checksums)  # type: ignore[arg-type]  # numpy's stubs hide the buffer protocol
    if direct:
        return
    found = _folded(raw, tuple(shape), dims, DTYPES[block.dtype].itemsize)
    if is_narrowed:
        found = found.narrow(1 + 2 * dims.index(part.dim), part.start, part.end - part.start)
    target.copy_(found)


def _read_span(
    file: IO[bytes],
    index: Index,
    block: Entry,
    path: Location,
    view: memoryview,
    first: int,
    *,
    checksums: bool,
) -> None:
    """Read the bytes of a block from ``first`` on, as many as a buffer holds."""
    name, last = shown(path), first + len(view)
    with open_block(file, index, block, path) as source:
        if not checksums and not block.coding:
            source.seek(first, 1)
            for i in range(0, len(view), CHUNK):
                provide(view[i : i + CHUNK])
                fill(source, view[i : i + CHUNK], name)
            return
        hasher = xxhash.xxh3_128()
        scratch = memoryview(bytearray(CHUNK if len(view) < block.nbytes else 0))
        position = 0
        while position < (block.nbytes if checksums else last):
            if position < first:
                chunk = scratch[: min(CHUNK, first - position)]
            elif position < last:
                chunk = view[position - first :][:CHUNK]
                provide(chunk)
            else:
                chunk = scratch[: min(CHUNK, block.nbytes - position)]
            fill(source, chunk, name)
            hasher.update(chunk)
            position += len(chunk)
        if checksums:
            check_block(hasher.digest(), index, block, path)
