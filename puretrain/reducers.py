"""Reducers: callbacks that are pure functions of the state and an event.

What a reducer remembers is in ``state.reducers`` under its name, so it is saved with the state, and
a resumed run goes on exactly. Each function here makes a :class:`~puretrain.loop.Reducer`; give
them to :func:`puretrain.fit`. To use one in a loop of your own, call :func:`puretrain.prepare` on
the state once, and ``state = reducer.reduce(state, event)`` after each event.

A *monitor* is the name of a metric as the events carry it: ``"val/loss"`` comes with every
validation, ``"train/loss"`` (the mean over an epoch) at the end of every epoch, and ``"loss"`` with
every step. Such a reducer looks whenever an event carries the metric, and counts those events.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, NonFiniteError, check_choice, check_whole
from puretrain.loop import Event, Reducer
from puretrain.optim import get_hyperparams, set_hyperparams
from puretrain.state import TrainState, reserve, unreserve
from puretrain.tree import (
    FrozenDict,
    Record,
    check_same_structure,
    invalidate,
    nodes,
    path_string,
    tree_flatten,
    tree_leaves,
    tree_like,
    tree_map,
    tree_paths,
    tree_structure,
    tree_unflatten,
    under_transform,
)

__all__ = [
    "Average",
    "Best",
    "Plateau",
    "Stopping",
    "averaged",
    "best_k",
    "early_stopping",
    "ema",
    "lr_monitor",
    "nan_guard",
    "reduce_on_plateau",
    "swa",
]

S = TypeVar("S", bound=TrainState)

Mode = Literal["min", "max"]


def _integer(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def _real(value: float | Sequence[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ── Averages of the parameters ────────────────────────────────────────────────────────────────────


class Average(Record):
    """What :func:`ema` and :func:`swa` remember."""

    params: Any
    """The average of the parameters, a tree like them."""
    buffers: Any
    """The average of the buffers, a tree like them; None if they are not averaged."""
    count: Tensor
    """How often the average was moved, int64 of shape ``()``."""
    updates: Tensor
    """``state.updates`` when it was last moved, int64 of shape ``()``."""


def ema(
    decay: float = 0.999,
    *,
    every: int = 1,
    warmup: bool = False,
    buffers: bool = True,
    name: str = "ema",
) -> Reducer:
    """Keep an exponential moving average of the parameters, which often generalizes better.

    After update n: ``average = average + (1 - decay) * (params - average)``, beginning from the
    parameters at the start of the run (Polyak and Juditsky, "Acceleration of stochastic
    approximation by averaging", 1992). Parameters of a low precision are averaged in that
    precision: with bfloat16 a decay of 0.99 is about the slowest that still moves.

    :func:`averaged` puts the average in the place of the parameters. The state, and so a
    checkpoint, always holds both.

    Args:
        decay: how much of the average stays at each update, from 0 up to 1.
        every: move the average after every so many updates of the optimizer (``state.updates``:
            with accumulation, a step is not always an update).
        warmup: use ``min(decay, (1 + n) / (10 + n))`` the n-th time, from 0, so that the random
            initial parameters are soon forgotten.
        buffers: average floating-point buffers as well (running statistics that fit the averaged
            parameters) and copy the others. Without it :func:`averaged` leaves the buffers alone.
        name: the key of the memory in ``state.reducers``.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> import puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=1.0)
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> state = pt.fit(state, step, [torch.tensor(-1.0)] * 2, epochs=1, reducers=[ema(0.5)])
        >>> state.params["w"], averaged(state).params["w"]  # 1, 2 -> 0.5, 1.25
        (tensor(2.), tensor(1.2500))

        To validate the average instead of the last parameters:

        >>> evaluate = pt.eval_step(lambda params, buffers, batch, key: {"w": params["w"]})
        >>> validation = pt.Validation(
        ...     lambda state, batch: evaluate(averaged(state), batch), [torch.tensor(0.0)])
    """
    if not 0.0 <= decay < 1.0:
        raise ConfigurationError(f"the decay of ema is from 0 up to (not at) 1, not {decay!r}")
    every = check_whole("ema: every", every)

    def reduce(state: S, event: Event) -> S:
        memory: Average = memory_of(state, name)
        updates = int(state.updates)
        # At the end of an epoch as well: the flush of waiting gradients is an update without a step
        if updates == int(memory.updates) or updates % every:
            return state
        n = int(memory.count)
        kept = min(decay, (1 + n) / (10 + n)) if warmup else decay
        return _move(state, name, memory, 1.0 - kept, event.donate)

    return Reducer(reduce, name, lambda state: _first_average(state, buffers))


def swa(
    *,
    start_epoch: int | None = None,
    start_step: int | None = None,
    every: int = 1,
    buffers: bool = True,
    name: str = "swa",
) -> Reducer:
    """Keep the mean of the parameters at several points of the run (stochastic weight averaging).

    ``mean = mean + (params - mean) / (n + 1)`` at the n-th point, from 0 (Izmailov et al.,
    "Averaging weights leads to wider optima and better generalization", UAI 2018). It wants a
    learning rate that stays high, see :func:`puretrain.optim.constant`.

    :func:`averaged` with ``"swa"`` puts the mean in the place of the parameters. The mean of
    BatchNorm's running statistics is not quite the statistics of the mean network; for those, run
    the network in training mode over some batches.

    Args:
        start_epoch: take part of the state at the end of this epoch (from 0) and of later ones.
        start_step: instead, take part after this step (from 1) and later ones.
        every: at every so many epochs or steps from the start.
        buffers: as for :func:`ema`.
        name: the key of the memory in ``state.reducers``.

    Raises:
        ConfigurationError: not exactly one of the starts is given, or an argument is out of range.

    Example:
        >>> import puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=1.0)
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> state = pt.fit(state, step, [torch.tensor(-1.0)] * 4, epochs=1,
        ...                reducers=[swa(start_step=2, every=2)])
        >>> averaged(state, "swa").params["w"]  # the mean of 2 and 4
        tensor(3.)
    """
    if (start_epoch is None) == (start_step is None):
        raise ConfigurationError("swa begins at start_epoch=, or at start_step=; give one of them")
    every = check_whole("swa: every", every)
    kind: Literal["step", "epoch_end"] = "epoch_end" if start_step is None else "step"
    start = start_epoch if start_step is None else start_step
    start = check_whole(f"swa: start_{'epoch' if start_step is None else 'step'}", start, 0)

    def reduce(state: S, event: Event) -> S:
        since = (event.epoch if start_step is None else event.step) - start
        if since < 0 or since % every:
            return state
        memory: Average = memory_of(state, name)
        return _move(state, name, memory, 1.0 / (int(memory.count) + 1), event.donate)

    return Reducer(reduce, name, lambda state: _first_average(state, buffers), (kind,))


def averaged(state: S, name: str = "ema") -> S:
    """The state with averaged parameters (and buffers) in the place of its own, for evaluation.

    It shares its tensors with the memory of the reducer: while you need it beyond the next step of
    a running loop, hold a :func:`puretrain.lease` on it.

    Args:
        state: a state of a run with :func:`ema` or :func:`swa`.
        name: the name of that reducer.

    Raises:
        ConfigurationError: the state has no such average, or nothing was averaged yet.
    """
    memory = state.reducers.get(name)
    fields = dict(memory) if isinstance(memory, FrozenDict) else vars(memory or FrozenDict)
    if not {"params", "count", "updates"} <= fields.keys():
        raise ConfigurationError(
            f"the state has no average named {name!r}: fit it with the reducer ema() or swa() "
            f"of that name; its reducers are: {', '.join(state.reducers) or 'none'}"
        )
    if not int(fields["count"]):
        raise ConfigurationError(
            f"the reducer {name!r} has averaged nothing yet, at step "
            f"{int(state.step)}; train further, or let it begin earlier"
        )
    params = _shaped_like(state.params, fields["params"], f"the parameters in {name!r}")
    buffers = fields.get("buffers")
    if buffers is None:
        return state.replace(params=params)
    return state.replace(
        params=params, buffers=_shaped_like(state.buffers, buffers, f"the buffers in {name!r}")
    )


def _shaped_like(template: Any, stored: Any, what: str) -> Any:
    # The very containers of the memory, so that a lease on the one keeps the other; and where new
    # ones are needed (a checkpoint read without a template), new tensors in them.
    if tree_structure(stored) == tree_structure(template):
        return stored
    return tree_map(torch.clone, tree_like(template, stored, what))


def _first_average(state: TrainState, with_buffers: bool) -> Average:
    copy = tree_map(torch.clone, (state.params, state.buffers if with_buffers else None))
    return Average(*copy, _integer(0), state.updates.clone())


def _move(state: S, name: str, memory: Average, weight: float, donate: bool) -> S:
    """Move an average towards the state's parameters by a weight; the first of a mean is a copy."""
    transformed = under_transform()
    reserved = reserve(memory) if donate and not transformed else None
    donate = reserved is not None
    before = (memory.params, memory.buffers)
    current = (state.params, None if memory.buffers is None else state.buffers)
    old, structure = tree_flatten(before)
    new, structure_now = tree_flatten(current)
    if structure_now != structure:
        check_same_structure(before, current, f"the average {name!r}", "the state")
    moves = [
        weight != 1.0 and (end.is_floating_point() or end.is_complex()) for end in new
    ]  # the others are copied
    starts = [start for start, moved in zip(old, moves, strict=True) if moved]
    ends = [end for end, moved in zip(new, moves, strict=True) if moved]
    if donate:
        if starts:
            torch._foreach_lerp_(starts, ends, weight)
        for start, end, moved in zip(old, new, moves, strict=True):
            if not moved:
                start.copy_(end)
    else:
        if transformed:
            averages = [torch.lerp(x, end, weight) for x, end in zip(starts, ends, strict=True)]
        else:
            averages = list(torch._foreach_lerp(starts, ends, weight)) if starts else []
        averaged = iter(averages)
        old = [
            next(averaged) if moved else end.clone() for end, moved in zip(new, moves, strict=True)
        ]
    params, buffers = tree_unflatten(structure, old)
    after = Average(params, buffers, memory.count + 1, state.updates)
    if reserved is not None:
        reason = f"the reducer {name!r} has moved its average on in place"
        for node in nodes(memory):
            invalidate(node, reason)
        unreserve(reserved)
    return _remember(state, name, after)


