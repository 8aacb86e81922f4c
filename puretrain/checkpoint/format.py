"""The bytes of a checkpoint: header and index, encoded and strictly decoded.

``docs/checkpoint-format.md`` specifies them. Nothing here opens a file or touches a tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import msgpack
import torch
import xxhash

from puretrain.errors import CheckpointError
from puretrain.tree import FrozenDict, Record, field, path_string

__all__ = ["DTYPES", "Entry", "Header", "Index", "Piece"]

VERSION = 1
HEADER_LENGTH = 64
ALIGNMENT = 64
CHECKSUM_LENGTH = 16

# The limits keep a lying file from costing memory or time; what save writes stays within them.
MAX_GAP = 1 << 16
MAX_INDEX_LENGTH = 1 << 26
MAX_ENTRY_LENGTH = 1 << 16
MAX_METADATA_LENGTH = 1 << 20
MAX_ITEMS = 1 << 16
MAX_DEPTH = 100
MAX_DIMENSIONS = 64
MAX_INTEGER_LENGTH = 1 << 10

# The first byte is no ASCII and the line ends are of both kinds, so that a transfer which changes
# text or strips the eighth bit is found out; the byte 26 ends a text file that is typed on Windows.
MAGIC = b"\x89PTC\r\n\x1a\n"
AGAIN = "copy it again, or load another checkpoint"  # what to do about a damaged file
_HEADER = struct.Struct("<8sIIQQQ16s")

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        "float4_e2m1fn_x2",
    )
}
"""The element types that a file may have, by their names in the file."""

STORED = frozenset({"tensor", "str", "bytes"})
"""The kinds of entries whose content is bytes, in the data or in a file of its own."""
EMPTY = frozenset({"none", "map", "list"})
"""The kinds of entries that are no leaves."""
FEATURES = frozenset({"pieces", "shared", "zstd"})
"""What an index may require of its reader; ``docs/checkpoint-format.md``."""
# Zstandard makes 128 KiB of four bytes at best: no block can claim to hold more.
MAX_EXPANSION = 1 << 15
_VALUES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int, bytes), "float": (float,)}


class Piece(NamedTuple):
    """A part of a tensor, between two places of one dimension, in a file of its own."""

    start: int
    """Where it begins along the dimension."""
    length: int
    """How long it is along the dimension, at least 1."""
    nbytes: int
    """How many bytes it has."""
    checksum: bytes
    """XXH3-128 of these bytes."""


class Entry(Record):
    """What the index of a checkpoint says of one leaf, or of a node without leaves."""

    keys: tuple[str | int, ...] = field(static=True)
    """The keys that lead to it from the root: names in a mapping, positions in a sequence."""
    kind: str = field(static=True)
    """``tensor``, ``tied``, ``bool``, ``int``, ``float``, ``str`` or ``bytes``; for a node without
    leaves ``none``, ``map`` or ``list``."""
    dtype: str = field(static=True, default="")
    """The element type of a tensor, such as ``float32``; for other leaves their kind."""
    shape: tuple[int, ...] = field(static=True, default=())
    """The shape of a tensor."""
    offset: int = field(static=True, default=0)
    """Where its bytes begin, counted from the beginning of the data; of a piece, where it begins
    along its dimension."""
    nbytes: int = field(static=True, default=0)
    """How many bytes it has; none if it is tied or its value is in the index."""
    checksum: bytes = field(static=True, default=b"")
    """XXH3-128 of these bytes."""
    value: bool | int | float | None = field(static=True, default=None)
    """The value of a bool, an int or a float."""
    tied_to: int | None = field(static=True, default=None)
    """For a tensor that occurs twice: the number of the entry that holds it."""
    coding: str = field(static=True, default="")
    """How the bytes are stored: ``zstd``, or empty for as they are."""
    coded_nbytes: int = field(static=True, default=0)
    """With a coding: how many bytes are stored."""
    coded_checksum: bytes = field(static=True, default=b"")
    """With a coding: XXH3-128 of what is stored."""
    shared: bool = field(static=True, default=False)
    """Whether the bytes are in a file beside this one, which other checkpoints use as well."""
    dim: int | None = field(static=True, default=None)
    """The dimension along which the tensor is cut, if it is stored in pieces."""
    pieces: tuple[Piece, ...] = field(static=True, default=())
    """The pieces, in order; then there is no checksum of the whole."""

    @property
    def is_placed(self) -> bool:
        """Whether the bytes are in the data of this file."""
        return self.kind in STORED and not self.shared and not self.pieces

    @property
    def blocks(self) -> tuple[Entry, ...]:
        """What the bytes are read from: an entry for each piece, or this one."""
        return tuple(map(self._piece, self.pieces)) if self.pieces else (self,)

    def _piece(self, piece: Piece) -> Entry:
        shape = list(self.shape)
        shape[self.dim or 0] = piece.length
        return self.replace(
            shape=tuple(shape),
            offset=piece.start,
            nbytes=piece.nbytes,
            checksum=piece.checksum,
            shared=True,
            pieces=(),
        )

    @property
    def label(self) -> str:
        """The path, for messages; of a piece also which part of the tensor it is."""
        path = path_string(self.keys)
        if self.dim is None or self.pieces:
            return path
        start, end = self.offset, self.offset + self.shape[self.dim]
        return f"the piece of {path} from {start:,} to {end:,} along dimension {self.dim}"

    @property
    def stored_nbytes(self) -> int:
        """How many bytes are stored, here or in a shared file."""
        return self.coded_nbytes if self.coding else self.nbytes

    @property
    def shared_name(self) -> str:
        """The name of the shared file: it follows from the content."""
        suffix = self.coding or "raw"
        return f"{self.checksum.hex()}-{self.nbytes}.{suffix}"

    @property
    def path(self) -> tuple[str, ...]:
        """The keys as strings."""
        return tuple(map(str, self.keys))


class Index(Record):
    """What a checkpoint says of itself, without the tensors; see :func:`read_index`."""

    version: int = field(static=True)
    """The version of the format."""
    file_length: int = field(static=True)
    """The length of the file in bytes."""
    data_offset: int = field(static=True)
    """Where the data begin in the file."""
    writer: Mapping[str, Any] = field(static=True)
    """What wrote the file and when: versions of puretrain and torch, time of creation in UTC."""
    metadata: Mapping[str, Any] = field(static=True)
    """What the caller of :func:`save` gave."""
    entries: tuple[Entry, ...] = field(static=True)
    """All leaves and all nodes without leaves, in the order of the tree."""

    @property
    def requires(self) -> frozenset[str]:
        """The features beyond version 1 that a reader must know."""
        return required(self.entries)

    @property
    def leaves(self) -> tuple[Entry, ...]:
        """The entries that are leaves."""
        return tuple(entry for entry in self.entries if entry.kind not in EMPTY)


class Header(NamedTuple):
    """The fixed first bytes of a file."""

    index_length: int
    data_offset: int
    file_length: int
    index_checksum: bytes


# ── Encoding ──────────────────────────────────────────────────────────────────────────────────────


def aligned(offset: int) -> int:
    """The smallest multiple of the alignment that is not below an offset."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def placed(entries: Iterable[Entry]) -> list[Entry]:
    """Give entries their places in the data, one after the other."""
    found, end = [], 0
    for entry in entries:
        if entry.is_placed:
            entry = entry.replace(offset=aligned(end))
            end = entry.offset + entry.stored_nbytes
        found.append(entry)
    return found


