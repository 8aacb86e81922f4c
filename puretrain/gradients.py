"""The loss of a state on a batch, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from puretrain.errors import LossError, StructureError
from puretrain.state import LossScale, TrainState, address, memory
from puretrain.tree import (
    FrozenDict,
    Record,
    field,
    freeze,
    frozen_dict,
    path_string,
    tree_cast,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_paths,
    tree_unflatten,
    under_transform,
)

__all__ = [
    "Across",
    "Aux",
    "Evaluate",
    "Gradients",
    "Loss",
    "Passage",
    "Precision",
]

Precision = Literal["32", "64", "bf16", "16"]

_AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


def _no_metrics() -> FrozenDict[Any]:
    return frozen_dict((), ())  # a compiler can't follow FrozenDict()


class Aux(Record):
    """What a loss function returns besides the loss: ``return loss, Aux(metrics={"acc": acc})``."""

    buffers: Any = None
    """The new buffers; None keeps the old ones."""
    metrics: Any = field(default_factory=_no_metrics)
    """Metrics by name: tensors of shape ``()`` or metric records. No gradient flows from them."""


_NOTHING = Aux()  # made here, since a compiler can't follow the making of a frozen record


class Loss(Protocol):
    """A pure loss function."""

    def __call__(self, params: Any, buffers: Any, batch: Any, key: Tensor, /) -> Any:
        """Return the loss, a tensor of shape ``()``, or a pair of it and an :class:`Aux`."""
        ...


class Gradients(NamedTuple):
    """What one evaluation of the loss gives, all of it detached."""

    loss: Tensor
    """The loss, a tensor of shape ``()``."""
    buffers: Any
    """The buffers of the state that follows."""
    metrics: FrozenDict[Any]
    """The metrics by name, the loss among them."""
    grads: Sequence[Tensor | None]
    """A gradient for each leaf of the parameters, in their order; None where there is none."""
    as_tree: Callable[[Sequence[Any]], Any]
    """Makes a tree like the parameters out of such leaves."""
    everywhere: Callable[[bool], bool] = bool
    """Whether something holds in all processes, where they hold different gradients."""


class Passage(NamedTuple):
    """What lies between the parameters that a state holds and those that a loss is given."""

    into: Callable[[list[Tensor]], list[Tensor]]
    """From the leaves in the state to the leaves for the loss; gradients flow back through it."""
    out: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
    """What is done to the gradients of the leaves in the state when all are there."""
    weight: float = 1.0
    """What the loss is multiplied with before it is differentiated: the share of the part in the
    whole batch, so that the sum over the parts is the mean over the batch."""


class Evaluate(Protocol):
    """Evaluates the loss of a step, and its gradients, on one part of a batch."""

    def __call__(
        self, state: TrainState, batch: Any, key: Tensor | None, passage: Passage | None = None, /
    ) -> Gradients:
        """Evaluate; torch's generators are as the caller has seeded them.

        The gradients are those of the loss times the passage's weight, and times the loss scale,
        if there is one; nothing has looked at their values yet.
        """
        ...


Across = Callable[[Evaluate, TrainState, Any, "Tensor | None"], Gradients]
"""How a step evaluates a batch that is divided over devices or processes: it calls the function
that it is given for each part that falls to it, and returns what belongs to the whole batch."""


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def evaluate_loss(
    loss: Loss,
    state: TrainState,
    batch: Any,
    key: Tensor | None,
    precision: Precision,
    loss_scale: LossScale | None,
    tracing: bool,
    passage: Passage | None = None,
) -> Gradients:
    """Evaluate the loss and its gradients; torch's generators are as the caller has seeded them.

    Args:
        loss: what to differentiate.
        state: whose parameters and buffers; it is not changed.
        batch: as the loss takes it.
        key: handed to the loss.
        precision: as for :func:`puretrain.train_step`.
        loss_scale: what the loss is multiplied with, if the precision is ``'16'``.
        tracing: whether a transform is tracing the caller.
        passage: what lies between the leaves in the state and those for the loss.

    Raises:
        LossError: the loss is no scalar tensor, no parameter takes part in it, or the function has
            changed one of its arguments in place.
        StructureError: a parameter can't be differentiated, or has the wrong precision.
    """
    scale = None if loss_scale is None else loss_scale.scale
    leaves, as_tree = _leaves(state.params)
    if precision == "64":
        _check_float64(state.params)
    batch = _cast(batch, precision)

    def scaled_loss(leaves: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Aux]]:
        params = as_tree(leaves if passage is None else passage.into(leaves))
        with _casting(precision, state.params):
            value, aux = _check_loss(loss(params, state.buffers, batch, cast(Tensor, key)))
        differentiated = value if scale is None else value * scale
        if passage is not None and passage.weight != 1.0:
            differentiated = differentiated * passage.weight
        return differentiated, (value, aux)

    if tracing:
        # A function of the leaves, so that outer transforms see through it.
        grads, (_, (value, aux)) = torch.func.grad_and_value(scaled_loss, has_aux=True)(leaves)
        taken: set[int] = set()
    else:
        with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
            try:
                inputs = [leaf.detach().requires_grad_() for leaf in leaves]
            except (AttributeError, RuntimeError):
                raise StructureError(_not_differentiable(state.params)) from None
            watched = [*leaves, *_tensors(state.buffers), *_tensors(batch)]
            versions = _versions(watched)
            differentiated, (value, aux) = scaled_loss(inputs)
            if not differentiated.requires_grad:
                raise LossError(_INDEPENDENT)
            grads = backward(differentiated, inputs)
            if passage is not None:
                grads = passage.out(grads)
        if versions != _versions(watched):
            raise LossError(_changed_in_place(state, batch, watched, versions))
        # What autograd returns and what the loss returns may be the memory of its arguments.
        taken = memory(watched)
        grads = _separate(grads, leaves, state.params, taken)
    if not isinstance(aux.metrics, Mapping):
        raise LossError(
            f"the metrics in Aux are {describe(aux.metrics)}; give them by name, such as "
            "Aux(metrics={'accuracy': accuracy})"
        )
    value = _separated(value, taken, tracing)
    metrics = {"loss": value}
    for name, metric in aux.metrics.items():
        metrics[name] = _separated(_as_tensor(metric), taken, tracing)
    buffers = state.buffers
    if aux.buffers is not None:
        # Buffers that stay as they were are shared with the state before: no step overwrites them.
        held = memory(_tensors(state.buffers)) - memory(leaves) if taken else taken
        buffers = _separated(aux.buffers, taken - held, tracing)
    return Gradients(value, buffers, frozen_dict(metrics, metrics.values()), grads, as_tree)


def evaluate_metrics(
    function: Callable[[Any, Any, Any, Tensor], Mapping[str, Any]],
    state: TrainState,
    batch: Any,
    key: Tensor,
    precision: Precision,
) -> FrozenDict[Any]:
    """The metrics that a function computes of a state and a batch, without gradients."""
    tracing = under_transform()
    batch = _cast(batch, precision)
    with torch.no_grad(), _casting(precision, state.params):
        metrics = function(state.params, state.buffers, batch, key)
    if not isinstance(metrics, Mapping):
        raise LossError(
            f"the function of eval_step returned {type(metrics).__name__}; "
            "it returns metrics by name, such as {'loss': loss}"
        )
    taken: set[int] = set()
    if not tracing:  # the state may be overwritten later on, the metrics must not change then
        taken = memory(_tensors((state.params, state.buffers, batch)))
    return FrozenDict(
        {name: _separated(_as_tensor(x), taken, tracing) for name, x in metrics.items()}
    )


_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)


def backward(loss: Tensor, inputs: list[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of a loss, as ``torch.autograd.grad(loss, inputs, allow_unused=True)``.

    What that does around torch's engine costs a small model a tenth of its step. It serves other
    kinds of tensors, and devices whose part of the graph runs in a thread of its own.
    """
    if _ENGINE is None or loss.device.type != "cpu" or {*map(type, (loss, *inputs))} != {Tensor}:
        return torch.autograd.grad(loss, inputs, allow_unused=True)
    first = (torch.ones_like(loss),)
    return cast(
        "tuple[Tensor | None, ...]",
        # keeps no graph, makes no graph, and allows inputs without a gradient
        _ENGINE.run_backward((loss,), first, False, False, (*inputs,), True, accumulate_grad=False),
    )


