"""Hyper-parameters as part of the optimizer's state, where they can be read, set and swept."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from puretrain.errors import OptimizerError
from puretrain.optim.base import GradientTransformation, Optimizer, check_number, schedule_value
from puretrain.optim.members import Active, Together, together
from puretrain.tree import FrozenDict, Path, Record, field, path_string

__all__ = ["InjectedState", "get_hyperparams", "inject_hyperparams", "set_hyperparams"]


class InjectedState(Record):
    """The state of an optimizer made by :func:`inject_hyperparams`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    hyperparams: FrozenDict[Tensor]
    """The hyper-parameters by name, of shape ``()`` (float64 if they were given as numbers). That
    of a schedule has the value that the last update used."""
    inner: Any
    """What the optimizer itself remembers."""
    scheduled: tuple[str, ...] = field(static=True, default=())
    """Which of them follow a schedule."""


def inject_hyperparams(
    make: Callable[..., Any], *, static: Collection[str] = ()
) -> Callable[..., Any]:
    """Let an optimizer or a transformation keep its hyper-parameters in its state.

    There they are tensors like everything else: saved with the state, read with
    :func:`get_hyperparams`, changed with :func:`set_hyperparams` (or by the reducer
    :func:`puretrain.reducers.reduce_on_plateau`), and swept with ``torch.func.vmap``.

    Args:
        make: a function such as :func:`puretrain.optim.adamw` that takes hyper-parameters by name.
        static: arguments to leave alone.

    Returns:
        A function of the same arguments, given by name. Those that are floating-point numbers
        (or integers where the default is a float), floating-point tensors and schedules are
        injected; the elements of a tuple of such numbers, as ``betas``, as ``betas.0``, ….

    Raises:
        OptimizerError: (the function) there is nothing to inject, or an argument is positional.

    Example:
        >>> import puretrain as pt
        >>> optimizer = inject_hyperparams(pt.optim.sgd)(lr=0.5)
        >>> params = {"w": torch.tensor(1.0)}
        >>> state = set_hyperparams(optimizer.init(params), lr=0.25)
        >>> params, state = optimizer.update({"w": torch.tensor(1.0)}, state, params)
        >>> params["w"], get_hyperparams(state)
        (tensor(0.7500), {'lr': tensor(0.2500, dtype=torch.float64)})

        One state for each of several learning rates, and one step for all of them:

        >>> state = torch.func.vmap(lambda lr: set_hyperparams(state, lr=lr))(torch.rand(4))
        >>> state.hyperparams["lr"].shape
        torch.Size([4])
    """
    defaults = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    who = getattr(make, "__name__", repr(make))

    def made(*args: Any, **arguments: Any) -> Any:
        if args:
            raise OptimizerError(f"{who}: give the injected hyper-parameters by name")
        values: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for name, value in arguments.items():
            if name in static:
                continue
            if _is_numbers(value):
                lengths[name] = len(value)
                values |= {f"{name}.{i}": element for i, element in enumerate(value)}
            elif _is_injected(value, defaults.get(name)):
                values[name] = value
        if not values:
            raise OptimizerError(
                f"{who}: there is no hyper-parameter to inject among the arguments "
                f"({', '.join(arguments) or 'none are given'}); give one by name, such as lr=1e-3"
            )
        rest = {name: x for name, x in arguments.items() if name not in values | lengths}

        def with_values(current: Mapping[str, Any]) -> Any:
            whole = {name: x for name, x in current.items() if name in arguments}
            for name, length in lengths.items():
                whole[name] = tuple(current[f"{name}.{i}"] for i in range(length))
            return make(**rest, **whole)

        return _injected(who, with_values, values)

    return made


