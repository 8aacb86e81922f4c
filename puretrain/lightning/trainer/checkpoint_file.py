"""The file ``.ckpt``: torch's zip container, with an index of ours over the same bytes.

``torch.save`` writes the checkpoint, so that ``torch.load`` reads it. One more record, named
``puretrain.index``, says in msgpack what the checkpoint is: its dicts, lists and plain values, and
for each tensor the record that holds its bytes, and a checksum. :func:`read` looks at nothing else,
so nothing of a file is ever unpickled. A file without that record comes from Lightning itself and
is read by torch's weights-only unpickler.
"""

from __future__ import annotations

import argparse
import collections
import io
import math
import os
import pathlib
import pickle
import secrets
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import torch
import xxhash
from torch import Tensor

from puretrain.checkpoint.format import DTYPES
from puretrain.errors import CheckpointError
from puretrain.lightning.utilities import cloud_io

__all__ = ["Opaque", "read", "write"]

_RECORD = "puretrain.index"
_FORMAT = 1
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TUPLE, _TENSOR, _INTEGER, _PAIRS, _OPAQUE, _TAGGED = range(1, 7)


class Opaque:
    """Stands for a value that is no plain data, and that was therefore not read."""

    def __init__(self, kind: str) -> None:
        """Remember the type's name."""
        self.kind = kind

    def __repr__(self) -> str:
        return f"<not read: {self.kind}>"


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def write(path: Any, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint to a file, all of it or nothing; or to an open file.

    Args:
        path: a path or a binary file; directories are made.
        checkpoint: a dict. Tensors and plain values are indexed, other values are only pickled.

    Raises:
        CheckpointError: the file can't be written.
    """
    if hasattr(path, "write"):
        content = io.BytesIO()
        _write(content, checkpoint)
        path.write(content.getvalue())
        return
    target = pathlib.Path(path)
    temporary = target.with_name(f".puretrain-{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            _write(file, checkpoint)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target} can't be written: {error}") from error
        raise


def _write(file: Any, checkpoint: Mapping[str, Any]) -> None:
    storages = _Storages()
    storages.dump(checkpoint)
    torch.save(checkpoint, file)
    file.seek(0)
    tensors: list[dict[str, Any]] = []
    tree = _encode(checkpoint, tensors, storages)
    hashes: dict[str, bytes] = {}
    for entry in tensors:
        key = entry["record"]
        if key not in hashes:
            hashes[key] = storages.checksum(key)
        entry["xxh3"] = hashes[key]
    content = msgpack.packb({"format": _FORMAT, "tree": tree, "tensors": tensors})
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        top = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{top}/{_RECORD}", xxhash.xxh3_128_digest(content) + content)


class _Storages(pickle.Pickler):
    """Finds out in which order, and so under which names, ``torch.save`` writes storages."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=2)
        self.keys: dict[int, str] = {}
        self.storages: dict[str, Any] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            obj = obj._untyped_storage
        elif not torch.is_storage(obj):
            return None
        key = self.keys.setdefault(obj._cdata, str(len(self.keys)))
        self.storages[key] = obj
        return "storage", key

    def checksum(self, key: str) -> bytes:
        storage = self.storages[key].cpu()
        view = torch.empty(0, dtype=torch.uint8).set_(storage)
        return xxhash.xxh3_128_digest(memoryview(view.numpy()))


def _encode(value: Any, tensors: list[dict[str, Any]], storages: _Storages) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        if -(2**63) <= value < 2**64:
            return value
        return msgpack.ExtType(_INTEGER, str(value).encode())
    if isinstance(value, Tensor):
        return _encode_tensor(value, tensors, storages)
    if isinstance(value, list):
        return [_encode(item, tensors, storages) for item in value]
    if isinstance(value, dict):
        if all(type(key) is str for key in value):
            return {key: _encode(item, tensors, storages) for key, item in value.items()}
        pairs = [
            [_encode(key, tensors, storages), _encode(item, tensors, storages)]
            for key, item in value.items()
        ]
        return msgpack.ExtType(_PAIRS, msgpack.packb(pairs))
    if kind is tuple or kind is torch.Size:
        items = [_encode(item, tensors, storages) for item in value]
        return msgpack.ExtType(_TUPLE, msgpack.packb(items))
    tagged = _tagged(value)
    if tagged is not None:
        content = [tagged[0], _encode(tagged[1], tensors, storages)]
        return msgpack.ExtType(_TAGGED, msgpack.packb(content))
    return msgpack.ExtType(_OPAQUE, f"{kind.__module__}.{kind.__qualname__}".encode())


def _tagged(value: Any) -> tuple[str, Any] | None:
    """Values of the standard library, numpy and torch that are plain under another type."""
    if isinstance(value, argparse.Namespace):
        return "namespace", dict(vars(value))
    if isinstance(value, pathlib.PurePath):
        return "path", str(value)
    if isinstance(value, np.generic):
        return "number", value.item() if value.dtype.kind in "biuf" else str(value)
    if isinstance(value, torch.dtype):
        return "dtype", str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return "device", str(value)
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, list(value)
    if isinstance(value, range):
        return "range", [value.start, value.stop, value.step]
    if isinstance(value, collections.deque):
        return "list", list(value)
    if isinstance(value, complex):
        return "complex", [value.real, value.imag]
    if isinstance(value, (bool, int, float, str)):  # a subclass, such as an enum of strings
        return "number", {bool: bool, int: int, float: float, str: str}[
            next(t for t in (bool, int, float, str) if isinstance(value, t))
        ](value.value if hasattr(value, "value") else value)
    return None


def _encode_tensor(tensor: Tensor, tensors: list[dict[str, Any]], storages: _Storages) -> Any:
    storage = tensor.untyped_storage() if tensor.layout is torch.strided else None
    key = None if storage is None else storages.keys.get(storage._cdata)
    if key is None or tensor.dtype not in _NAMES:
        return msgpack.ExtType(_OPAQUE, f"a tensor of {tensor.dtype}, {tensor.layout}".encode())
    tensors.append(
        {
            "record": key,
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
        }
    )
    number = len(tensors) - 1
    return msgpack.ExtType(_TENSOR, msgpack.packb([number, isinstance(tensor, torch.nn.Parameter)]))


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def read(path: Any, map_location: Any = None, *, weights_only: bool | None = None) -> Any:
    """Read a checkpoint of this package or of Lightning.

    Args:
        path: a path or an open binary file.
        map_location: where to put the tensors, as for ``torch.load``.
        weights_only: False unpickles everything, which runs code that the file names.

    Raises:
        CheckpointError: the file can't be read, is damaged, or holds more than plain values.
    """
    name = getattr(path, "name", "the file") if hasattr(path, "read") else os.fspath(path)
    if weights_only is False:
        return torch.load(path, map_location=map_location, weights_only=False)
    if not hasattr(path, "read") and "://" in str(name):
        path = cloud_io.open_binary(name)
    elif not hasattr(path, "read") and not os.path.isfile(path):
        raise FileNotFoundError(f"Checkpoint at {name} not found. Aborting.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [each for each in archive.namelist() if each.endswith("/" + _RECORD)]
            if len(names) == 1:
                return _read(archive, names[0], str(name), map_location)
    except (zipfile.BadZipFile, EOFError) as error:
        if hasattr(path, "read"):
            path.seek(0)
        if _is_zip(path):
            raise CheckpointError(f"{name} is damaged: {error}") from error
    if hasattr(path, "seek"):
        path.seek(0)
    try:
        return cloud_io.load(path, map_location=map_location)
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler on bytes that are none raises anything
        raise CheckpointError(
            f"{name} is no checkpoint, or is damaged: {type(error).__name__}: {error}"
        ) from error


def _is_zip(path: Any) -> bool:
    if hasattr(path, "read"):
        start = path.read(4)
        path.seek(0)
        return bool(start == b"PK\3\4")
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def _read(archive: zipfile.ZipFile, record: str, name: str, map_location: Any) -> Any:
    content = archive.read(record)
    digest, content = content[:16], content[16:]
    if xxhash.xxh3_128_digest(content) != digest:
        raise CheckpointError(f"{name}: the index is damaged: its checksum is wrong")
    try:
        index = msgpack.unpackb(content, strict_map_key=False)
        if index["format"] != _FORMAT:
            raise CheckpointError(
                f"{name}: the index has version {index['format']}, this puretrain reads {_FORMAT}"
            )
        top = record.split("/", maxsplit=1)[0]
        storages: dict[str, Tensor] = {}
        tensors = [_tensor(archive, top, e, storages, name, map_location) for e in index["tensors"]]
        return _decode(index["tree"], tensors)
    except (KeyError, TypeError, ValueError, IndexError, msgpack.UnpackException) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name}: the index is invalid: {error!r}") from error


def _tensor(
    archive: zipfile.ZipFile,
    top: str,
    entry: Mapping[str, Any],
    storages: dict[str, Tensor],
    name: str,
    map_location: Any,
) -> Tensor:
    key = str(entry["record"])
    if key not in storages:
        record = f"{top}/data/{key}"
        info = archive.getinfo(record)
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{name}: {record} is compressed")
        raw = torch.empty(info.file_size, dtype=torch.uint8)
        if info.file_size:
            with archive.open(info) as stream:
                stream._update_crc = lambda data: None  # ours is checked instead, and is faster
                view = memoryview(raw.numpy())
                done = 0
                while done < info.file_size:
                    count = stream.readinto(view[done:])
                    if not count:
                        raise CheckpointError(f"{name}: {record} ends too early")
                    done += count
        if xxhash.xxh3_128_digest(memoryview(raw.numpy())) != entry["xxh3"]:
            raise CheckpointError(f"{name}: {record} is damaged: its checksum is wrong")
        storages[key] = raw
    raw = storages[key]
    dtype = DTYPES[entry["dtype"]]
    shape, stride, offset = entry["shape"], entry["stride"], entry["offset"]
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    empty = math.prod(shape) == 0
    if not empty and (min((0, offset, *stride)) < 0 or (last + 1) * dtype.itemsize > raw.numel()):
        raise CheckpointError(f"{name}: a tensor of {entry['dtype']} {shape} leaves its record")
    if empty:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        whole = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        tensor = whole.as_strided(shape, stride, offset)
        if sys.byteorder == "big":  # pragma: no cover - no such machine runs the tests
            raise CheckpointError(f"{name}: reading needs a little-endian machine")
    device = map_location
    if callable(map_location) or isinstance(map_location, Mapping):
        device = None
        if callable(map_location):
            moved = map_location(tensor, "cpu")
            tensor = moved if isinstance(moved, Tensor) else tensor
    return tensor if device is None else tensor.to(device)


def _decode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, msgpack.ExtType):
        return value
    if value.code == _INTEGER:
        return int(value.data)
    if value.code == _OPAQUE:
        return Opaque(value.data.decode())
    content = msgpack.unpackb(value.data, strict_map_key=False)
    if value.code == _TENSOR:
        number, is_parameter = content
        tensor = tensors[number]
        return torch.nn.Parameter(tensor) if is_parameter else tensor
    if value.code == _TUPLE:
        return tuple(_decode(item, tensors) for item in content)
    if value.code == _PAIRS:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    if value.code == _TAGGED:
        tag, inner = content
        return _TAGS[tag](_decode(inner, tensors))
    raise ValueError(f"unknown type {value.code}")


def _dtype(name: str) -> torch.dtype:
    return DTYPES[name]


_TAGS: dict[str, Any] = {
    "namespace": lambda items: argparse.Namespace(**items),
    "path": pathlib.Path,
    "number": lambda number: number,
    "dtype": _dtype,
    "device": torch.device,
    "set": set,
    "frozenset": frozenset,
    "range": lambda ends: range(*ends),
    "list": list,
    "complex": lambda parts: complex(*parts),
}
