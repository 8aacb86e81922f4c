"""When a run ends: it gets no better, or it is lost."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, NonFiniteError, check_choice, check_whole
from puretrain.loop import Event, Reducer
from puretrain.reducers.monitoring import (
    Mode,
    comparison,
    integer,
    memory_of,
    monitored,
    real,
    remember,
)
from puretrain.state import TrainState
from puretrain.tree import Record, path_string, tree_leaves, tree_paths

__all__ = ["REASONS", "Stopping", "early_stopping", "nan_guard"]

S = TypeVar("S", bound=TrainState)

REASONS = (
    "not stopped",
    "no improvement",
    "the metric is not finite",
    "the stopping threshold is reached",
    "the divergence threshold is passed",
)
"""What the field ``reason`` of :class:`Stopping` stands for."""


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
    better = comparison(mode)
    worst = math.inf if mode == "min" else -math.inf
    patience = check_whole("patience", patience, 0)
    if not min_delta >= 0:
        raise ConfigurationError(f"min_delta is 0 or more, not {min_delta!r}")
    margin = min_delta if mode == "min" else -min_delta

    def reduce(state: S, event: Event) -> S:
        memory: Stopping = memory_of(state, name)
        value = monitored(name, monitor, state, event, memory.checks)
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
        memory = memory.replace(best=real(best), waited=integer(waited), checks=memory.checks + 1)
        if reason:
            memory = memory.replace(stopped=integer(event.step), reason=integer(reason))
            state = state.replace(stop=torch.tensor(True))
        return remember(state, name, memory)

    def init(state: TrainState) -> Stopping:
        return Stopping(real(worst), integer(0), integer(0), integer(-1), integer(0))

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

    Example:
        >>> import torch, puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=1.0)
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(1.0)}, None, optimizer, key=pt.random.key(0))
        >>> batches = [torch.tensor(x) for x in (1.0, float("nan"), 1.0)]
        >>> end = pt.fit(state, step, batches, epochs=1, reducers=[nan_guard(action="stop")])
        >>> end.step
        tensor(2)
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
