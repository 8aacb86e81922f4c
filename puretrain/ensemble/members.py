"""The state of an ensemble, and members of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from puretrain import random
from puretrain.errors import StructureError, check_choice
from puretrain.optim import set_hyperparams
from puretrain.reducers import Average
from puretrain.state import TrainState
from puretrain.tree import FrozenDict, Record, tree_index, tree_map, tree_stack

__all__ = [
    "BY_MEMBER",
    "STACKED",
    "EnsembleState",
    "Mode",
    "PerMember",
    "Population",
    "ensemble",
    "gathered",
    "member",
    "members_of",
    "of_member",
    "ranking",
    "select_members",
]

Mode = Literal["min", "max"]


class EnsembleState(TrainState):
    """The state of an ensemble. Make one with :func:`ensemble`.

    ``params``, ``opt_state``, ``buffers``, ``key`` and ``skipped`` have a leading axis of the
    members, also in each of their leaves; the other fields of :class:`~puretrain.TrainState` are
    shared. ``stop`` is set when no member trains any more.
    """

    stopped: Tensor
    """The step after which each member stopped, int64 of shape ``(members,)``; -1: it trains."""

    @property
    def members(self) -> int:
        """The number of members."""
        return len(self.stopped)


class PerMember(Record):
    """What a reducer made by :func:`per_member` remembers."""

    per_member: Any
    """The members' memories, stacked."""


class Population(Record):
    """What :func:`population` remembers."""

    checks: Tensor
    """How many scores there were, int64 of shape ``()``."""
    parents: Tensor
    """The member that each was last copied from, int64 of shape ``(members,)``; -1: never."""
    copies: Tensor
    """How often each was replaced by a copy, int64 of shape ``(members,)``."""


STACKED = ("params", "opt_state", "buffers", "key", "skipped")

BY_MEMBER = ("metrics", "epoch_metrics")


def ensemble(
    init: Callable[[Tensor], TrainState], keys: Tensor, **hyperparameters: Sequence[float] | Tensor
) -> EnsembleState:
    """Make the state of an ensemble out of the states of its members.

    Args:
        init: from a key to the first state of a member. Torch's generators are seeded from the key
            meanwhile, so that a module made in it has weights that are a function of the key.
        keys: one for each member, int64 of shape ``(members, 2)``, as
            :func:`puretrain.random.split` makes them. Members with equal keys begin alike.
        **hyperparameters: for a sweep, one value for each member, by the name that
            :func:`puretrain.optim.get_hyperparams` gives. The optimizer must be made with
            :func:`puretrain.optim.inject_hyperparams`.

    Raises:
        OptimizerError: the optimizer's state holds no such hyper-parameter.
        StructureError: the states differ in structure or in their place in the data, or there are
            not as many values as members.

    Example:
        >>> import puretrain as pt
        >>> optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=1.0)
        >>> def init(key):
        ...     return pt.TrainState.create({"w": torch.rand(2)}, None, optimizer, key=key)
        >>> state = ensemble(init, pt.random.split(pt.random.key(0), 3), lr=[0.1, 0.2, 0.4])
        >>> state.members, state.params["w"].shape
        (3, torch.Size([3, 2]))
        >>> pt.optim.get_hyperparams(state.opt_state)["lr"]
        tensor([0.1000, 0.2000, 0.4000], dtype=torch.float64)
    """
    if not isinstance(keys, Tensor) or keys.dim() != 2 or not len(keys):
        raise StructureError(
            "keys are int64 of shape (members, 2): puretrain.random.split(key, members)"
        )
    for name, values in hyperparameters.items():
        if len(values) != len(keys):
            raise StructureError(
                f"{name} has {len(values)} values, but there are {len(keys)} "
                "members; give one for each"
            )
    states = []
    for i, key in enumerate(keys):
        with random.scope(key):
            state = init(key)
        if type(state) is not TrainState:
            raise StructureError(
                f"init(key) returns a TrainState of one member, not a {type(state).__name__}"
            )
        if hyperparameters:
            own = {name: values[i] for name, values in hyperparameters.items()}
            state = state.replace(opt_state=set_hyperparams(state.opt_state, **own))
        states.append(state)
    return _joined(states)


def _joined(states: Sequence[TrainState]) -> EnsembleState:
    first = states[0]
    for i, state in enumerate(states):
        here = (state.step, state.cursor.epoch, state.cursor.offset, state.updates)
        there = (first.step, first.cursor.epoch, first.cursor.offset, first.updates)
        if [*map(int, here)] != [*map(int, there)]:
            raise StructureError(
                f"member {i} is at step {int(state.step)}, epoch {int(state.cursor.epoch)}, member "
                f"0 at step {int(first.step)}, epoch {int(first.cursor.epoch)}; the members of an "
                "ensemble go through the data together"
            )
        if state.accumulator is not None or state.loss_scale is not None:
            raise StructureError(
                "an ensemble has no accumulator and no loss scale: accumulate with "
                "puretrain.optim.apply_every, and use the precision 'bf16' instead of '16'"
            )
    fields = {name: getattr(first, name) for name in TrainState._names}
    for name in STACKED:
        fields[name] = tree_stack([getattr(state, name) for state in states])
    fields |= {"metrics": FrozenDict(), "epoch_metrics": FrozenDict(), "reducers": FrozenDict()}
    return EnsembleState(**fields, stopped=torch.full((len(states),), -1))


