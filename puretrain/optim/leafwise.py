"""The one shape that all optimizers here share: a formula applied to each leaf by itself.

An optimizer names its *slots* (trees like the parameters, such as a momentum), whether it counts
the updates of each leaf, and its *formula*, written in plain torch operations. From these
:func:`leafwise` makes the pair of functions. The formula is used as written under transforms. On
plain tensors a *kernel*, if there is one, computes the same in place: one of torch's own.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from puretrain.errors import OptimizerError, StructureError
from puretrain.optim.base import Optimizer, plain_value, schedule_value
from puretrain.optim.members import Active, Together, runs
from puretrain.optim.shards import cut_leaves, parts_are_given
from puretrain.tree import (
    FrozenDict,
    Record,
    check_same_structure,
    frozen_dict,
    path_string,
    tree_flatten,
    tree_flatten_up_to,
    tree_leaves,
    tree_map,
    tree_paths,
    tree_structure,
    tree_unflatten,
    under_transform,
)

Column = list[Tensor]
"""One tensor for each leaf that has a gradient."""


class Values(dict[str, Any]):
    """Numbers by name, read as attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Formula(Protocol):
    """The update of one leaf, out of place."""

    def __call__(
        self, param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values
    ) -> tuple[Tensor, ...]:
        """Return the new parameter and the new slots.

        The tensors are at least float32: narrower ones are widened first and rounded afterwards, as
        the fused kernels do. ``h`` has the hyper-parameters and what ``scalars`` made of them.
        """
        ...


class Kernel(Protocol):
    """The same update of all leaves together, in place."""

    def __call__(
        self,
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
        /,
    ) -> None:
        """Change ``params``, ``slots`` and ``vectors``, but not ``vectors['step']``.

        That is the number of updates of each leaf, this one included.
        """
        ...


