"""Which states of a run are worth keeping."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from puretrain.errors import check_whole
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
from puretrain.tree import Record

__all__ = ["Best", "best_k"]

S = TypeVar("S", bound=TrainState)


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
    better = comparison(mode)
    k = check_whole("best_k: k", k)

    def reduce(state: S, event: Event) -> S:
        memory: Best = memory_of(state, name)
        value = monitored(name, monitor, state, event, memory.checks)
        if value is None:
            return state
        pairs = zip(memory.steps.tolist(), memory.scores.tolist(), strict=True)
        kept = [(step, score) for step, score in pairs if step not in (-1, event.step)]
        if not math.isnan(value):
            place = next((i for i, (_, s) in enumerate(kept) if better(value, s)), len(kept))
            kept.insert(place, (event.step, value))
        kept = [*kept[:k], *[(-1, math.nan)] * (k - len(kept))]
        steps, scores = zip(*kept, strict=True)
        return remember(state, name, Best(torch.tensor(steps), real(scores), memory.checks + 1))

    def init(state: TrainState) -> Best:
        return Best(torch.full((k,), -1), real([math.nan] * k), integer(0))

    return Reducer(reduce, name, init)
