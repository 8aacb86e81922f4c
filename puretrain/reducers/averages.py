"""Averages of the parameters over the steps of a run."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, check_whole
from puretrain.loop import Event, Reducer
from puretrain.reducers.monitoring import integer, memory_of, remember
from puretrain.state import TrainState, reserve, unreserve
from puretrain.tree import (
    FrozenDict,
    Record,
    check_same_structure,
    invalidate,
    nodes,
    tree_flatten,
    tree_like,
    tree_map,
    tree_structure,
    tree_unflatten,
    under_transform,
)

__all__ = ["Average", "averaged", "ema", "swa"]

S = TypeVar("S", bound=TrainState)


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

    Example:
        >>> import torch, puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=1.0)
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> state = pt.fit(state, step, [torch.tensor(-1.0)] * 2, epochs=1, reducers=[ema(0.5)])
        >>> state.params["w"], averaged(state).params["w"]  # 0.5 * (0.5 * 0 + 0.5 * 1) + 0.5 * 2
        (tensor(2.), tensor(1.2500))
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
    return Average(*copy, integer(0), state.updates.clone())


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
    return remember(state, name, after)