def required(entries: Iterable[Entry]) -> frozenset[str]:
    """The features of :data:`FEATURES` that entries use."""
    found: set[str] = set()
    for entry in entries:
        found |= {
            entry.coding,
            "shared" if entry.shared else "",
            "pieces" if entry.pieces else "",
        }
    return frozenset(found - {""})


def encode_index(
    entries: Sequence[Entry], metadata: Mapping[str, Any], writer: Mapping[str, Any], name: str
) -> bytes:
    """Write an index; its length does not depend on checksums, nor, with a coding, on places.

    Args:
        entries: in the order of the tree; without a checksum, zeros stand in its place.
        metadata: string keys, plain values.
        writer: string keys, plain values.
        name: the file, for errors.

    Raises:
        CheckpointError: a limit is exceeded, or the metadata are not plain.
    """
    packed = []
    needed = required(entries)
    for entry in entries:
        packed.append(_pack_entry(entry, wide="zstd" in needed))
        if len(packed[-1]) > MAX_ENTRY_LENGTH:
            path = path_string(entry.keys)
            reason = f"the path {path[:80]}… is too long"
            if entry.pieces:
                reason = f"{path[:80]} has too many pieces, {len(entry.pieces):,}"
            raise CheckpointError(
                f"{name}: {reason}: its entry has {len(packed[-1]):,} bytes, of at most "
                f"{MAX_ENTRY_LENGTH:,}"
            )
    packed_metadata = _pack(_plain(metadata, ("metadata",), name))
    if len(packed_metadata) > MAX_METADATA_LENGTH:
        raise CheckpointError(
            f"{name}: the metadata have {len(packed_metadata):,} bytes, of at most "
            f"{MAX_METADATA_LENGTH:,}; put large things into the tree"
        )
    packer = msgpack.Packer()
    content = b"".join(
        (
            packer.pack_map_header(4),
            *(packer.pack("requires"), packer.pack(sorted(needed))),
            *(packer.pack("writer"), packer.pack(writer)),
            *(packer.pack("metadata"), packed_metadata),
            *(packer.pack("entries"), packer.pack_array_header(len(packed)), *packed),
        )
    )
    if len(content) > MAX_INDEX_LENGTH:
        raise CheckpointError(
            f"{name}: the index of {len(packed):,} leaves has {len(content):,} bytes, of at most "
            f"{MAX_INDEX_LENGTH:,}; save the tree in several files"
        )
    return content