Scalars = Callable[[Values, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""What a formula needs besides, from the hyper-parameters and the vectors (float64, one element for
each leaf); under the name of a vector, its new value."""


Reads = Literal["elements", "norms", "leaf"]
Norm = Callable[[Tensor], Tensor]


def on_cpu_or_gpu(param: Tensor) -> bool:
    """Whether a leaf is a plain tensor where torch has fused kernels."""
    return type(param) in _PLAIN and param.device.type in ("cpu", "cuda")


def _nothing(param: Tensor) -> bool:
    return False


_PLAIN = (Tensor, torch.nn.Parameter)


def zeros(param: Tensor) -> Tensor:
    """A slot that begins with zeros."""
    return torch.zeros_like(param)


def leafwise(
    name: str,
    state_type: type[Record],
    formula: Formula,
    hyperparameters: Mapping[str, Any],
    *,
    slots: Mapping[str, Callable[[Tensor], Tensor]],
    vectors: Mapping[str, float] | None = None,
    scalars: Scalars | None = None,
    kernel: Kernel | None = None,
    fused_kernel: Kernel | None = None,
    fused: bool | None = None,
    fusable: Callable[[Tensor], bool] = on_cpu_or_gpu,
    beside_leaves: bool = False,
    maximize: bool = False,
    check: Callable[[list[str], Column], None] | None = None,
    reads: Reads = "elements",
) -> Optimizer:
    """Make an optimizer out of a formula.

    Args:
        name: the optimizer's, for errors.
        state_type: the record of its state: ``count``, and a field for each slot and vector.
        formula: the update of one leaf.
        hyperparameters: numbers, tensors of shape ``()``, and schedules.
        slots: what is kept for each leaf, by name, with the function that makes it.
        vectors: the numbers kept for each leaf, by name, with their first values. One of the name
            ``step`` counts the updates of each leaf.
        scalars: numbers for the formula that are computed for all leaves together.
        kernel: the update on plain tensors; without one, the formula does it.
        fused_kernel: the same for the leaves that one of torch's fused kernels takes. It is called
            with leaves that are laid out alike, and on a GPU, of one device and dtype.
        fused: whether to use that: None where it takes the leaf, True always, False never.
        fusable: which leaves it takes.
        beside_leaves: whether it reads the vectors on the GPU where the leaves are.
        maximize: climb instead of descending.
        check: a further check of the leaves and their paths; raises.
        reads: what of a leaf the formula needs for one of its elements: that element, also norms of
            the leaf (``h.norm(x)``; such an optimizer has no kernel), or the leaf as it is. It
            decides what may be done with parts of leaves (see :mod:`puretrain.optim.shards`), and
            whether the leaves of several members can be taken as one.
    """
    values = {k: float(v) if isinstance(v, numbers.Real) else v for k, v in hyperparameters.items()}
    present = {"count", *slots, *(vectors or {})}
    changing = tuple(k for k, v in values.items() if not isinstance(v, float))
    method = _Method(
        name,
        state_type,
        formula,
        values,
        slots,
        vectors or {},
        scalars,
        kernel,
        fused_kernel if fused is not False else None,
        fused,
        fusable,
        beside_leaves,
        maximize,
        check,
        tuple(field for field in state_type._names if field not in present),
        changing,
        reads,
        None if changing else Values(values),
    )
    update = functools.partial(_update, method)
    if not torch.compiler.is_compiling():  # a compiler can't follow it, and has no use for it
        update.together = Together(_update_together, method)  # type: ignore[attr-defined]
    return Optimizer(functools.partial(_init, method), update)


class _Method(NamedTuple):
    """The arguments of :func:`leafwise`, and what follows from them.

    A named tuple, since the compiler can make one: hyper-parameters that are injected make their
    optimizer anew in each update.
    """

    name: str
    state_type: type[Record]
    formula: Formula
    hyperparameters: Mapping[str, Any]
    slots: Mapping[str, Callable[[Tensor], Tensor]]
    vectors: Mapping[str, float]
    scalars: Scalars | None
    kernel: Kernel | None
    fused_kernel: Kernel | None
    fused: bool | None
    fusable: Callable[[Tensor], bool]
    beside_leaves: bool
    maximize: bool
    check: Callable[[list[str], Column], None] | None
    absent: tuple[str, ...]
    """The fields of the state that are None."""
    changing: tuple[str, ...]
    """The hyper-parameters that are schedules or tensors."""
    reads: Reads
    fixed: Values | None
    """The hyper-parameters, if all of them are numbers."""


def _init(method: _Method, params: Any, /) -> Any:
    leaves, structure = tree_flatten(params)
    paths = [path_string(path) for path in tree_paths(params)]
    for path, leaf in zip(paths, leaves, strict=True):
        _check_leaf(method.name, path, leaf)
    if method.check is not None:
        method.check(paths, leaves)
    _norms(method, params)  # raises where a part of a leaf won't do
    content: dict[str, Any] = {"count": torch.tensor(0, dtype=torch.int64)}
    with torch.no_grad():
        for slot, first in method.slots.items():
            content[slot] = tree_unflatten(structure, map(first, leaves))
    there = method.beside_leaves and method.fused_kernel and leaves and leaves[0].is_cuda
    device = leaves[0].device if there else torch.device("cpu")
    for vector, value in method.vectors.items():
        content[vector] = torch.full((len(leaves),), value, dtype=torch.float32, device=device)
    return method.state_type(**content, **dict.fromkeys(method.absent))


def _update(
    method: _Method, grads: Any, state: Any, params: Any, /, *, donate: bool = False
) -> tuple[Any, Any]:
    transformed = under_transform()
    known = None if transformed else _known(method, grads, state, params)
    if known is not None:
        leaves, columns = known.leaves, known.columns
        gradients = list(grads._items.values())
        rows = {vector: getattr(state, vector) for vector in method.vectors}
    else:
        leaves, structure = tree_flatten(params)
        try:
            gradients = tree_flatten_up_to(structure, grads)
            columns = [tree_flatten_up_to(structure, getattr(state, slot)) for slot in method.slots]
            rows = {vector: getattr(state, vector) for vector in method.vectors}
            fits = _fit(method, state, leaves, gradients, columns, rows)
        except (AttributeError, StructureError):
            fits = False  # what does not fit is found out below
        if not fits:
            raise _misfit(method, grads, state, params)
    h = Values(method.hyperparameters)
    for k in method.changing:
        now = schedule_value(method.hyperparameters[k], state.count)
        h[k] = now if transformed else plain_value(method.name, k, now)
    if transformed:
        leaves, columns, rows = _by_formula(
            method, gradients, leaves, columns, rows, h, _replaced, None
        )
        count = state.count + ONE
    else:
        direct = known is not None and known.direct and donate
        direct = direct and all(map(Tensor.is_contiguous, gradients))
        if direct:
            count = state.count
            count.add_(ONE)
            if "step" in rows:
                rows["step"].add_(ONE)
            cast(Kernel, method.fused_kernel)(leaves, cast(Column, gradients), columns, rows, h)
        else:
            with torch.no_grad():
                if not donate:
                    leaves = [leaf.clone() for leaf in leaves]
                    columns = [[x.clone() for x in column] for column in columns]
                    rows = {vector: row.clone() for vector, row in rows.items()}
                _in_place(method, gradients, leaves, columns, rows, h, _norms(method, params))
                count = state.count.add_(ONE) if donate else state.count + ONE
    if known is not None:
        names = params._items
        new_params: Any = frozen_dict(names, leaves)
        trees: list[Any] = [frozen_dict(names, column) for column in columns]
    else:
        new_params = tree_unflatten(structure, leaves)
        trees = [tree_unflatten(structure, column) for column in columns]
    content = dict(zip(method.slots, trees, strict=True))
    new_state = state.replace(count=count, **content, **rows)
    if not transformed:
        _remember(method, new_state, new_params, leaves, columns, known)
    return new_params, new_state


# ── Members of an ensemble ────────────────────────────────────────────────────────────────────────


def _update_together(
    methods: Sequence[_Method], grads: Any, state: Any, params: Any, active: Active
) -> tuple[Any, Any]:
    """Update members in place, those with equal hyper-parameters and counts by one kernel call."""
    split, gradients = _taken_apart(methods, grads, state, params)
    first = methods[0]
    rows = {vector: getattr(state, vector) for vector in first.vectors}
    kept = {vector: row.tolist() for vector, row in rows.items()}
    groups = _groups(methods, state.count.tolist(), [*kept.values()], active)
    slices: list[Any] = gradients
    if len(groups) > 1:  # each is needed by each member alone
        slices = [None if grad is None else grad.unbind() for grad in gradients]
    for group in groups:
        method, a_member = methods[group[0]], group[0]
        entries = split.entries(tuple(group))
        slopes = split.of(slices if len(group) == 1 else gradients, group)
        part = {}
        for vector, row in kept.items():
            values = [row[a_member][i] for i in entries.places]
            old = rows[vector]
            part[vector] = torch.tensor(values, dtype=old.dtype, device=old.device)
        h = method.fixed or _now(method, state.count[a_member])
        param, *slots = entries.columns
        if entries.direct and all(map(Tensor.is_contiguous, slopes)):
            if "step" in part:
                part["step"].add_(ONE)
            cast(Kernel, method.fused_kernel)(param, slopes, slots, part, h)
        else:
            _in_place(method, cast("list[Tensor | None]", slopes), param, slots, part, h)
        for vector, row in kept.items():
            new = dict(zip(entries.places, part[vector].tolist(), strict=True))
            row[a_member] = [new.get(i, before) for i, before in enumerate(row[a_member])]
            for i in group[1:]:
                row[i] = row[a_member]
    for vector, row in rows.items():
        row.copy_(torch.tensor(kept[vector], dtype=row.dtype))
    if len(active) == len(methods):
        state.count.add_(ONE)
    else:
        state.count[list(active)] += 1
    return _put_together(first, split, state, params)


def _taken_apart(
    methods: Sequence[_Method], grads: Any, state: Any, params: Any
) -> tuple[_Split, list[Tensor | None]]:
    """The leaves as rows, and the gradients, checked to fit."""
    known = _known_split(methods, grads, state, params)
    if known is not None:
        return known, list(grads._items.values())
    first = methods[0]
    leaves, structure = tree_flatten(params)
    try:
        gradients = tree_flatten_up_to(structure, grads)
        columns = [tree_flatten_up_to(structure, getattr(state, slot)) for slot in first.slots]
        fits = _fit_together(methods, state, leaves, gradients, columns)
    except (AttributeError, StructureError):
        fits = False  # what does not fit is found out below
    if not fits:
        member = functools.partial(tree_map, lambda leaf: leaf[0])
        raise _misfit(first, *map(member, (grads, state, params)))
    there = [i for i, grad in enumerate(gradients) if grad is not None]
    whole = [first.reads == "elements" and _rounds_alike(leaf) for leaf in leaves]
    return _Split(first, [leaves, *columns], there, whole, {}, [], []), gradients


def _groups(
    methods: Sequence[_Method], counts: list[int], kept: list[list[list[float]]], active: Active
) -> list[list[int]]:
    """The active members that one kernel call can update."""
    columns: list[list[Any]] = [[*map(id, methods)], counts, *kept]
    if all(map(_all_alike, columns)):
        return [[*active]] if active else []
    groups: dict[Any, list[int]] = {}
    for i in active:
        alike = (id(methods[i]), counts[i], *(tuple(row[i]) for row in kept))
        groups.setdefault(alike, []).append(i)
    return [*groups.values()]


def _put_together(method: _Method, split: _Split, state: Any, params: Any) -> tuple[Any, Any]:
    """The trees again, in new containers, so that those given up can be told from them."""
    leaves, *columns = split.columns
    if type(params) is FrozenDict and len(params) == len(leaves):
        names = params._items
        new_params: Any = frozen_dict(names, leaves)
        trees: list[Any] = [frozen_dict(names, column) for column in columns]
        kinds = [*map(_traits, leaves)]
        split = split._replace(params=[weakref.ref(new_params)], kinds=kinds)
    else:
        structure = tree_structure(params)
        new_params = tree_unflatten(structure, leaves)
        trees = [tree_unflatten(structure, column) for column in columns]
    new_state = state.replace(**dict(zip(method.slots, trees, strict=True)))
    new_state.__dict__["_split"] = split
    return new_params, new_state


def _all_alike(values: list[Any]) -> bool:
    return values.count(values[0]) == len(values)


class _Entries(NamedTuple):
    """The rows of a group of members, as a kernel takes them."""

    places: list[int]
    """Of which leaf each entry is."""
    columns: list[Column]
    """The entries of the parameters and of each slot."""
    direct: bool
    """Whether the fused kernel takes them as they are."""


class _Split(NamedTuple):
    """Stacked leaves in rows, or in several rows at once where that makes no difference.

    It is noted beside an immutable state, and holds as long as that comes with the same parameters.
    """

    method: _Method
    columns: list[Column]
    """The leaves of the parameters and of each slot."""
    there: list[int]
    """The leaves that have a gradient."""
    whole: list[bool]
    """Whether the rows of a leaf may be taken together."""
    known: dict[tuple[int, ...], _Entries]
    """Those of each group so far."""
    params: list[weakref.ReferenceType[FrozenDict[Tensor]]]
    """The parameters that it belongs to; empty if they are no plain frozen dict."""
    kinds: list[tuple[Any, ...]]
    """What :data:`_traits` says of each leaf, and of its gradient."""

    def entries(self, group: tuple[int, ...]) -> _Entries:
        found = self.known.get(group)
        if found is None:
            pieces = runs(group)
            places = [i for i in self.there for _ in (pieces if self.whole[i] else group)]
            columns = [self.of(column, group) for column in self.columns]
            takes = self.method.fusable if self.method.fused_kernel is not None else _nothing
            direct = (
                all(map(takes, columns[0]))
                and all(map(Tensor.is_contiguous, chain(*columns)))
                and len({(x.device, x.dtype) for x in columns[0]}) == 1
            )
            if len(self.known) > 4 * self.columns[0][0].shape[0]:  # groups that do not come again
                self.known.clear()
            found = self.known[group] = _Entries(places, columns, direct)
        return found

    def of(self, column: Sequence[Any], group: Sequence[int]) -> Column:
        """The entries of a group in a column, leaf by leaf."""
        if len(group) == 1:
            return [column[i][group[0]] for i in self.there]
        pieces = runs(group)
        found: Column = []
        for i in self.there:
            leaf = column[i]
            if not self.whole[i]:
                rows = leaf.unbind()
                found += rows if len(group) == len(rows) else [rows[k] for k in group]
            elif len(group) == len(leaf):
                found.append(leaf)
            else:
                found += [leaf[piece] for piece in pieces]
        return found


def _known_split(methods: Sequence[_Method], grads: Any, state: Any, params: Any) -> _Split | None:
    """What the last update found out, if it is about these parameters and the gradients fit."""
    split: _Split | None = getattr(state, "__dict__", {}).get("_split")
    own = split.params[0]() if split is not None and split.params else None
    if split is None or own is None or own is not params:
        return None
    first = split.method
    if any(
        method is not first
        and (method.state_type, method.fused_kernel is None, method.slots.keys())
        != (first.state_type, first.fused_kernel is None, first.slots.keys())
        for method in methods
    ):
        return None
    if type(grads) is not FrozenDict or [*grads._items] != [*own._items]:
        return None
    there = grads._items.values()
    if len(split.there) != len(there):
        return None
    try:
        return split if [*map(_traits, there)] == split.kinds else None
    except AttributeError:  # a leaf without a gradient
        return None


def _rounds_alike(leaf: Tensor) -> bool:
    """Whether a kernel gives the same bits for the rows together as for each by itself.

    It works on pieces of 64 bytes, and computes what is left at the end of a tensor otherwise,
    which rounds otherwise. So the rows must not have such ends.
    """
    return leaf.is_contiguous() and leaf.stride(0) * leaf.element_size() % 64 == 0


def _now(method: _Method, count: Tensor) -> Values:
    """The hyper-parameters after so many updates."""
    h = Values(method.hyperparameters)
    for k in method.changing:
        h[k] = plain_value(method.name, k, schedule_value(method.hyperparameters[k], count))
    return h


def _fit_together(
    methods: Sequence[_Method],
    state: Any,
    leaves: Column,
    gradients: list[Tensor | None],
    columns: list[Column],
) -> bool:
    first, members = methods[0], len(methods)
    rows = {vector: getattr(state, vector) for vector in first.vectors}
    kinds = {(method.state_type, *method.slots, *method.vectors) for method in methods}
    return (
        len(kinds) == 1
        and state.count.shape == (members,)
        and all(leaf.dim() and len(leaf) == members for leaf in leaves)
        and all(row.shape == (members, len(leaves)) for row in rows.values())
        and _fit(first, state, leaves, gradients, columns, {})
    )


class _Known(NamedTuple):
    """What an update found out of the trees that it returned, so that the next one needn't."""

    method: _Method
    params: weakref.ReferenceType[FrozenDict[Tensor]]
    leaves: Column
    columns: list[Column]
    kinds: list[tuple[Any, ...]]
    """What :data:`_traits` says of each leaf, and of its gradient."""
    direct: bool
    """Whether the fused kernel takes all leaves and what is kept for them as they are."""


def _known(method: _Method, grads: Any, state: Any, params: Any) -> _Known | None:
    """What is known of a state and the parameters that came with it, if the gradients fit."""
    known: _Known | None = getattr(state, "__dict__", {}).get("_known")
    own = None if known is None or known.method is not method else known.params()
    if known is None or own is None or own is not params:
        return None
    if type(grads) is not FrozenDict or [*grads._items] != [*own._items]:
        return None
    try:
        return known if [*map(_traits, grads._items.values())] == known.kinds else None
    except AttributeError:  # a leaf without a gradient
        return None


_traits = operator.attrgetter("shape", "dtype", "layout", "requires_grad")


def _remember(
    method: _Method,
    state: Any,
    params: Any,
    leaves: Column,
    columns: list[Column],
    known: _Known | None,
) -> None:
    """Note beside an immutable state what holds as long as it comes with these parameters."""
    if known is None:
        if type(params) is not FrozenDict or len(params) != len(leaves):
            return  # a nested tree, or one that can change
        takes = method.fusable if method.fused_kernel is not None else _nothing
        direct = (
            all(map(takes, leaves))
            and all(map(Tensor.is_contiguous, chain(leaves, *columns)))
            and not any(x.requires_grad for x in chain(leaves, *columns))
            and len({(x.device, x.dtype) for x in leaves}) <= 1
        )
        kinds = [*map(_traits, leaves)]
    else:
        kinds, direct = known.kinds, known.direct
    state.__dict__["_known"] = _Known(method, weakref.ref(params), leaves, columns, kinds, direct)


def _in_place(
    method: _Method,
    grads: list[Tensor | None],
    params: Column,
    columns: list[Column],
    rows: dict[str, Tensor],
    h: Values,
    norms: list[Norm] | None = None,
) -> None:
    if method.kernel is None:
        if any(grad is not None for grad in grads):
            _by_formula(method, grads, params, columns, rows, h, Tensor.copy_, norms)
        return
    fused: list[int] = []
    others: list[int] = []
    takes = method.fusable if method.fused_kernel is not None else _nothing
    for i, grad in enumerate(grads):
        if grad is not None:
            (fused if takes(params[i]) else others).append(i)
    if method.fused and others:
        raise OptimizerError(
            f"{method.name}: fused=True, but torch has no fused kernel that takes a tensor of "
            f"{params[others[0]].dtype} on {params[others[0]].device}; with fused=None it is used "
            "where there is one"
        )
    kernels = ((functools.partial(_fused, method), fused), (method.kernel, others))
    for kernel, places in kernels:
        if not places:
            continue
        if len(places) == len(grads):
            if "step" in rows:
                rows["step"].add_(ONE)
            kernel(params, cast(Column, grads), columns, rows, h)
        else:
            index = torch.tensor(places)
            part = {vector: row[index.to(row.device)] for vector, row in rows.items()}
            if "step" in part:
                part["step"].add_(ONE)
            kernel(
                [params[i] for i in places],
                [cast(Tensor, grads[i]) for i in places],
                [[column[i] for i in places] for column in columns],
                part,
                h,
            )
            for vector, row in rows.items():
                row[index.to(row.device)] = part[vector]


def _by_formula(
    method: _Method,
    grads: list[Tensor | None],
    params: Column,
    columns: list[Column],
    rows: dict[str, Tensor],
    h: Values,
    put: Callable[[Tensor, Tensor], Tensor],
    norms: list[Norm] | None,
) -> tuple[Column, list[Column], dict[str, Tensor]]:
    """Put the new tensors in the place of the old ones, one leaf after the other."""
    grown = {vector: row.double() for vector, row in rows.items()}
    if "step" in grown:
        grown["step"] = grown["step"] + 1
    per_leaf = dict(method.scalars(h, grown)) if method.scalars is not None else {}
    there = None
    if any(grad is None for grad in grads):
        there = torch.tensor([grad is not None for grad in grads])
    new_rows = {}
    for vector, row in rows.items():
        new = per_leaf.pop(vector, grown[vector]).to(row.dtype)
        if there is not None:
            new = torch.where(there.to(row.device), new, row)
        new_rows[vector] = put(row, new)

    cast_values: dict[Any, Values] = {}
    new_params, new_columns = list(params), [list(column) for column in columns]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            continue
        wide = torch.promote_types(param.dtype, torch.float32)
        kind = (wide, param.device)
        if kind not in cast_values:
            cast_values[kind] = Values({k: _like(v, *kind) for k, v in (h | per_leaf).items()})
        here = Values({k: v[i] if k in per_leaf else v for k, v in cast_values[kind].items()})
        if method.reads == "norms":
            here["norm"] = whole_norm if norms is None else norms[i]
        new_param, *new_slots = method.formula(
            param.to(wide),
            -grad.to(wide) if method.maximize else grad.to(wide),
            *(column[i].to(wide) for column in columns),
            h=here,
        )
        new_params[i] = put(param, new_param.to(param.dtype))
        for column, new_column, slot in zip(columns, new_columns, new_slots, strict=True):
            new_column[i] = put(column[i], slot.to(column[i].dtype))
    return new_params, new_columns, new_rows


def whole_norm(x: Tensor) -> Tensor:
    """The Euclidean norm of a leaf, of shape ``()``."""
    # Contiguous, because the sum of squares rounds by the order of its terms in memory.
    return cast(Tensor, torch.linalg.vector_norm(x.contiguous()))


def _norms(method: _Method, params: Any) -> list[Norm] | None:
    """How to get the norm of each leaf, if some are parts and the formula wants norms."""
    if method.reads == "elements" or not parts_are_given():
        return None
    paths = tree_paths(params)
    found = cut_leaves(paths)
    if found is None:
        return None
    shards, cut = found
    if method.reads == "leaf":
        names = [path_string(path) for path, is_cut in zip(paths, cut, strict=True) if is_cut]
        raise OptimizerError(
            f"{method.name}: its update of a leaf needs the whole of it, but of "
            f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''} each process has only a "
            "part; leave these leaves whole (whole=… of puretrain.sharding.zero)"
        )
    return [shards.norm if is_cut else whole_norm for is_cut in cut]


def decayed(param: Tensor, grad: Tensor, h: Values) -> Tensor:
    """The gradient with that of an L2 penalty, ``weight_decay · param``."""
    return grad if is_zero(h.weight_decay) else grad + h.weight_decay * param


def is_zero(value: Any) -> bool:
    """Whether a hyper-parameter is known to be 0; the value of a tensor is not looked at."""
    return not isinstance(value, Tensor) and value == 0


def square_root(x: Tensor) -> Tensor:
    """The square root of numbers from 0, with derivative 0 at 0, where it would be infinite.

    A parameter without influence on the loss has a second moment of 0; its infinite derivative
    would turn the derivative of a loss by the learning rate into NaN.
    """
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _fused(
    method: _Method,
    params: Column,
    grads: Column,
    slots: Sequence[Column],
    vectors: Mapping[str, Tensor],
    h: Values,
) -> None:
    """Call a fused kernel, which walks through memory without looking at strides.

    Those of a leaf must be the same, and without gaps; a leaf of another layout is copied for the
    time of the call.
    """
    kernel = cast(Kernel, method.fused_kernel)
    columns = [params, grads, *slots]
    copied: list[tuple[Tensor, Tensor]] = []
    if not all(map(Tensor.is_contiguous, chain(*columns))):
        columns = [list(column) for column in columns]
        for i, param in enumerate(params):
            if _same_layout(param, [column[i] for column in columns[1:]]):
                continue
            for k, column in enumerate(columns):
                original, column[i] = column[i], column[i].contiguous()
                if k != 1 and column[i] is not original:  # a gradient need not be put back
                    copied.append((original, column[i]))
    kinds = {(param.device, param.dtype) for param in params}
    if len(kinds) == 1 or not any(device.type == "cuda" for device, _ in kinds):
        kernel(columns[0], columns[1], columns[2:], vectors, h)
    else:
        for kind in kinds:
            places = [i for i, param in enumerate(params) if (param.device, param.dtype) == kind]
            part = [[column[i] for i in places] for column in columns]
            index = torch.tensor(places)
            rows = {vector: row[index.to(row.device)] for vector, row in vectors.items()}
            if method.beside_leaves:
                rows = {vector: row.to(kind[0]) for vector, row in rows.items()}
            kernel(part[0], part[1], part[2:], rows, h)
    for original, copy in copied:
        original.copy_(copy)


def _same_layout(param: Tensor, others: Sequence[Tensor]) -> bool:
    strides = param.stride()
    return torch.empty_like(param, device="meta").stride() == strides and all(
        x.stride() == strides for x in others
    )


def each(row: Tensor) -> Column:
    """The elements of a vector as tensors of shape ``()``, to be read only."""
    if row.device.type == "cpu" and len(set(row.tolist())) == 1:
        return [row[0]] * len(row)  # the usual case, and quicker
    return list(row.unbind())


def power(base: float | Tensor, exponent: Tensor) -> Tensor:
    """``base ** exponent``, which a compiled step computes once instead of for each element.

    The compiler moves what is small into the loop over the elements of a leaf, a power as well; it
    keeps out what has an exponential in it. The two agree to rounding.
    """
    if not torch.compiler.is_compiling() or (isinstance(base, float) and base <= 0):
        return base**exponent
    log = base.log() if isinstance(base, Tensor) else math.log(base)
    return (exponent * log).exp()


def counts_before(step: Tensor) -> Column:
    """The counts of updates before this one, as tensors that a kernel of torch's may increase."""
    return list((step - 1).cpu().unbind())


ONE = torch.tensor(1)  # adding a tensor is quicker than adding a Python number


def _replaced(old: Tensor, new: Tensor) -> Tensor:
    return new


def _like(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    # A float64 number would widen a parameter of shape (), and a batched one can't cross devices.
    return value.to(device=device, dtype=dtype) if isinstance(value, Tensor) else value


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


def _check_leaf(name: str, path: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise OptimizerError(f"{name}: {path} is {type(leaf).__name__}, not a tensor")
    if leaf.is_complex():
        raise OptimizerError(
            f"{name}: {path} is complex; train torch.view_as_real of it, and view it as complex in "
            "the loss"
        )
    if not leaf.is_floating_point():
        raise OptimizerError(
            f"{name}: {path} is of {leaf.dtype}, which has no gradient; keep it among the buffers"
        )


def _fit(
    method: _Method,
    state: Any,
    leaves: Column,
    gradients: list[Tensor | None],
    columns: list[Column],
    rows: Mapping[str, Tensor],
) -> bool:
    """Whether it all belongs together; not all kernels look at shapes and dtypes themselves."""
    if not isinstance(state, method.state_type):
        return False
    for field in method.absent:
        if getattr(state, field) is not None:
            return False
    shapes, dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
    for column in columns:
        if [x.shape for x in column] != shapes or [x.dtype for x in column] != dtypes:
            return False
    for grad, shape, dtype in zip(gradients, shapes, dtypes, strict=True):
        if grad is not None and (
            grad.shape != shape or grad.dtype != dtype or grad.layout != torch.strided
        ):
            return False
    return all(row.shape == (len(leaves),) for row in rows.values())


def _misfit(method: _Method, grads: Any, state: Any, params: Any) -> OptimizerError:
    """Say what does not fit the parameters."""
    structure = tree_structure(params)
    paths = [path_string(path) for path in tree_paths(params)]
    leaves = dict(zip(paths, tree_leaves(params), strict=True))
    for path, leaf in leaves.items():
        _check_leaf(method.name, path, leaf)
    wrong = _misfit_of_state(method, state, params, leaves)
    if wrong is not None:
        return OptimizerError(f"{method.name}: {wrong}; make one with init(params)")
    try:
        gradients = tree_flatten_up_to(structure, grads)
    except StructureError as error:
        return OptimizerError(f"{method.name}: the gradients do not fit the parameters: {error}")
    for (path, leaf), grad in zip(leaves.items(), gradients, strict=True):
        if grad is None:
            continue
        if not isinstance(grad, Tensor):
            what = repr(grad)
        elif grad.layout != torch.strided:
            what = f"of layout {grad.layout}; make it dense with .to_dense()"
        elif grad.shape != leaf.shape or grad.dtype != leaf.dtype:
            what = _kind(grad)
        else:
            continue
        return OptimizerError(f"{method.name}: {path} is {_kind(leaf)}, but its gradient is {what}")
    raise StructureError(
        f"{method.name}: gradients, state and parameters do not fit "
        "together; make the state with init(params)"
    )


def _misfit_of_state(
    method: _Method, state: Any, params: Any, leaves: Mapping[str, Tensor]
) -> str | None:
    if not isinstance(state, method.state_type):
        return f"the state is of type {type(state).__name__}, not {method.state_type.__name__}"
    for field in method.state_type._names:
        has = getattr(state, field) is not None
        if has == (field in method.absent):
            return (
                f"the state {'has' if has else 'lacks'} {field}: it was made with other "
                "hyper-parameters"
            )
    for slot in method.slots:
        tree = getattr(state, slot)
        try:
            check_same_structure(params, tree, "the parameters", f"the state's {slot}")
        except StructureError as error:
            return f"the state does not fit the parameters: {error}"
        for (path, leaf), x in zip(leaves.items(), tree_leaves(tree), strict=True):
            if not isinstance(x, Tensor) or x.shape != leaf.shape or x.dtype != leaf.dtype:
                there = _kind(x) if isinstance(x, Tensor) else repr(x)
                return f"{path} is {_kind(leaf)}, but in the state's {slot} it is {there}"
    for vector in method.vectors:
        shape = tuple(getattr(state, vector).shape)
        if shape != (len(leaves),):
            return f"the state's {vector} has shape {shape}, but there are {len(leaves)} parameters"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
