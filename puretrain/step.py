"""From a loss function to a step: ``step(state, batch) -> state``, a pure function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from puretrain import random
from puretrain.errors import (
    ConfigurationError,
    LossError,
    NonFiniteError,
    OptimizerError,
    StructureError,
    TransformError,
)
from puretrain.optim import Optimizer
from puretrain.optim.leafwise import ONE
from puretrain.state import (
    Accumulator,
    LossScale,
    TrainState,
    accept,
    address,
    claim,
    give_up,
    memory,
)
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
    tree_like,
    tree_map,
    tree_paths,
    tree_unflatten,
    under_transform,
)

__all__ = [
    "Across",
    "Aux",
    "EvalStep",
    "Evaluate",
    "Gradients",
    "Loss",
    "NonFinite",
    "Passage",
    "Precision",
    "Recipe",
    "Step",
    "eval_step",
    "train_step",
]

S = TypeVar("S", bound=TrainState)
T = TypeVar("T")

Precision = Literal["32", "64", "bf16", "16"]
NonFinite = Literal["propagate", "raise", "skip"]

_AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}
_FIRST_SCALE, _GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


def _no_metrics() -> FrozenDict[Any]:
    return frozen_dict((), ())  # a compiler can't follow FrozenDict()


class Aux(Record):
    """What a loss function returns besides the loss."""

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


class Step(Protocol):
    """A pure function from a state and a batch to the next state."""

    def __call__(self, state: S, batch: Any, /, *, donate: bool = False) -> S:
        """Take one step; see :func:`train_step`."""
        ...


class EvalStep(Protocol):
    """A pure function from a state and a batch to metrics."""

    def __call__(self, state: TrainState, batch: Any, /) -> FrozenDict[Any]:
        """Evaluate one batch; see :func:`eval_step`."""
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


class Recipe(NamedTuple):
    """The arguments of :func:`train_step`, which a step has as ``step.recipe``.

    ``step.recipe._replace(accumulate=4).step()`` is the same step, but for one of them.
    """

    loss: Loss
    optimizer: Optimizer
    accumulate: int = 1
    precision: Precision = "32"
    nonfinite: NonFinite = "propagate"
    draws: bool = True
    across: Across | None = None

    def step(self) -> Step:
        """Make the step."""
        options = {name: getattr(self, name) for name in self._fields[2:]}
        return train_step(self.loss, self.optimizer, **options)


def train_step(
    loss: Loss,
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    precision: Precision = "32",
    nonfinite: NonFinite = "propagate",
    draws: bool = True,
    across: Across | None = None,
) -> Step:
    """Make a step out of a loss function and an optimizer.

    ``step(state, batch)`` returns the next state and changes nothing: not the state, the batch,
    a module, or torch's random generators. ``step(state, batch, donate=True)`` computes the same
    bits in the memory of the given state, which raises ``DonatedStateError`` when it is read
    afterwards; that is what a loop wants. It overwrites only what a step has made before: of
    tensors that came from elsewhere (a module's, say), and of those that the state holds a second
    time, it makes a copy first. While the state is under a :func:`~puretrain.lease`, a donating
    step copies everything. A tensor that was taken out of a donated state changes.

    Gradients come from ``torch.autograd.grad``; inside a transform of ``torch.func`` and under
    ``torch.compile`` they come from ``torch.func``, so that steps compose. There, a parameter that
    the loss does not use has a gradient of zero; otherwise it has none and stays as it is. A loss
    that draws needs ``vmap(step, randomness='different')`` (or ``'same'``), else torch raises.

    Args:
        loss: ``loss(params, buffers, batch, key)`` returns the loss, a tensor of shape ``()``, or
            ``(loss, Aux(buffers=…, metrics=…))``. It may draw random numbers as it likes: torch's
            generators are seeded from ``key``, the key of this very step.
        optimizer: what turns gradients into new parameters.
        accumulate: how many batches make an update. Their gradients are summed and divided by
            their number; ``step.flush(state)`` updates with the batches of an unfinished group,
            divided by *its* number (the loop does so at the end of an epoch).
        precision: ``'32'`` leaves dtypes alone. ``'64'`` converts floating-point inputs to
            float64 and wants parameters of float64 (see :func:`~puretrain.tree.tree_cast`).
            ``'bf16'`` runs the loss under autocast to bfloat16; ``'16'`` under autocast to
            float16 with a dynamic loss scale in ``state.loss_scale``, which starts at 65536,
            doubles after 2000 good batches in a row, and halves at an overflow, when the batch
            is skipped and counted in ``state.skipped``
            (Micikevicius et al., "Mixed precision training", ICLR 2018).
        nonfinite: what to do about a loss or gradient that is NaN or infinite: ``'propagate'``
            does not look, and so never waits for the device; ``'raise'`` raises and leaves the
            state as it was, donated or not (with precision ``'16'`` only for the loss, since
            gradients overflow now and then); ``'skip'`` leaves parameters, buffers and optimizer
            as they were and counts the batch in ``state.skipped``.
        draws: False says that the loss draws nothing: ``key`` is None then and the generators are
            left alone, which saves some 20 µs. A bare ``torch.compile`` needs it, as a graph can't
            seed; :func:`puretrain.compiled` does not.
        across: over what a batch is divided, such as ``puretrain.sharding.ddp(mesh)``; None: it
            is evaluated whole, here.

    Returns:
        The step. It also has ``flush`` and, as ``recipe``, the arguments that it was made of.

    Raises:
        ConfigurationError: an argument has no such value.
        DonatedStateError: (the step) the state was donated before.
        LossError: (the step) the loss is no scalar tensor, no parameter takes part in it, or the
            function has changed one of its arguments in place.
        NonFiniteError: (the step) as ``nonfinite='raise'`` says.
        OptimizerError: (the step) the optimizer does not fit the state.
        StructureError: (the step) a parameter can't be differentiated, or has the wrong precision.
        TransformError: (the step) a state can't be donated, nor raised about, inside a transform.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     x, y = batch
        ...     return ((x @ params["w"] - y) ** 2).mean()
        >>> optimizer = pt.optim.sgd(lr=0.5)
        >>> step = train_step(loss, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.zeros(2)}, None, optimizer, key=pt.random.key(0))
        >>> state = step(state, (torch.eye(2), torch.tensor([1.0, 2.0])))
        >>> state.params["w"], state.metrics["loss"]
        (tensor([0.5000, 1.0000]), tensor(2.5000))
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigurationError(f"accumulate is a whole number from 1, not {accumulate!r}")
    check_choice("precision", precision, ("32", "64", "bf16", "16"))
    check_choice("nonfinite", nonfinite, ("propagate", "raise", "skip"))
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            "optimizer is an Optimizer, such as puretrain.optim.adamw(1e-3), not a "
            f"{type(optimizer).__name__}; end a chain of transformations with one, and make a "
            "class of torch.optim one with puretrain.optim.from_torch"
        )
    scaled = precision == "16"

    def step(state: S, batch: Any, /, *, donate: bool = False) -> S:
        tracing = _check_call(state, donate, draws, nonfinite)
        if not draws:
            return advance(state, batch, None, donate, tracing)
        if tracing:
            drawing = random.scope(random.fold_in(state.key, state.step))
        else:
            drawing = random.step_scope(state.key, int(state.step))
        with drawing as key:
            return advance(state, batch, key, donate, tracing)

    def evaluated(
        state: TrainState, batch: Any, key: Tensor | None, scale: LossScale | None, tracing: bool
    ) -> Gradients:
        if across is None:
            return evaluate_loss(loss, state, batch, key, precision, scale, tracing)
        if tracing:
            raise TransformError(
                "a step whose batches are divided (across=) can't be transformed: processes and "
                "devices talk to each other in it. Transform the loss, or the step without it"
            )

        def evaluate(
            state: TrainState, batch: Any, key: Tensor | None, passage: Passage | None = None, /
        ) -> Gradients:
            return evaluate_loss(loss, state, batch, key, precision, scale, False, passage)

        return across(evaluate, state, batch, key)

    def advance(given: S, batch: Any, key: Tensor | None, donate: bool, tracing: bool) -> S:
        scale = _typed_loss_scale(given.loss_scale) if scaled else None
        result = _unscaled(evaluated(given, batch, key, scale, tracing), scale)
        result = _shown(given, result, tracing)
        finite: bool | Tensor = True
        if scaled or nonfinite != "propagate":
            finite = _all_finite(result, tracing)
            if nonfinite == "raise":
                _raise_unless(finite if scale is None else result.loss.isfinite(), given, result)
        counted = {
            "step": given.step + ONE,
            "metrics": result.metrics,
            "loss_scale": _rescale(scale, finite),
        }

        def from_finite(state: S, donate: bool) -> S:
            used = counted | {"buffers": result.buffers}
            if accumulate == 1:
                grads = result.as_tree(result.grads)
                return update(state, grads, donate, used)
            accumulator = _add(cast(Accumulator, state.accumulator), result.grads, donate)
            used["accumulator"] = accumulator
            return _choose(
                accumulator.count == accumulate,
                lambda: update(state, _mean(accumulator), donate, used),
                lambda: state.replace(**used),
            )

        def following(state: S, donate: bool) -> S:
            return _choose(
                finite,
                lambda: from_finite(state, donate),
                lambda: state.replace(**counted, skipped=state.skipped + ONE),
            )

        return hand_over(given, with_accumulator(given), following, donate, tracing)

    def update(state: S, grads: Any, donate: bool, changes: dict[str, Any]) -> S:
        params, opt_state = optimizer.update(grads, state.opt_state, state.params, donate=donate)
        accumulator = changes.get("accumulator")
        if accumulator is not None:  # the sums stay: the next group's first gradients replace them
            accumulator = accumulator.replace(
                count=torch.zeros_like(accumulator.count), seen=torch.zeros_like(accumulator.seen)
            )
        new = {"params": params, "opt_state": opt_state, "accumulator": accumulator}
        return state.replace(**(changes | new | {"updates": state.updates + ONE}))

    def with_accumulator(state: S) -> S:
        if accumulate == 1 or isinstance(state.accumulator, Accumulator):
            return state
        return state.replace(accumulator=_new_accumulator(state))

    def flush(state: S, /, *, donate: bool = False) -> S:
        """Update with the batches of an unfinished group, if there are any."""
        if accumulate == 1:
            return state
        tracing = _check_call(state, donate, False, "propagate")

        def following(state: S, donate: bool) -> S:
            accumulator = cast(Accumulator, state.accumulator)
            return _choose(
                accumulator.count > 0,
                lambda: update(state, _mean(accumulator), donate, {"accumulator": accumulator}),
                lambda: state,
            )

        return hand_over(state, with_accumulator(state), following, donate, tracing)

    step.flush = flush  # type: ignore[attr-defined]
    step.recipe = Recipe(  # type: ignore[attr-defined]
        loss, optimizer, accumulate, precision, nonfinite, draws, across
    )
    return step