def _leaves(params: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of the parameters, and the function that makes such a tree out of leaves."""
    if type(params) is FrozenDict and {*map(type, params.values())} == _ONLY_TENSORS:
        names = params.keys()  # the usual kind, which is much quicker to do by hand
        return list(params.values()), lambda leaves: frozen_dict(names, leaves)
    leaves, structure = tree_flatten(params)
    return leaves, functools.partial(tree_unflatten, structure)


_INDEPENDENT = (
    "the loss does not depend on any parameter: compute it from the params that the loss function "
    "is given (not from a module's own), without detach() or no_grad()"
)


def _separate(
    grads: Sequence[Tensor | None], leaves: list[Tensor], params: Any, taken: set[int]
) -> Sequence[Tensor | None]:
    """Make sure that gradients may be changed in place.

    Autograd returns one tensor for two inputs that were added, and an expanded one for a sum.
    """
    there = [grad for grad in grads if grad is not None]
    if not there:
        raise LossError(_INDEPENDENT)
    if {grad.layout for grad in there} != {torch.strided}:
        raise StructureError(_sparse_gradient(grads, params))
    addresses = memory(there)
    if (
        len(addresses) == len(leaves)
        and taken.isdisjoint(addresses)
        and [*map(Tensor.stride, there)] == [*map(Tensor.stride, leaves)]
    ):
        return grads
    separate: list[Tensor | None] = []
    seen = set(taken)
    for grad, leaf in zip(grads, leaves, strict=True):
        if grad is not None:
            if grad.stride() != leaf.stride() or address(grad) in seen:
                grad = torch.empty_like(leaf).copy_(grad)
            seen.add(address(grad))
        separate.append(grad)
    return separate


def _sparse_gradient(grads: Sequence[Tensor | None], params: Any) -> str:
    path, layout = next(
        (path, grad.layout)
        for path, grad in zip(tree_paths(params), grads, strict=True)
        if grad is not None and grad.layout is not torch.strided
    )
    return (
        f"params/{path_string(path)} has a gradient of layout {layout}, which no optimizer here "
        "takes; make the layer with sparse=False"
    )


def _separated(tree: Any, taken: set[int], tracing: bool) -> Any:
    """What the loss returned, without a graph, and with a copy of what is in memory taken."""
    if tracing:  # an outer transform may want to differentiate these
        return freeze(tree)
    if isinstance(tree, Tensor):
        tree = tree.detach() if tree.requires_grad else tree
        return tree.clone() if address(tree) in taken else tree
    if isinstance(tree, Mapping):  # by hand: this is in every step, and maps are cheap to walk
        return FrozenDict({key: _separated(child, taken, tracing) for key, child in tree.items()})
    return tree_map(
        lambda leaf: _separated(leaf, taken, tracing) if isinstance(leaf, Tensor) else leaf,
        freeze(tree),
    )


def _versions(tensors: list[Tensor]) -> list[int]:
    """How often each tensor was changed in place; torch does not count it in inference mode."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _changed_in_place(
    state: TrainState, batch: Any, watched: list[Tensor], versions: list[int]
) -> str:
    changed = {
        id(tensor)
        for tensor, before, now in zip(watched, versions, _versions(watched), strict=True)
        if before != now
    }
    arguments = FrozenDict(params=state.params, buffers=state.buffers, batch=batch)
    where = ", ".join(
        path_string(path)
        for path, leaf in zip(tree_paths(arguments), tree_leaves(arguments), strict=True)
        if id(leaf) in changed
    )
    return (
        f"the loss function has changed {where} in place, which others may hold as well; let it "
        "compute a new tensor (x = x / 255 instead of x /= 255) and return it, if it is a buffer"
    )


