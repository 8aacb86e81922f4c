"""Between trees and the entries of an index: a tree taken apart, and put together again."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import optree
import torch
from torch import Tensor

from puretrain.checkpoint.format import (
    DTYPES,
    EMPTY,
    MAX_DEPTH,
    MAX_DIMENSIONS,
    MAX_INTEGER_LENGTH,
    Entry,
    is_text,
    nest,
    placed,
)
from puretrain.errors import CheckpointError
from puretrain.tree import FrozenDict, Path, Record, match_paths, path_string

__all__ = ["Arrangement", "Content", "arrange", "flatten", "select"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHOWN = 8

Content = Tensor | bytes | None
"""What an entry has in the data."""


# ── Taking apart ──────────────────────────────────────────────────────────────────────────────────


def flatten(tree: Any, name: str) -> tuple[list[Entry], list[Content]]:
    """Take a tree apart into entries, placed one after the other, and what each has in the data.

    Args:
        tree: the tree to save.
        name: the file, for errors.

    Raises:
        CheckpointError: a leaf or a node can't be saved; names its path.
    """
    entries: list[Entry] = []
    contents: list[Content] = []
    held: dict[Any, int] = {}
    for keys, leaf in _walk(tree, (), name):
        entry, content = _entry(keys, leaf, name)
        if isinstance(content, Tensor):
            identity = _identity(content)
            number = held.setdefault(identity, len(entries))
            if number < len(entries):
                entry = Entry(keys, "tied", entry.dtype, entry.shape, tied_to=number)
                content = None
        entries.append(entry)
        contents.append(content)
    return placed(entries), contents


def _walk(node: Any, keys: tuple[str | int, ...], name: str) -> Iterator[tuple[Any, Any]]:
    """The leaves and the nodes without children, in order, with the keys of each."""
    if len(keys) > MAX_DEPTH:
        raise CheckpointError(
            f"{name}: {path_string(keys[:8])}/… is nested deeper than {MAX_DEPTH}; is it a cycle?"
        )
    children = None if type(node) is Tensor else _children(node, keys, name)
    if not children:
        yield keys, node
        return
    for key, child in children:
        yield from _walk(child, (*keys, key), name)


def _children(
    node: Any, keys: tuple[str | int, ...], name: str
) -> list[tuple[str | int, Any]] | None:
    """The children of a node with their keys; None for a leaf."""
    if optree.tree_is_leaf(node, namespace="puretrain"):
        return None
    flat = optree.tree_flatten_one_level(node, namespace="puretrain")
    if _is_sequence(node):
        return list(enumerate(flat.children))
    names = [str(key) for key in flat.entries]
    for key, text in zip(flat.entries, names, strict=True):
        if type(key) not in {str, int} or not is_text(text):
            raise CheckpointError(
                f"{name}: {path_string(keys)} has the key {key!r}; only strings and integers can "
                "be saved as keys"
            )
    if len(set(names)) != len(names):
        raise CheckpointError(
            f"{name}: {path_string(keys)} has two keys that are written alike, "
            "as 1 and '1' are; name one otherwise"
        )
    return list(zip(names, flat.children, strict=True))


def _is_sequence(node: Any) -> bool:
    return isinstance(node, (tuple, list, collections.deque))


def _entry(keys: tuple[str | int, ...], leaf: Any, name: str) -> tuple[Entry, Content]:
    def fail(message: str) -> NoReturn:
        raise CheckpointError(f"{name}: {path_string(keys)} {message}")

    kind = type(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)):
        leaf = _from_numpy(leaf, fail)
    if isinstance(leaf, Tensor):
        _check_tensor(leaf, fail)
        dtype, shape = _NAMES[leaf.dtype], tuple(leaf.shape)
        return Entry(keys, "tensor", dtype, shape, nbytes=leaf.numel() * leaf.element_size()), leaf
    if kind in {str, bytes}:
        if kind is str and not is_text(leaf):
            fail(f"is {leaf!r}, which is no Unicode text")
        content = leaf.encode() if kind is str else leaf
        return Entry(keys, kind.__name__, kind.__name__, nbytes=len(content)), content
    if kind in {bool, int, float}:
        if kind is int and leaf.bit_length() >= 8 * MAX_INTEGER_LENGTH:
            fail(f"is an integer of more than {MAX_INTEGER_LENGTH} bytes")
        return Entry(keys, kind.__name__, kind.__name__, value=leaf), None
    if leaf is None:
        return Entry(keys, "none"), None
    if optree.tree_is_leaf(leaf, namespace="puretrain"):
        fail(
            f"is a {kind.__module__}.{kind.__qualname__}, which can't be saved; leaves are "
            "tensors, numpy arrays, bool, int, float, str, bytes and None"
        )
    return Entry(keys, "list" if _is_sequence(leaf) else "map"), None


def _from_numpy(leaf: Any, fail: Callable[[str], NoReturn]) -> Tensor:
    kind = type(leaf)
    if not isinstance(leaf, np.generic) and kind not in {np.ndarray, np.memmap}:
        fail(f"is a {kind.__module__}.{kind.__qualname__}; save its plain array")
    array = np.asarray(leaf)
    if not array.flags.writeable or not array.dtype.isnative or any(n < 0 for n in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))  # torch takes none of these as they are
    try:
        return torch.from_numpy(array)
    except TypeError:
        fail(f"is a numpy array of {array.dtype}, which torch has no dtype for")


def _check_tensor(tensor: Tensor, fail: Callable[[str], NoReturn]) -> None:
    kind = type(tensor)
    if tensor.layout != torch.strided or tensor.is_sparse:
        fail(f"is a tensor of the layout {tensor.layout}, which can't be saved; use .to_dense()")
    if tensor.is_nested:
        fail("is a nested tensor, which can't be saved; save .unbind() or a padded tensor")
    if kind not in {Tensor, torch.nn.Parameter}:
        fail(
            f"is a {kind.__module__}.{kind.__qualname__}, which can't be saved; "
            "convert it to a plain tensor that holds its values"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        fail("is inside a transform of torch.func and has no value to save yet")
    if tensor.is_meta:
        fail("is on the meta device and has no values to save")
    if tensor.is_quantized or tensor.dtype not in _NAMES:
        fail(f"has the dtype {tensor.dtype}, which can't be saved; use .dequantize() or .to(...)")
    if tensor.dim() > MAX_DIMENSIONS:
        fail(f"has {tensor.dim()} dimensions, of at most {MAX_DIMENSIONS}")
    if tensor.numel():
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        if tensor.untyped_storage().nbytes() < needed:
            fail("has lost its memory: its storage was resized, as sharding frameworks do it")


def _identity(tensor: Tensor) -> Any:
    """Equal for two tensors that are the same memory read in the same way."""
    if not tensor.numel():
        return id(tensor)  # no memory, so that only the object can be the same
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


# ── Putting together ──────────────────────────────────────────────────────────────────────────────


def select(entries: Sequence[Entry], pattern: str) -> Any:
    """A tree of frozen dicts of the numbers of those leaves whose paths match a pattern.

    Raises:
        PatternError: no path matches.
    """
    numbers = {e.path: i for i, e in enumerate(entries) if e.kind not in EMPTY}
    wanted = match_paths(pattern, numbers)
    # Some of a sequence is no sequence, so that every node becomes a mapping.
    chosen = [Entry(path, "tensor") for path in wanted]
    return _renumbered(_frozen(nest(chosen)), [numbers[path] for path in wanted])


def _renumbered(node: Any, numbers: Sequence[int]) -> Any:
    if isinstance(node, FrozenDict):
        return FrozenDict({key: _renumbered(child, numbers) for key, child in node.items()})
    return numbers[node]


class Arrangement(NamedTuple):
    """The tree that a file gives, before its leaves are read."""

    tree: Any
    """Its leaves are the numbers of entries, also for empty nodes."""
    devices: dict[int, torch.device]
    """Where the template has the tensor of an entry."""


def arrange(entries: Sequence[Entry], like: Any, name: str) -> Arrangement:
    """Put the entries of a file together.

    Args:
        entries: all entries of a file.
        like: a template that gives the node types, and that the entries must fit; or None.
        name: the file, for errors.

    Raises:
        CheckpointError: the entries do not fit the template; names the first differences.
    """
    node = nest(entries)
    if like is None:
        return Arrangement(_frozen(node), {})
    fit = _Fit(entries, name, [], {})
    tree = _fitted(like, node, (), fit)
    if fit.differences:
        more = len(fit.differences) - _SHOWN
        raise CheckpointError(
            f"{name} does not fit the template: "
            + "; ".join(fit.differences[:_SHOWN])
            + (f"; and {more:,} more" if more > 0 else "")
        )
    return Arrangement(tree, fit.devices)


class _Fit(NamedTuple):
    """What is needed and found while entries are fitted to a template."""

    entries: Sequence[Entry]
    name: str
    differences: list[str]
    devices: dict[int, torch.device]
    open: bool = False
    """Whether the place is below an open field, where dtypes and shapes are the file's own."""