def encode_head(index: bytes, data_length: int) -> bytes:
    """Write everything in front of the data: header, index, and zeros up to the alignment."""
    data_offset = aligned(HEADER_LENGTH + len(index))
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        0,
        len(index),
        data_offset,
        data_offset + data_length,
        xxhash.xxh3_128_digest(index),
    )
    head = header + xxhash.xxh3_64_digest(header) + index
    return head.ljust(data_offset, b"\0")


def _entry_fields(entry: Entry) -> dict[str, Any]:
    fields: dict[str, Any] = {"path": entry.keys, "kind": entry.kind}
    if entry.kind == "tensor":
        fields |= {"dtype": entry.dtype, "shape": entry.shape}
    if entry.pieces:
        fields |= {"size": entry.nbytes, "dim": entry.dim, "pieces": [*map(list, entry.pieces)]}
    elif entry.kind in STORED:
        checksum = entry.checksum or bytes(CHECKSUM_LENGTH)
        place = {"shared": True} if entry.shared else {"offset": entry.offset}
        fields |= {**place, "size": entry.nbytes, "xxh3": checksum}
    if entry.coding:
        fields |= {"coding": entry.coding, "coded_size": entry.coded_nbytes}
        fields["coded_xxh3"] = entry.coded_checksum or bytes(CHECKSUM_LENGTH)
    if entry.kind in _VALUES:
        value: Any = entry.value
        if type(value) is int and not -(2**63) <= value < 2**64:
            value = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        fields["value"] = value
    if entry.kind == "tied":
        fields["to"] = entry.tied_to
    return fields


