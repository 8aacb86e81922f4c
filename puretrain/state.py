"""TrainState: everything that decides what happens next in a training run, as one value.

A run is a fold, ``state' = step(state, batch)``. Two runs with equal states and equal sources of
data have equal futures, bit for bit; so saving the state is saving the run.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from puretrain.errors import DonatedStateError, StructureError
from puretrain.tree import (
    FrozenDict,
    Reason,
    Record,
    field,
    freeze,
    invalidate,
    nodes,
    tree_leaves,
    tree_map,
    under_transform,
)

if TYPE_CHECKING:
    from puretrain.optim import Optimizer

__all__ = ["Accumulator", "Cursor", "Lease", "LossScale", "TrainState", "lease"]

T = TypeVar("T")


def _count(value: int = 0) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


class Cursor(Record):
    """The place in the data: what has been read of which epoch."""

    epoch: Tensor = field(default_factory=_count)
    """The epoch, int64 of shape ``()`` on the CPU, from 0."""
    offset: Tensor = field(default_factory=_count)
    """How many samples of the epoch have been read (how many items, if the source yields ready
    batches); int64 of shape ``()`` on the CPU."""
    source: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """What a source that keeps its own place says of it, as msgpack; uint8 of shape ``(n,)``."""


class Accumulator(Record):
    """Gradients summed over the micro-batches since the last update of the optimizer."""

    grads: Any
    """A tree like the parameters."""
    seen: Tensor
    """Which parameters had a gradient so far, bool of shape ``(leaves,)`` on the CPU."""
    count: Tensor
    """The number of micro-batches, int64 of shape ``()`` on the CPU."""


class LossScale(Record):
    """The dynamic loss scale of float16 training; see :func:`puretrain.train_step`."""

    scale: Tensor
    """What the loss is multiplied with, float32 of shape ``()``."""
    good: Tensor
    """Batches with finite gradients since the scale last changed, int32 of shape ``()``."""


class TrainState(Record):
    """The state of a training run. Make one with :meth:`create`; it never changes.

    To carry more, subclass it and annotate further fields; a step keeps what it does not know.

    Example:
        >>> import puretrain as pt
        >>> _, params, buffers = pt.functional(torch.nn.Linear(2, 1))
        >>> state = pt.TrainState.create(params, buffers, pt.optim.sgd(0.1), key=pt.random.key(0))
        >>> state.step, state.params["weight"].shape
        (tensor(0), torch.Size([1, 2]))
        >>> class WithTeacher(pt.TrainState):
        ...     teacher: pt.FrozenDict
        >>> WithTeacher.create(params, key=pt.random.key(0), teacher=params).teacher
        {'weight': f32[1,2], 'bias': f32[1]}
    """

    step: Tensor
    """Batches consumed: calls of the step. int64 of shape ``()`` on the CPU."""
    updates: Tensor
    """Updates of the optimizer; fewer than ``step`` when gradients accumulate. int64, ``()``."""
    params: Any
    """What is trained: a tree of tensors, usually a ``FrozenDict`` by parameter name."""
    opt_state: Any
    """What the optimizer remembers."""
    buffers: Any
    """What the model reads and may replace but does not train: running statistics, frozen
    weights."""
    key: Tensor
    """The random key of the run, see :mod:`puretrain.random`; step n draws from fold_in(key, n)."""
    cursor: Cursor
    """The place in the data."""
    accumulator: Accumulator | None = field(open=True)
    """Gradients waiting for the optimizer, when ``accumulate`` is more than one."""
    loss_scale: LossScale | None = field(open=True)
    """The loss scale, when the precision is ``'16'``."""
    skipped: Tensor
    """Updates skipped because a loss or gradient was not finite. int64 of shape ``()``."""
    stop: Tensor
    """Whether a reducer has asked the loop to end. bool of shape ``()`` on the CPU."""
    validated: Tensor
    """The step after which the last validation was made, -1 before. int64 of shape ``()``."""
    metrics: FrozenDict[Any] = field(open=True)
    """The metrics of the last step, by name: tensors or metric records."""
    epoch_metrics: FrozenDict[Any] = field(open=True)
    """The metrics of this epoch so far, as metric records that merge."""
    reducers: FrozenDict[Any] = field(open=True)
    """What each reducer remembers, by the reducer's name."""

    @property
    def members(self) -> int | None:
        """How many members an ensemble has (see :mod:`puretrain.ensemble`); None: a single run."""
        return None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            StructureError: a name in ``changes`` is no field.
        """
        new = super().replace(**changes)
        made: _Made | None = self.__dict__.get("_made")
        if made is not None and changes.keys().isdisjoint(_OVERWRITABLE):
            new.__dict__["_made"] = _Made(made.containers, made.apart.difference(changes))
        return new

    @classmethod
    def create(
        cls,
        params: Any,
        buffers: Any = None,
        optimizer: Optimizer | None = None,
        *,
        key: Tensor,
        **extra: Any,
    ) -> Self:
        """Make the state of a run that has not begun.

        Dicts become frozen dicts and lists tuples; tensors are taken as they are, not copied. No
        step overwrites them: the first one that is given the state to use up makes a copy.

        Args:
            params: the tree of tensors to train.
            buffers: the tree of tensors that the model needs besides.
            optimizer: makes ``opt_state`` out of the parameters; without one it is empty.
            key: the random key of the run, int64 of shape ``(2,)``.
            **extra: the fields that a subclass adds, or fields to set otherwise than here.

        Raises:
            StructureError: the key is none, or a field of a subclass is missing.
        """
        if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape[-1:] != (2,):
            raise StructureError(f"key must be made by puretrain.random.key(seed), not {key!r}")
        params = _detached(freeze(params))
        fields: dict[str, Any] = {
            "step": _count(),
            "updates": _count(),
            "params": params,
            "opt_state": () if optimizer is None else optimizer.init(params),
            "buffers": FrozenDict() if buffers is None else _detached(freeze(buffers)),
            "key": key,
            "cursor": Cursor(),
            "accumulator": None,
            "loss_scale": None,
            "skipped": _count(),
            "stop": torch.tensor(False),
            "validated": _count(-1),
            "metrics": FrozenDict(),
            "epoch_metrics": FrozenDict(),
            "reducers": FrozenDict(),
        }
        fields.update((name, freeze(value)) for name, value in extra.items())
        missing = [name for name in cls._names if name not in fields]
        unknown = [name for name in fields if name not in cls._names]
        if missing or unknown:
            raise StructureError(
                f"{cls.__name__}.create: "
                + "; ".join(
                    f"{word} {', '.join(names)}"
                    for word, names in (("missing", missing), ("no such field:", unknown))
                    if names
                )
            )
        return cls(**fields)


def _detached(tree: T) -> T:
    if under_transform():  # a derivative by the first parameters flows through here
        return tree
    return tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf,
        tree,
    )


# ── Leases ────────────────────────────────────────────────────────────────────────────────────────
#
# A donated state is used up: what it holds is overwritten with the next state's. Two states of a
# run share tensors by sharing their container (a record or a frozen dict), so it suffices to mark
# containers: a lease forbids to give them up.

Container = Record | FrozenDict[Any]

_leases: weakref.WeakKeyDictionary[Container, int] = weakref.WeakKeyDictionary()
# A thread that has saved a state ends its lease while the loop takes another on the next one.
_lock = threading.Lock()
# The id of each tree that is being overwritten right now: too late for a lease.
_reserved: set[int] = set()


class Lease:
    """Keeps a state readable; made by :func:`lease`. It does not keep the state alive."""

    def __init__(self, state: TrainState) -> None:
        with _lock:
            found = nodes(state)
            if _reserved and any(id(node) in _reserved for node in found):
                raise DonatedStateError(
                    "another thread is overwriting the state; take a lease on it before a step "
                    "with donate=True begins"
                )
            for node in found:
                _leases[node] = _leases.get(node, 0) + 1
        self._nodes = [weakref.ref(node) for node in found]

    def release(self) -> None:
        """End the lease; further calls do nothing."""
        with _lock:
            references, self._nodes = self._nodes, []
            for reference in references:
                node = reference()
                if node is not None:
                    _leases[node] -= 1
                    if not _leases[node]:
                        del _leases[node]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def lease(state: TrainState) -> Lease:
    """Keep a state from being overwritten: while the lease is held, a donating step copies instead.

    An observer that wants to look at a state after the loop has gone on takes a lease on it. Use it
    as a context manager or call its ``release()``; a lease that is never released holds as long as
    the state exists.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] * batch).sum()
        >>> optimizer = pt.optim.sgd(1.0)
        >>> params = {"w": torch.ones(1)}
        >>> state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
        >>> step = pt.train_step(loss, optimizer)
        >>> with pt.lease(state):
        ...     after = step(state, torch.ones(1), donate=True)
        >>> state.params["w"], after.params["w"]
        (tensor([1.]), tensor([0.]))
        >>> final = step(after, torch.ones(1), donate=True)
        >>> after.params
        Traceback (most recent call last):
        puretrain.errors.DonatedStateError: this TrainState was given up: step 2 was computed...
    """
    return Lease(state)


def is_leased(tree: Any) -> bool:
    """Whether any record or frozen dict of a tree is under a lease."""
    return bool(_leases) and any(node in _leases for node in nodes(tree))


def reserve(*trees: Any) -> frozenset[int] | None:
    """Begin to overwrite trees, unless one is under a lease; until :func:`unreserve` none is given.

    Only the roots are marked, which is quick: a lease is on a whole state, with all roots in it.
    The caller must hold on to the trees.

    Returns:
        What to give back to :func:`unreserve`; None if there is a lease.
    """
    with _lock:
        if is_leased(trees):
            return None
        reserved = frozenset(map(id, trees))
        _reserved.update(reserved)
    return reserved


def unreserve(reserved: frozenset[int]) -> None:
    """End a reservation."""
    with _lock:
        _reserved.difference_update(reserved)


# ── Donation ──────────────────────────────────────────────────────────────────────────────────────
#
# Anybody may build a state out of tensors that others hold as well: a module's, another state's,
# those that a reducer remembers. So a step overwrites only tensors in containers that a step has
# made, which are marked as owned, and of these only what the rest of the state does not hold too.
# It copies the others; from then on they are its own.
#
# Finding that out walks over the whole state. So a step notes beside the state that it returns what
# it knows already, and `TrainState.replace` hands on what still holds.

_OVERWRITABLE = ("params", "opt_state", "accumulator")
# Fields whose tensors are always made anew.
_FRESH = (
    *("step", "updates", "key", "cursor", "loss_scale"),
    *("skipped", "stop", "validated", "epoch_metrics"),
)


class _Made(NamedTuple):
    """What is known of a state that a step has made."""

    containers: list[Container]
    """Those of the overwritable parts, all of them owned."""
    apart: frozenset[str]
    """The fields that hold none of their memory."""


class Donation(NamedTuple):
    """A state whose ``params``, ``opt_state`` and ``accumulator`` may be overwritten."""

    state: Any
    used_up: list[Container]
    """What must not be read any more afterwards."""
    reserved: frozenset[int]
    """What :func:`unreserve` takes."""


def accept(given: TrainState, state: TrainState) -> Donation | None:
    """Take over a state that was given up, unless a lease forbids it.

    It must be handed on to :func:`give_up`, come what may. ``state`` is the given one, or a copy
    of it with other fields, which nobody else holds.
    """
    made: _Made | None = state.__dict__.get("_made")
    doubtful = _doubtful(state._names)
    rest = _survey(state, doubtful if made is None else doubtful - made.apart)
    elsewhere = memory(rest.tensors)
    if made is None or elsewhere:
        found = _survey(state, _OVERWRITABLE)
        containers = found.containers
        mine = (
            found.all_inside
            and all(map(_is_owned, containers))
            and elsewhere.isdisjoint(memory(found.tensors))
        )
    else:
        containers, mine = made.containers, True
    with _lock:
        if _leases and (given in _leases or any(node in _leases for node in containers)):
            return None
        reserved = frozenset([id(getattr(state, name)) for name in _OVERWRITABLE])
        _reserved.update(reserved)
    used_up: list[Container] = [given, *containers]
    if rest.containers:
        kept = set(map(id, rest.containers))
        used_up = [node for node in used_up if id(node) not in kept]
    if not mine:
        changes = {name: _own(getattr(state, name), False, elsewhere) for name in _OVERWRITABLE}
        state = state.replace(**changes)
    return Donation(state, used_up, reserved)


def give_up(donation: Donation, new: TrainState | None) -> None:
    """Empty what a step has used up, unless the new state uses it, so that reading it raises.

    Without a new state: the step failed on the way, when some may have been overwritten.
    """
    reason: Reason = "a step with donate=True failed while it overwrote the state"
    kept: set[int] = set()
    if new is not None:
        step = new.step
        reason = lambda: f"step {int(step)} was computed with donate=True"  # noqa: E731
        found = _survey(new, _OVERWRITABLE)
        for node in found.containers:
            _mark_owned(node)
        kept = {id(new), *map(id, found.containers)}
        if found.all_inside:  # what the rest held of it has been copied
            new.__dict__["_made"] = _Made(found.containers, _doubtful(new._names))
    for node in donation.used_up:
        if id(node) not in kept:
            kept.add(id(node))
            invalidate(node, reason)
    unreserve(donation.reserved)


@functools.cache
def _doubtful(names: tuple[str, ...]) -> frozenset[str]:
    """The fields of a state that may hold memory of the overwritable ones."""
    return frozenset(names).difference(_OVERWRITABLE, _FRESH)


def claim(new: TrainState, old: TrainState) -> None:
    """Note what a step has made anew, so that the next one may overwrite it."""
    before = _survey(old, _OVERWRITABLE)
    known, taken = set(map(id, before.containers)), memory(before.tensors)
    for node in _survey(new, _OVERWRITABLE).containers:
        tensors = [leaf for leaf in tree_leaves(node) if isinstance(leaf, Tensor)]
        if id(node) not in known and taken.isdisjoint(memory(tensors)):
            _mark_owned(node)


def memory(tensors: Collection[Tensor]) -> set[int]:
    """Where the storages of tensors begin; two tensors share memory if these are the same."""
    try:  # this is in every step several times
        found = {x.data_ptr() - int(x.storage_offset()) * x.itemsize for x in tensors}
    except (NotImplementedError, RuntimeError, TypeError):
        found = {0}
    return set(map(address, tensors)) if 0 in found else found


def address(tensor: Tensor) -> int:
    """Where the storage of a tensor begins; a number of its own if it has none."""
    try:  # not by untyped_storage(), which makes an object and is slow
        offset = tensor.storage_offset()
        start = tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # it is sparse, or made of other tensors
        return id(tensor)
    if offset:
        start -= int(offset) * tensor.element_size()
    return start or id(tensor)


_ONLY_TENSORS = {Tensor}


class _Survey:
    """The containers and the tensors in some fields of a state. It is made in every step."""

    __slots__ = ("all_inside", "containers", "tensors")

    def __init__(self) -> None:
        self.containers: list[Container] = []
        self.tensors: list[Tensor] = []
        self.all_inside = True  # no tensor is outside of all containers


def _survey(state: TrainState, names: Iterable[str]) -> _Survey:
    survey = _Survey()
    _visit([getattr(state, name) for name in names], survey, False)
    return survey


def _visit(children: Iterable[Any], survey: _Survey, inside: bool) -> None:
    for child in children:
        kind = type(child)
        if kind is Tensor:
            survey.tensors.append(child)
            if not inside:
                survey.all_inside = False
        elif child is None:
            pass
        elif kind is FrozenDict:
            survey.containers.append(child)
            values = child._items.values()
            if {*map(type, values)} == _ONLY_TENSORS:  # the usual case, and quicker
                survey.tensors.extend(values)
            else:
                _visit(values, survey, True)
        elif isinstance(child, Record):
            survey.containers.append(child)
            _visit([getattr(child, name) for name in child._children], survey, True)
        elif isinstance(child, (tuple, list)):
            _visit(child, survey, inside)
        else:  # a plain value, another kind of tensor, or a container that can be changed
            found = [leaf for leaf in tree_leaves(child) if isinstance(leaf, Tensor)]
            survey.tensors.extend(found)
            if found and (found[0] is not child or not inside):
                survey.all_inside = False


def _own(tree: Any, mine: bool, elsewhere: set[int]) -> Any:
    """Copy the tensors that are not in owned containers, or that are elsewhere in the state."""
    if isinstance(tree, Tensor):
        return tree if mine and address(tree) not in elsewhere else tree.clone()
    if isinstance(tree, FrozenDict):
        mine = _is_owned(tree)
        return FrozenDict({key: _own(child, mine, elsewhere) for key, child in tree.items()})
    if isinstance(tree, Record):
        mine = _is_owned(tree)
        return tree.replace(**{k: _own(getattr(tree, k), mine, elsewhere) for k in tree._children})
    if isinstance(tree, (tuple, list)):
        children = [_own(child, mine, elsewhere) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _is_owned(node: Container) -> bool:
    try:
        return node._owned is True
    except AttributeError:
        return False


def _mark_owned(node: Container) -> None:
    object.__setattr__(node, "_owned", True)
