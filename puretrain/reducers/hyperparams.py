"""Hyper-parameters that are changed and watched during a run."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

from torch import Tensor

from puretrain.errors import ConfigurationError, check_whole
from puretrain.loop import Event, Reducer
from puretrain.optim import get_hyperparams, set_hyperparams
from puretrain.reducers.monitoring import (
    Mode,
    improvement,
    integer,
    memory_of,
    monitored,
    real,
    remember,
)
from puretrain.state import TrainState
from puretrain.tree import Record

__all__ = ["Plateau", "lr_monitor", "reduce_on_plateau"]

S = TypeVar("S", bound=TrainState)


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
        >>> import torch, puretrain as pt
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
    improved = improvement(mode, threshold, threshold_mode)
    if not 0.0 < factor < 1.0:
        raise ConfigurationError(f"factor is between 0 and 1, not {factor!r}")
    worst = math.inf if mode == "min" else -math.inf

    def lowered(value: float) -> float:
        new = max(value * factor, min_lr)
        return new if value - new > eps else value

    def reduce(state: S, event: Event) -> S:
        memory: Plateau = memory_of(state, name)
        value = monitored(name, monitor, state, event, memory.checks)
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
        return remember(
            state,
            name,
            Plateau(real(best), integer(bad), integer(resting), memory.checks + 1),
        )

    def init(state: TrainState) -> Plateau:
        found = _injected(state, "reduce_on_plateau", hyperparameter)
        set_hyperparams(state.opt_state, **found)  # refuses now what it would refuse hours later
        return Plateau(real(worst), integer(0), integer(0), integer(0))

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

    Example:
        >>> import torch, puretrain as pt
        >>> optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=pt.optim.linear(1.0, 0.0, 4))
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> state = pt.fit(state, step, [torch.tensor(1.0)] * 2, epochs=1, reducers=[lr_monitor()])
        >>> round(float(state.metrics["lr"]), 6)  # of the second update
        0.75
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
