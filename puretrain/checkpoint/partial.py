"""Some leaves of a checkpoint: one at a time, or those that fit into another tree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor

from puretrain.checkpoint.file import opened, read_leaf, read_range_of
from puretrain.checkpoint.format import EMPTY, Entry, Index
from puretrain.checkpoint.places import Location, shown
from puretrain.errors import CheckpointError, PatternError
from puretrain.tree import (
    match_paths,
    path_string,
    tree_leaves,
    tree_paths,
    tree_structure,
    tree_unflatten,
)

__all__ = ["Checkpoint", "load_part", "open_checkpoint", "read_slice", "renamed"]

T = TypeVar("T")
_SHOWN = 6


class Checkpoint(Mapping[str, Any]):
    """The leaves of a checkpoint by their paths, read on demand; see :func:`open_checkpoint`."""

    def __init__(self, path: Location) -> None:
        with ExitStack() as stack:
            self._file, self._index = stack.enter_context(opened(path))
            self._open: ExitStack | None = stack.pop_all()
        self._path = path
        self._numbers = {
            path_string(entry.path): number
            for number, entry in enumerate(self._index.entries)
            if entry.kind not in EMPTY
        }

    @property
    def index(self) -> Index:
        """What the checkpoint says of itself."""
        return self._index

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the caller of :func:`puretrain.save` gave."""
        return self._index.metadata

    def entry(self, name: str) -> Entry:
        """What the index says of a leaf.

        Raises:
            KeyError: there is no such leaf.
        """
        return self._index.entries[self._numbers[name]]

    def __getitem__(self, name: str) -> Any:
        return read_leaf(self._file, self._index, self._number(name), self._path)

    def slice(
        self, name: str, dim: int, start: int, length: int, *, checksums: bool = True
    ) -> Tensor:
        """Read a slice of a tensor; see :func:`read_slice`.

        Raises:
            KeyError: there is no such leaf.
        """
        number = self._number(name)
        return read_range_of(
            self._file, self._index, number, self._path, dim, start, length, checksums=checksums
        )

    def _number(self, name: str) -> int:
        number = self._numbers[name]
        if self._open is None:
            raise CheckpointError(f"{shown(self._path)} was closed; open it again to read {name}")
        return number

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<checkpoint {shown(self._path)} of {len(self)} leaves>"


def open_checkpoint(path: Location) -> Checkpoint:
    """Open a checkpoint as a mapping from paths to leaves, each read and checked when asked for.

    Args:
        path: the file, or a URL that fsspec knows.

    Raises:
        CheckpointError: the file can't be read, or its index is damaged; when a leaf is asked for,
            that is damaged.

    Example:
        >>> import tempfile, torch, puretrain as pt
        >>> directory = tempfile.TemporaryDirectory()
        >>> pt.save(f"{directory.name}/a.ckpt", {"params": {"w": torch.ones(2)}, "step": 7})
        >>> with open_checkpoint(f"{directory.name}/a.ckpt") as leaves:
        ...     list(leaves), leaves["params/w"]
        (['params/w', 'step'], tensor([1., 1.]))
        >>> directory.cleanup()
    """
    return Checkpoint(path)


def read_slice(
    path: Location, leaf: str, dim: int, start: int, length: int, *, checksums: bool = True
) -> Tensor:
    """Read the elements of a tensor between two places of one dimension.

    Of a tensor that is stored in pieces only those pieces are read that have such elements.

    Args:
        path: the file, or a URL that fsspec knows.
        leaf: the path of the tensor in the tree, such as ``params/encoder.weight``.
        dim: the dimension, from 0.
        start: the first place along it.
        length: how many.
        checksums: compare what is read with its checksum. There is one for a piece, or for a
            tensor that is not in pieces; so all of that is read (what is not asked for takes no
            memory). False leaves the check out, and reads only the bytes of the slice if ``dim`` is
            0, or all dimensions before it have length 1.

    Returns:
        ``tensor.narrow(dim, start, length)``, in memory of its own.

    Raises:
        CheckpointError: the file can't be read or is damaged, or has no such tensor.
        ConfigurationError: the tensor has no such slice.

    Example:
        >>> import tempfile, torch, puretrain as pt
        >>> directory = tempfile.TemporaryDirectory()
        >>> pt.save(f"{directory.name}/a.ckpt", {"w": torch.arange(6).reshape(3, 2)})
        >>> read_slice(f"{directory.name}/a.ckpt", "w", dim=0, start=1, length=2)
        tensor([[2, 3],
                [4, 5]])
        >>> directory.cleanup()
    """
    with open_checkpoint(path) as leaves:
        if leaf not in leaves._numbers:
            raise CheckpointError(f"{shown(path)} has no leaf {leaf}; it has {_some(list(leaves))}")
        return leaves.slice(leaf, dim, start, length, checksums=checksums)