# ── Stopping ──────────────────────────────────────────────────────────────────────────────────────


class Stopping(Record):
    """What :func:`early_stopping` remembers; all of shape ``()``."""

    best: Tensor
    """The best value so far, float64; infinite before the first."""
    waited: Tensor
    """How many checks in a row brought no improvement, int64."""
    checks: Tensor
    """How many checks there were, int64."""
    stopped: Tensor
    """The step after which it asked to stop, int64; -1: it has not."""
    reason: Tensor
    """Why, int64: an index of :data:`REASONS`."""


REASONS = (
    "not stopped",
    "no improvement",
    "the metric is not finite",
    "the stopping threshold is reached",
    "the divergence threshold is passed",
)
"""What the field ``reason`` of :class:`Stopping` stands for."""


def early_stopping(
    monitor: str,
    *,
    min_delta: float = 0.0,
    patience: int = 3,
    mode: Mode = "min",
    stopping_threshold: float | None = None,
    divergence_threshold: float | None = None,
    check_finite: bool = True,
    name: str = "early_stopping",
) -> Reducer:
    """End the run when a metric does not get better any more.

    Args:
        monitor: the metric; each event that carries it is a check.
        min_delta: a change of at most this much is no improvement.
        patience: stop when so many checks in a row brought no improvement.
        mode: whether ``'min'`` or ``'max'`` is better.
        stopping_threshold: stop as soon as the metric is better than this.
        divergence_threshold: stop as soon as the metric is worse than this.
        check_finite: stop when the metric is NaN or infinite. Otherwise NaN is no improvement.
        name: the key of the memory in ``state.reducers``; it says when and why the run stopped.

    Raises:
        ConfigurationError: an argument is out of its range; (in the loop) the metric is missing
            where it should be.

    Example:
        >>> import puretrain as pt
        >>> from puretrain.loop import Event
        >>> reducer = early_stopping("val/loss", patience=2)
        >>> state = pt.prepare(pt.TrainState.create({}, key=pt.random.key(0)), [reducer])
        >>> for i, loss in enumerate([0.9, 0.7, 0.8, 0.7]):
        ...     event = Event("validation", i, i, {"val/loss": torch.tensor(loss)})
        ...     state = reducer.reduce(state, event)
        ...     print(loss, bool(state.stop))
        0.9 False
        0.7 False
        0.8 False
        0.7 True
    """
    better = _better(mode)
    worst = math.inf if mode == "min" else -math.inf
    patience = check_whole("patience", patience, 0)
    if not min_delta >= 0:
        raise ConfigurationError(f"min_delta is 0 or more, not {min_delta!r}")
    margin = min_delta if mode == "min" else -min_delta

    def reduce(state: S, event: Event) -> S:
        memory: Stopping = memory_of(state, name)
        value = _monitored(name, monitor, state, event, memory.checks)
        if value is None:
            return state
        best, waited, reason = float(memory.best), int(memory.waited), 0
        if check_finite and not math.isfinite(value):
            reason = 2
        elif stopping_threshold is not None and better(value, stopping_threshold):
            reason = 3
        elif divergence_threshold is not None and better(divergence_threshold, value):
            reason = 4
        elif better(value + margin, best):
            best, waited = value, 0
        else:
            waited += 1
            reason = int(waited >= patience)
        memory = memory.replace(best=_real(best), waited=_integer(waited), checks=memory.checks + 1)
        if reason:
            memory = memory.replace(stopped=_integer(event.step), reason=_integer(reason))
            state = state.replace(stop=torch.tensor(True))
        return _remember(state, name, memory)

    def init(state: TrainState) -> Stopping:
        return Stopping(_real(worst), _integer(0), _integer(0), _integer(-1), _integer(0))

    return Reducer(reduce, name, init)