def _pack_entry(entry: Entry, *, wide: bool) -> bytes:
    fields = _entry_fields(entry)
    if not wide:
        return _pack(fields)
    # How well something compresses is known when it has been written, but the index stands in front
    # and must have its length before.
    packed: bytes = msgpack.Packer().pack_map_header(len(fields))
    for key, value in fields.items():
        packed += _pack(key)
        is_wide = key in {"offset", "coded_size"}
        packed += b"\xcf" + value.to_bytes(8, "big") if is_wide else _pack(value)
    return packed


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _plain(value: Any, where: tuple[str, ...], name: str) -> Any:
    """Metadata as what msgpack packs: dicts, lists and scalars."""
    kind = type(value)
    if isinstance(value, Mapping) or kind in {list, tuple}:
        if len(value) > MAX_ITEMS or len(where) > MAX_DEPTH:
            raise CheckpointError(
                f"{name}: {path_string(where[:8])} has more than {MAX_ITEMS:,} items or is nested "
                f"deeper than {MAX_DEPTH}; put large things into the tree"
            )
        if not isinstance(value, Mapping):
            return [_plain(item, (*where, str(i)), name) for i, item in enumerate(value)]
        for key in value:
            if type(key) is not str or not is_text(key):
                raise CheckpointError(
                    f"{name}: {path_string(where)} has the key {key!r}; metadata have string keys"
                )
        return {key: _plain(item, (*where, key), name) for key, item in value.items()}
    if kind is int and not -(2**63) <= value < 2**64:
        raise CheckpointError(
            f"{name}: {path_string(where)} is an integer of more than 64 bits; write it as a string"
        )
    if kind is str and not is_text(value):
        raise CheckpointError(
            f"{name}: {path_string(where)} is {value!r}, which is no Unicode "
            "text; write it as bytes"
        )
    if value is not None and kind not in {bool, int, float, str, bytes}:
        raise CheckpointError(
            f"{name}: {path_string(where)} is a {kind.__name__}; metadata are None, bool, int, "
            "float, str, bytes, and lists and dicts of them; put tensors into the tree"
        )
    return value


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: a lone surrogate can't."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# ── Decoding ──────────────────────────────────────────────────────────────────────────────────────


def decode_header(content: bytes, size: int, name: str) -> Header:
    """Read the header and check that it fits the file.

    Args:
        content: the first bytes of the file, :data:`HEADER_LENGTH` of them or the whole file.
        size: the length of the file in bytes.
        name: the file, for errors.

    Raises:
        CheckpointError: the file is no checkpoint, has another version, is truncated or damaged.
    """

    def fail(message: str) -> NoReturn:
        raise CheckpointError(f"{name}: {message}")

    if size == 0:
        fail(f"the file is empty; {AGAIN}")
    if content[:8] != MAGIC[: len(content)]:
        fail(_foreign(content))
    if len(content) < HEADER_LENGTH:
        fail(
            f"the file is truncated: it has {size} bytes, and the header alone {HEADER_LENGTH}; "
            f"{AGAIN}"
        )
    fields = _HEADER.unpack_from(content)
    _, version, reserved, index_length, data_offset, file_length, index_checksum = fields
    if version != VERSION:
        fail(
            f"the file has version {version} of the format, this puretrain reads version {VERSION}"
            + ("; install a newer puretrain" if version > VERSION else "")
        )
    if xxhash.xxh3_64_digest(content[: _HEADER.size]) != content[_HEADER.size :]:
        fail(f"the header (bytes 0 to {HEADER_LENGTH}) is damaged: its checksum is wrong; {AGAIN}")
    if size < file_length:
        fail(f"the file is truncated: it has {size:,} bytes of {file_length:,}; {AGAIN}")
    if size > file_length:
        more = size - file_length
        count = "1 byte" if more == 1 else f"{more:,} bytes"
        fail(f"the file has {count} behind its end at byte {file_length:,}; {AGAIN}")
    index_end = HEADER_LENGTH + index_length
    if (
        reserved
        or index_length > MAX_INDEX_LENGTH
        or data_offset % ALIGNMENT
        or not 0 <= data_offset - index_end < MAX_GAP
        or data_offset > file_length
    ):
        fail(
            f"the header is invalid: the index of {index_length:,} bytes and the data from byte "
            f"{data_offset:,} on don't fit the format or the file of {size:,} bytes; {AGAIN}"
        )
    return Header(index_length, data_offset, file_length, index_checksum)


def _foreign(content: bytes) -> str:
    if content[:4] == MAGIC[:4] or content[1:4] == MAGIC[1:4]:
        return (
            "the first bytes are damaged, as by a transfer that changes line ends: copy the file "
            "in binary mode"
        )
    convert = "; `puretrain convert` makes one of it"
    if content.startswith(b"PK\3\4"):
        kind = f"a zip archive, as torch.save, numpy.savez and Lightning write it{convert}"
    elif content.startswith(b"\x80") and content[1:2] in {b"\2", b"\3", b"\4", b"\5"}:
        kind = f"a pickle{convert}"
    elif content[8:10] == b'{"':
        kind = f"a safetensors file{convert}"
    else:
        kind = f"something else, which begins with {content[:8]!r}"
    return f"this is no puretrain checkpoint but {kind}"


