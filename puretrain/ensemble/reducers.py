"""Reducers for the members of an ensemble: each by itself, or as a population."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from puretrain import random
from puretrain.ensemble.members import (
    BY_MEMBER,
    STACKED,
    Mode,
    PerMember,
    Population,
    gathered,
    member,
    members_of,
    of_member,
    ranking,
)
from puretrain.errors import ConfigurationError, StructureError, check_choice, check_whole
from puretrain.loop import Event, Kind, Reducer, as_reducer
from puretrain.optim import get_hyperparams, set_hyperparams
from puretrain.state import TrainState
from puretrain.tree import FrozenDict, freeze, tree_index, tree_stack

__all__ = ["per_member", "population"]


def per_member(
    reducer: Reducer | Callable[[Any, Event], Any],
    *,
    on: Sequence[Kind] = ("validation", "epoch_end"),
) -> Reducer:
    """Apply a reducer to each member of an ensemble by itself, with the metrics of that member.

    With :func:`puretrain.early_stopping` members stop one after the other: one that has stopped
    stays as it is, to the bit, and the run ends with the last. With
    :func:`puretrain.reduce_on_plateau` each has its own learning rate, with
    :func:`puretrain.best_k` its own best steps. It takes a turn for each member; a reducer
    that only computes with parameters, as :func:`puretrain.ema` does, takes the whole state of an
    ensemble as it is.

    Args:
        reducer: for the state of a single run.
        on: the kinds of events that it sees, those that the reducer itself wants among them. After
            each ``'step'`` it would be slow; give it if the reducer monitors a metric of the steps.

    Raises:
        StructureError: (in the loop) the reducer changes what all members share.

    Example:
        >>> import puretrain as pt
        >>> from puretrain.loop import Event
        >>> reducer = per_member(pt.early_stopping("val/loss", patience=1))
        >>> state = pt.ensemble(
        ...     lambda key: pt.TrainState.create({"w": torch.ones(())}, key=key),
        ...     pt.random.split(pt.random.key(0), 2))
        >>> state = pt.prepare(state, [reducer])
        >>> for i, losses in enumerate([[0.9, 0.7], [0.8, 0.8]]):
        ...     event = Event("validation", i, i, {"val/loss": torch.tensor(losses)})
        ...     state = reducer.reduce(state, event)
        >>> state.stopped, state.stop
        (tensor([-1,  1]), tensor(False))
    """
    base = as_reducer(reducer)

    def reduce(state: Any, event: Event) -> Any:
        count = members_of(state)
        before = [member(state, i) for i in range(count)]
        after = [
            one if bool(one.stop) else base.reduce(one, _event_of(event, i, count))
            for i, one in enumerate(before)
        ]
        changed = [
            name
            for name in TrainState._names
            if any(
                getattr(a, name) is not getattr(b, name) for a, b in zip(after, before, strict=True)
            )
        ]
        changes: dict[str, Any] = {}
        for name in changed:
            if name == "stop":
                now = torch.tensor([bool(one.stop) for one in after])
                stopped = torch.where(now & (state.stopped < 0), event.step, state.stopped)
                changes |= {"stopped": stopped, "stop": (stopped >= 0).all()}
            elif name == "reducers":
                memory = PerMember(tree_stack([one.reducers[base.name] for one in after]))
                changes[name] = state.reducers | {base.name: memory}
            elif name in (*STACKED, *BY_MEMBER):
                changes[name] = tree_stack([getattr(one, name) for one in after])
            else:
                raise StructureError(
                    f"the reducer {base.name!r} changes {name}, which the members of an ensemble "
                    "share"
                )
        return state.replace(**changes) if changes else state

    init = base.init
    if init is None:
        return Reducer(reduce, base.name, None, tuple(k for k in base.on if k in on))

    def first(state: Any) -> PerMember:
        count = members_of(state)
        return PerMember(tree_stack([freeze(init(member(state, i))) for i in range(count)]))

    return Reducer(reduce, base.name, first, tuple(kind for kind in base.on if kind in on))


def _event_of(event: Event, index: int, count: int) -> Event:
    return event._replace(metrics=of_member(freeze(event.metrics), index, count), donate=False)


def population(
    monitor: str,
    *,
    mode: Mode = "min",
    fraction: float = 0.25,
    every: int = 1,
    perturb: Mapping[str, Sequence[float]] | None = None,
    name: str = "population",
) -> Reducer:
    """Population-based training: now and then the worst members become copies of the best.

    (Jaderberg et al., `Population based training of neural networks
    <https://arxiv.org/abs/1711.09846>`_, 2017, with truncation selection.) A copy takes parameters,
    buffers, the optimizer's state with its hyper-parameters, and what moving averages and
    :func:`per_member` remember; then each hyper-parameter in ``perturb`` is multiplied by one of
    its factors. The member keeps its own key. All is a function of the state, so a resumed run
    chooses the same.

    Args:
        monitor: the metric, of shape ``(members,)``; each event that carries it is a check.
        mode: whether ``'min'`` or ``'max'`` is better. NaN is worst.
        fraction: how many of the members are replaced, and from how many of the best their parents
            are drawn; above 0, at most a half. At least one is replaced.
        every: at every so many checks.
        perturb: factors by the name of a hyper-parameter in the optimizer's state, as in
            ``{"lr": (0.8, 1.25)}``; by default copies stay copies, but for their keys.
        name: the key of the memory in ``state.reducers``.

    Raises:
        ConfigurationError: an argument is out of its range; (in the loop) the metric has no axis
            of the members.
        OptimizerError: (at the start of the loop) the optimizer's state holds no such
            hyper-parameter, or it follows a schedule.

    Example:
        >>> import puretrain as pt
        >>> from puretrain.loop import Event
        >>> optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1)
        >>> def init(key):
        ...     return pt.TrainState.create({"w": torch.rand(1)}, None, optimizer, key=key)
        >>> reducer = population("val/loss", perturb={"lr": (0.5, 2.0)})
        >>> state = pt.ensemble(init, pt.random.split(pt.random.key(0), 4))
        >>> state = pt.prepare(state, [reducer])
        >>> event = Event("validation", 0, 9, {"val/loss": torch.tensor([0.3, 0.1, 0.9, 0.2])})
        >>> after = reducer.reduce(state, event)
        >>> after.reducers["population"].parents
        tensor([-1, -1,  1, -1])
        >>> torch.equal(after.params["w"][2], state.params["w"][1])
        True
    """
    check_choice("mode", mode, ("min", "max"))
    if not 0.0 < fraction <= 0.5:
        raise ConfigurationError(f"fraction is above 0 and at most a half, not {fraction!r}")
    every = check_whole("population: every", every)
    factors = {key: [float(x) for x in choices] for key, choices in (perturb or {}).items()}
    for key, choices in factors.items():
        if not choices or not all(0.0 < x < math.inf for x in choices):
            raise ConfigurationError(
                f"perturb[{key!r}] is a sequence of factors above 0, not {choices!r}"
            )

    def reduce(state: Any, event: Event) -> Any:
        if monitor not in event.metrics:
            return state
        count = members_of(state)
        scores = event.metrics[monitor]
        if not isinstance(scores, Tensor) or scores.shape != (count,):
            raise ConfigurationError(
                f"the reducer {name!r} monitors {monitor!r}, which has not one value for each of "
                f"the {count} members"
            )
        memory: Population = state.reducers[name]
        checks = memory.checks + 1
        if int(checks) % every:
            return state.replace(reducers=state.reducers | {name: memory.replace(checks=checks)})
        generator = random.generator(random.fold_in(random.stream(state.key[0], name), int(checks)))
        order = ranking(scores.cpu(), mode).tolist()
        some = max(1, int(fraction * count))
        training = [i for i in order[some:] if int(state.stopped[i]) < 0]
        parents = torch.arange(count)
        for i in training[-some:]:
            parents[i] = order[int(torch.randint(some, (), generator=generator))]
        moved = parents != torch.arange(count)
        copied = {
            field: tree_index(getattr(state, field), parents)
            for field in ("params", "opt_state", "buffers")
        }
        present = get_hyperparams(copied["opt_state"])
        new = {}
        for key, choices in factors.items():
            drawn = torch.randint(len(choices), (count,), generator=generator)
            factor = torch.where(moved, torch.tensor(choices, dtype=torch.float64)[drawn], 1.0)
            new[key] = present[key] * factor.to(present[key])
        if new:
            copied["opt_state"] = set_hyperparams(copied["opt_state"], **new)
        memories = {key: gathered(x, parents) for key, x in state.reducers.items() if key != name}
        memories[name] = Population(
            checks, torch.where(moved, parents, memory.parents), memory.copies + moved
        )
        reducers = FrozenDict({key: memories[key] for key in state.reducers})
        return state.replace(**copied, reducers=reducers)

    def init(state: Any) -> Population:
        count = members_of(state)
        present = get_hyperparams(state.opt_state)
        wanted = {key: present.get(key, torch.ones(count)) for key in factors}
        set_hyperparams(state.opt_state, **wanted)  # refuses now what it would refuse later
        return Population(
            torch.tensor(0), torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
        )

    return Reducer(reduce, name, init, ("step", "validation", "epoch_end"))