def nan_guard(
    what: Literal["loss", "params"] = "loss",
    *,
    every: int = 1,
    action: Literal["raise", "stop"] = "raise",
) -> Reducer:
    """End the run when the loss or a parameter has become NaN or infinite.

    It looks after the step, when the harm is done: ``train_step(nonfinite=…)`` looks before the
    update. On an accelerator each look waits for the device.

    Args:
        what: ``'loss'`` looks at the metrics of the step, ``'params'`` at the parameters as well.
        every: look after every so many steps.
        action: ``'raise'`` raises :class:`~puretrain.errors.NonFiniteError`; ``'stop'`` asks the
            loop to end, which then ends as usual, with a last checkpoint.

    Raises:
        ConfigurationError: an argument has no such value.
        NonFiniteError: (in the loop) with the number of the step and the name of the leaf.
    """
    check_choice("what", what, ("loss", "params"))
    check_choice("action", action, ("raise", "stop"))
    every = check_whole("nan_guard: every", every)

    def reduce(state: S, event: Event) -> S:
        if event.step % every:
            return state
        bad = _nonfinite("metrics", event.metrics)
        if bad is None and what == "params":
            bad = _nonfinite("params", state.params)
        if bad is None:
            return state
        if action == "stop":
            return state.replace(stop=torch.tensor(True))
        raise NonFiniteError(
            f"after step {event.step} (epoch {event.epoch}), {bad} is not finite; lower the "
            "learning rate, clip the gradients, or let train_step(nonfinite='skip') pass over it"
        )

    return Reducer(reduce, on=("step",))


