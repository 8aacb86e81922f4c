"""TrainState: everything that decides what happens next in a training run, as one value.

A run is a fold, ``state' = step(state, batch)``. Two runs with equal states and equal sources of
data have equal futures, bit for bit; so saving the state is saving the run.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from puretrain.errors import StructureError
from puretrain.tree import FrozenDict, Record, field, freeze, invalidate, nodes, tree_map

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
    """Updates with finite gradients since the scale last changed, int32 of shape ``()``."""


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
    """What the model reads and may replace but does not train: running statistics, frozen weights."""
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

        Dicts become frozen dicts and lists tuples; tensors are taken as they are, not copied.

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
    return tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf, tree
    )


# ── Leases ────────────────────────────────────────────────────────────────────────────────────────
#
# A donated state is used up: its tensors are overwritten with the next state's. What may be
# overwritten sits in containers (records and frozen dicts), and two states share tensors only by
# sharing their container. So it suffices to mark containers: a lease forbids to give them up.

_leases: weakref.WeakKeyDictionary[Record | FrozenDict[Any], int] = weakref.WeakKeyDictionary()


class Lease:
    """Keeps a state readable; made by :func:`lease`. It does not keep the state alive."""

    def __init__(self, state: TrainState) -> None:
        found = nodes(state)
        for node in found:
            _leases[node] = _leases.get(node, 0) + 1
        self._nodes = [weakref.ref(node) for node in found]

    def release(self) -> None:
        """End the lease; further calls do nothing."""
        for reference in self._nodes:
            node = reference()
            if node is not None:
                _leases[node] -= 1
                if not _leases[node]:
                    del _leases[node]
        self._nodes = []

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
    as a context manager or call its ``release()``.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] * batch).sum()
        >>> optimizer = pt.optim.sgd(1.0)
        >>> state = pt.TrainState.create({"w": torch.ones(1)}, None, optimizer, key=pt.random.key(0))
        >>> step = pt.train_step(loss, optimizer)
        >>> with pt.lease(state):
        ...     after = step(state, torch.ones(1), donate=True)
        >>> state.params["w"], after.params["w"]
        (tensor([1.]), tensor([0.]))
        >>> final = step(after, torch.ones(1), donate=True)
        >>> after.params
        Traceback (most recent call last):
        puretrain.errors.DonatedStateError: this TrainState was given up: step 2 was computed with donate=True...
    """
    return Lease(state)


def is_leased(tree: Any) -> bool:
    """Whether any record or frozen dict of a tree is under a lease."""
    return bool(_leases) and any(node in _leases for node in nodes(tree))


def _overwritable(state: TrainState) -> tuple[Any, ...]:
    """The parts of a state whose memory a donating step uses for the next state."""
    return (state.params, state.opt_state, state.accumulator)


def may_overwrite(state: TrainState) -> bool:
    """Whether no lease forbids a step to use up a state."""
    return not is_leased(_overwritable(state))


def give_up(old: TrainState, new: TrainState) -> None:
    """Empty what a donating step has used up of a state, so that reading it raises.

    That is the record itself and its overwritten parts, unless ``new`` still uses them. The rest
    stays readable for those who hold it.
    """
    parts = _overwritable(old)
    kept = {id(node) for node in nodes(_overwritable(new))}
    reason = f"step {int(new.step)} was computed with donate=True"
    invalidate(old, reason)
    for node in nodes(parts):
        if id(node) not in kept:
            invalidate(node, reason)