def _fitted(template: Any, node: Any, keys: tuple[str | int, ...], fit: _Fit) -> Any:
    """Give a node of a file the types of a template; differences are noted, not raised."""
    children = None if type(template) is Tensor else _children(template, keys, fit.name)
    found = _leaf_numbers(node, fit.entries)
    if children is None:
        if type(node) is int and found:
            _compare(template, node, keys, fit)
            return node
        fit.differences.append(f"{path_string(keys)} is missing in the file")
        children, template = [], None
    below = _by_key(node)
    if not below:
        fit.differences.extend(_unexpected(found, fit.entries))
    opened = template._open if isinstance(template, Record) else frozenset()
    arranged = []
    for key, child in children:
        inner = below.pop(str(key), None)
        if key in opened and inner is not None:
            arranged.append(_fitted_open(child, inner, (*keys, key), fit))
        else:
            arranged.append(_fitted(child, inner, (*keys, key), fit))
    for inner in below.values():
        fit.differences.extend(_unexpected(_leaf_numbers(inner, fit.entries), fit.entries))
    if fit.differences:
        return None
    flat = optree.tree_flatten_one_level(template, namespace="puretrain")
    return flat.unflatten_func(flat.metadata, arranged)


def _fitted_open(template: Any, node: Any, keys: tuple[str | int, ...], fit: _Fit) -> Any:
    """What a file has below an open field; in the template's types if it has the same paths."""
    trial = fit._replace(differences=[], devices={}, open=True)
    tree = _fitted(template, node, keys, trial)
    if trial.differences or not _leaf_numbers(node, fit.entries):
        return _frozen(node)
    fit.devices.update(trial.devices)
    return tree


