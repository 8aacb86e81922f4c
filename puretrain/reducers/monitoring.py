"""What reducers share: their memory in the state, and the metric that one monitors."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, check_choice
from puretrain.loop import Event
from puretrain.state import TrainState
from puretrain.tree import Record

__all__ = [
    "Mode",
    "comparison",
    "improvement",
    "integer",
    "memory_of",
    "monitored",
    "number",
    "real",
    "remember",
]

S = TypeVar("S", bound=TrainState)

Mode = Literal["min", "max"]


def integer(value: int) -> Tensor:
    """An int64 tensor of shape ``()``."""
    return torch.tensor(value, dtype=torch.int64)


def real(value: float | Sequence[float]) -> Tensor:
    """A float64 tensor of the shape of the value."""
    return torch.tensor(value, dtype=torch.float64)


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


def remember(state: S, name: str, memory: Record) -> S:
    """The state with another memory of a reducer."""
    return state.replace(reducers=state.reducers | {name: memory})


def monitored(
    name: str, monitor: str, state: TrainState, event: Event, checks: Tensor
) -> float | None:
    """The value of the monitored metric, None if this event does not carry it."""
    if monitor in event.metrics:
        return number(name, monitor, event.metrics[monitor])
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


def number(name: str, monitor: str, metric: Any) -> float:
    """The one number that a metric is.

    Raises:
        ConfigurationError: it is several, as of an ensemble.
    """
    value = metric.compute() if isinstance(metric, Record) else metric
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigurationError(
            f"the reducer {name!r} monitors {monitor!r}, which is no single number but of shape "
            f"{tuple(value.shape)}; of an ensemble, let each member be looked at by itself: "
            "puretrain.per_member(reducer)"
        )
    return float(value)


def comparison(mode: str) -> Callable[[float, float], bool]:
    """Whether a value is better than another."""
    check_choice("mode", mode, ("min", "max"))
    return operator.lt if mode == "min" else operator.gt


def improvement(mode: str, threshold: float, kind: str) -> Callable[[float, float], bool]:
    """Whether a value is better than the best by more than the threshold."""
    better, sign = comparison(mode), -1.0 if mode == "min" else 1.0
    check_choice("threshold_mode", kind, ("rel", "abs"))
    if kind == "rel":
        return lambda value, best: better(value, best * (1.0 + sign * threshold))
    return lambda value, best: better(value, best + sign * threshold)