def decode_index(content: bytes, header: Header, name: str) -> Index:
    """Read an index and check all that it says: against itself, the limits, and the file's length.

    The memory that this takes is bounded by a small multiple of the length of the index.

    Args:
        content: the index, then the zeros up to the data.
        header: the header of the same file.
        name: the file, for errors.

    Raises:
        CheckpointError: the index is damaged or invalid, or asks for a feature that is not known.
    """
    where = f"{name}: the index (bytes {HEADER_LENGTH} to {HEADER_LENGTH + header.index_length:,})"
    content, padding = content[: header.index_length], content[header.index_length :]
    if xxhash.xxh3_128_digest(content) != header.index_checksum:
        raise CheckpointError(f"{where} is damaged: its checksum is wrong; {AGAIN}")
    if padding.strip(b"\0"):
        raise CheckpointError(f"{where} is not followed by zeros: the file is damaged; {AGAIN}")
    try:
        found = _unpack_index(content)
        entries = found["entries"]
        if required(entries) != set(found["requires"]):
            raise ValueError("what it requires is not what its entries use")
        nest(entries)
        _check_placement(entries, header)
    except (ValueError, OverflowError, msgpack.UnpackException) as error:
        # what msgpack says of an end before its time is nothing at all
        reason = str(error) or "it ends in the middle of a value"
        raise CheckpointError(f"{where} is invalid: {reason}; {AGAIN}") from None
    return Index(
        VERSION,
        header.file_length,
        header.data_offset,
        FrozenDict(found["writer"]),
        FrozenDict(found["metadata"]),
        entries,
    )


def _unpack_index(content: bytes) -> dict[str, Any]:
    # Each part is measured before it is unpacked. A decoder that is let loose on the whole would
    # turn one byte into an object of 64, and reserve what an array claims to hold.
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(content), 1))
    unpacker.feed(content)

    def take(what: str, limit: int, kind: type) -> Any:
        start = unpacker.tell()
        unpacker.skip()
        end = unpacker.tell()
        if end - start > limit:
            raise ValueError(f"{what} has {end - start:,} bytes, of at most {limit:,}")
        value = msgpack.unpackb(
            content[start:end],
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            list_hook=_plain_list,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )
        if type(value) is not kind:
            raise ValueError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    if not content:
        raise ValueError("it is empty")
    found: dict[str, Any] = {}
    for number in range(unpacker.read_map_header()):
        key = take("a key", MAX_ENTRY_LENGTH, str)
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        if (number == 0) != (key == "requires"):
            raise ValueError("'requires' must be its first key")
        found[key] = None
        if key == "requires":
            needed = take(key, MAX_ENTRY_LENGTH, list)
            unknown = [x for x in needed if type(x) is not str or x not in FEATURES]
            if unknown:
                shown = ", ".join(map(str, unknown[:8]))
                raise ValueError(
                    f"reading it requires {shown}, which this puretrain does not know; "
                    "install a newer one"
                )
            found[key] = needed
        elif key in {"writer", "metadata"}:
            found[key] = take(key, MAX_METADATA_LENGTH, dict)
        elif key == "entries":
            count = unpacker.read_array_header()
            found[key] = _decode_entries(
                take(f"entry {i}", MAX_ENTRY_LENGTH, dict) for i in range(count)
            )
        else:
            unpacker.skip()
    if unpacker.tell() != len(content):
        raise ValueError(f"it has {len(content) - unpacker.tell():,} bytes too many")
    for key in ("requires", "writer", "metadata", "entries"):
        if key not in found:
            raise ValueError(f"it has no {key!r}")
    return found


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a map has a key twice")
    if not all(type(key) is str for key in mapping):
        raise ValueError("a map has a key that is no string")
    _plain_list(list(mapping.values()))
    return mapping


def _plain_list(values: list[Any]) -> list[Any]:
    if any(type(value) in {msgpack.ExtType, msgpack.Timestamp} for value in values):
        raise ValueError("it has an extension of msgpack")
    return values


