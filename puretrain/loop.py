"""The loop: fold a step over batches, tell reducers and observers what happened.

All that the loop knows is in the state. Where it stands (in the middle of an epoch, at its end,
before or after a validation) follows from the cursor and the counters alone, so a run continues
from any state that an observer has ever been shown as if nothing had happened.
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

import optree
import torch
from torch import Tensor

from puretrain import random
from puretrain.data import Batches, batches
from puretrain.errors import ConfigurationError, DataError, StructureError, check_whole
from puretrain.metrics import as_metric, compute_all
from puretrain.metrics.monoids import accumulate
from puretrain.state import Cursor, TrainState, lease
from puretrain.step import EvalStep, Step
from puretrain.tree import (
    FrozenDict,
    check_same_structure,
    freeze,
    nodes,
    path_string,
    tree_leaves,
    tree_like,
    tree_map,
    tree_paths,
    tree_structure,
)

__all__ = [
    "Event",
    "Interrupted",
    "Observer",
    "Reducer",
    "Validation",
    "evaluate",
    "fit",
    "predict",
    "prepare",
]

S = TypeVar("S", bound=TrainState)

Kind = Literal[
    "fit_start", "epoch_start", "step", "validation", "epoch_end", "interrupt", "fit_end"
]


class Event(NamedTuple):
    """Something that happened in a run.

    Reducers see the kinds ``step`` (after every step), ``validation`` (after a validation) and
    ``epoch_end``. Observers see the state that the reducers have made of it, and besides:
    ``fit_start`` (also after a resume), ``epoch_start``, ``interrupt`` (a signal came; the state is
    complete), and ``fit_end``.
    """

    kind: Kind
    epoch: int
    """The epoch it belongs to, from 0; at ``epoch_end`` the one that has ended."""
    step: int
    """Batches consumed in the whole run."""
    metrics: Mapping[str, Tensor] = FrozenDict()
    """What became known: a step's own metrics by their names, a validation's as ``val/…``, an
    epoch's means as ``train/…``; tensors of shape ``()``, where they were computed."""
    size: int = 0
    """Samples in the batch, at ``step``."""
    position: int = 0
    """Batches read of this epoch."""
    total: int | None = None
    """Batches in this epoch, if known."""
    limit: int | None = None
    """The step at which the run will end at the latest, if known."""
    donate: bool = False
    """Whether a reducer may overwrite what it remembers, instead of making it anew."""
    batch: Any = None
    """The batch that the step got, at ``step``; the very object, not to be changed."""


class Reducer(NamedTuple):
    """A callback that is a pure function ``(state, event) -> state``.

    A plain function does as well, if it needs no memory of its own.
    """

    reduce: Callable[[Any, Event], Any]
    """Returns the next state. It must be a function of its arguments alone."""
    name: str = ""
    """The key of its memory in ``state.reducers``."""
    init: Callable[[Any], Any] | None = None
    """Makes the memory (a tree) out of the state at the start of a run; None: it has none."""
    on: tuple[Kind, ...] = ("step", "validation", "epoch_end")
    """The kinds of events that it wants to see."""


class Observer(Protocol):
    """A callback that looks at states and events and writes elsewhere; a plain function will do.

    If it has a method ``close()``, the loop calls that at the end, also after an error. If it has a
    method ``before_step(batch)``, the loop calls that with each batch of training, just read.
    """

    def __call__(self, state: Any, event: Event, /) -> None:
        """Look at what happened. To keep the state beyond the call, take a lease on it."""
        ...


class Validation(NamedTuple):
    """When and on what to validate during :func:`fit`.

    Example:
        >>> import torch, puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=1.0)
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> test = pt.eval_step(lambda params, buffers, batch, key: {"w": params["w"] * batch})
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> def show(state, event):
        ...     if event.kind == "validation":
        ...         print(event.step, float(event.metrics["val/w"]))
        >>> _ = pt.fit(state, step, [torch.tensor(-1.0)] * 4, epochs=1, observers=[show],
        ...            validation=Validation(test, [torch.tensor(1.0)], every=2))
        2 2.0
        4 4.0
    """

    step: EvalStep
    """From a state and a batch to metrics; made by :func:`puretrain.eval_step`."""
    batches: Any
    """A source as for :func:`fit`; its epoch 0 is read each time."""
    every: int | None = None
    """Validate after so many steps. None: at the end of epochs."""
    every_epochs: int = 1
    """Validate at the end of every so many epochs, unless ``every`` is given."""
    limit: int | None = None
    """Read at most so many batches."""
    prefix: str = "val/"
    """Put in front of the names of the metrics."""