def eval_step(
    function: Callable[[Any, Any, Any, Tensor], Mapping[str, Any]],
    *,
    precision: Precision = "32",
) -> EvalStep:
    """Make a pure function from a state and a batch to metrics.

    Args:
        function: ``function(params, buffers, batch, key)`` returns metrics by name: tensors of
            shape ``()``, which are averaged over batches by their sizes, or metric records. It
            runs without gradients; what it draws is a function of the state's key and step.
        precision: as for :func:`train_step`.

    Raises:
        ConfigurationError: ``precision`` has no such value.
        LossError: (the step) the function did not return a mapping.

    Example:
        >>> import puretrain as pt
        >>> step = eval_step(lambda params, buffers, batch, key: {"sum": params["w"] @ batch})
        >>> state = pt.TrainState.create({"w": torch.ones(3)}, key=pt.random.key(0))
        >>> step(state, torch.arange(3.0))
        {'sum': f32 3.0}
    """
    check_choice("precision", precision, ("32", "64", "bf16", "16"))

    def step(state: TrainState, batch: Any, /) -> FrozenDict[Any]:
        tracing = under_transform()
        stream = random.stream(state.key, "evaluation")
        key = random.fold_in(stream, state.step if tracing else int(state.step))
        batch = _cast(batch, precision)
        with random.scope(key), torch.no_grad(), _casting(precision, state.params):
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

    return step


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


