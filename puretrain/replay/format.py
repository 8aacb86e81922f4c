"""The bytes of a journal: records that delimit themselves, see ``docs/journal-format.md``."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import msgpack
import xxhash

from puretrain.errors import JournalError

__all__ = ["HEADER", "Damage", "Scan", "encode", "scan"]

_MAGIC = b"PTJOURNL"
VERSION = 1
HEADER = _MAGIC + struct.pack("<II", VERSION, 0)
_SYNC = b"\xf5rec"
_HEAD = struct.Struct("<4sIQ")  # sync mark, length of the content, checksum
_LARGEST = 1 << 26
_PACKER = msgpack.Packer()  # each has a buffer of its own, which takes longer than a record

# Kinds of records: the first element of each.
SEGMENT, COLUMNS, LEAVES, STEP, EVENT = range(5)


class Damage(NamedTuple):
    """A stretch of a journal that holds no whole record."""

    offset: int
    """Where it begins, in bytes from the start of the file."""
    length: int
    """How many bytes."""
    tail: bool
    """Whether it reaches to the end of the file, as an unfinished last record does."""


class Scan(NamedTuple):
    """What is in a journal's bytes."""

    records: list[tuple[int, list[Any]]]
    """The offset and the content of each record that is whole."""
    damage: tuple[Damage, ...]
    """What is between and after them."""
    end: int
    """Where the next record goes: after the last whole one."""


def encode(record: list[Any], offset: int) -> bytes:
    """The bytes of a record that is to stand at an offset."""
    content: bytes = _PACKER.pack(record)
    length = len(content)
    if length > _LARGEST:
        raise JournalError(
            f"a record of the journal would have {length} bytes, which is more "
            f"than {_LARGEST}; report fewer or smaller metrics"
        )
    return _HEAD.pack(_SYNC, length, _checksum(content, offset)) + content


def _checksum(content: bytes, offset: int) -> int:
    # With the offset as the seed, a record that got to another place is none.
    return xxhash.xxh3_64_intdigest(content, seed=offset)


def scan(data: bytes, name: str) -> Scan:
    """Find the records in the bytes of a journal, and what is damaged.

    Args:
        data: the whole file. Nothing, or less than a header, is a journal without records.
        name: the name of the file, for an error.

    Raises:
        JournalError: it is no journal, of another version, or a record with a right checksum has a
            content that no writer of this version makes.
    """
    if len(data) < len(HEADER):
        if not HEADER.startswith(data):
            raise JournalError(f"{name} is no journal: it does not begin with {_MAGIC!r}")
        torn = (Damage(0, len(data), True),) if data else ()
        return Scan([], torn, 0)
    if not data.startswith(_MAGIC):
        raise JournalError(f"{name} is no journal: it does not begin with {_MAGIC!r}")
    version, reserved = struct.unpack_from("<II", data, len(_MAGIC))
    if version != VERSION or reserved:
        raise JournalError(
            f"{name} is a journal of version {version} (flags {reserved}), or its header is "
            f"damaged; this puretrain reads version {VERSION}"
        )
    records: list[tuple[int, list[Any]]] = []
    damage: list[Damage] = []
    place = end = len(HEADER)
    while place < len(data):
        content = _content(data, place)
        if content is None:
            place = data.find(_SYNC, place + 1)
            if place < 0:
                break
            continue
        if place > end:
            damage.append(Damage(end, place - end, False))
        records.append((place, _decode(content, place, name)))
        place = end = place + _HEAD.size + len(content)
    if end < len(data):
        damage.append(Damage(end, len(data) - end, True))
    return Scan(records, tuple(damage), end)


def _content(data: bytes, place: int) -> bytes | None:
    """The content of the record at a place, if a whole one is there."""
    if len(data) - place < _HEAD.size:
        return None
    sync, length, checksum = _HEAD.unpack_from(data, place)
    start = place + _HEAD.size
    if sync != _SYNC or length > _LARGEST or length > len(data) - start:
        return None
    content = data[start : start + length]
    return content if _checksum(content, place) == checksum else None


def _decode(content: bytes, place: int, name: str) -> list[Any]:
    try:
        record = msgpack.unpackb(content, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise JournalError(f"{name}: the record at byte {place} is not msgpack: {error}") from None
    if not isinstance(record, list) or len(record) < 3 or type(record[0]) is not int:
        raise JournalError(f"{name}: the record at byte {place} is none of this version")
    return record