class Interrupted(SystemExit):
    """The run was ended by Ctrl-C or SIGTERM, between two steps.

    Left uncaught it ends the program without a traceback, with the customary code: 130 after
    Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, state: TrainState, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.state = state
        """The complete state after the last step; :func:`fit` goes on from it."""
        self.signal_number = signal_number


def fit(
    state: S,
    step: Step,
    batches: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    reducers: Iterable[Reducer | Callable[[Any, Event], Any]] = (),
    observers: Iterable[Observer] = (),
    validation: Validation | None = None,
    donate: bool = False,
    handle_signals: bool = True,
    agree: Callable[[int], int] | None = None,
) -> S:
    """Train: fold a step over batches until the run has seen its epochs or steps.

    ``epochs`` and ``steps`` count from the beginning of the run, not of the call: ``fit`` to 10
    epochs and then to 20 is the same as ``fit`` to 20, bit for bit, and so is every resume from a
    state that an observer has saved.

    After a step come the reducers, in order, then the observers. At the end of an epoch, waiting
    gradients are flushed, then comes the validation if it is due, then ``epoch_end``.

    Args:
        state: where to start or go on. It stays as it is, unless ``donate``.
        step: ``step(state, batch, donate=…) -> state``, made by :func:`puretrain.train_step` or
            composed out of such; without an argument ``donate`` it makes each state anew. A wrapper
            must hand on ``flush`` if gradients accumulate; ``functools.wraps`` does.
        batches: made by :func:`puretrain.batches`, or an iterable of ready batches.
        epochs: end after so many epochs.
        steps: end after so many steps. With both, whichever comes first.
        reducers: pure callbacks, see :class:`Reducer`. Their memories are in ``state.reducers``.
        observers: callbacks with effects, see :class:`Observer`.
        validation: what to validate on, and when.
        donate: the state may be used up as well; without it, the first step makes a copy.
        handle_signals: on Ctrl-C or SIGTERM finish the step, show the observers an ``interrupt``,
            and raise :class:`Interrupted`. A second Ctrl-C stops at once. Only in the main thread.
        agree: for a run of several processes, which have to end after the same step: called after
            every step with the number of the signal that came to this process, or 0; what it
            returns counts. :func:`puretrain.sharding.agreement` makes one.

    Returns:
        The last state.

    Raises:
        ConfigurationError: neither ``epochs`` nor ``steps`` is given, or two reducers share a name.
        DataError: the source is empty, or a batch has another structure than those before.
        StructureError: the step returned something of another structure than it was given.
        Interrupted: see ``handle_signals``.

    Example:
        >>> import puretrain as pt
        >>> x, y = torch.eye(4), torch.arange(4.0)
        >>> def loss(params, buffers, batch, key):
        ...     x, y = batch
        ...     return ((x @ params["w"] - y) ** 2).sum()
        >>> optimizer = pt.optim.sgd(lr=0.5)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.zeros(4)}, None, optimizer, key=pt.random.key(0))
        >>> step = pt.train_step(loss, optimizer)
        >>> state = pt.fit(state, step, pt.batches((x, y), 2, shuffle=True), epochs=2)
        >>> state.params["w"], int(state.step)
        (tensor([0., 1., 2., 3.]), 4)
    """
    if epochs is None and steps is None:
        raise ConfigurationError("fit needs to know when to end: give epochs=, steps=, or both")
    if validation is not None:
        if validation.every is not None:
            check_whole("Validation: every", validation.every)
        check_whole("Validation: every_epochs", validation.every_epochs)
    chain = [as_reducer(reducer) for reducer in reducers]
    plan = _Plan(
        step,
        as_batches(batches),
        {kind: [r.reduce for r in chain if kind in r.on] for kind in get_args(Kind)},
        list(observers),
        validation and validation._replace(batches=as_batches(validation.batches)),
        epochs,
        steps,
        agree or _alone,
    )
    with (
        _closing(plan.observers),
        _signals(handle_signals) as received,
        ExitStack() as keeping,
    ):
        start = prepare(state, chain)
        if not donate:
            keeping.enter_context(lease(state))
            start = start.replace(reducers=tree_map(_copy, start.reducers))
        return cast(S, _run(plan, start, received, keeping))


class _Plan(NamedTuple):
    """The arguments of :func:`fit`, in order."""

    step: Step
    source: Batches
    reduces: Mapping[str, Sequence[Callable[[Any, Event], Any]]]
    observers: Sequence[Observer]
    validation: Validation | None
    epochs: int | None
    steps: int | None
    agree: Callable[[int], int]


def _alone(signal_number: int) -> int:
    return signal_number


def _run(plan: _Plan, state: Any, received: list[int], keeping: ExitStack) -> Any:
    _check_single(state)
    step = plan.step if _takes_donate(plan.step) else _without_donate(plan.step)
    before: dict[str, str] | None = _signature(state)  # until it has been compared
    kept: set[int] | None = _overwritable(state)  # until a step has replaced it all
    batch_structure = None
    size, weight = 0, torch.zeros((), dtype=torch.float64)
    early = [x.before_step for x in plan.observers if hasattr(x, "before_step")]
    state = _tell(plan, state, _event(plan, "fit_start", state))
    ended = bool(plan.source.exhausted(state.cursor))  # a state from the end of an epoch
    while True:
        state = _validate_if_due(plan, state, received, at_end_of_epoch=False)
        if ended:
            state = _end_epoch(plan, state, received)
        if _finished(plan, state):
            break
        total, position = _progress(plan.source, state.cursor)
        epoch = int(state.cursor.epoch)
        if not int(state.cursor.offset):
            state = _tell(plan, state, _event(plan, "epoch_start", state, total=total))
        ended = True
        with closing(plan.source.read(state.cursor)) as reads:
            for batch, cursor, samples in reads:
                batch_structure = _check_batch(batch, batch_structure, state)
                for look in early:
                    look(batch)
                state = step(state, batch, donate=True)
                if before is not None:
                    _check_unchanged(before, state)
                    before = None
                if kept is not None and kept.isdisjoint(_overwritable(state)):
                    keeping.close()  # a lease costs each step a look at it
                    kept = None
                if samples != size:
                    size, weight = samples, torch.full((), samples, dtype=torch.float64)
                position += 1
                metrics = state.metrics
                totals = _merge(state.epoch_metrics, metrics, weight)
                state = state.replace(cursor=cursor, epoch_metrics=totals)
                event = Event(
                    "step",
                    epoch,
                    int(state.step),
                    metrics,
                    size,
                    position,
                    total,
                    plan.steps,
                    True,
                    batch,
                )
                state = _tell(plan, state, event)
                _stop_if(received, plan, state)
                state = _validate_if_due(plan, state, received, at_end_of_epoch=False)
                if _finished(plan, state):
                    ended = bool(plan.source.exhausted(state.cursor))
                    break
            else:
                if not int(state.cursor.offset):
                    raise DataError(
                        f"the source gave no batch in epoch {epoch}: it is empty, or was used up "
                        "before (a generator can be read once; pass a function that makes one)"
                    )
    return _tell(plan, state, _event(plan, "fit_end", state))


def _event(plan: _Plan, kind: Kind, state: TrainState, **facts: Any) -> Event:
    return Event(
        kind, int(state.cursor.epoch), int(state.step), limit=plan.steps, donate=True, **facts
    )


def _tell(plan: _Plan, state: S, event: Event) -> S:
    for reduce in plan.reduces[event.kind]:
        state = reduce(state, event)
    for observer in plan.observers:
        observer(state, event)
    return state


def _stop_if(received: list[int], plan: _Plan, state: TrainState) -> None:
    number = plan.agree(received[0] if received else 0)
    if number:
        _tell(plan, state, _event(plan, "interrupt", state))
        raise Interrupted(state, number)


def _finished(plan: _Plan, state: TrainState) -> bool:
    return (
        bool(state.stop)
        or (plan.steps is not None and int(state.step) >= plan.steps)
        or (plan.epochs is not None and int(state.cursor.epoch) >= plan.epochs)
    )


def _end_epoch(plan: _Plan, state: S, received: list[int]) -> S:
    state = _flush(plan.step, state)
    state = _validate_if_due(plan, state, received, at_end_of_epoch=True)
    state = _with_typed_metrics(plan, state)
    means = {f"train/{name}": mean for name, mean in compute_all(state.epoch_metrics).items()}
    event = _event(plan, "epoch_end", state, metrics=FrozenDict(means))
    cursor = plan.source.next_epoch(state.cursor)
    state = _tell(plan, state.replace(cursor=cursor, epoch_metrics=FrozenDict()), event)
    _stop_if(received, plan, state)
    return state


def _with_typed_metrics(plan: _Plan, state: S) -> S:
    """Give the epoch's metrics their types back if no step has, since they were loaded.

    A checkpoint does not say what kinds of records metrics are; only the step knows. So it is run
    on the epoch's first batch once more, and nothing but the kinds of its metrics is used.
    """
    if not any(isinstance(total, FrozenDict) for total in state.epoch_metrics.values()):
        return state
    with closing(plan.source.read(Cursor(epoch=state.cursor.epoch))) as reads:
        metrics = plan.step(state, next(reads).batch).metrics
    missing = [name for name in state.epoch_metrics if name not in metrics]
    if missing:
        raise StructureError(
            f"the state holds a mean over the epoch of the metric {missing[0]!r}, but the step "
            f"reports only {', '.join(metrics)}: it is the state of a run with another loss"
        )
    typed = {
        name: _typed(name, total, as_metric(metrics[name]))
        for name, total in state.epoch_metrics.items()
    }
    return state.replace(epoch_metrics=FrozenDict(typed))


def _flush(step: Any, state: S) -> S:
    waiting = state.accumulator
    count = 0 if waiting is None else int(dict(_items(waiting))["count"])
    if not count:
        return state
    flush = getattr(step, "flush", None)
    if flush is None:
        raise ConfigurationError(
            f"the epoch ends with {count} accumulated batches, and the step has no `flush` to "
            "update with them: make the wrapper of the step with functools.wraps, which hands it on"
        )
    return cast(S, flush(state, donate=True))


def _validate_if_due(plan: _Plan, state: S, received: list[int], *, at_end_of_epoch: bool) -> S:
    validation, step = plan.validation, int(state.step)
    if validation is None or int(state.validated) == step:
        return state
    if validation.every is not None:
        due = step > 0 and step % validation.every == 0
    else:
        due = at_end_of_epoch and (int(state.cursor.epoch) + 1) % validation.every_epochs == 0
    if not due:
        return state
    metrics = evaluate(
        state,
        validation.step,
        validation.batches,
        limit=validation.limit,
        after_batch=lambda: _stop_if(received, plan, state),
    )
    named = FrozenDict({validation.prefix + name: value for name, value in metrics.items()})
    state = state.replace(validated=state.step)
    state = _tell(plan, state, _event(plan, "validation", state, metrics=named))
    _stop_if(received, plan, state)
    return state


# ── Without training ──────────────────────────────────────────────────────────────────────────────


def evaluate(
    state: TrainState,
    step: EvalStep,
    batches: Any,
    *,
    limit: int | None = None,
    after_batch: Callable[[], None] | None = None,
) -> FrozenDict[Tensor]:
    """Evaluate a state on one pass over a source of data.

    Args:
        state: the state to evaluate; it does not change.
        step: from a state and a batch to metrics, made by :func:`puretrain.eval_step`.
        batches: a source as for :func:`fit`; its epoch 0 is read.
        limit: read at most so many batches.
        after_batch: called after each batch; may raise to end early.

    Returns:
        The metrics by name, tensors of shape ``()`` (or whatever a metric record computes). Plain
        tensors are averaged over the batches, weighted by the number of samples in each.

    Raises:
        DataError: the source is empty.

    Example:
        >>> import puretrain as pt
        >>> step = pt.eval_step(lambda params, buffers, batch, key: {"mean": batch.mean()})
        >>> state = pt.TrainState.create({}, key=pt.random.key(0))
        >>> evaluate(state, step, pt.batches(torch.arange(5.0), batch_size=2))
        {'mean': f64 2.0}
    """
    totals: FrozenDict[Any] = FrozenDict()
    for batch, _, size in _reads(batches, limit):
        weight = torch.full((), size, dtype=torch.float64)
        totals = _merge(totals, step(state, batch), weight)
        if after_batch is not None:
            after_batch()
    return compute_all(totals)


def predict(
    state: TrainState,
    function: Callable[[Any, Any, Any, Tensor], Any],
    batches: Any,
    *,
    limit: int | None = None,
) -> Any:
    """Run a function over one pass of a source and put its outputs together.

    Args:
        state: whose parameters and buffers to use.
        function: ``function(params, buffers, batch, key)`` returns a tree of tensors whose first
            dimension is that of the batch. It runs without gradients.
        batches: a source as for :func:`fit`; its epoch 0 is read, in its order.
        limit: read at most so many batches.

    Returns:
        The tree of outputs, concatenated along the first dimension.

    Raises:
        DataError: the source is empty.
        StructureError: the outputs of two batches have different structures.

    Example:
        >>> import puretrain as pt
        >>> state = pt.TrainState.create({"w": torch.tensor(2.0)}, key=pt.random.key(0))
        >>> predict(state, lambda params, buffers, batch, key: params["w"] * batch,
        ...         pt.batches(torch.arange(3.0), batch_size=2))
        tensor([0., 2., 4.])
    """
    outputs = []
    base = random.stream(state.key, "prediction")
    for i, (batch, _, _) in enumerate(_reads(batches, limit)):
        key = random.fold_in(base, i)
        with random.scope(key), torch.no_grad():
            outputs.append(function(state.params, state.buffers, batch, key))
    structure = tree_structure(outputs[0])
    for i, output in enumerate(outputs):
        if tree_structure(output) != structure:
            check_same_structure(
                outputs[0], output, "the output for the first batch", f"that for batch {i + 1}"
            )
    return tree_map(lambda *parts: torch.cat(parts), *outputs)


def _reads(source: Any, limit: int | None) -> Iterator[Any]:
    empty = True
    with closing(as_batches(source).read(Cursor())) as reads:
        for read in islice(reads, limit):
            empty = False
            yield read
    if empty:
        raise DataError(
            "there is nothing to evaluate: the source gave no batch; it is "
            "empty, or was used up before (a generator can be read once; pass "
            "a function that makes one)"
        )


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────


def as_batches(source: Any) -> Batches:
    """Take a source as it is, or an iterable of ready batches as one.

    A source of another kind does as well, if it reads from cursors as :class:`Batches` does.
    """
    if isinstance(source, Batches) or hasattr(source, "next_epoch"):
        return cast(Batches, source)
    return batches(source)


def as_reducer(reducer: Reducer | Callable[[Any, Event], Any]) -> Reducer:
    """Take a reducer as it is, or a plain function as one without memory."""
    return reducer if isinstance(reducer, Reducer) else Reducer(reducer)


def prepare(state: S, reducers: Iterable[Reducer | Callable[[Any, Event], Any]]) -> S:
    """Add the memories of reducers to a state, where it does not have them yet.

    :func:`fit` does it by itself. Memories that came from a checkpoint get their types back.

    Raises:
        ConfigurationError: two reducers have the same name.
        StructureError: the state holds a memory of another structure under the reducer's name.
    """
    memories: dict[str, Any] = dict(state.reducers)
    names = set()
    for reducer in map(as_reducer, reducers):
        if reducer.init is None:
            continue
        if reducer.name in names:
            raise ConfigurationError(
                f"two reducers are named {reducer.name!r}; give one of them another name"
            )
        names.add(reducer.name)
        fresh, memory = freeze(reducer.init(state)), memories.get(reducer.name)
        if reducer.name not in memories:
            memories[reducer.name] = fresh
        elif tree_structure(memory) != tree_structure(fresh):
            what, where = f"the memory of reducer {reducer.name!r}", ("reducers", reducer.name)
            # New containers get tensors of their own, for a lease keeps containers.
            memories[reducer.name] = tree_map(_copy, tree_like(fresh, memory, what, where))
    return state.replace(reducers=FrozenDict(memories))


def _takes_donate(step: Any) -> bool:
    # Not through __wrapped__: a transform such as vmap wraps a step, but can't pass this on.
    return "donate" in inspect.signature(step, follow_wrapped=False).parameters


def _without_donate(step: Any) -> Step:
    return cast(Step, lambda state, batch, donate: step(state, batch))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _overwritable(state: TrainState) -> set[int]:
    """The identities of the containers whose tensors a donating step may overwrite."""
    return set(map(id, nodes((state.params, state.opt_state, state.accumulator))))


# ── Checks ────────────────────────────────────────────────────────────────────────────────────────


def _check_single(state: TrainState) -> None:
    if state.step.dim():
        raise StructureError(
            f"state.step has the shape {tuple(state.step.shape)}: these are several states in one, "
            "but a run has one place in its data. Make an ensemble of them with "
            "puretrain.ensemble, whose members share it, and a step with puretrain.ensemble_step"
        )


def _signature(state: TrainState) -> dict[str, str]:
    """What must stay the same from step to step: paths, shapes and dtypes of the closed fields."""
    closed = {name: getattr(state, name) for name in state._names if name not in state._open}
    return {
        path_string(path): _kind(leaf)
        for path, leaf in zip(tree_paths(closed), tree_leaves(closed), strict=True)
        if path != ("cursor", "source")
    }


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} of shape {tuple(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def _check_unchanged(before: dict[str, str], state: Any) -> None:
    if not isinstance(state, TrainState):
        raise StructureError(
            f"the step returned {_kind(state)}; it must return the next TrainState"
        )
    after = _signature(state)
    if after == before:
        return
    for path in [*before, *after]:
        if before.get(path) != after.get(path):
            raise StructureError(
                f"the step changed the structure of the state: {path} was "
                f"{before.get(path, 'not there')} and is {after.get(path, 'not there')} after it; "
                "a step keeps the shape and dtype of every leaf"
            )


def _check_batch(batch: Any, expected: Any, state: TrainState) -> Any:
    if expected is not None and tree_structure(batch) == expected:
        return expected
    # Lists hold what could not be stacked (strings), so their lengths vary with the batch.
    structure = optree.tree_structure(batch, is_leaf=_is_list, namespace="puretrain")
    if expected is not None and structure != expected:
        raise DataError(
            f"epoch {int(state.cursor.epoch)}, offset {int(state.cursor.offset)}: a batch has the "
            f"structure {structure}, those before it had {expected}; give all batches of a run one "
            "structure, for instance with collate= or transform="
        )
    return structure


def _is_list(node: Any) -> bool:
    return isinstance(node, list)


# ── Details ───────────────────────────────────────────────────────────────────────────────────────


def _merge(totals: FrozenDict[Any], metrics: FrozenDict[Any], weight: Tensor) -> FrozenDict[Any]:
    merged = dict(totals)
    for name, value in metrics.items():
        total = merged.get(name)
        if total is None:
            merged[name] = as_metric(value, weight)
        else:
            if isinstance(total, FrozenDict):
                total = _typed(name, total, as_metric(value, weight))
            merged[name] = accumulate(total, value, weight)
    return FrozenDict(merged)


def _typed(name: str, total: Any, metric: Any) -> Any:
    """The total of a metric as a record like the metric; a checkpoint holds it as a frozen dict."""
    if isinstance(total, FrozenDict):
        return tree_like(metric, total, f"the metric {name!r}", ("epoch_metrics", name))
    return total


def _items(node: Any) -> Iterable[tuple[str, Any]]:
    # An accumulator is a frozen dict while it is as a checkpoint holds it.
    if isinstance(node, Mapping):
        return node.items()
    return [(name, getattr(node, name)) for name in node._names]


def _progress(source: Batches, cursor: Cursor) -> tuple[int | None, int]:
    """How many batches the epoch has, if known, and how many of them have been read."""
    total = source.length(cursor.replace(offset=torch.zeros_like(cursor.offset)))
    left = source.length(cursor)
    if total is None or left is None:
        return total, source.position(cursor)
    return total, total - left


@contextmanager
def _signals(wanted: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of obeying them, in the main thread."""
    received: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield received
        return
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (received or os.getpid() != process):
            raise KeyboardInterrupt  # the second one means at once; a worker obeys the first
        received.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            # None: the handler was not set from Python, and can't be set again from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _closing(observers: Sequence[Observer]) -> ExitStack:
    """Close every observer at the end, the last one first, also if another's close() raises."""
    stack = ExitStack()
    for observer in observers:
        close = getattr(observer, "close", None)
        if close is not None:
            stack.callback(close)
    return stack