def _nonfinite(where: str, tree: Any) -> str | None:
    """The path of the first leaf that has a NaN or an infinity."""
    leaves = [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor)
        and (leaf.is_floating_point() or leaf.is_complex())
        and leaf.numel()
    ]
    if not leaves:
        return None
    # The largest magnitude is finite only if all are; one look at the host suffices.
    largest = torch._foreach_norm(leaves, math.inf)
    if bool(torch.stack([norm.to(leaves[0].device) for norm in largest]).isfinite().all()):
        return None
    return next(
        path_string((where, *path))
        for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True)
        if isinstance(leaf, Tensor) and not bool(leaf.isfinite().all())
    )


# ── Hyper-parameters ──────────────────────────────────────────────────────────────────────────────


class Plateau(Record):
    """What :func:`reduce_on_plateau` remembers; all of shape ``()``."""

    best: Tensor
    """The best value so far, float64; infinite before the first."""
    bad: Tensor
    """How many checks in a row brought no improvement, int64."""
    cooldown: Tensor
    """How many checks are left in which nothing counts as bad, int64."""
    checks: Tensor
    """How many checks there were, int64."""


def reduce_on_plateau(
    monitor: str,
    *,
    mode: Mode = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
    hyperparameter: str = "lr",
    name: str = "reduce_on_plateau",
) -> Reducer:
    """Lower the learning rate when a metric does not get better any more.

    The learning rate must be in the state: make the optimizer with
    :func:`puretrain.optim.inject_hyperparams`. The values are those of
    :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`, for each place that injects one.

    Args:
        monitor: the metric; each event that carries it is a check.
        mode: whether ``'min'`` or ``'max'`` is better.
        factor: what the learning rate is multiplied with, between 0 and 1.
        patience: lower after *more* than so many checks in a row without an improvement.
        threshold: how much better the metric must be to count as improved.
        threshold_mode: ``'rel'``: a fraction of the best value; ``'abs'``: an amount.
        cooldown: after lowering, so many checks pass before they count again.
        min_lr: the learning rate never gets lower.
        eps: a change of at most this much is not made.
        hyperparameter: the name of the hyper-parameter.
        name: the key of the memory in ``state.reducers``.

    Raises:
        ConfigurationError: an argument is out of its range; (at the start of the loop) the
            optimizer's state does not hold the hyper-parameter; (in the loop) the metric is missing
            where it should be.
        OptimizerError: (at the start of the loop) the hyper-parameter follows a schedule, which
            would set it again.

    Example:
        >>> import puretrain as pt
        >>> from puretrain.loop import Event
        >>> optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1)
        >>> reducer = reduce_on_plateau("val/loss", patience=0, factor=0.5)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.zeros(1)}, None, optimizer, key=pt.random.key(0))
        >>> state = pt.prepare(state, [reducer])
        >>> for i in range(3):
        ...     event = Event("validation", i, i, {"val/loss": torch.tensor(1.0)})
        ...     state = reducer.reduce(state, event)
        >>> [float(value) for value in pt.optim.get_hyperparams(state.opt_state).values()]
        [0.025]
    """
    improved = _improved(mode, threshold, threshold_mode)
    if not 0.0 < factor < 1.0:
        raise ConfigurationError(f"factor is between 0 and 1, not {factor!r}")
    worst = math.inf if mode == "min" else -math.inf

    def lowered(value: float) -> float:
        new = max(value * factor, min_lr)
        return new if value - new > eps else value

    def reduce(state: S, event: Event) -> S:
        memory: Plateau = memory_of(state, name)
        value = _monitored(name, monitor, state, event, memory.checks)
        if value is None:
            return state
        best, bad, resting = float(memory.best), int(memory.bad), int(memory.cooldown)
        if improved(value, best):
            best, bad = value, 0
        else:
            bad += 1
        if resting > 0:
            resting, bad = resting - 1, 0
        if bad > patience:
            resting, bad = cooldown, 0
            found = _injected(state, "reduce_on_plateau", hyperparameter)
            new = {path: lowered(float(rate)) for path, rate in found.items()}
            state = state.replace(opt_state=set_hyperparams(state.opt_state, **new))
        return _remember(
            state,
            name,
            Plateau(_real(best), _integer(bad), _integer(resting), memory.checks + 1),
        )

    def init(state: TrainState) -> Plateau:
        found = _injected(state, "reduce_on_plateau", hyperparameter)
        set_hyperparams(state.opt_state, **found)  # refuses now what it would refuse hours later
        return Plateau(_real(worst), _integer(0), _integer(0), _integer(0))

    return Reducer(reduce, name, init)