def _injected(
    who: str, with_values: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any]
) -> Any:
    schedules = {name: value for name, value in values.items() if _is_schedule(value)}
    zero = torch.tensor(0, dtype=torch.int64)
    kind = type(with_values({name: schedule_value(value, zero) for name, value in values.items()}))

    def init(params: Any, /) -> InjectedState:
        count = torch.tensor(0, dtype=torch.int64)
        # Tensors already here: some optimizers keep more for a tensor than for a number that is 0.
        start = {name: _as_tensor(schedule_value(value, count)) for name, value in values.items()}
        return InjectedState(
            count,
            FrozenDict(start),
            with_values(start).init(params),
            tuple(schedules),
        )

    def update(
        grads: Any, state: Any, params: Any, /, *, donate: bool = False
    ) -> tuple[Any, InjectedState]:
        if not isinstance(state, InjectedState) or state.hyperparams.keys() != values.keys():
            raise OptimizerError(
                f"{who}: the state is of type {type(state).__name__} and does not hold the "
                f"hyper-parameters {', '.join(values)}; make one with init(params)"
            )
        current = dict(state.hyperparams)
        for name, schedule in schedules.items():
            current[name] = _as_tensor(schedule_value(schedule, state.count))
        new, inner = with_values(current).update(grads, state.inner, params, donate=donate)
        if not donate:
            current = {k: x if k in schedules else x.clone() for k, x in current.items()}
        changes = {"count": state.count + 1, "hyperparams": FrozenDict(current), "inner": inner}
        return new, state.replace(**changes)

    @functools.lru_cache(maxsize=1024)
    def with_numbers(numbers: tuple[tuple[float, torch.dtype], ...]) -> Any:
        pairs = zip(values, numbers, strict=True)
        return with_values({name: torch.tensor(x, dtype=dtype) for name, (x, dtype) in pairs})

    update.together = Together(  # type: ignore[attr-defined]
        _update_together, (with_numbers, schedules)
    )
    wrap = GradientTransformation if issubclass(kind, GradientTransformation) else Optimizer
    return wrap(init, update)


def _update_together(
    owns: Any, grads: Any, state: InjectedState, params: Any, active: Active
) -> tuple[Any, InjectedState]:
    current = dict(state.hyperparams)
    for name in owns[0][1]:
        pairs = zip(owns, state.count.unbind(), strict=True)
        new = [_as_tensor(schedule_value(own[1][name], count)) for own, count in pairs]
        current[name] = torch.where(_mask(active, state.count), torch.stack(new), current[name])
    numbers = [[(x, row.dtype) for x in row.tolist()] for row in current.values()]
    each = zip(*numbers, strict=True)
    parts = [with_numbers(tuple(own)) for (with_numbers, _), own in zip(owns, each, strict=True)]
    params, inner = together(parts, grads, state.inner, params, active)
    state.count[list(active)] += 1
    return params, state.replace(hyperparams=FrozenDict(current), inner=inner)


def _mask(active: Active, like: Tensor) -> Tensor:
    mask = torch.zeros(len(like), dtype=torch.bool)
    mask[list(active)] = True
    return mask


def _is_real(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or not any(map(_is_real, value)):
        return False
    return all(_is_real(x) or (isinstance(x, int) and not isinstance(x, bool)) for x in value)


def _is_schedule(value: Any) -> bool:
    return callable(value) and not isinstance(value, (Tensor, type))


def _is_injected(value: Any, default: Any) -> bool:
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, float)):
        return isinstance(default, float)
    return _is_real(value) or _is_schedule(value)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.clone()
    return torch.tensor(float(value), dtype=torch.float64)


def get_hyperparams(opt_state: Any) -> dict[str, Tensor]:
    """The hyper-parameters that an optimizer's state holds.

    Args:
        opt_state: the state of any optimizer or chain with a part made by
            :func:`inject_hyperparams`.

    Returns:
        Tensors of shape ``()`` by name. Where several parts hold some, the place of the part comes
        before the name: ``1/lr``. Empty if there are none.

    >>> import puretrain as pt
    >>> sgd = inject_hyperparams(pt.optim.sgd)(lr=0.5, momentum=0.9)
    >>> optimizer = pt.optim.chain(pt.optim.clip_by_global_norm(1.0), sgd)
    >>> list(get_hyperparams(optimizer.init({"w": torch.zeros(1)})))
    ['lr', 'momentum']
    """
    places = list(_places(opt_state, ()))
    if len(places) == 1:
        return dict(places[0][1].hyperparams)
    return {
        path_string((*path, name)): value
        for path, state in places
        for name, value in state.hyperparams.items()
    }