def _decode_entries(found: Iterable[dict[str, Any]]) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for number, fields in enumerate(found):
        try:
            entries.append(_decode_entry(fields, entries))
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
    if not entries:
        raise ValueError("it has no entries")
    return tuple(entries)


def _decode_entry(fields: dict[str, Any], before: Sequence[Entry]) -> Entry:
    def take(key: str, *kinds: type) -> Any:
        if type(fields.get(key)) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"its {key!r} is {fields.get(key)!r:.80}, not {expected}")
        return fields[key]

    keys = tuple(take("path", list))
    for key in keys:
        if type(key) is not str and (type(key) is not int or key < 0):
            raise ValueError(f"its path has the key {key!r:.80}")
    if len(keys) > MAX_DEPTH:
        raise ValueError(f"its path has {len(keys)} keys, of at most {MAX_DEPTH}")
    kind = take("kind", str)
    if kind in EMPTY:
        return Entry(keys, kind)
    if kind in _VALUES:
        value = take("value", *_VALUES[kind])
        if isinstance(value, bytes):
            if not 0 < len(value) <= MAX_INTEGER_LENGTH:
                raise ValueError(f"its value has {len(value)} bytes")
            value = int.from_bytes(value, "little", signed=True)
        return Entry(keys, kind, kind, value=value)
    if kind == "tied":
        target = take("to", int)
        if not 0 <= target < len(before) or before[target].kind != "tensor":
            raise ValueError(f"{path_string(keys)} is tied to entry {target}, no tensor before it")
        held = before[target]
        return Entry(keys, kind, held.dtype, held.shape, tied_to=target)
    if kind not in STORED:
        raise ValueError(f"{path_string(keys)} is of the kind {kind!r:.80}, which is not known")
    if kind == "tensor":
        return _decode_tensor(fields, keys, take)
    nbytes, checksum, extra = _decode_stored(fields, keys, take)
    offset = 0 if extra["shared"] else take("offset", int)
    return Entry(keys, kind, kind, (), offset, nbytes, checksum, **extra)


def _decode_tensor(
    fields: dict[str, Any], keys: tuple[str | int, ...], take: Callable[..., Any]
) -> Entry:
    nbytes, checksum, offset = take("size", int), b"", 0
    extra: dict[str, Any] = {}
    if "pieces" not in fields:
        nbytes, checksum, extra = _decode_stored(fields, keys, take)
        offset = 0 if extra["shared"] else take("offset", int)
    dtype, shape = take("dtype", str), tuple(take("shape", list))
    if dtype not in DTYPES:
        raise ValueError(f"{path_string(keys)} has the unknown dtype {dtype!r:.80}")
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{path_string(keys)} has the shape {shape!r:.80}")
    width = DTYPES[dtype].itemsize
    # the strides of an empty tensor must not overflow either
    if math.prod(max(n, 1) for n in shape) * width >= 2**63 or nbytes != math.prod(shape) * width:
        raise ValueError(f"{path_string(keys)}: {dtype} of shape {shape} in {nbytes:,} bytes")
    if "pieces" in fields:
        extra = _decode_pieces(fields, keys, shape, nbytes, take)
    return Entry(keys, "tensor", dtype, shape, offset, nbytes, checksum, **extra)


def _decode_pieces(
    fields: dict[str, Any],
    keys: tuple[str | int, ...],
    shape: tuple[int, ...],
    nbytes: int,
    take: Callable[..., Any],
) -> dict[str, Any]:
    where = path_string(keys)
    dim, found = take("dim", int), take("pieces", list)
    others = sorted({"offset", "shared", "xxh3", "coding"} & fields.keys())
    if others:
        raise ValueError(f"{where} is in pieces and has {', '.join(others)} as well")
    if not 0 <= dim < len(shape) or not nbytes:
        raise ValueError(f"{where}: a tensor of shape {shape} can't be cut along dimension {dim}")
    width, end, pieces = nbytes // shape[dim], 0, []
    for number, piece in enumerate(found):
        kinds = [type(part) for part in piece] if type(piece) is list else []
        if kinds != [int, int, int, bytes] or len(piece[3]) != CHECKSUM_LENGTH:
            raise ValueError(f"{where}: its piece {number} is {piece!r:.80}")
        start, length, size, checksum = piece
        if start != end or length < 1 or length > shape[dim] - start or size != length * width:
            raise ValueError(
                f"{where}: its piece {number} has {size:,} bytes and is {length:,} long from "
                f"{start:,} on, where the piece before ends at {end:,} of {shape[dim]:,}"
            )
        pieces.append(Piece(start, length, size, checksum))
        end += length
    if end != shape[dim]:
        raise ValueError(f"{where}: its pieces end at {end:,} of {shape[dim]:,}")
    return {"dim": dim, "pieces": tuple(pieces)}


