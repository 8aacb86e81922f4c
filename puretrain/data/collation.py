"""Make one batch of several samples: a tree of stacked tensors out of trees of one structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puretrain.errors import DataError, StructureError
from puretrain.tree import (
    Path,
    check_same_structure,
    path_string,
    tree_flatten,
    tree_paths,
    tree_unflatten,
)

__all__ = ["collate"]


def collate(samples: Sequence[Any], indices: Sequence[int] | None = None) -> Any:
    """Stack samples leaf by leaf along a new first dimension.

    A sample is any tree: dicts, tuples, named tuples, lists, records, frozen dicts; the batch has
    the same nodes. Tensors and numpy arrays are stacked as they are, numbers become a tensor as
    ``torch.tensor`` makes it (``float`` in torch's default dtype), strings and bytes become a list.

    Nothing is promoted, broadcast or padded, so that the dtype and shape of a batch never depend
    on which samples are in it.

    Args:
        samples: at least one.
        indices: what to call the samples in an error; their places in the list by default.

    Raises:
        DataError: two samples differ in structure, shape, dtype or type, or a leaf can't be
            stacked; says which sample and where in it.

    Example:
        >>> batch = collate([{"x": torch.ones(2), "id": "a"}, {"x": torch.zeros(2), "id": "b"}])
        >>> batch["x"].shape, batch["id"]
        (torch.Size([2, 2]), ['a', 'b'])
        >>> collate([torch.ones(2), torch.ones(3)])
        Traceback (most recent call last):
        puretrain.errors.DataError: .: sample 1 is float32[3], but sample 0 is float32[2]; make...
    """
    if not samples:
        raise DataError("collate needs at least one sample")
    names = range(len(samples)) if indices is None else indices
    first, structure = tree_flatten(samples[0])
    rows = [first]
    for sample, name in zip(samples[1:], names[1:], strict=True):
        leaves, its_structure = tree_flatten(sample)
        if its_structure != structure:
            raise _structure_error(samples[0], sample, names[0], name)
        rows.append(leaves)
    columns = list(zip(*rows, strict=True))
    try:
        return tree_unflatten(structure, [_stack(column, None) for column in columns])
    except _Unequal:
        pass
    # Once more, slowly, to say where.
    for path, column in zip(tree_paths(samples[0]), columns, strict=True):
        try:
            _stack(column, path)
        except _Unequal as unequal:
            place, reason = unequal.args
            raise DataError(
                f"{path_string(path)}: sample {names[place]} {reason.format(names[0])}"
            ) from None
    raise DataError("the samples can't be stacked")  # pragma: no cover - the loop above raises


class _Unequal(Exception):
    """A value can't be stacked with the first one: (its place, why, with the first's name open)."""


def _stack(values: Sequence[Any], path: Path | None) -> Any:
    first = values[0]
    if isinstance(first, Tensor | np.ndarray | np.generic) and not isinstance(first, str | bytes):
        tensors = list(values)
        if not all(isinstance(value, Tensor) for value in values):
            tensors = [_as_tensor(value, place) for place, value in enumerate(values)]
        dtype = tensors[0].dtype
        for place, tensor in enumerate(tensors):
            if tensor.dtype != dtype or (path is not None and tensor.shape != tensors[0].shape):
                raise _Unequal(
                    place,
                    f"is {_describe(tensor)}, but sample {{}} is {_describe(tensors[0])}; make "
                    "them alike in the dataset (crop, pad, convert), or give `collate=`",
                )
        try:
            return torch.stack(tensors)
        except RuntimeError:
            if path is not None or all(tensor.shape == tensors[0].shape for tensor in tensors):
                raise
            raise _Unequal from None
    for place, value in enumerate(values):
        if type(value) is not type(first):
            raise _Unequal(
                place,
                f"is of type {type(value).__name__}, but sample {{}} of type "
                f"{type(first).__name__}; convert them in the dataset, or give `collate=`",
            )
    if isinstance(first, str | bytes):
        return list(values)
    if isinstance(first, bool | int | float | complex):
        return torch.tensor(values)
    raise _Unequal(0, _UNKNOWN.format(type(first).__name__))


_UNKNOWN = (
    "is of type {}, which can't be stacked; turn it into a tensor or a number in the dataset, "
    "or give `collate=`"
)


def _as_tensor(value: Any, place: int) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise _Unequal(
            place,
            f"is of type {type(value).__name__}, but sample {{}} an array; convert them in the "
            "dataset, or give `collate=`",
        )
    # torch takes neither negative strides nor, without a warning, read-only memory.
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    if not array.flags.writeable:
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError:
        kind = f"numpy array of dtype {array.dtype}".replace("{", "{{").replace("}", "}}")
        raise _Unequal(place, _UNKNOWN.format(kind)) from None


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _structure_error(first: Any, other: Any, name: int, other_name: int) -> DataError:
    advice = "give every sample the same fields, or give `collate=`"
    try:
        check_same_structure(first, other, f"sample {name}", f"sample {other_name}")
    except StructureError as error:
        return DataError(f"{error}; {advice}")
    return DataError(f"samples {name} and {other_name} have other structures; {advice}")
