"""An ``nn.Module`` as a pure function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from puretrain import random
from puretrain.errors import StructureError
from puretrain.tree import FrozenDict, frozen_dict

__all__ = ["Apply", "Functional", "functional", "load_into"]

M = TypeVar("M", bound=nn.Module)


class Apply(Protocol):
    """The pure function that :func:`functional` makes of a module."""

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        /,
        *args: Any,
        key: Tensor | None = None,
        train: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, FrozenDict[Tensor]]:
        """Run the module; see :func:`functional`."""
        ...


class Functional(NamedTuple):
    """What :func:`functional` returns; unpack it into ``apply, params, buffers``."""

    apply: Apply
    params: FrozenDict[Tensor]
    buffers: FrozenDict[Tensor]


class _Slot(NamedTuple):
    """One place in a module that holds a tensor. Tied weights fill several with one tensor."""

    store: dict[str, Any]  # the `_parameters` or `_buffers` of the submodule
    name: str  # the key in the store
    path: str  # the name in `params` or `buffers`
    mutable: bool  # a buffer, which the module may change in place


def functional(module: nn.Module) -> Functional:
    """Take a module apart into a pure function, its parameters and its buffers.

    ``apply(params, buffers, *args, key=None, train=None, **kwargs)`` returns ``(output,
    new_buffers)``. It calls the module with the given tensors in the place of its own, and leaves
    the module as it was, also when the call raises.

    - ``params`` are the parameters that require a gradient, by name, in the module's order. A
      tensor that the module uses in two places (tied weights) occurs once, under its first name.
    - ``buffers`` are the module's buffers, non-persistent ones too, and the parameters that
      require no gradient: all that it reads but does not train. What the call changed (the
      running statistics of a BatchNorm) comes back in ``new_buffers``; the given buffers stay.
    - ``key`` seeds what the call draws (dropout), see :func:`puretrain.random.scope`. Without it
      the call draws from torch's generators as they are; :func:`puretrain.train_step` has seeded
      those already.
    - ``train`` puts the whole module in training mode (True) or evaluation mode (False) for the
      call. By default each submodule is in the mode that it had when ``functional`` was called, so
      that a frozen BatchNorm stays frozen.

    A parameter may be passed in either mapping: moving an entry from ``params`` to ``buffers``
    freezes it. A keyword of the module's own that is called ``key`` or ``train`` must be passed
    by position.

    The tensors returned share memory with the module's. On the meta device they have none:
    ``apply`` accepts real ones of the same shapes in their place.

    Raises:
        StructureError: the module has parameters without a shape yet (lazy modules).

    Example:
        >>> apply, params, buffers = functional(nn.BatchNorm1d(2))
        >>> list(params), list(buffers)
        (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
        >>> output, after = apply(params, buffers, torch.tensor([[0.0, 2.0], [4.0, 2.0]]))
        >>> buffers["running_mean"], after["running_mean"]
        (tensor([0., 0.]), tensor([0.2000, 0.2000]))
    """
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    slots = list(_find_slots(module))
    for slot in slots:
        tensor = slot.store[slot.name]
        trained = not slot.mutable and tensor.requires_grad
        (params if trained else buffers)[slot.path] = tensor.detach()
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    recurrent = [submodule for submodule in module.modules() if isinstance(submodule, nn.RNNBase)]
    names = frozenset(slot.path for slot in slots)
    changing = [slot.path for slot in slots if slot.mutable]

    def apply(
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        /,
        *args: Any,
        key: Tensor | None = None,
        train: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, FrozenDict[Tensor]]:
        if key is not None:
            with random.scope(key):
                return apply(params, buffers, *args, train=train, **kwargs)
        given = _plain(buffers) | _plain(params)
        if given.keys() != names:
            _raise_mismatch(type(module).__name__, names, given)
        for path in changing:
            given[path] = given[path].clone()
        changed = _set_modes(modes, train)
        try:
            if torch.compiler.is_compiling():
                # the compiler knows this function, and can't follow changes to a module's dicts
                output = torch.func.functional_call(module, given, args, kwargs)
            else:
                output = _call_with(module, slots, recurrent, given, args, kwargs)
        finally:
            for submodule in changed:
                submodule.training = not submodule.training
        kept = _plain(buffers)
        return output, frozen_dict(kept, [given[name] for name in kept])

    return Functional(apply, FrozenDict(params), FrozenDict(buffers))


def _find_slots(module: nn.Module) -> Iterator[_Slot]:
    first_name: dict[int, str] = {}
    seen = set()
    for prefix, submodule in module.named_modules(remove_duplicate=True):
        for store, mutable in ((submodule._parameters, False), (submodule._buffers, True)):
            for name, tensor in store.items():
                if tensor is None or (id(store), name) in seen:
                    continue
                path = f"{prefix}.{name}" if prefix else name
                if nn.parameter.is_lazy(tensor):
                    raise StructureError(
                        f"{path} of {type(module).__name__} has no shape yet, as its module is "
                        "lazy; run the module once on a batch before functional(module)"
                    )
                seen.add((id(store), name))
                yield _Slot(store, name, first_name.setdefault(id(tensor), path), mutable)


def _call_with(
    module: nn.Module,
    slots: list[_Slot],
    recurrent: list[nn.RNNBase],
    given: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a module with tensors in its slots; note in ``given`` what those hold at the end."""
    own = [slot.store[slot.name] for slot in slots]
    flat_weights = [rnn._flat_weights for rnn in recurrent]
    try:
        for slot in slots:
            slot.store[slot.name] = given[slot.path]
        for rnn in recurrent:  # these keep a second list of their parameters
            rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
        output = module(*args, **kwargs)
        for slot in slots:
            if slot.mutable:
                given[slot.path] = slot.store[slot.name]
        return output
    finally:
        for slot, tensor in zip(slots, own, strict=True):
            slot.store[slot.name] = tensor
        for rnn, weights in zip(recurrent, flat_weights, strict=True):
            rnn._flat_weights = weights


def _set_modes(modes: list[tuple[nn.Module, bool]], train: bool | None) -> list[nn.Module]:
    """Put submodules in the modes noted for them, or all in one; returns those that changed."""
    changed = [
        submodule
        for submodule, noted in modes
        if submodule.training is not (noted if train is None else train)
    ]
    for submodule in changed:
        submodule.training = not submodule.training
    return changed


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The dict inside of a frozen dict is many times quicker to copy than a mapping in general.
    return tensors._items if isinstance(tensors, FrozenDict) else dict(tensors)


def _raise_mismatch(name: str, expected: frozenset[str], given: Mapping[str, Any]) -> None:
    missing = ", ".join(sorted(expected - given.keys())[:4])
    unknown = ", ".join(sorted(given.keys() - expected)[:4])
    raise StructureError(
        f"the params and buffers don't fit {name}: "
        + " and ".join(
            text
            for text in (missing and f"missing {missing}", unknown and f"unknown {unknown}")
            if text
        )
    )


class _HasTensors(Protocol):
    @property
    def params(self) -> Any: ...
    @property
    def buffers(self) -> Any: ...


def load_into(module: M, state: _HasTensors) -> M:
    """Copy the parameters and buffers of a state into a module, in place; returns the module.

    Args:
        module: a module of the kind that the state was made from.
        state: a :class:`~puretrain.TrainState`, a :class:`Functional`, or anything else with
            ``params`` and ``buffers`` by name.

    Raises:
        StructureError: a name, shape or dtype differs; nothing has been copied then.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> _, params, buffers = functional(nn.Linear(2, 1))
        >>> _ = load_into(model, Functional(None, params, buffers))
        >>> torch.equal(model.weight, params["weight"])
        True
    """
    given = {**state.buffers, **state.params}
    slots = list(_find_slots(module))
    names = frozenset(slot.path for slot in slots)
    if given.keys() != names:
        _raise_mismatch(type(module).__name__, names, given)
    for slot in slots:
        own, new = slot.store[slot.name], given[slot.path]
        if own.shape != new.shape or own.dtype != new.dtype:
            raise StructureError(
                f"{slot.path} is {own.dtype} of shape {tuple(own.shape)} in "
                f"{type(module).__name__}, but {new.dtype} of shape {tuple(new.shape)} in the state"
            )
    with torch.no_grad():
        for slot in slots:
            slot.store[slot.name].copy_(given[slot.path])
    return module