_ONLY_TENSORS = {Tensor}


def _tensors(tree: Any) -> list[Tensor]:
    if type(tree) is tuple and {*map(type, tree)} == _ONLY_TENSORS:
        return list(tree)  # the usual batch, and quicker
    if type(tree) is FrozenDict and {*map(type, tree.values())} <= _ONLY_TENSORS:
        return list(tree.values())  # the usual buffers
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _check_loss(returned: Any) -> tuple[Tensor, Aux]:
    value, aux = (
        returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, _NOTHING)
    )
    if not isinstance(value, Tensor) or not isinstance(aux, Aux):
        raise LossError(
            f"the loss function returned {describe(returned)}; it returns the loss, a tensor of "
            "shape (), or (loss, Aux(buffers=…, metrics=…))"
        )
    if value.dim() or not value.is_floating_point():
        raise LossError(
            f"the loss is {describe(value)}; it must be one floating-point number, a tensor of "
            "shape (): reduce it with .mean() or .sum()"
        )
    return value, aux


def describe(value: Any) -> str:
    """What a value is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    return f"an object of type {type(value).__name__}"


def _as_tensor(value: Any) -> Any:
    """A metric as it is, a number as a tensor: all leaves of a state are tensors."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else value


def _not_differentiable(params: Any) -> str:
    for path, leaf in zip(tree_paths(params), tree_leaves(params), strict=True):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return (
                f"params/{path_string(path)} is {describe(leaf)}, which has no gradient; "
                "keep it in the buffers"
            )
    return "a parameter can't require a gradient; was it made in torch.inference_mode()?"