def lr_monitor(*, every: int = 1) -> Reducer:
    """Put the hyper-parameters that the optimizer's state holds among the metrics of the step.

    ``state.metrics`` gets a ``lr`` (and what else is injected), as it was for this update, where
    observers find it. Where several parts of the optimizer inject some, the place of the part comes
    first: ``1/lr``. It does not count towards the means of an epoch.

    Args:
        every: do so after every so many steps.

    Raises:
        ConfigurationError: the optimizer's state holds none; make the optimizer with
            :func:`puretrain.optim.inject_hyperparams`.
    """
    every = check_whole("lr_monitor: every", every)

    def reduce(state: S, event: Event) -> S:
        if event.step % every:
            return state
        found = _injected(state, "lr_monitor")
        # Copies: the next update may overwrite the optimizer's own.
        return state.replace(
            metrics=state.metrics | {name: value.clone() for name, value in found.items()}
        )

    return Reducer(reduce, on=("step",))


# ── Which states to keep ──────────────────────────────────────────────────────────────────────────


class Best(Record):
    """What :func:`best_k` remembers: the steps whose states should be kept, the best first."""

    steps: Tensor
    """Their steps, int64 of shape ``(k,)``; -1 where there is none yet."""
    scores: Tensor
    """The values of the metric at those, float64 of shape ``(k,)``; NaN where there is none."""
    checks: Tensor
    """How many values there were, int64 of shape ``()``."""


