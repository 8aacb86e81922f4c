"""The state of a foreign source as bytes: plain values only, in msgpack, never pickle."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from puretrain.errors import DataError
from puretrain.tree import path_string

__all__ = ["pack", "unpack"]

# What msgpack has no type for travels as an extension: its code and its content, packed again.
_TUPLE, _LARGE_INT, _TENSOR, _ARRAY = range(4)


def pack(state: Any) -> Tensor:
    """Write a state as bytes.

    Plain are None, numbers, strings, bytes, lists, tuples and dicts of them, and the tensors and
    numpy arrays in which random generators keep their state.

    Returns:
        uint8 of shape ``(n,)``.

    Raises:
        DataError: a value is not plain; names its key.

    >>> unpack(pack({"read": 3, "generator": (1, 2**100)}))
    {'read': 3, 'generator': (1, 1267650600228229401496703205376)}
    """
    return torch.frombuffer(bytearray(_packb(_encode(state, ()))), dtype=torch.uint8)


def unpack(content: Tensor) -> Any:
    """Read back what :func:`pack` has written.

    Raises:
        DataError: the bytes were not written by :func:`pack`.
    """
    try:
        return _unpackb(content.numpy().tobytes())
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise DataError(
            f"cursor.source holds {content.numel()} bytes that are no state of "
            f"a source: {error}. Begin with Cursor()"
        ) from None


def _packb(value: Any) -> bytes:
    content: bytes = msgpack.packb(value, strict_types=True)
    return content


def _unpackb(content: bytes) -> Any:
    return msgpack.unpackb(content, strict_map_key=False, ext_hook=_decode)


def _encode(value: Any, path: tuple[Any, ...]) -> Any:
    kind = type(value)
    if kind is int and not -(2**63) <= value < 2**64:
        return msgpack.ExtType(_LARGE_INT, str(value).encode())
    if value is None or kind in (bool, int, float, str, bytes):
        return value
    if kind is list:
        return [_encode(item, (*path, i)) for i, item in enumerate(value)]
    if kind is tuple:
        items = [_encode(item, (*path, i)) for i, item in enumerate(value)]
        return msgpack.ExtType(_TUPLE, _packb(items))
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise DataError(f"{_where(path)} has the key {key!r}; use strings or integers")
        return {key: _encode(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.dtype != torch.bfloat16:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind in "biufc":
            content = [array.dtype.str, list(array.shape), array.tobytes()]
            code = _TENSOR if isinstance(value, Tensor) else _ARRAY
            return msgpack.ExtType(code, _packb(content))
    raise DataError(
        f"{_where(path)} is a {kind.__name__}, which can't be kept in a cursor; keep numbers, "
        "strings, bytes, lists, tuples, dicts, tensors or numpy arrays in the source's state_dict"
    )


def _where(path: tuple[Any, ...]) -> str:
    return f"the source's state: {path_string(path)}" if path else "the source's state"


def _decode(code: int, content: bytes) -> Any:
    if code == _LARGE_INT:
        return int(content)
    fields = _unpackb(content)
    if code == _TUPLE:
        return tuple(fields)
    if code not in (_TENSOR, _ARRAY):
        raise ValueError(f"unknown extension type {code}")
    dtype, shape, data = fields
    array = np.frombuffer(bytearray(data), np.dtype(dtype)).reshape(shape)
    return torch.from_numpy(array) if code == _TENSOR else array[()]