def set_hyperparams(opt_state: Any, /, **values: float | Tensor) -> Any:
    """The state with other hyper-parameters.

    Args:
        opt_state: as for :func:`get_hyperparams`.
        **values: numbers or tensors of shape ``()``, by the names that :func:`get_hyperparams`
            gives, or by the name alone for all parts at once.

    Raises:
        OptimizerError: no part holds such a hyper-parameter, or it follows a schedule, which would
            set it again at the next update.

    >>> import puretrain as pt
    >>> optimizer = inject_hyperparams(pt.optim.sgd)(lr=0.5)
    >>> state = set_hyperparams(optimizer.init({"w": torch.zeros(1)}), lr=0.25)
    >>> get_hyperparams(state)
    {'lr': tensor(0.2500, dtype=torch.float64)}
    """
    places = list(_places(opt_state, ()))
    known = {name for _, state in places for name in state.hyperparams}
    paths = {path_string((*path, name)) for path, state in places for name in state.hyperparams}
    for name in values:
        if name not in known | paths:
            raise OptimizerError(
                f"the optimizer's state holds no hyper-parameter {name!r}; it holds: "
                f"{', '.join(get_hyperparams(opt_state)) or 'none'}. Make the optimizer with "
                "inject_hyperparams, as in inject_hyperparams(adamw)(lr=1e-3)"
            )

    def changed(path: Path, state: InjectedState) -> InjectedState:
        new = dict(state.hyperparams)
        for name, old in state.hyperparams.items():
            for wanted in (name, path_string((*path, name))):
                if wanted in values:
                    if name in state.scheduled:
                        raise OptimizerError(
                            f"{wanted} follows a schedule, which would set it again at the next "
                            "update; give inject_hyperparams a number instead"
                        )
                    new[name] = _like(wanted, values[wanted], old)
        return state.replace(hyperparams=FrozenDict(new))

    return _with_places(opt_state, (), changed)


def _like(name: str, value: float | Tensor, old: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        check_number("set_hyperparams", name, value, least=-math.inf)
        return torch.full_like(old, value)
    if value.dim() and value.shape != old.shape:
        raise OptimizerError(
            f"set_hyperparams: {name} has shape {tuple(old.shape)}, not {tuple(value.shape)}; for "
            "one state per value use torch.func.vmap"
        )
    return value.to(device=old.device, dtype=old.dtype).expand(old.shape).clone()


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, Record):
        yield from ((name, getattr(node, name)) for name in node._names)
    elif isinstance(node, Mapping):
        yield from node.items()
    elif isinstance(node, (tuple, list)):
        yield from enumerate(node)


def _places(node: Any, path: Path) -> Iterator[tuple[Path, InjectedState]]:
    if isinstance(node, InjectedState):
        yield path, node
        node, path = node.inner, (*path, "inner")
        if isinstance(node, InjectedState):
            yield from _places(node, path)
            return
    for key, child in _children(node):
        yield from _places(child, (*path, key))


def _with_places(node: Any, path: Path, change: Callable[[Path, InjectedState], Any]) -> Any:
    """The tree with every injected state changed."""
    if isinstance(node, InjectedState):
        inner = _with_places(node.inner, (*path, "inner"), change)
        return change(path, node.replace(inner=inner))
    new = {key: _with_places(child, (*path, key), change) for key, child in _children(node)}
    if all(new[key] is child for key, child in _children(node)):
        return node
    if isinstance(node, Record):
        return node.replace(**new)
    if isinstance(node, FrozenDict):
        return FrozenDict(new)
    if isinstance(node, dict):
        return new
    return type(node)(*new.values()) if hasattr(node, "_fields") else type(node)(new.values())