# ── Precision ─────────────────────────────────────────────────────────────────────────────────────


def _casting(precision: Precision, params: Any) -> AbstractContextManager[Any]:
    dtype = _AUTOCAST.get(precision)
    if dtype is None:
        return nullcontext()
    device = next((leaf.device.type for leaf in tree_leaves(params)), "cpu")
    return torch.autocast(device, dtype=dtype)


def _cast(batch: Any, precision: Precision) -> Any:
    return tree_cast(batch, torch.float64) if precision == "64" else batch


def _check_float64(params: Any) -> None:
    for path, leaf in zip(tree_paths(params), tree_leaves(params), strict=True):
        if leaf.dtype != torch.float64:
            raise StructureError(
                f"params/{path_string(path)} is {leaf.dtype}, but the precision of the step is "
                "'64': make the state from tree_cast(params, torch.float64) and buffers likewise"
            )


# ── Watching ──────────────────────────────────────────────────────────────────────────────────────

Watch = Callable[[TrainState, Gradients], None]

_watchers: ContextVar[tuple[Watch, ...]] = ContextVar("_watchers", default=())


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Show a function what each step evaluates, in this thread, however the steps are wrapped.

    ``watch(state, gradients)`` is called before the optimizer, and may not change what it sees.
    Steps inside of a transform are not shown, as their tensors have no values yet.
    """
    token = _watchers.set((*_watchers.get(), watch))
    try:
        yield
    finally:
        _watchers.reset(token)


def shown(state: TrainState, gradients: Gradients, tracing: bool) -> Gradients:
    """Show gradients to all who watch; returns them."""
    if not tracing:
        for watch in _watchers.get():
            watch(state, gradients)
    return gradients


def is_watched() -> bool:
    """Whether steps are being shown to somebody."""
    return bool(_watchers.get())
