"""Trees: immutable records and mappings over tensors, and functions over them.

A *tree* is any nesting of :class:`Record`, :class:`FrozenDict`, tuples, named tuples, lists and
dicts; its *leaves* are tensors and plain values. ``None`` is an empty subtree, not a leaf. Records
and frozen dicts are nodes for `optree <https://optree.readthedocs.io>`_ and for torch's own pytree
alike, so ``optree.tree_map`` and the transforms of ``torch.func`` see through them.

Every leaf has a *path*, the tuple of keys that lead to it, written ``params/encoder.0.weight``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
import sys
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform

import numpy as np
import optree
import torch
import torch.utils._pytree as torch_pytree
import xxhash
from torch import Tensor

from puretrain.errors import DonatedStateError, PatternError, StructureError

__all__ = [
    "FrozenDict",
    "LeafDifference",
    "Path",
    "Record",
    "field",
    "freeze",
    "match_paths",
    "path_string",
    "tree_cast",
    "tree_diff",
    "tree_digest",
    "tree_equal",
    "tree_flatten",
    "tree_flatten_up_to",
    "tree_index",
    "tree_leaves",
    "tree_like",
    "tree_map",
    "tree_map_with_path",
    "tree_paths",
    "tree_size",
    "tree_stack",
    "tree_structure",
    "tree_to",
    "tree_unflatten",
    "tree_unstack",
]

T = TypeVar("T")

Path = tuple[Any, ...]
"""The keys that lead from the root of a tree to a leaf: attribute names, mapping keys, indices."""

_STATIC = "puretrain.static"
_OPEN = "puretrain.open"


# ── Nodes ─────────────────────────────────────────────────────────────────────────────────────────


def field(*, static: bool = False, open: bool = False, **arguments: Any) -> Any:
    """Declare a field of a :class:`Record`.

    Args:
        static: the value belongs to the structure, not to the leaves: it is compared when two trees
            must match, it is never traced or differentiated, and it must be hashable.
        open: the structure below this field is data. It may differ between two states of one run
            (the metrics of a step are not known before the first one), and a checkpoint restores
            it as it was saved.
        **arguments: as for :func:`dataclasses.field` (``default``, ``default_factory``, …).
    """
    return dataclasses.field(metadata={_STATIC: static, _OPEN: open}, **arguments)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
class Record:
    """Base class of immutable records that are tree nodes.

    A subclass is a frozen dataclass: annotate its fields, nothing else. Comparison is by identity
    (use :func:`tree_equal` for the bits).

    Example:
        >>> class Point(Record):
        ...     x: Tensor
        ...     y: Tensor
        ...     name: str = field(static=True, default="p")
        >>> point = Point(torch.ones(2), torch.tensor(3.0))
        >>> tree_map(lambda leaf: leaf * 2, point).replace(name="q")
        Point(x=f32[2], y=f32 6.0, name='q')
    """

    _names: ClassVar[tuple[str, ...]] = ()
    _children: ClassVar[tuple[str, ...]] = ()
    _static: ClassVar[frozenset[str]] = frozenset()
    _open: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # it is a dataclass by now
        cls._names = tuple(f.name for f in fields)
        cls._static = frozenset(f.name for f in fields if f.metadata.get(_STATIC))
        cls._children = tuple(name for name in cls._names if name not in cls._static)
        cls._open = frozenset(f.name for f in fields if f.metadata.get(_OPEN))
        _register(
            cls, functools.partial(_flatten_record, cls), functools.partial(_unflatten_record, cls)
        )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            StructureError: a name in ``changes`` is no field.
        """
        own = self.__dict__
        if "_donated" in own:
            getattr(self, self._names[0])  # raises
        fields = {name: own[name] for name in self._names}  # not what is noted beside them
        fields.update(changes)
        if len(fields) > len(self._names):
            unknown = [name for name in changes if name not in self._names]
            raise StructureError(
                f"{type(self).__name__} has no field {', '.join(map(repr, unknown))}; "
                f"its fields are {', '.join(self._names)}"
            )
        new = object.__new__(type(self))
        new.__dict__.update(fields)
        return new

    def __getattr__(self, name: str) -> Any:
        # Reached only when normal lookup fails: an unknown name, or a record that was donated.
        donated = self.__dict__.get("_donated")
        if donated is not None and name in self._names:
            raise DonatedStateError(_donated_message(type(self).__name__, donated))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)

    def __repr__(self) -> str:
        if "_donated" in self.__dict__:
            return f"<donated {type(self).__name__}>"
        shown = (f"{name}={_brief(getattr(self, name))}" for name in self._names)
        return f"{type(self).__name__}({', '.join(shown)})"