def _decode_stored(
    fields: dict[str, Any], keys: tuple[str | int, ...], take: Callable[..., Any]
) -> tuple[int, bytes, dict[str, Any]]:
    nbytes, checksum = take("size", int), take("xxh3", bytes)
    extra: dict[str, Any] = {"shared": "shared" in fields and take("shared", bool)}
    if "coding" in fields:
        extra |= {"coding": take("coding", str), "coded_nbytes": take("coded_size", int)}
        extra["coded_checksum"] = take("coded_xxh3", bytes)
        if extra["coding"] != "zstd":
            raise ValueError(f"{path_string(keys)} has the coding {extra['coding']!r:.80}")
        if not 0 < nbytes <= extra["coded_nbytes"] * MAX_EXPANSION:
            raise ValueError(
                f"{path_string(keys)}: {nbytes:,} bytes in {extra['coded_nbytes']:,} compressed"
            )
    if any(len(x) != CHECKSUM_LENGTH for x in (checksum, extra.get("coded_checksum", checksum))):
        raise ValueError(f"{path_string(keys)} has a checksum of another length")
    return nbytes, checksum, extra


def _check_placement(entries: Iterable[Entry], header: Header) -> None:
    # Every byte of the file then belongs to exactly one block, or to a gap that must be zero.
    end, length = 0, header.file_length - header.data_offset
    for entry in entries:
        if entry.kind in STORED and entry.nbytes < 0:
            raise ValueError(f"{path_string(entry.keys)} has {entry.nbytes:,} bytes")
        if not entry.is_placed:
            continue
        if entry.offset % ALIGNMENT or not 0 <= entry.offset - end < MAX_GAP:
            raise ValueError(
                f"{path_string(entry.keys)} has {entry.nbytes:,} bytes from byte {entry.offset:,} "
                f"of the data on, where the block before ends at {end:,}"
            )
        end = entry.offset + entry.stored_nbytes
        if end > length:
            raise ValueError(
                f"{path_string(entry.keys)} ends at byte {end:,} of the {length:,} bytes of data"
            )
    if end != length:
        raise ValueError(f"there are {length:,} bytes of data, and the last block ends at {end:,}")


def nest(entries: Iterable[Entry]) -> Any:
    """Build the tree of dicts and lists that the paths of entries describe.

    Its leaves are the numbers of the entries. The entries must come in the order of the tree, depth
    first, and positions count from 0: there is one index for each tree, and no path occurs twice.

    Raises:
        ValueError: the paths describe no tree.
    """
    top: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        node: Any = top
        keys: tuple[str | int, ...] = ("", *entry.keys)
        for depth, key in enumerate(keys):
            final = depth == len(keys) - 1
            child = _child(node, key)
            if child is _NOWHERE or (final and child is not None):
                raise ValueError(f"entry {number}: {path_string(entry.keys)} is not in its place")
            if final:
                child = number
            elif child is None:
                child = [] if type(keys[depth + 1]) is int else {}
            if type(node) is list and key == len(node):
                node.append(child)
            else:
                node[key] = child
            node = child
    return top[""]


_NOWHERE = object()


def _child(node: Any, key: str | int) -> Any:
    """The last child of a node if that has the key, None where the key can be added."""
    if type(node) is dict and type(key) is str:
        if key not in node:
            return None
        return node[key] if next(reversed(node)) == key else _NOWHERE
    if type(node) is list and type(key) is int and len(node) - 1 <= key <= len(node):
        return node[key] if key < len(node) else None
    return _NOWHERE