def best_k(monitor: str, k: int = 1, *, mode: Mode = "min", name: str = "best_k") -> Reducer:
    """Remember at which steps a metric was best.

    The observer :func:`puretrain.observers.checkpoints` saves the states of these steps and keeps
    them as long as they are among the best. Of equal values the earlier one is better; NaN is
    never among the best.

    Args:
        monitor: the metric.
        k: how many steps to remember.
        mode: whether ``'min'`` or ``'max'`` is better.
        name: the key of the memory in ``state.reducers``.

    Raises:
        ConfigurationError: an argument is out of its range; (in the loop) the metric is missing
            where it should be.

    Example:
        >>> import puretrain as pt
        >>> from puretrain.loop import Event
        >>> reducer = best_k("val/loss", k=2)
        >>> state = pt.prepare(pt.TrainState.create({}, key=pt.random.key(0)), [reducer])
        >>> for step, loss in [(10, 0.9), (20, 0.5), (30, 0.7), (40, 0.8)]:
        ...     event = Event("validation", 0, step, {"val/loss": torch.tensor(loss)})
        ...     state = reducer.reduce(state, event)
        >>> state.reducers["best_k"].steps
        tensor([20, 30])
    """
    better = _better(mode)
    k = check_whole("best_k: k", k)

    def reduce(state: S, event: Event) -> S:
        memory: Best = memory_of(state, name)
        value = _monitored(name, monitor, state, event, memory.checks)
        if value is None:
            return state
        pairs = zip(memory.steps.tolist(), memory.scores.tolist(), strict=True)
        kept = [(step, score) for step, score in pairs if step not in (-1, event.step)]
        if not math.isnan(value):
            place = next((i for i, (_, s) in enumerate(kept) if better(value, s)), len(kept))
            kept.insert(place, (event.step, value))
        kept = [*kept[:k], *[(-1, math.nan)] * (k - len(kept))]
        steps, scores = zip(*kept, strict=True)
        return _remember(state, name, Best(torch.tensor(steps), _real(scores), memory.checks + 1))

    def init(state: TrainState) -> Best:
        return Best(torch.full((k,), -1), _real([math.nan] * k), _integer(0))

    return Reducer(reduce, name, init)


