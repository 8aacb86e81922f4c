"""The one shape that all optimizers here share: a formula applied to each leaf by itself.

An optimizer names its *slots* (trees like the parameters, such as a momentum), whether it counts
the updates of each leaf, and its *formula*, written in plain torch operations. From these
:func:`leafwise` makes the pair of functions. The formula is used as written under transforms. On
plain tensors a *kernel*, if there is one, computes the same in place: one of torch's own.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from puretrain.errors import OptimizerError, StructureError
from puretrain.optim.base import Optimizer, schedule_value
from puretrain.tree import (
    Record,
    check_same_structure,
    path_string,
    tree_flatten,
    tree_flatten_up_to,
    tree_map,
    tree_paths,
    tree_unflatten,
    under_transform,
)

Column = list[Tensor]
"""One tensor for each leaf that has a gradient."""


class Formula(Protocol):
    """The update of one leaf, out of place."""

    def __call__(
        self, param: Tensor, grad: Tensor, /, *slots: Tensor, h: SimpleNamespace
    ) -> tuple[Tensor, ...]:
        """Return the new parameter and the new slots.

        The tensors are at least float32: narrower ones are widened first and rounded afterwards, as
        the fused kernels do. ``h`` has the hyper-parameters and what ``scalars`` made of them.
        """
        ...


class Kernel(Protocol):
    """The same update of all leaves at once, in place."""

    def __call__(
        self,
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: SimpleNamespace,
        /,
    ) -> None:
        """Change ``params``, ``slots`` and ``vectors``, but not ``vectors['step']``.

        That is the number of updates of each leaf, this one included.
        """
        ...


Scalars = Callable[[SimpleNamespace, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""What a formula needs besides, from the hyper-parameters and the vectors (float64, one element for
each leaf); under the name of a vector, its new value."""


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
    maximize: bool = False,
    check: Callable[[str, Tensor], None] | None = None,
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
        maximize: climb instead of descending.
        check: a further check of a leaf, by its path; raises.
    """
    vectors = vectors or {}
    fields = (*slots, *vectors)
    absent = [f for f in state_type._names if f != "count" and f not in fields]
    hyperparameters = {
        k: float(v) if isinstance(v, numbers.Real) else v for k, v in hyperparameters.items()
    }
    changing = [k for k, v in hyperparameters.items() if not isinstance(v, float)]

    def init(params: Any, /) -> Any:
        leaves, structure = tree_flatten(params)
        for path, leaf in zip(tree_paths(params), leaves, strict=True):
            _check_leaf(name, path_string(path), leaf)
            if check is not None:
                check(path_string(path), leaf)
        content: dict[str, Any] = {"count": torch.tensor(0, dtype=torch.int64)}
        with torch.no_grad():
            for slot, first in slots.items():
                content[slot] = tree_unflatten(structure, map(first, leaves))
        # The kernels for a GPU look for the counts there.
        device = leaves[0].device if leaves and kernel is not None else None
        for vector, value in vectors.items():
            content[vector] = torch.full((len(leaves),), value, dtype=torch.float32, device=device)
        return state_type(**content, **dict.fromkeys(absent))

    def update(
        grads: Any, state: Any, params: Any, /, *, donate: bool = False
    ) -> tuple[Any, Any]:
        leaves, structure = tree_flatten(params)
        try:
            gradients = tree_flatten_up_to(structure, grads)
            columns = [tree_flatten_up_to(structure, getattr(state, slot)) for slot in slots]
            rows = {vector: getattr(state, vector) for vector in vectors}
        except (AttributeError, StructureError):
            fits = False
        else:
            fits = isinstance(state, state_type) and _fit(leaves, gradients, columns, rows)
        if not fits or any([getattr(state, field) is not None for field in absent]):
            raise _misfit(name, state_type, list(slots), list(vectors), grads, state, params)
        h = SimpleNamespace(**hyperparameters)
        if under_transform():
            for k in changing:
                setattr(h, k, schedule_value(hyperparameters[k], state.count))
            leaves, columns, rows = by_formula(gradients, leaves, columns, rows, h)
            count = state.count + _ONE
        else:
            for k in changing:
                setattr(h, k, _plain(name, k, hyperparameters[k], state.count))
            with torch.no_grad():
                if donate:
                    count = state.count.add_(_ONE)
                else:
                    leaves = [leaf.clone() for leaf in leaves]
                    columns = [[x.clone() for x in column] for column in columns]
                    rows = {vector: row.clone() for vector, row in rows.items()}
                    count = state.count + _ONE
                in_place(gradients, leaves, columns, rows, h)
        content = {
            slot: tree_unflatten(structure, column)
            for slot, column in zip(slots, columns, strict=True)
        }
        return tree_unflatten(structure, leaves), state.replace(count=count, **content, **rows)

    def in_place(
        grads: list[Tensor | None],
        params: Column,
        columns: list[Column],
        rows: dict[str, Tensor],
        h: SimpleNamespace,
    ) -> None:
        active = [i for i, grad in enumerate(grads) if grad is not None]
        if not active:
            return
        if kernel is None:
            new_params, new_columns, new_rows = by_formula(grads, params, columns, rows, h)
            for old, new in zip(
                (params, *columns, [*rows.values()]),
                (new_params, *new_columns, [*new_rows.values()]),
                strict=True,
            ):
                for x, y in zip(old, new, strict=True):
                    if x is not y:
                        x.copy_(y)
            return
        part = rows
        if len(active) < len(grads):
            index = torch.tensor(active)
            params = [params[i] for i in active]
            columns = [[column[i] for i in active] for column in columns]
            part = {vector: row[index.to(row.device)] for vector, row in rows.items()}
        if "step" in part:
            part["step"].add_(_ONE)
        kernel(params, [g for g in grads if g is not None], columns, part, h)
        if part is not rows:
            for vector, row in rows.items():
                row[index.to(row.device)] = part[vector]

    def by_formula(
        grads: list[Tensor | None],
        params: Column,
        columns: list[Column],
        rows: dict[str, Tensor],
        h: SimpleNamespace,
    ) -> tuple[Column, list[Column], dict[str, Tensor]]:
        grown = {vector: row.double() for vector, row in rows.items()}
        if "step" in grown:
            grown["step"] = grown["step"] + 1
        per_leaf = dict(scalars(h, grown)) if scalars is not None else {}
        for vector in vectors:
            grown[vector] = per_leaf.pop(vector, grown[vector])
        everywhere = all(grad is not None for grad in grads)
        new_rows = {}
        for vector, row in rows.items():
            new = grown[vector].to(row.dtype)
            if not everywhere:
                new = torch.where(
                    torch.tensor([g is not None for g in grads], device=row.device), new, row
                )
            new_rows[vector] = new

        @functools.cache
        def values(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
            shared = {k: _like(v, dtype, device) for k, v in vars(h).items()}
            return shared | {k: _like(v, dtype, device) for k, v in per_leaf.items()}

        new_params, new_columns = list(params), [list(column) for column in columns]
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            wide = torch.promote_types(param.dtype, torch.float32)
            here = values(wide, param.device)
            here = SimpleNamespace(**{k: v[i] if k in per_leaf else v for k, v in here.items()})
            new_param, *new_slots = formula(
                param.to(wide),
                -grad.to(wide) if maximize else grad.to(wide),
                *(column[i].to(wide) for column in columns),
                h=here,
            )
            new_params[i] = new_param.to(param.dtype)
            for column, new_column, slot in zip(columns, new_columns, new_slots, strict=True):
                new_column[i] = slot.to(column[i].dtype)
        return new_params, new_columns, new_rows

    return Optimizer(init, update)


def decayed(param: Tensor, grad: Tensor, h: SimpleNamespace) -> Tensor:
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


def fusable(params: Column, grads: Column, slots: Sequence[Column], devices: Sequence[str]) -> bool:
    """Whether torch's fused kernels take these tensors.

    They walk through memory without looking at strides, so those of a leaf must be the same, and
    without gaps.
    """
    if not _PLAIN.issuperset(map(type, params)):
        return False
    if any([device.type not in devices for device in {p.device for p in params}]):
        return False
    if all([all(map(Tensor.is_contiguous, column)) for column in (params, grads, *slots)]):
        return True
    return all(
        torch.empty_like(param, device="meta").stride() == param.stride()
        and all(param.stride() == x.stride() for x in rest)
        for param, *rest in zip(params, grads, *slots, strict=True)
    )


def each(row: Tensor) -> Column:
    """The elements of a vector as tensors of shape ``()``, to be read only."""
    if row.device.type == "cpu" and len(set(row.tolist())) == 1:
        return [row[0]] * len(row)  # the usual case, and quicker
    return list(row.unbind())


_PLAIN = {Tensor, torch.nn.Parameter}
_ONE = torch.tensor(1)  # adding a tensor is quicker than adding a Python number


def _like(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    # A float64 number would widen a parameter of shape (), and a batched one can't cross devices.
    return value.to(device=device, dtype=dtype) if isinstance(value, Tensor) else value


def _plain(name: str, argument: str, value: Any, count: Tensor) -> Any:
    """The value of a hyper-parameter as a Python number, which is what the kernels take."""
    value = schedule_value(value, count)
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise OptimizerError(
            f"{name}: {argument} requires grad, but no gradient flows through an update outside of "
            "torch.func: differentiate with torch.func.grad, or give a detached tensor"
        )
    return value.item()


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
    leaves: Column,
    gradients: list[Tensor | None],
    columns: list[Column],
    rows: Mapping[str, Tensor],
) -> bool:
    """Whether shapes agree, and dtypes of gradients; the kernels do not look at the shapes."""
    shapes = [leaf.shape for leaf in leaves]
    return (
        not any([[x.shape for x in column] != shapes for column in columns])
        and not any([row.shape != (len(leaves),) for row in rows.values()])
        and all(
            [
                g is None or (g.dtype == p.dtype and g.shape == shape)
                for g, p, shape in zip(gradients, leaves, shapes, strict=True)
            ]
        )
    )


def _misfit(
    name: str,
    state_type: type[Record],
    slots: list[str],
    vectors: list[str],
    grads: Any,
    state: Any,
    params: Any,
) -> OptimizerError:
    """Say what does not fit the parameters."""
    again = "make one with init(params)"
    if not isinstance(state, state_type):
        return OptimizerError(
            f"{name}: the state is of type {type(state).__name__}, not {state_type.__name__}; {again}"
        )
    for field in state_type._names:
        has = getattr(state, field) is not None
        if field != "count" and has != (field in slots or field in vectors):
            return OptimizerError(
                f"{name}: the state {'has' if has else 'lacks'} {field}: it was made with other "
                f"hyper-parameters; {again}"
            )
    leaves, structure = tree_flatten(params)
    paths = [path_string(path) for path in tree_paths(params)]
    try:
        for slot in slots:
            check_same_structure(
                params, getattr(state, slot), "the parameters", f"the state's {slot}"
            )
    except StructureError as error:
        return OptimizerError(f"{name}: the state does not fit the parameters: {error}; {again}")
    for slot in slots:
        for path, leaf, x in zip(
            paths, leaves, tree_flatten_up_to(structure, getattr(state, slot)), strict=True
        ):
            if x.shape != leaf.shape:
                return OptimizerError(
                    f"{name}: {path} has shape {tuple(leaf.shape)}, but in the state's {slot} it "
                    f"has shape {tuple(x.shape)}; {again}"
                )
    for vector in vectors:
        if getattr(state, vector).shape != (len(leaves),):
            return OptimizerError(
                f"{name}: the state's {vector} has shape {tuple(getattr(state, vector).shape)}, "
                f"but there are {len(leaves)} parameters; {again}"
            )
    try:
        gradients = tree_flatten_up_to(structure, grads)
    except StructureError as error:
        return OptimizerError(f"{name}: the gradients do not fit the parameters: {error}")
    for path, leaf, grad in zip(paths, leaves, gradients, strict=True):
        if isinstance(grad, Tensor) and grad.shape == leaf.shape and grad.dtype == leaf.dtype:
            continue
        if grad is not None:
            what = f"{grad.dtype} {list(grad.shape)}" if isinstance(grad, Tensor) else repr(grad)
            return OptimizerError(
                f"{name}: {path} is {leaf.dtype} {list(leaf.shape)}, but its gradient is {what}"
            )
    return OptimizerError(f"{name}: the state does not fit the parameters; {again}")
