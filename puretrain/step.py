"""From a loss function to a step: ``step(state, batch) -> state``, a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from puretrain import random
from puretrain.errors import (
    LossError,
    NonFiniteError,
    OptimizerError,
    StructureError,
    TransformError,
    check_choice,
    check_whole,
)
from puretrain.gradients import (
    Across,
    Gradients,
    Loss,
    Passage,
    Precision,
    describe,
    evaluate_loss,
    evaluate_metrics,
    shown,
)
from puretrain.optim import Optimizer
from puretrain.optim.leafwise import ONE
from puretrain.state import (
    Accumulator,
    LossScale,
    TrainState,
    accept,
    claim,
    give_up,
)
from puretrain.tree import (
    FrozenDict,
    path_string,
    tree_flatten,
    tree_leaves,
    tree_like,
    tree_map,
    tree_paths,
    tree_unflatten,
    under_transform,
)

__all__ = [
    "EvalStep",
    "NonFinite",
    "Recipe",
    "Step",
    "eval_step",
    "train_step",
]

S = TypeVar("S", bound=TrainState)
T = TypeVar("T")

NonFinite = Literal["propagate", "raise", "skip"]

_FIRST_SCALE, _GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


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


class Recipe(NamedTuple):
    """The arguments of :func:`train_step`, which a step has as ``step.recipe``.

    ``step.recipe.replace(accumulate=4).step()`` is the same step, but for one of them.
    """

    loss: Loss
    optimizer: Optimizer
    accumulate: int = 1
    precision: Precision = "32"
    nonfinite: NonFinite = "propagate"
    draws: bool = True
    across: Across | None = None

    def replace(self, **changes: Any) -> Recipe:
        """The same with some arguments changed.

        Raises:
            ConfigurationError: there is no such argument.
        """
        for name in changes:
            check_choice("an argument of train_step", name, self._fields)
        return self._replace(**changes)

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
        LossError: ``loss`` is no function; (the step) it returns no scalar tensor, no parameter
            takes part in that, or it has changed one of its arguments in place.
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
    if not callable(loss):
        raise LossError(
            f"loss is a function loss(params, buffers, batch, key), not {describe(loss)}"
        )
    accumulate = check_whole("accumulate", accumulate)
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
        result = shown(given, result, tracing)
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
        with random.scope(key):
            return evaluate_metrics(function, state, batch, key, precision)

    return step


# ── The loss scale ────────────────────────────────────────────────────────────────────────────────


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
            f"a step takes a TrainState and a batch, in this order; the state is {describe(state)}"
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