class FrozenDict(Mapping[str, T]):
    """An immutable mapping with string keys that is a tree node. It keeps the order of insertion.

    The order matters: a sum over leaves (a global norm) rounds by the order of its terms, and a
    plain ``dict`` is flattened by sorted keys, which is not a module's own order. ``a | b`` is a
    copy of ``a`` updated with ``b``. Comparison is by identity; use :func:`tree_equal`.

    Example:
        >>> params = FrozenDict(weight=torch.ones(2, 3), bias=torch.zeros(3))
        >>> list(params | {"scale": torch.ones(())})
        ['weight', 'bias', 'scale']
        >>> params["weight"] = torch.zeros(2, 3)
        Traceback (most recent call last):
        TypeError: 'FrozenDict' object does not support item assignment
    """

    __slots__ = ("__weakref__", "_donated", "_items", "_owned")
    _items: dict[str, T]
    _donated: Reason
    _owned: bool  # set by `puretrain.state`

    def __init__(self, items: Mapping[str, T] | Iterable[tuple[str, T]] = (), /, **more: T) -> None:
        content: dict[str, T] = dict(items, **more)
        for key in content:
            if not isinstance(key, str):
                raise StructureError(f"a FrozenDict has string keys, not {key!r}; use str({key!r})")
        object.__setattr__(self, "_items", content)

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    # The mixins of Mapping would look up each key by itself.

    def keys(self) -> KeysView[str]:
        """The keys, in order."""
        return self._items.keys()

    def values(self) -> ValuesView[T]:
        """The values, in the order of the keys."""
        return self._items.values()

    def items(self) -> ItemsView[str, T]:
        """Pairs of keys and values, in order."""
        return self._items.items()

    def __or__(self, other: Mapping[str, T]) -> FrozenDict[T]:
        return FrozenDict({**self._items, **other})

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("a FrozenDict can't be changed; build a new one, for example with `|`")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name == "_items":  # the slot is empty: the mapping was donated
            raise DonatedStateError(_donated_message("FrozenDict", self._donated))
        raise AttributeError(f"'FrozenDict' object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, T]:
        return self._items

    def __setstate__(self, items: dict[str, T]) -> None:
        object.__setattr__(self, "_items", items)

    def __repr__(self) -> str:
        try:
            items = self._items
        except DonatedStateError:
            return "<donated FrozenDict>"
        return "{" + ", ".join(f"{key!r}: {_brief(value)}" for key, value in items.items()) + "}"


def freeze(tree: Any) -> Any:
    """Turn dicts into :class:`FrozenDict` and lists into tuples, all the way down.

    >>> freeze({"a": [1, {"b": 2}]})
    {'a': (1, {'b': 2})}
    """
    if isinstance(tree, (dict, FrozenDict)):
        return FrozenDict({key: freeze(value) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(freeze, tree))
    if isinstance(tree, (list, tuple)):
        return tuple(map(freeze, tree))
    return tree


def _flatten_record(cls: type[Record], node: Any) -> tuple[list[Any], Any, tuple[str, ...]]:
    if not cls._static:
        return [getattr(node, name) for name in cls._names], (), cls._names
    fixed = tuple((name, getattr(node, name)) for name in cls._names if name in cls._static)
    return [getattr(node, name) for name in cls._children], fixed, cls._children


def _unflatten_record(cls: type[Record], fixed: Any, children: Iterable[Any]) -> Any:
    node = object.__new__(cls)
    node.__dict__.update(zip(cls._children, children, strict=True))
    node.__dict__.update(fixed)
    return node


def frozen_dict(keys: Iterable[str], values: Iterable[T]) -> FrozenDict[T]:
    """A frozen dict of keys that are known to be strings; quicker than its constructor."""
    node: FrozenDict[T] = object.__new__(FrozenDict)
    object.__setattr__(node, "_items", dict(zip(keys, values, strict=True)))
    return node


def _flatten_frozen_dict(node: FrozenDict[Any]) -> tuple[list[Any], Any, tuple[str, ...]]:
    keys = tuple(node._items)
    return list(node._items.values()), keys, keys


def _register(
    cls: type,
    flatten: Callable[[Any], tuple[list[Any], Any, tuple[str, ...]]],
    unflatten: Callable[[Any, Iterable[Any]], Any],
) -> None:
    optree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        path_entry_type=optree.MappingEntry if cls is FrozenDict else optree.GetAttrEntry,
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
    key = torch_pytree.MappingKey if cls is FrozenDict else torch_pytree.GetAttrKey

    # For torch's pytree None is a leaf, which vmap then refuses. So a node's children leave out
    # None here, and its context says where they were.

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context, names = flatten(node)
        there = tuple(child is not None for child in children)
        pairs = zip(names, children, strict=True)
        return [(key(name), child) for name, child in pairs if child is not None], (context, there)

    def flatten_for_torch(node: Any) -> tuple[list[Any], Any]:
        children, context, _ = flatten(node)
        there = tuple(child is not None for child in children)
        return [child for child in children if child is not None], (context, there)

    def unflatten_for_torch(children: Iterable[Any], context: Any) -> Any:
        context, there = context
        remaining = iter(children)
        return unflatten(context, [next(remaining) if present else None for present in there])

    torch_pytree.register_pytree_node(
        cls, flatten_for_torch, unflatten_for_torch, flatten_with_keys_fn=flatten_with_keys
    )


_register(FrozenDict, _flatten_frozen_dict, frozen_dict)


def nodes(tree: Any) -> list[Record | FrozenDict[Any]]:
    """Every record and frozen dict of a tree, parents before their children."""
    found: list[Record | FrozenDict[Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if type(node) is Tensor:  # most are, and this is quick
            continue
        if isinstance(node, Record):
            found.append(node)
            waiting.extend([getattr(node, name) for name in node._names])
        elif isinstance(node, (FrozenDict, dict)):
            if isinstance(node, FrozenDict):
                found.append(node)
                node = node._items
            waiting.extend([child for child in node.values() if type(child) is not Tensor])
        elif isinstance(node, (tuple, list)):
            waiting.extend(node)
    return found


Reason = str | Callable[[], str]


def invalidate(node: Record | FrozenDict[Any], reason: Reason) -> None:
    """Empty a node whose memory was given away, so that reading it raises DonatedStateError.

    The reason may be a function, since it is hardly ever asked for.
    """
    if isinstance(node, Record):
        node.__dict__.clear()
        node.__dict__["_donated"] = reason
    else:
        object.__setattr__(node, "_donated", reason)
        object.__delattr__(node, "_items")


def _donated_message(what: str, reason: Reason) -> str:
    why = reason if isinstance(reason, str) else reason()
    return (
        f"this {what} was given up: {why}, and its memory was used for the next state. "
        "Use the state that the step returned, or keep this one with `lease(state)` or donate=False"
    )


def under_transform() -> bool:
    """Whether a transform of ``torch.func`` or ``torch.compile`` is tracing the caller.

    Tensors may then have no storage or value to look at, and must not be changed in place.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


# ── Maps ──────────────────────────────────────────────────────────────────────────────────────────


def tree_flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Split a tree into its leaves and its structure; :func:`tree_unflatten` is the inverse."""
    return optree.tree_flatten(tree, namespace="puretrain")


def tree_unflatten(structure: optree.PyTreeSpec, leaves: Iterable[Any]) -> Any:
    """Build a tree of a given structure out of leaves."""
    return optree.tree_unflatten(structure, leaves)


def tree_structure(tree: Any) -> optree.PyTreeSpec:
    """The structure of a tree without its leaves; structures compare with ``==``."""
    return optree.tree_structure(tree, namespace="puretrain")


def tree_flatten_up_to(structure: optree.PyTreeSpec, tree: Any) -> list[Any]:
    """What a tree holds at the leaves of a structure: None or a whole subtree count as one.

    Raises:
        StructureError: the tree has another structure.

    >>> params = FrozenDict(a=torch.ones(1), b=torch.ones(1))
    >>> tree_flatten_up_to(tree_structure(params), FrozenDict(a=1, b=None))
    [1, None]
    """
    try:
        return cast("list[Any]", structure.flatten_up_to(tree))
    except ValueError as error:
        raise StructureError(f"a tree has another structure than expected: {error}") from None


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, in the order of its fields and keys.

    >>> tree_leaves({"b": 2, "a": [0, 1]})
    [0, 1, 2]
    """
    return optree.tree_leaves(tree, namespace="puretrain")


def tree_map(function: Callable[..., Any], tree: T, *rest: Any) -> T:
    """Apply a function to every leaf (and to the leaves at the same place of ``rest``).

    Raises:
        StructureError: a tree of ``rest`` has another structure; says where.

    >>> tree_map(lambda a, b: a + b, {"x": 1, "y": (2, 3)}, {"x": 10, "y": (20, 30)})
    {'x': 11, 'y': (22, 33)}
    """
    leaves, structure = tree_flatten(tree)
    columns = [leaves]
    for other in rest:
        other_leaves, other_structure = tree_flatten(other)
        if other_structure != structure:
            check_same_structure(tree, other, "the first tree", "another one")
        columns.append(other_leaves)
    return cast(T, tree_unflatten(structure, map(function, *columns)))


def tree_map_with_path(function: Callable[..., Any], tree: T) -> T:
    """Apply ``function(path, leaf)`` to every leaf; ``path`` is a tuple, see :data:`Path`.

    >>> tree_map_with_path(lambda path, leaf: f"{path_string(path)}={leaf}", {"a": [0, 1]})
    {'a': ['a/0=0', 'a/1=1']}
    """
    leaves, structure = tree_flatten(tree)
    return cast(T, tree_unflatten(structure, map(function, tree_paths(tree), leaves)))


def tree_paths(tree: Any) -> list[Path]:
    """The path of every leaf, in the order of :func:`tree_leaves`.

    >>> [path_string(path) for path in tree_paths({"a": [1, 2], "b": {"c": 3}})]
    ['a/0', 'a/1', 'b/c']
    """
    return optree.tree_paths(tree, namespace="puretrain")


def path_string(path: Path) -> str:
    """Write a path with slashes. The root is ``.``.

    >>> path_string(("params", "encoder.0.weight")), path_string(())
    ('params/encoder.0.weight', '.')
    """
    return "/".join(map(str, path)) or "."


def tree_size(tree: Any) -> tuple[int, int]:
    """Count what a tree holds: (elements, bytes), each tensor that occurs twice counted once.

    >>> tree_size({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int8)})
    (10, 28)
    """
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return (
        sum(leaf.numel() for leaf in tensors.values()),
        sum(leaf.numel() * leaf.element_size() for leaf in tensors.values()),
    )


def tree_cast(tree: T, dtype: torch.dtype) -> T:
    """Convert every floating-point tensor of a tree to ``dtype``; other leaves stay as they are.

    >>> cast_down = tree_cast({"w": torch.ones(2), "n": torch.tensor(1)}, torch.bfloat16)
    >>> cast_down["w"].dtype, cast_down["n"].dtype
    (torch.bfloat16, torch.int64)
    """
    return tree_map(
        lambda leaf: (
            leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        tree,
    )


def tree_to(tree: T, device: torch.device | str) -> T:
    """Move every tensor of a tree to a device; other leaves stay as they are."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def tree_stack(trees: Sequence[T]) -> T:
    """Stack trees of one structure leaf by leaf, along a new first dimension (for ``vmap``).

    Raises:
        StructureError: there is no tree, or one differs in structure or shapes from the first.

    >>> tree_stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
    torch.Size([2, 3])
    """
    if not trees:
        raise StructureError("tree_stack needs at least one tree")
    for i, tree in enumerate(trees[1:], start=1):
        check_same_structure(trees[0], tree, "tree 0", f"tree {i}", leaves=True)
    return tree_map(lambda *leaves: torch.stack([torch.as_tensor(x) for x in leaves]), *trees)


def tree_unstack(tree: T) -> list[T]:
    """Split a tree along the first dimension of its leaves; the inverse of :func:`tree_stack`.

    Raises:
        StructureError: the leaves' first dimensions differ, or a leaf has none.

    >>> tree_unstack({"w": torch.tensor([[1, 2], [3, 4]])})
    [{'w': tensor([1, 2])}, {'w': tensor([3, 4])}]
    """
    sizes = {
        path_string(path): leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None
        for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True)
    }
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise StructureError(f"tree_unstack needs one common first dimension; found {sizes}")
    return [tree_index(tree, i) for i in range(cast(int, next(iter(sizes.values()))))]


def tree_index(tree: T, index: Any) -> T:
    """Index the first dimension of every leaf: a member of an ensemble, or a gather of several.

    >>> tree_index({"w": torch.tensor([[1, 2], [3, 4]])}, 1)
    {'w': tensor([3, 4])}
    """
    return tree_map(lambda leaf: leaf[index], tree)


def tree_like(template: T, tree: Any, what: str = "the tree", where: Path = ()) -> T:
    """Give a tree the node types of a template that has the same paths.

    A checkpoint read without a template is made of plain frozen dicts; this turns it back into the
    records that it was saved from.

    Args:
        template: a tree whose paths are those of ``tree``; its leaves are not used.
        tree: the tree to convert.
        what: the name of ``tree`` in an error.
        where: the path of both inside of a larger tree, for an error.

    Raises:
        StructureError: the paths differ; names the first few.
    """
    leaves = dict(zip(tree_paths(tree), tree_leaves(tree), strict=True))
    by_name = {tuple(map(str, path)): leaf for path, leaf in leaves.items()}
    paths = [tuple(map(str, path)) for path in tree_paths(template)]
    if set(by_name) != set(paths) or len(by_name) != len(leaves):
        missing = [path_string((*where, *path)) for path in paths if path not in by_name]
        extra = [path_string((*where, *path)) for path in by_name if path not in set(paths)]
        raise StructureError(
            f"{what} has another structure than expected: "
            + "; ".join(
                f"{word} {', '.join(names[:4])}" + (" …" if len(names) > 4 else "")
                for word, names in (("it lacks", missing), ("it has besides", extra))
                if names
            )
        )
    return cast(T, tree_unflatten(tree_structure(template), [by_name[path] for path in paths]))


# ── Patterns ──────────────────────────────────────────────────────────────────────────────────────


def match_paths(pattern: str, paths: Iterable[Path]) -> list[Path]:
    """The paths that a pattern matches, in order.

    ``*`` stands for any characters but ``/`` and ``.``, ``**`` for any characters at all, and
    ``?`` for one character; ``{a,b}`` for a choice.

    Raises:
        PatternError: no path matches, with the nearest ones, or a brace is not closed.

    >>> paths = [("encoder.0.weight",), ("encoder.0.bias",), ("head.weight",)]
    >>> match_paths("encoder.**", paths)
    [('encoder.0.weight',), ('encoder.0.bias',)]
    >>> match_paths("**.{bias,scale}", paths)
    [('encoder.0.bias',)]
    """
    paths = list(paths)
    expression = _compile_pattern(pattern)
    found = [path for path in paths if expression.fullmatch(path_string(path))]
    if not found:
        shown = ", ".join(map(path_string, paths[:6])) + (", …" if len(paths) > 6 else "")
        raise PatternError(f"the pattern {pattern!r} matches no leaf; there are: {shown or 'none'}")
    return found


@functools.lru_cache(maxsize=256)
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    out, depth = [], 0
    for token in re.findall(r"\*\*|.", pattern, flags=re.DOTALL):
        if token == "{":
            depth += 1
            out.append("(?:")
        elif token == "}" and depth:
            depth -= 1
            out.append(")")
        elif token == "," and depth:
            out.append("|")
        else:
            out.append({"**": ".*", "*": "[^/.]*", "?": "."}.get(token) or re.escape(token))
    if depth:
        raise PatternError(f"the pattern {pattern!r} has a '{{' without its '}}'")
    return re.compile("".join(out), flags=re.DOTALL)


# ── Content ───────────────────────────────────────────────────────────────────────────────────────


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The content of a tensor as bytes: row-major, little-endian, without a copy where possible."""
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    array = dense.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":  # pragma: no cover - no such machine runs the tests
        width = dense.element_size() // (2 if dense.is_complex() else 1)
        array = np.ascontiguousarray(array.reshape(-1, width)[:, ::-1]).reshape(-1)
    return memoryview(array)  # type: ignore[arg-type]  # numpy's stubs hide the buffer protocol


def tree_digest(tree: Any) -> str:
    """Hash the content of a tree: 32 hexadecimal digits that change when any bit of it changes.

    Covers the path, dtype, shape and bytes of every leaf, in the order of the paths, and nothing
    else: not the device, the strides, nor the node types. The same on every platform. The hash is
    XXH3-128, which finds differences but does not withstand an adversary.

    Raises:
        StructureError: a leaf is neither a dense tensor, a numpy array, nor a plain value.

    >>> tree_digest({"w": torch.arange(3)}) == tree_digest(FrozenDict(w=torch.arange(3)))
    True
    >>> tree_digest({"w": torch.zeros(1)}) == tree_digest({"w": -torch.zeros(1)})
    False
    """
    hasher = xxhash.xxh3_128()
    named = [
        (tuple(map(str, path)), leaf)
        for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True)
    ]
    for path, leaf in sorted(named, key=lambda item: item[0]):
        kind, shape, content = _leaf_content(path, leaf)
        head = [*path, kind]
        hasher.update(struct.pack(f"<I{len(head)}I", len(head), *(len(k.encode()) for k in head)))
        hasher.update("".join(head).encode())
        hasher.update(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        hasher.update(content)
    return hasher.hexdigest()


def _leaf_content(path: Path, leaf: Any) -> tuple[str, tuple[int, ...], Any]:
    if isinstance(leaf, (np.ndarray, np.generic)):
        leaf = torch.as_tensor(np.asarray(leaf))
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided:
            raise StructureError(
                f"{path_string(path)}: a {leaf.layout} tensor is no leaf; use .to_dense()"
            )
        return str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape), tensor_bytes(leaf)
    if isinstance(leaf, bool):
        return "bool value", (), b"\1" if leaf else b"\0"
    if isinstance(leaf, int):
        return "int value", (), str(leaf).encode()
    if isinstance(leaf, float):
        return "float value", (), struct.pack("<d", leaf)
    if isinstance(leaf, (str, bytes)):
        content = leaf.encode() if isinstance(leaf, str) else leaf
        return f"{type(leaf).__name__} value", (len(content),), content
    raise StructureError(
        f"{path_string(path)}: a {type(leaf).__name__} is no leaf; "
        "leaves are tensors, numpy arrays, bool, int, float, str and bytes"
    )


def tree_equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure and the same bits.

    NaNs are equal when their bits are; ``0.0`` and ``-0.0`` are not equal. The device is ignored.

    >>> tree_equal({"x": torch.tensor(float("nan"))}, {"x": torch.tensor(float("nan"))})
    True
    """
    leaves_a, structure_a = tree_flatten(a)
    leaves_b, structure_b = tree_flatten(b)
    return structure_a == structure_b and all(map(_same_bits, leaves_a, leaves_b))


def _same_bits(a: Any, b: Any) -> bool:
    kind_a, shape_a, content_a = _leaf_content((), a)
    kind_b, shape_b, content_b = _leaf_content((), b)
    if kind_a != kind_b or shape_a != shape_b or len(content_a) != len(content_b):
        return False
    return np.array_equal(np.frombuffer(content_a, np.uint8), np.frombuffer(content_b, np.uint8))


class LeafDifference(Record):
    """How one leaf of two trees differs; see :func:`tree_diff`."""

    path: str = field(static=True)
    """Where, written with slashes."""
    kind: str = field(static=True)
    """``only in a``, ``only in b``, ``type``, ``dtype``, ``shape`` or ``value``."""
    a: str = field(static=True)
    """The leaf of the first tree in brief, for example ``f32[3,4]``."""
    b: str = field(static=True)
    """The leaf of the second tree in brief."""
    max_abs: float | None = field(static=True, default=None)
    """Largest absolute difference of two elements, NaN if one of them is; None unless ``value``."""
    max_ulps: int | None = field(static=True, default=None)
    """Largest distance in representable numbers between; None unless floating point and no NaN."""
    count: int | None = field(static=True, default=None)
    """How many elements have other bits; None unless ``value``."""


def tree_diff(a: Any, b: Any) -> list[LeafDifference]:
    """List the leaves in which two trees differ, bit for bit, in the order of the paths.

    >>> one = torch.ones(3)
    >>> above = torch.nextafter(one, 2 * one)
    >>> [(d.path, d.kind, d.max_ulps) for d in tree_diff({"w": one, "b": 0}, {"w": above, "c": 0})]
    [('b', 'only in a', None), ('w', 'value', 1), ('c', 'only in b', None)]
    """
    leaves_a, leaves_b = (
        {
            tuple(map(str, path)): leaf
            for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True)
        }
        for tree in (a, b)
    )
    found = []
    for path in [*leaves_a, *(path for path in leaves_b if path not in leaves_a)]:
        name = path_string(path)
        if path not in leaves_b:
            found.append(LeafDifference(name, "only in a", _brief(leaves_a[path]), "nothing"))
        elif path not in leaves_a:
            found.append(LeafDifference(name, "only in b", "nothing", _brief(leaves_b[path])))
        elif not _same_bits(leaves_a[path], leaves_b[path]):
            found.append(_leaf_difference(name, leaves_a[path], leaves_b[path]))
    return found


def _leaf_difference(name: str, a: Any, b: Any) -> LeafDifference:
    brief_a, brief_b = _brief(a), _brief(b)
    a, b = (
        torch.as_tensor(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x
        for x in (a, b)
    )
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return LeafDifference(name, "value" if type(a) is type(b) else "type", brief_a, brief_b)
    if a.shape != b.shape:
        return LeafDifference(name, "shape", brief_a, brief_b)
    if a.dtype != b.dtype:
        return LeafDifference(name, "dtype", brief_a, brief_b)
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    bytes_a, bytes_b = (np.frombuffer(tensor_bytes(x), np.uint8) for x in (a, b))
    count = int((bytes_a != bytes_b).reshape(a.numel(), -1).any(axis=1).sum())
    wide = torch.complex128 if a.is_complex() else torch.float64
    # Equal infinities differ by nothing, though their difference is NaN.
    gap = torch.where(a == b, 0.0, (a.to(wide) - b.to(wide)).abs())
    largest = float("nan") if bool(gap.isnan().any()) else float(gap.max())
    ulps = None
    if a.is_floating_point() and not bool(a.isnan().any() or b.isnan().any()):
        ulps = _max_ulps(a, b)
    return LeafDifference(name, "value", brief_a, brief_b, largest, ulps, count)


def _max_ulps(a: Tensor, b: Tensor) -> int | None:
    integer = {1: "i1", 2: "<i2", 4: "<i4", 8: "<i8"}.get(a.element_size())
    if integer is None:  # pragma: no cover - no such dtype in torch today
        return None

    def ordered(tensor: Tensor) -> Any:
        # IEEE 754 numbers of one sign are ordered like their bits read as integers.
        bits = np.frombuffer(tensor_bytes(tensor), integer).astype(np.int64)
        sign_bit = -(1 << (8 * tensor.element_size() - 1))
        return np.where(bits < 0, sign_bit - bits, bits)

    x, y = ordered(a), ordered(b)
    low, high = np.minimum(x, y), np.maximum(x, y)
    # Two float64 of opposite sign may be further apart than an int64 reaches; a uint64 suffices.
    return int((high.astype(np.uint64) - low.astype(np.uint64)).max())


def check_same_structure(
    a: Any, b: Any, name_a: str, name_b: str, *, leaves: bool = False, where: Path = ()
) -> None:
    """Raise a StructureError that says where two trees part, if they do.

    Args:
        a: the tree that is as it should be.
        b: the tree to check.
        name_a: what to call ``a`` in the error.
        name_b: what to call ``b`` in the error.
        leaves: compare the shape and dtype of tensors as well.
        where: the path of both in a larger tree, put in front of the paths in the error.
    """
    paths_a, paths_b = tree_paths(a), tree_paths(b)
    for path in paths_a:
        if path not in set(paths_b):
            raise StructureError(f"{path_string((*where, *path))} is in {name_a}, not in {name_b}")
    for path in paths_b:
        if path not in set(paths_a):
            raise StructureError(f"{path_string((*where, *path))} is in {name_b}, not in {name_a}")
    if tree_structure(a) != tree_structure(b):
        raise StructureError(
            f"{path_string(where)}: {name_a} and {name_b} have the same leaves in nodes of other "
            f"types, order or static fields: {tree_structure(a)} against {tree_structure(b)}"
        )
    if not leaves:
        return
    for path, x, y in zip(paths_a, tree_leaves(a), tree_leaves(b), strict=True):
        if _signature(x) != _signature(y):
            raise StructureError(
                f"{path_string((*where, *path))} is {_signature(x)} in {name_a}, "
                f"but {_signature(y)} in {name_b}"
            )


def _signature(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{_DTYPE_BRIEF.get(leaf.dtype, str(leaf.dtype))}{list(leaf.shape)}"
    return type(leaf).__name__


_DTYPE_BRIEF = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = _DTYPE_BRIEF.get(value.dtype, str(value.dtype).removeprefix("torch."))
        try:
            if value.dim() == 0 and value.device.type == "cpu":
                return f"{dtype} {value.item()}"
        except RuntimeError:
            pass  # under a transform a tensor has no value to show; its shape will do
        return f"{dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return "(" + ", ".join(map(_brief, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
