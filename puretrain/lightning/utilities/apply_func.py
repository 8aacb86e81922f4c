"""Functions over the tensors inside nested batches."""

from __future__ import annotations

import copy
import dataclasses
import numbers
from abc import ABC
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CONVERSION_DTYPES",
    "TransferableDataType",
    "apply_to_collection",
    "apply_to_collections",
    "convert_to_tensors",
    "from_numpy",
    "move_data_to_device",
    "to_dtype_tensor",
]


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_asdict") and hasattr(value, "_fields")


def _is_dataclass_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _like_mapping(data: Mapping[Any, Any], items: list[tuple[Any, Any]]) -> Any:
    if isinstance(data, defaultdict):
        return defaultdict(data.default_factory, items)
    kind: Any = type(data)
    return kind(OrderedDict(items))


def _like_sequence(data: Sequence[Any], items: list[Any]) -> Any:
    kind: Any = type(data)
    return kind(*items) if _is_namedtuple(data) else kind(items)


def apply_to_collection(
    data: Any,
    dtype: type | Any | tuple[type | Any, ...],
    function: Callable[..., Any],
    *args: Any,
    wrong_dtype: type | tuple[type, ...] | None = None,
    include_none: bool = True,
    **kwargs: Any,
) -> Any:
    """Apply a function to all values of a type in nested mappings, sequences and dataclasses.

    Args:
        data: the collection; anything else than the containers and ``dtype`` is left as it is.
        dtype: the type of what the function takes, or a tuple of types.
        function: is called with such a value, ``*args`` and ``**kwargs``.
        wrong_dtype: a type that is left alone although it is a ``dtype``.
        include_none: whether results that are None stay in the collection.

    Returns:
        A collection of the same types.

    >>> apply_to_collection({"a": 1, "b": [2, "x"]}, int, lambda value: value + 1)
    {'a': 2, 'b': [3, 'x']}
    """
    if isinstance(data, dtype) and (wrong_dtype is None or not isinstance(data, wrong_dtype)):
        return function(data, *args, **kwargs)

    def inside(value: Any) -> Any:
        return apply_to_collection(
            value,
            dtype,
            function,
            *args,
            wrong_dtype=wrong_dtype,
            include_none=include_none,
            **kwargs,
        )

    if isinstance(data, Mapping):
        items = [(key, inside(value)) for key, value in data.items()]
        return _like_mapping(data, [(k, v) for k, v in items if include_none or v is not None])
    if _is_namedtuple(data) or (isinstance(data, Sequence) and not isinstance(data, (str, bytes))):
        if isinstance(data, range):
            return data
        values = [inside(value) for value in data]
        return _like_sequence(data, [v for v in values if include_none or v is not None])
    if _is_dataclass_instance(data):
        result = copy.copy(data)
        for field in dataclasses.fields(data):
            value = inside(getattr(data, field.name))
            if field.init and (include_none or value is not None):
                object.__setattr__(result, field.name, value)
        return result
    return data


def apply_to_collections(
    data1: Any,
    data2: Any,
    dtype: type | Any | tuple[type | Any, ...],
    function: Callable[..., Any],
    *args: Any,
    wrong_dtype: type | tuple[type, ...] | None = None,
    **kwargs: Any,
) -> Any:
    """Apply a function of two values to two collections of the same structure.

    Args:
        data1: the first collection; if it is None, the second takes its place.
        data2: the second; if it is None, the function is called with the first's value alone.
        dtype: the type of the values of ``data1``.
        function: is called with both values, ``*args`` and ``**kwargs``.
        wrong_dtype: a type that is left alone although it is a ``dtype``.

    >>> apply_to_collections({"a": 1}, {"a": 2}, int, lambda first, second: first + second)
    {'a': 3}
    """
    if data1 is None:
        if data2 is None:
            return None
        data1, data2 = data2, None
    if (
        isinstance(data1, dtype)
        and data2 is not None
        and (wrong_dtype is None or not isinstance(data1, wrong_dtype))
    ):
        return function(data1, data2, *args, **kwargs)

    def inside(first: Any, second: Any) -> Any:
        return apply_to_collections(
            first, second, dtype, function, *args, wrong_dtype=wrong_dtype, **kwargs
        )

    if isinstance(data1, Mapping) and data2 is not None:
        keys = [*data1, *(key for key in data2 if key not in data1)]
        return _like_mapping(data1, [(k, inside(data1.get(k), data2.get(k))) for k in keys])
    if isinstance(data1, Sequence) and not isinstance(data1, str) and data2 is not None:
        if len(data1) != len(data2):
            raise AssertionError("Sequence collections have different sizes.")
        pairs = zip(data1, data2, strict=True)
        return _like_sequence(data1, [inside(first, second) for first, second in pairs])
    return apply_to_collection(data1, dtype, function, *args, wrong_dtype=wrong_dtype, **kwargs)


class TransferableDataType(ABC):  # noqa: B024 - it recognizes by structure
    """Anything with a method ``to(device)``; ``isinstance`` looks for that.

    >>> isinstance(torch.tensor(1), TransferableDataType), isinstance({}, TransferableDataType)
    (True, False)
    """

    @classmethod
    def __subclasshook__(cls, subclass: Any) -> Any:
        if cls is TransferableDataType:
            return callable(getattr(subclass, "to", None))
        return NotImplemented


_BLOCKING = ("cpu", "mps")


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Move the tensors of a batch, and everything else that has a ``to``, to a device.

    Copies to an accelerator do not wait. A batch type of one's own needs a method ``to(device)``;
    if that returns nothing, it is taken to have moved the batch itself.

    >>> move_data_to_device([torch.ones(1), "text"], "cpu")
    [tensor([1.]), 'text']
    """
    kind = torch.device(device).type

    def move(data: Any) -> Any:
        waits = kind in _BLOCKING or not isinstance(data, Tensor)
        moved = data.to(device) if waits else data.to(device, non_blocking=True)
        return data if moved is None else moved

    return apply_to_collection(batch, TransferableDataType, move)


def to_dtype_tensor(value: Any, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A number as a tensor."""
    return torch.tensor(value, dtype=dtype, device=device)


def from_numpy(value: np.ndarray[Any, Any], device: torch.device | str) -> Tensor:
    """An array as a tensor on a device."""
    return torch.from_numpy(value).to(device)


def _number_to_tensor(value: Any, device: torch.device | str) -> Tensor:
    if isinstance(value, bool):
        return torch.tensor(value, dtype=torch.uint8, device=device)
    kind = torch.int if isinstance(value, numbers.Integral) else torch.float
    return torch.tensor(value, dtype=kind, device=device)


CONVERSION_DTYPES: list[tuple[Any, Callable[[Any, Any], Tensor]]] = [
    (bool, _number_to_tensor),
    (int, _number_to_tensor),
    (float, _number_to_tensor),
    (np.ndarray, from_numpy),
]


def convert_to_tensors(data: Any, device: torch.device | str) -> Any:
    """Turn the numbers and arrays of a collection into tensors and move all to a device."""

    def convert(value: Any) -> Tensor:
        if isinstance(value, np.ndarray):
            return from_numpy(value, device)
        return _number_to_tensor(value, device)

    data = apply_to_collection(data, (bool, int, float, np.ndarray), convert)
    return move_data_to_device(data, device)