def load_part(
    source: Location | Mapping[str, Any],
    into: T,
    *,
    only: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> T:
    """A tree with some of its tensors replaced by those of a checkpoint, of another model perhaps.

    Floating-point tensors are converted to the dtype of what they replace, and all go to its
    device; the shapes must agree. Nothing else than the tensors that are taken is read.

    Args:
        source: a checkpoint, or a mapping from names to tensors (what ``torch.load`` gives with
            ``weights_only=True``).
        into: the tree, for example a state; it does not change.
        only: replace all leaves of ``into`` whose paths match this pattern; each must be in the
            source. By default those that the source happens to have.
        rename: how leaves of the source are named in ``into``, by patterns: in the order given,
            the first that matches a whole name counts. What a ``*``, ``**`` or ``?`` stands for
            goes into the same place of the new name.

    Raises:
        CheckpointError: a leaf that is wanted is missing, or has another shape, or a dtype of
            another kind; or the source can't be read or is damaged.
        PatternError: a pattern matches nothing, or its replacement has other wildcards.

    Example:
        >>> import torch
        >>> state = {"params": {"backbone.w": torch.zeros(2), "head.w": torch.zeros(1)}}
        >>> load_part({"encoder.w": torch.ones(2, dtype=torch.float64)}, state,
        ...           rename={"encoder.**": "params/backbone.**"})
        {'params': {'backbone.w': tensor([1., 1.]), 'head.w': tensor([0.])}}
    """
    if isinstance(source, Mapping):
        return _replaced(source, "the source", into, only, rename or {})
    with open_checkpoint(source) as leaves:
        return _replaced(leaves, shown(source), into, only, rename or {})


def _replaced(
    source: Mapping[str, Any], what: str, into: T, only: str | None, rename: Mapping[str, str]
) -> T:
    leaves, paths = tree_leaves(into), tree_paths(into)
    places = {path_string(path): number for number, path in enumerate(paths)}
    found = renamed(source, rename)
    wanted = [path for path in places if path in found]
    if only is not None:
        wanted = [path_string(path) for path in match_paths(only, paths)]
    elif not wanted:
        raise CheckpointError(
            f"{what} has no leaf of the tree: it has {_some(found)}; the tree has {_some(places)}; "
            "give rename="
        )
    missing = [path for path in wanted if path not in found]
    if missing:
        raise CheckpointError(
            f"{what} has no {_some(missing)}; after renaming it has {_some(found)}"
        )
    misfits = []
    for path in wanted:
        value, template = source[found[path]], leaves[places[path]]
        if not isinstance(value, Tensor) or not isinstance(template, Tensor):
            fits = type(value) is type(template)
        else:
            inexact = value.is_floating_point() and template.is_floating_point()
            fits = value.shape == template.shape and (inexact or value.dtype == template.dtype)
        if not fits:
            misfits.append(f"{found[path]} is {_kind(value)}, and {path} is {_kind(template)}")
            continue
        if isinstance(value, Tensor):
            kept_as_meta = template.is_meta  # a template without values says nothing of a device
            value = value.to("cpu" if kept_as_meta else template.device, template.dtype)
        leaves[places[path]] = value
    if misfits:
        raise CheckpointError(f"{what} does not fit the tree: " + "; ".join(misfits[:_SHOWN]))
    replaced: T = tree_unflatten(tree_structure(into), leaves)
    return replaced


def renamed(names: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, str]:
    """New names and the old name of each.

    Raises:
        PatternError: a pattern matches nothing or has other wildcards than its replacement, or two
            names become one.

    >>> renamed({"a.w": 1, "a.b.c": 2}, {"a.**": "params/**"})
    {'params/w': 'a.w', 'params/b.c': 'a.b.c'}
    """
    rules = [(pattern, *_rule(pattern, target)) for pattern, target in rename.items()]
    used: set[str] = set()
    found: dict[str, str] = {}
    for name in names:
        new = name
        for pattern, expression, target in rules:
            match = expression.fullmatch(name)
            if match:
                new = target.format(*match.groups())
                used.add(pattern)
                break
        if new in found:
            raise PatternError(
                f"{found[new]} and {name} are both renamed to {new}; give one another name"
            )
        found[new] = name
    unused = [pattern for pattern in rename if pattern not in used]
    if unused:
        raise PatternError(
            f"the pattern {unused[0]!r} of rename matches no leaf; there are: {_some(names)}"
        )
    return found


_WILDCARD = re.compile(r"\*\*|\*|\?")


def _rule(pattern: str, target: str) -> tuple[re.Pattern[str], str]:
    wild = _WILDCARD.findall(pattern)
    if wild != _WILDCARD.findall(target):
        raise PatternError(
            f"rename {pattern!r} to {target!r}: both need the same wildcards in the same order"
        )
    kinds = {"**": "(.*)", "*": "([^/.]*)", "?": "(.)"}
    parts = [re.escape(part) for part in _WILDCARD.split(pattern)]
    expression = parts[0] + "".join(
        kinds[card] + part for card, part in zip(wild, parts[1:], strict=True)
    )
    template = "{}".join(
        part.replace("{", "{{").replace("}", "}}") for part in _WILDCARD.split(target)
    )
    return re.compile(expression, flags=re.DOTALL), template


def _some(names: Mapping[str, Any] | list[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return (shown + (", …" if len(names) > _SHOWN else "")) or "nothing"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a plain {type(value).__name__}"