def member(state: EnsembleState, index: int) -> TrainState:
    """The state of one member, as its own separate run would have it.

    It is an ordinary state: save it, evaluate it, go on with it, put it into a module with
    :func:`puretrain.load_into`. It has the member's own parts of what :func:`per_member` remembers,
    and no other memory of reducers. While you need it beyond the next step of a running loop, hold
    a :func:`puretrain.lease` on the ensemble's state.

    Args:
        state: of an ensemble.
        index: which member, from 0; negative ones count from the end.

    Raises:
        StructureError: the state is none of an ensemble, or has no such member.

    Example:
        >>> import torch, puretrain as pt
        >>> states = pt.ensemble(
        ...     lambda key: pt.TrainState.create({"w": torch.zeros(3)}, key=key),
        ...     pt.random.split(pt.random.key(0), 4))
        >>> states.params["w"].shape, member(states, -1).params["w"].shape
        (torch.Size([4, 3]), torch.Size([3]))
    """
    count = members_of(state)
    if not -count <= index < count:
        raise StructureError(f"there is no member {index}: the ensemble has {count}")
    fields = {name: getattr(state, name) for name in TrainState._names}
    for name in STACKED:
        fields[name] = tree_index(fields[name], index)
    for name in BY_MEMBER:
        fields[name] = of_member(fields[name], index, count)
    fields["reducers"] = FrozenDict(
        {
            name: tree_index(memory, index)
            for name, memory in map(_own_memories, state.reducers, state.reducers.values())
            if memory is not None
        }
    )
    stopped = int(state.stopped[index])
    if stopped >= 0:
        fields["step"] = torch.tensor(stopped)
        fields["stop"] = torch.tensor(True)
    return TrainState(**fields)


def select_members(state: EnsembleState, indices: Sequence[int] | Tensor) -> EnsembleState:
    """An ensemble of some members, in a given order; one may occur several times.

    Args:
        state: of an ensemble.
        indices: which members.

    Raises:
        StructureError: the state is none of an ensemble, or there is no such member.

    Example:
        The two best of a sweep, ``metrics`` being the result of :func:`puretrain.evaluate`:

        >>> import puretrain as pt
        >>> init = lambda key: pt.TrainState.create({"w": torch.rand(2)}, key=key)
        >>> state = ensemble(init, pt.random.split(pt.random.key(0), 4))
        >>> metrics = {"loss": torch.tensor([0.4, 0.2, float("nan"), 0.3])}
        >>> best = ranking(metrics["loss"])[:2]
        >>> best, select_members(state, best).members
        (tensor([1, 3]), 2)
    """
    count = members_of(state)
    chosen = torch.as_tensor(indices, dtype=torch.int64)
    if chosen.dim() != 1 or not len(chosen) or not bool(((chosen >= 0) & (chosen < count)).all()):
        raise StructureError(f"members are numbers from 0 to {count - 1}, not {indices!r}")
    fields = {name: getattr(state, name) for name in EnsembleState._names}
    for name in (*STACKED, "stopped"):
        fields[name] = tree_index(fields[name], chosen)
    for name in BY_MEMBER:
        fields[name] = of_member(fields[name], chosen, count)
    fields["reducers"] = FrozenDict(
        {name: gathered(memory, chosen) for name, memory in state.reducers.items()}
    )
    return EnsembleState(**fields)


def ranking(scores: Tensor, mode: Mode = "min") -> Tensor:
    """The numbers of the members from the best to the worst; NaN is worst, ties keep their order.

    Args:
        scores: a metric of an ensemble, of shape ``(members,)``.
        mode: whether ``'min'`` or ``'max'`` is better.

    Returns:
        int64 of shape ``(members,)``.

    >>> ranking(torch.tensor([0.5, float("nan"), 0.9]), "max")
    tensor([2, 0, 1])
    """
    check_choice("mode", mode, ("min", "max"))
    worst = math.inf if mode == "min" else -math.inf
    known = torch.where(scores.isnan(), worst, scores)
    order = known.argsort(descending=mode == "max", stable=True)
    # An infinite one is not worst, but better than none
    return torch.cat([order[~scores[order].isnan()], order[scores[order].isnan()]])


def members_of(state: Any) -> int:
    """How many members a state has.

    Raises:
        StructureError: it is not the state of an ensemble.
    """
    if not isinstance(state, EnsembleState):
        raise StructureError(
            f"this is a {type(state).__name__}, not the state of an ensemble; make one with "
            "puretrain.ensemble"
        )
    return state.members


def of_member(metrics: Any, index: Any, count: int) -> Any:
    """The metrics of a member; what has no axis of members is shared."""
    return tree_map(lambda x: x[index] if x.dim() and len(x) == count else x, metrics)


def _own_memories(name: str, memory: Any) -> tuple[str, Any]:
    """What a reducer remembers of each member; None if it does not tell them apart."""
    if isinstance(memory, PerMember):
        return name, memory.per_member
    if isinstance(memory, FrozenDict) and [*memory] == ["per_member"]:  # as a checkpoint holds it
        return name, memory["per_member"]
    return name, None


def gathered(memory: Any, index: Tensor) -> Any:
    """What a reducer remembers, of the members with these numbers."""
    if isinstance(memory, Average):
        rows = tree_index((memory.params, memory.buffers), index)
        return memory.replace(params=rows[0], buffers=rows[1])
    if isinstance(memory, PerMember):
        return tree_index(memory, index)
    if isinstance(memory, Population):
        return memory.replace(parents=memory.parents[index], copies=memory.copies[index])
    return memory