# ── Details ───────────────────────────────────────────────────────────────────────────────────────


def memory_of(state: TrainState, name: str) -> Any:
    """What a state remembers for a reducer.

    Raises:
        ConfigurationError: nothing; the state was not prepared for the reducer.
    """
    try:
        return state.reducers[name]
    except KeyError:
        raise ConfigurationError(
            f"the state has no memory of the reducer {name!r}: call "
            "`state = puretrain.prepare(state, reducers)` before the first event"
        ) from None


def _remember(state: S, name: str, memory: Record) -> S:
    return state.replace(reducers=state.reducers | {name: memory})


def _monitored(
    name: str, monitor: str, state: TrainState, event: Event, checks: Tensor
) -> float | None:
    """The value of the monitored metric, None if this event does not carry it."""
    if monitor in event.metrics:
        return _number(name, monitor, event.metrics[monitor])
    if event.kind == "step" or int(checks):
        return None
    # It has never been seen. Is this where it should have been?
    family = monitor.rpartition("/")[0]
    siblings = any(other.rpartition("/")[0] == family for other in event.metrics)
    over = event.kind == "epoch_end"
    if siblings or (over and int(state.validated) >= 0):
        others = sorted({*event.metrics, *state.metrics})
        raise ConfigurationError(
            f"the reducer {name!r} monitors {monitor!r}, but there is no such metric at the "
            f"{event.kind.replace('_', ' ')} after step {event.step}; there are: "
            f"{', '.join(others)}"
        )
    if over and event.epoch == 0:
        warnings.warn(
            f"the reducer {name!r} monitors {monitor!r}, which the first epoch did not bring, nor "
            f"any validation; there were: {', '.join(sorted({*event.metrics, *state.metrics}))}. "
            "Does fit() have a validation=, and when is it due?",
            stacklevel=2,
        )
    return None


def _number(name: str, monitor: str, metric: Any) -> float:
    value = metric.compute() if isinstance(metric, Record) else metric
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigurationError(
            f"the reducer {name!r} monitors {monitor!r}, which is no single number but of shape "
            f"{tuple(value.shape)}; of an ensemble, let each member be looked at by itself: "
            "puretrain.per_member(reducer)"
        )
    return float(value)


def _injected(state: TrainState, who: str, wanted: str | None = None) -> dict[str, Tensor]:
    present = get_hyperparams(state.opt_state)
    found = {
        path: value
        for path, value in present.items()
        if wanted is None or path.rpartition("/")[2] == wanted
    }
    if not found:
        raise ConfigurationError(
            f"{who} finds no {wanted or 'hyper-parameter'} in the optimizer's state (it has: "
            f"{', '.join(present) or 'none'}): make the optimizer with inject_hyperparams, as in "
            "puretrain.optim.inject_hyperparams(puretrain.optim.adamw)(lr=1e-3)"
        )
    return found


def _better(mode: str) -> Callable[[float, float], bool]:
    check_choice("mode", mode, ("min", "max"))
    return operator.lt if mode == "min" else operator.gt


def _improved(mode: str, threshold: float, kind: str) -> Callable[[float, float], bool]:
    better, sign = _better(mode), -1.0 if mode == "min" else 1.0
    check_choice("threshold_mode", kind, ("rel", "abs"))
    if kind == "rel":
        return lambda value, best: better(value, best * (1.0 + sign * threshold))
    return lambda value, best: better(value, best + sign * threshold)