def _by_key(node: Any) -> dict[str, Any]:
    if type(node) is list:
        return {str(i): child for i, child in enumerate(node)}
    return dict(node) if type(node) is dict else {}


def _leaf_numbers(node: Any, entries: Sequence[Entry]) -> list[int]:
    if node is None:
        return []
    if type(node) is int:
        return [] if entries[node].kind in EMPTY else [node]
    return [n for child in _by_key(node).values() for n in _leaf_numbers(child, entries)]


def _unexpected(numbers: Iterable[int], entries: Sequence[Entry]) -> list[str]:
    return [f"{path_string(entries[n].keys)} is only in the file" for n in numbers]


def _compare(template: Any, number: int, keys: Path, fit: _Fit) -> None:
    entry = fit.entries[number]
    if isinstance(template, Tensor) and not template.is_meta:
        fit.devices[number] = template.device
    if fit.open:
        return
    expected, found = _signature(template), _stored_signature(entry)
    if expected != found and not (expected.is_byte_string and found.is_byte_string):
        fit.differences.append(
            f"{path_string(keys)} is {found} in the file, but {expected} in the template"
        )


class _Signature(NamedTuple):
    """What a leaf of a file and one of a template must have in common."""

    is_tensor: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_byte_string(self) -> bool:
        """Whether the leaf holds bytes, of which there may be more or fewer another time."""
        return self.is_tensor and self.dtype == "uint8" and len(self.shape) == 1

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}" if self.is_tensor else f"a plain {self.dtype}"


def _signature(leaf: Any) -> _Signature:
    if isinstance(leaf, Tensor):
        return _Signature(True, str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _Signature(True, leaf.dtype.name, leaf.shape)
    return _Signature(False, type(leaf).__name__, ())


def _stored_signature(entry: Entry) -> _Signature:
    return _Signature(entry.kind in {"tensor", "tied"}, entry.dtype, entry.shape)


def _frozen(node: Any) -> Any:
    if type(node) is dict:
        return FrozenDict({key: _frozen(child) for key, child in node.items()})
    if type(node) is list:
        return tuple(map(_frozen, node))
    return node