def _shown(state: TrainState, gradients: Gradients, tracing: bool) -> Gradients:
    if not tracing:
        for watch in _watchers.get():
            watch(state, gradients)
    return gradients


def is_watched() -> bool:
    """Whether steps are being shown to somebody."""
    return bool(_watchers.get())


# ── Gradients ─────────────────────────────────────────────────────────────────────────────────────


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
            f"the metrics in Aux are {_describe(aux.metrics)}; give them by name, such as "
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
            f"the loss function returned {_describe(returned)}; it returns the loss, a tensor of "
            "shape (), or (loss, Aux(buffers=…, metrics=…))"
        )
    if value.dim() or not value.is_floating_point():
        raise LossError(
            f"the loss is {_describe(value)}; it must be one floating-point number, a tensor of "
            "shape (): reduce it with .mean() or .sum()"
        )
    return value, aux


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, value))})"
    return f"an object of type {type(value).__name__}"


def _as_tensor(value: Any) -> Any:
    """A metric as it is, a number as a tensor: all leaves of a state are tensors."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else value


def _not_differentiable(params: Any) -> str:
    for path, leaf in zip(tree_paths(params), tree_leaves(params), strict=True):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return (
                f"params/{path_string(path)} is {_describe(leaf)}, which has no gradient; "
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


def _typed_loss_scale(stored: Any) -> LossScale:
    if stored is None:
        return LossScale(torch.tensor(_FIRST_SCALE), torch.tensor(0, dtype=torch.int32))
    if isinstance(stored, LossScale):
        return stored
    return LossScale(stored["scale"], stored["good"])  # as a checkpoint holds it


def _unscaled(result: Gradients, scale: LossScale | None) -> Gradients:
    if scale is None:
        return result
    grads = [None if grad is None else grad / scale.scale for grad in result.grads]
    return result._replace(grads=grads)


def _rescale(before: LossScale | None, finite: bool | Tensor) -> LossScale | None:
    if before is None:
        return None
    good = before.good + 1
    grown = good >= _GROWTH_INTERVAL
    larger = before.scale * _GROWTH
    return _choose(
        finite,
        lambda: LossScale(
            torch.where(grown & larger.isfinite(), larger, before.scale),
            torch.where(grown, torch.zeros_like(good), good),
        ),
        lambda: LossScale(before.scale * _BACKOFF, torch.zeros_like(good)),
    )


def _all_finite(result: Gradients, tracing: bool) -> bool | Tensor:
    grads = [grad for grad in result.grads if grad is not None and grad.numel()]
    if tracing:
        return torch.stack([x.isfinite().all() for x in (result.loss, *grads)]).all()
    # The largest magnitude of each, which is finite only if all are; it can't overflow as a sum can
    largest = torch._foreach_norm(grads, float("inf")) if grads else []
    return result.everywhere(
        bool(torch.stack([x.isfinite() for x in (result.loss, *largest)]).all())
    )


def _raise_unless(finite: bool | Tensor, state: TrainState, result: Gradients) -> None:
    if finite:
        return
    bad = "the loss"
    if bool(result.loss.isfinite()):
        pairs = zip(tree_paths(state.params), result.grads, strict=True)
        bad = "the gradient of " + next(
            (
                f"params/{path_string(path)}"
                for path, grad in pairs
                if grad is not None and not bool(grad.isfinite().all())
            ),
            "a parameter of which another process has a shard",
        )
    raise NonFiniteError(
        f"step {int(state.step)}: {bad} is not finite (loss {result.loss.item()}). The state is "
        "as it was before the step. nonfinite='skip' goes on without such batches"
    )


# ── Accumulation ──────────────────────────────────────────────────────────────────────────────────


def _new_accumulator(state: TrainState) -> Accumulator:
    """An empty one, or what a checkpoint holds with its types."""
    stored: Any = state.accumulator
    leaves = tree_leaves(state.params)
    empty = Accumulator(
        tree_map(torch.zeros_like, state.params),
        torch.zeros(len(leaves), dtype=torch.bool),
        torch.tensor(0, dtype=torch.int64),
    )
    if stored is None:
        return empty
    return tree_like(empty, stored, "the accumulator", ("accumulator",))


def _add(before: Accumulator, grads: Sequence[Tensor | None], donate: bool) -> Accumulator:
    sums, structure = tree_flatten(before.grads)
    new: list[Tensor] = []
    for i, (total, grad) in enumerate(zip(sums, grads, strict=True)):
        if grad is None:
            new.append(total if donate else total.clone())
        elif under_transform():
            new.append(torch.where(before.seen[i], total + grad, grad))
        elif not before.seen[i]:
            new.append(grad)  # not 0 + grad: that would turn -0.0 into 0.0
        else:
            new.append(total.add_(grad) if donate else total + grad)
    had = torch.tensor([grad is not None for grad in grads])
    return Accumulator(tree_unflatten(structure, new), before.seen | had, before.count + 1)


def _mean(accumulator: Accumulator) -> Any:
    """The mean gradients, a tree like the parameters."""
    sums, structure = tree_flatten(accumulator.grads)
    if under_transform():
        return tree_unflatten(structure, [total / accumulator.count for total in sums])
    count, seen = int(accumulator.count), accumulator.seen.tolist()
    means = [total / count if had else None for total, had in zip(sums, seen, strict=True)]
    return tree_unflatten(structure, means)


# ── Control flow ──────────────────────────────────────────────────────────────────────────────────


def hand_over(
    given: S, state: S, following: Callable[[S, bool], S], donate: bool, tracing: bool
) -> S:
    """Compute the state that follows, in the memory of the given one if that is allowed.

    ``state`` is the given one, or a copy of it that has an accumulator.
    """
    donation = accept(given, state) if donate else None
    if donation is None:
        new = following(state, False)
        if not tracing:
            claim(new, state)
        return new
    try:
        new = following(donation.state, True)
    except BaseException:
        give_up(donation, None)
        raise
    give_up(donation, new)
    return new


def _choose(condition: bool | Tensor, yes: Callable[[], T], no: Callable[[], T]) -> T:
    """A branch on the host, or, where tensors have no values to look at, a choice by element."""
    if isinstance(condition, bool) or not under_transform():
        return yes() if condition else no()
    return tree_map(lambda a, b: torch.where(condition, a, b), yes(), no())


def _check_call(state: Any, donate: bool, draws: bool, nonfinite: str) -> bool:
    """Check what a step is called with and where; whether that is inside of a transform."""
    if not isinstance(state, TrainState):
        raise StructureError(
            f"a step takes a TrainState and a batch, in this order; the state is {_describe(state)}"
        )
    if not under_transform():
        return False
    if donate:
        raise TransformError(
            "a state can't be donated inside a transform: call the step with donate=False there"
        )
    if nonfinite == "raise":
        raise TransformError(
            "nonfinite='raise' can't look at values inside a transform; use 'skip' or 'propagate'"
        )
    if draws and torch.compiler.is_compiling() and not random.is_seeded():
        raise TransformError(
            "a graph can't seed torch's generators: compile the step with puretrain.compiled(step) "
            "instead of torch.compile, or make it with train_step(..., draws=False)"
        )
    return True


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ConfigurationError that names the argument unless its value is one of the choices."""
    if value not in choices:
        raise ConfigurationError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}")
