"""An ``nn.Module`` as a pure function of its parameters and buffers; and memory saved in pure ones.

:func:`functional` takes a module apart, :func:`load_into` puts values back into one, and
:func:`rematerialize` makes a pure function forget what its derivative can compute again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.utils._pytree as torch_pytree
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from puretrain import random
from puretrain.errors import ConfigurationError, StructureError, TransformError
from puretrain.tree import FrozenDict, frozen_dict, tree_leaves, under_transform

__all__ = ["Apply", "Functional", "functional", "load_into", "rematerialize"]

F = TypeVar("F", bound=Callable[..., Any])

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
        ConfigurationError: it is no module.
        StructureError: the module has parameters without a shape yet (lazy modules).
        TransformError: (``apply``) it is under ``vmap``, and a layer in the module has no rule for
            it: ``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` and ``nn.LSTMCell``.

    Example:
        >>> apply, params, buffers = functional(nn.BatchNorm1d(2))
        >>> list(params), list(buffers)
        (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
        >>> output, after = apply(params, buffers, torch.tensor([[0.0, 2.0], [4.0, 2.0]]))
        >>> buffers["running_mean"], after["running_mean"]
        (tensor([0., 0.]), tensor([0.2000, 0.2000]))
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"functional takes a torch.nn.Module, not {module!r:.80}")
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    slots = list(_find_slots(module))
    for slot in slots:
        tensor = slot.store[slot.name]
        trained = not slot.mutable and tensor.requires_grad
        (params if trained else buffers)[slot.path] = tensor.detach()
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    recurrent = [submodule for submodule in module.modules() if isinstance(submodule, nn.RNNBase)]
    without_rule = [
        (name, type(submodule).__name__)
        for name, submodule in module.named_modules()
        if isinstance(submodule, (nn.RNNBase, nn.LSTMCell))
    ]
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
        if without_rule and any(map(_is_batched, (*given.values(), *args))):
            path, kind = without_rule[0]
            raise TransformError(
                f"{path or 'the module'} is an nn.{kind}, which torch has no vmap rule for; run "
                "the members of an ensemble one after the other with "
                "ensemble_step(…, vectorize=False), or write the layer in plain operations"
            )
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


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


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
        + "; give those that functional(module) makes of the same module"
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


# ── Rematerialization ─────────────────────────────────────────────────────────────────────────────


def rematerialize(function: F) -> F:
    """Make a pure function keep its arguments for the backward pass, and nothing between.

    What lies between is computed once more when the gradient is, with the same draws: a part of a
    loss then takes the memory of its arguments and of its results, for a second forward pass of
    that part (Chen et al., "Training deep nets with sublinear memory cost", 2016; also called
    gradient checkpointing). It pays for a part that is one of several: a layer of a deep network.
    The values and the gradients have the same bits.

    It works with ``torch.autograd``, and so in a step; inside of transforms of ``torch.func``; and
    in a compiled step, where it may not draw, as a graph has no way to draw the same again.

    Args:
        function: a function of trees of tensors, such as the ``apply`` of :func:`functional`,
            which returns a tree of tensors. Gradients flow through its arguments only: give it the
            parameters as an argument. A module can't be one, since it holds its own.

    Raises:
        StructureError: ``function`` is a module.
        TransformError: (the function) inside of a transform, it holds a tensor that is being
            differentiated without having it as an argument; in a compiled step, it draws.

    Example:
        >>> layer = rematerialize(lambda params, x: torch.tanh(x @ params["w"]))
        >>> def loss(params, x):
        ...     for _ in range(8):
        ...         x = layer(params, x)  # of each layer only its input is kept
        ...     return x.sum()
        >>> params = {"w": torch.eye(2) / 2}
        >>> torch.func.grad(loss)(params, torch.ones(1, 2))["w"].shape
        torch.Size([2, 2])
    """
    if isinstance(function, nn.Module):
        raise StructureError(
            f"rematerialize takes a pure function, not a {type(function).__name__}, whose tensors "
            "are others when it is computed again: give it the apply of functional(module)"
        )

    described: list[Any] = []

    def recomputed(*args: Any) -> Any:
        flat, structure = torch_pytree.tree_flatten(args)
        places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        results: list[Any] = []

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = list(flat)
            for i, tensor in zip(places, tensors, strict=True):
                leaves[i] = tensor
            returned = function(*torch_pytree.tree_unflatten(leaves, structure))
            outputs, results[:] = torch_pytree.tree_flatten(returned)[0], [returned]
            return tuple(outputs)

        tensors = [flat[i] for i in places]
        outputs = _Recomputed.apply(  # type: ignore[no-untyped-call]
            _Replay(of_tensors, tensors), *tensors
        )
        if torch._guards.detect_fake_mode(tensors) is not None:
            described[:] = [_described(results[0])]
            return outputs
        return torch_pytree.tree_unflatten(outputs, torch_pytree.tree_structure(results[0]))

    # A compiler looks into it only when it has its graph. A graph knows no containers of ours: in
    # go plain dicts, out come tensors alone, and what they belong to is known when it has run.
    in_graph = torch.compiler.allow_in_graph(recomputed)  # type: ignore[no-untyped-call]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def description() -> Any:
        return described[0]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not under_transform():
            # Under torch.func its hooks for saved tensors are refused.
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
        if kwargs:
            raise TransformError(
                "inside of a transform a rematerialized function takes its arguments by position"
            )
        if torch.compiler.is_compiling():
            outputs = in_graph(*map(_plain_dicts, args))
            return _rebuilt(description(), list(outputs))
        _check_closure(function)
        return recomputed(*args)

    return run  # type: ignore[return-value]


def _plain_dicts(tree: Any) -> Any:
    if isinstance(tree, (FrozenDict, dict)):
        return {key: _plain_dicts(child) for key, child in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(map(_plain_dicts, tree))
    return tree


def _described(tree: Any) -> tuple[Any, ...]:
    if isinstance(tree, (FrozenDict, dict)):
        return ("dict", tuple((key, _described(child)) for key, child in tree.items()))
    if isinstance(tree, (tuple, list)):
        return ("tuple", tuple(map(_described, tree)))
    return ("tensor",)


def _rebuilt(description: tuple[Any, ...], outputs: list[Tensor]) -> Any:
    kind = description[0]
    if kind == "dict":
        return FrozenDict({key: _rebuilt(child, outputs) for key, child in description[1]})
    if kind == "tuple":
        return tuple([_rebuilt(child, outputs) for child in description[1]])
    return outputs.pop(0)


class _Replay:
    """A function, and all that decides what it computes besides its arguments."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> None:
        self._function = function
        self._tracing = torch._guards.detect_fake_mode(tensors) is not None
        self._device = tensors[0].device.type if tensors else "cpu"
        self._autocast = (
            torch.get_autocast_dtype(self._device)
            if torch.is_autocast_enabled(self._device)
            else None
        )
        generators = [] if self._tracing else random.generators()
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _WithoutDraws() if self._tracing else nullcontext():  # type: ignore[no-untyped-call]
            return self._function(*tensors)

    def again(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same once more, with the same draws."""
        now = [(generator, generator.get_state()) for generator, _ in self._generators]
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            autocast = torch.autocast(self._device, dtype=self._autocast)
        try:
            for generator, state in self._generators:
                generator.set_state(state)
            with autocast:
                return self(*tensors)
        finally:
            for generator, state in now:
                generator.set_state(state)


class _Recomputed(torch.autograd.Function):
    """Keeps the arguments of a function, and differentiates it when asked to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(replay: _Replay, *tensors: Tensor) -> tuple[Tensor, ...]:
        return replay(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.replay = inputs[0]
        ctx.floating = [tensor.is_floating_point() for tensor in output]
        ctx.mark_non_differentiable(*[t for t in output if not t.is_floating_point()])
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        varying = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]

        def of_varying(*values: Tensor) -> list[Tensor]:
            given = list(tensors)
            for i, value in zip(varying, values, strict=True):
                given[i] = value
            outputs = ctx.replay.again(*given)
            return [output for output in outputs if output.is_floating_point()]

        _, pull = torch.func.vjp(of_varying, *[tensors[i] for i in varying])[:2]
        slopes = [grad for grad, out in zip(grads, ctx.floating, strict=True) if out]
        back: list[Tensor | None] = [None] * len(tensors)
        for i, slope in zip(varying, pull(slopes), strict=True):
            back[i] = slope
        return None, *back


class _WithoutDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises when something is drawn."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in operation.tags:
            raise TransformError(
                f"a rematerialized function draws ({operation}) in a compiled step, which can't "
                "draw the same again: draw outside of it and pass the numbers in, or compile the "
                "step without rematerialize"
            )
        return operation(*args, **(kwargs or {}))


def _check_closure(function: Any) -> None:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        for leaf in tree_leaves(cell.cell_contents):
            if isinstance(leaf, Tensor) and torch._C._functorch.is_gradtrackingtensor(leaf):
                raise TransformError(
                    f"a rematerialized function uses {name!r}, which is being differentiated, "
                    "without having it as an argument: its gradient would be missing. Pass it in"
                )
