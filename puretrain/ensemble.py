"""Ensembles and sweeps: many members trained at once, in one state, by one step.

An :class:`EnsembleState` is one state of one run. What differs between members (parameters,
buffers, optimizer, key) has a leading axis in it; what they share (the step, the place in the data)
has none. So ``fit``, observers, checkpoints and replay take it like any other state, and metrics
have one value for each member. Each member is what its own separate run would have made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch import vmap as _vmap

from puretrain import random
from puretrain.errors import (
    ConfigurationError,
    LossError,
    NonFiniteError,
    OptimizerError,
    StructureError,
    TransformError,
    check_choice,
    check_whole,
)
from puretrain.gradients import Aux, Loss, Precision, evaluate_loss
from puretrain.loop import Event, Kind, Reducer, as_reducer
from puretrain.optim import Optimizer, get_hyperparams, set_hyperparams
from puretrain.optim.leafwise import ONE
from puretrain.optim.members import update_members
from puretrain.reducers import Average
from puretrain.state import TrainState
from puretrain.step import EvalStep, NonFinite, Step, eval_step, hand_over
from puretrain.tree import (
    FrozenDict,
    Record,
    freeze,
    frozen_dict,
    path_string,
    tree_index,
    tree_leaves,
    tree_map,
    tree_paths,
    tree_stack,
    under_transform,
)

__all__ = [
    "EnsembleState",
    "PerMember",
    "Population",
    "ensemble",
    "ensemble_eval_step",
    "ensemble_step",
    "mean_probabilities",
    "member",
    "per_member",
    "population",
    "ranking",
    "select_members",
]

T = TypeVar("T")

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


# ── Members ───────────────────────────────────────────────────────────────────────────────────────


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


_STACKED = ("params", "opt_state", "buffers", "key", "skipped")
_BY_MEMBER = ("metrics", "epoch_metrics")


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
    for name in _STACKED:
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
    """
    count = _members_of(state)
    if not -count <= index < count:
        raise StructureError(f"there is no member {index}: the ensemble has {count}")
    fields = {name: getattr(state, name) for name in TrainState._names}
    for name in _STACKED:
        fields[name] = tree_index(fields[name], index)
    for name in _BY_MEMBER:
        fields[name] = _of_member(fields[name], index, count)
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
    count = _members_of(state)
    chosen = torch.as_tensor(indices, dtype=torch.int64)
    if chosen.dim() != 1 or not len(chosen) or not bool(((chosen >= 0) & (chosen < count)).all()):
        raise StructureError(f"members are numbers from 0 to {count - 1}, not {indices!r}")
    fields = {name: getattr(state, name) for name in EnsembleState._names}
    for name in (*_STACKED, "stopped"):
        fields[name] = tree_index(fields[name], chosen)
    for name in _BY_MEMBER:
        fields[name] = _of_member(fields[name], chosen, count)
    fields["reducers"] = FrozenDict(
        {name: _gathered(memory, chosen) for name, memory in state.reducers.items()}
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


def _members_of(state: Any) -> int:
    if not isinstance(state, EnsembleState):
        raise StructureError(
            f"this is a {type(state).__name__}, not the state of an ensemble; make one with "
            "puretrain.ensemble"
        )
    return state.members


def _of_member(metrics: Any, index: Any, count: int) -> Any:
    """The metrics of a member; what has no axis of members is shared."""
    return tree_map(lambda x: x[index] if x.dim() and len(x) == count else x, metrics)


# ── The step ──────────────────────────────────────────────────────────────────────────────────────


def ensemble_step(
    loss: Loss,
    optimizer: Optimizer,
    *,
    batches: Literal["shared", "separate"] = "shared",
    vectorize: bool = True,
    precision: Precision = "32",
    nonfinite: NonFinite = "propagate",
    draws: bool = True,
    compile: bool | str = False,
) -> Step:
    """Make a step for the state of an ensemble, out of the same parts as for a single run.

    ``step(state, batch, donate=…)`` gives each member what :func:`puretrain.train_step` with the
    same arguments gives it, but the forward pass is one ``vmap`` over the members, the gradients
    come from one backward pass, and the optimizer takes the stacked leaves. A member's random
    numbers (dropout) are those of its own run, and so are its bits where torch's batched kernels
    round as the single ones do (see the page on ensembles). A member that has stopped stays as it
    is, to the bit.

    The metrics have one value for each member, of shape ``(members,)``.

    Args:
        loss: as for :func:`puretrain.train_step`, of one member.
        optimizer: likewise. Those that work element by element take all members at once; of others
            (:func:`~puretrain.optim.lamb`, :func:`~puretrain.optim.muon`, norms of all gradients)
            each member is computed by itself, which is slower, never wrong.
        batches: whether all members see the same batch, or each its own: then every tensor of a
            batch has a leading axis of the members.
        vectorize: False runs the members' forward passes one after the other, for models that
            ``vmap`` can't take, such as those with an LSTM or a GRU.
        precision: as for :func:`puretrain.train_step`; not ``'16'``, since each member would need a
            loss scale of its own.
        nonfinite: as there, of each member by itself; ``'skip'`` counts in ``state.skipped``, of
            shape ``(members,)``.
        draws: as there.
        compile: let ``torch.compile`` make one graph of the forward and backward passes of all
            members, which takes its time at the first step and pays for small models; or the name
            of its backend. It needs ``draws=False``, ``vectorize=True`` and the precision ``'32'``.
            A member then agrees with its own run to rounding only.

    Raises:
        ConfigurationError: an argument has no such value, or ``compile`` can't go with another.
        OptimizerError: ``optimizer`` is none.
        NonFiniteError: (the step) as ``nonfinite='raise'`` says, with the numbers of the members.
        StructureError: (the step) the state is none of an ensemble, or the batch has no axis of
            the members.
        TransformError: (the step) it is inside of a transform: there, use ``torch.func.vmap`` over
            a step of :func:`puretrain.train_step`; or the model has no rule for ``vmap``.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return ((params["w"] - batch) ** 2).sum()
        >>> optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=1.0)
        >>> def init(key):
        ...     return pt.TrainState.create({"w": torch.zeros(2)}, None, optimizer, key=key)
        >>> state = pt.ensemble(init, pt.random.split(pt.random.key(0), 2), lr=[0.5, 0.25])
        >>> step = ensemble_step(loss, optimizer)
        >>> state = step(state, torch.tensor([1.0, 2.0]))
        >>> state.params["w"]
        tensor([[1.0000, 2.0000],
                [0.5000, 1.0000]])
        >>> state.metrics["loss"]
        tensor([5., 5.])
    """
    check_choice("batches", batches, ("shared", "separate"))
    check_choice("precision", precision, ("32", "64", "bf16"))
    check_choice("nonfinite", nonfinite, ("propagate", "raise", "skip"))
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            "optimizer is an Optimizer, such as puretrain.optim.adamw(1e-3), not a "
            f"{type(optimizer).__name__}"
        )
    if compile and (draws or not vectorize or precision != "32"):
        raise ConfigurationError(
            "compile goes with draws=False, vectorize=True and precision='32' only: a graph can't "
            "seed the generator of each member"
        )
    compiled = _compiled(loss, batches, compile) if compile else None
    over = _OverMembers(
        _one_member(loss), (0, 0, 0 if batches == "separate" else None), vectorize=vectorize
    )

    def total(params: Any, buffers: Any, batch: Any, keys: Any) -> tuple[Tensor, Aux]:
        # The members are independent, so the gradient of the sum is that of each member's loss.
        losses, aux = over(_count(params), keys, params, buffers, batch)
        return losses.sum(), aux.replace(metrics=FrozenDict({"loss": losses}) | aux.metrics)

    def step(state: Any, batch: Any, /, *, donate: bool = False) -> Any:
        count = _members_of(state)
        _check_not_transformed()
        if batches == "separate":
            _check_separate(batch, count)
        keys = random.member_step_keys(state.key, int(state.step)) if draws else None
        if compiled is None:
            result = evaluate_loss(total, state, batch, keys, precision, None, False)
            buffers, metrics, gradients = result.buffers, result.metrics, result.grads
            grads = result.as_tree(gradients)
        else:
            grads, buffers, metrics = compiled(state, batch)
            gradients = tree_leaves(grads)
        still = {i for i, last in enumerate(state.stopped.tolist()) if last >= 0}
        skipped = state.skipped
        if nonfinite != "propagate":
            bad = _nonfinite(metrics["loss"], gradients) - still
            if bad and nonfinite == "raise":
                raise NonFiniteError(
                    f"step {int(state.step)}: the loss or a gradient of member "
                    f"{', '.join(map(str, sorted(bad)))} is not finite. The state is as it was "
                    "before the step. nonfinite='skip' goes on without such batches"
                )
            skipped = skipped + torch.tensor([i in bad for i in range(count)])
            still |= bad
        if still and tree_leaves(buffers):
            buffers = _with_rows(buffers, state.buffers, still)
        changes = {
            "step": state.step + ONE,
            "updates": state.updates + ONE,
            "skipped": skipped,
            "buffers": buffers,
            "metrics": metrics,
        }
        active = [i for i in range(count) if i not in still]

        def following(state: Any, donate: bool) -> Any:
            params, opt_state = update_members(
                [optimizer] * count, grads, state.opt_state, state.params, active, donate=donate
            )
            return state.replace(params=params, opt_state=opt_state, **changes)

        return hand_over(state, state, following, donate, False)

    return cast(Step, step)


_NOTHING = Aux()


def _one_member(loss: Loss) -> Callable[..., tuple[Tensor, Aux]]:
    """The loss of one member in one form, whatever it returns."""

    def one(params: Any, buffers: Any, batch: Any, key: Any) -> tuple[Tensor, Aux]:
        returned = loss(params, buffers, batch, key)
        pair = returned if isinstance(returned, tuple) else (returned, _NOTHING)
        value, aux = pair if len(pair) == 2 else (None, None)
        if not isinstance(value, Tensor) or value.dim() or not isinstance(aux, Aux):
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise LossError(
                "the loss function of a member returns the loss, a tensor of shape (), or "
                f"(loss, Aux(buffers=…, metrics=…)); this one returned {what}"
            )
        if not isinstance(aux.metrics, Mapping):
            raise LossError("give the metrics in Aux by name, as in Aux(metrics={'accuracy': x})")
        metrics = {name: _as_tensor(x) for name, x in aux.metrics.items()}
        return value, Aux(freeze(aux.buffers), FrozenDict(metrics))

    return one


def _compiled(
    loss: Loss, batches: str, backend: bool | str
) -> Callable[[Any, Any], tuple[Any, Any, FrozenDict[Tensor]]]:
    """The gradients, buffers and metrics of all members, by one compiled function."""
    one = _one_member(loss)

    def of_member(params: Any, buffers: Any, batch: Any) -> Any:
        def with_rest(params: Any) -> tuple[Tensor, Any]:
            value, aux = one(params, buffers, batch, None)
            rest = {"loss": value, "metrics": dict(aux.metrics)}
            # None is no tensor, which the transform refuses
            return value, rest if aux.buffers is None else rest | {"buffers": aux.buffers}

        return torch.func.grad_and_value(with_rest, has_aux=True)(params)

    axes = (0, 0, 0 if batches == "separate" else None)
    run = torch.compile(
        torch.func.vmap(of_member, axes),
        fullgraph=True,
        backend=backend if isinstance(backend, str) else "inductor",
    )

    def compiled(state: Any, batch: Any) -> tuple[Any, Any, FrozenDict[Tensor]]:
        grads, (_, rest) = run(state.params, state.buffers, batch)
        metrics = FrozenDict({"loss": rest["loss"]}) | rest["metrics"]
        return grads, rest.get("buffers", state.buffers), metrics

    return compiled


class _OverMembers:
    """A function of one member, over all of them; its results are stacked."""

    def __init__(
        self, function: Callable[..., Any], axes: Sequence[int | None], *, vectorize: bool
    ) -> None:
        self._function, self._axes, self._vectorize = function, (*axes, 0), vectorize
        # Whether the function is known to draw. It decides nothing but the speed: a pass in which
        # something was drawn is done again, with a stream for each member.
        self._drew = False

    def __call__(self, count: int, keys: Tensor | None, *arguments: Any) -> Any:
        arguments = (*arguments, keys)
        if not self._vectorize:
            return self._one_by_one(count, keys, arguments)
        if keys is None:
            return self._vectorized(count, arguments)
        if not self._drew:
            with random.watch() as watch:
                results = self._vectorized(count, arguments)
            if not watch.drew:
                return results
            self._drew = True
        with random.member_scope(keys):
            return self._vectorized(count, arguments)

    def _one_by_one(self, count: int, keys: Tensor | None, arguments: Sequence[Any]) -> Any:
        results = []
        for i in range(count):
            own = [x if axis is None else _row(x, i) for x, axis in self._zip(arguments)]
            if keys is None:
                results.append(self._function(*own))
            else:
                with random.scope(keys[i]):
                    results.append(self._function(*own))
        return tree_stack(results)

    def _vectorized(self, count: int, arguments: Sequence[Any]) -> Any:
        # This is torch.func.vmap without its walks over the trees, which show in a small step.
        # Under it, a hook on saved tensors would run where the members are gone.
        _vmap.lazy_load_decompositions()  # type: ignore[attr-defined]
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
            level = _functorch._vmap_increment_nesting(count, "different")
            try:
                own = [x if axis is None else _lifted(x, level) for x, axis in self._zip(arguments)]
                return _stacked(self._function(*own), level, count)
            finally:
                _functorch._vmap_decrement_nesting()

    def _zip(self, arguments: Sequence[Any]) -> Any:
        return zip(arguments, self._axes, strict=True)


_functorch = torch._C._functorch
_NO_HOOKS = (
    "saved-tensor hooks, which activation checkpointing and offloading use, do not work inside of "
    "a vmap over members; leave them out, or run the members one after the other with "
    "vectorize=False"
)


def _lifted(tree: Any, level: int) -> Any:
    """The tree as one member sees it."""
    if type(tree) is FrozenDict and {*map(type, tree.values())} <= {Tensor}:
        values = [_functorch._add_batch_dim(leaf, 0, level) for leaf in tree.values()]
        return frozen_dict(tree.keys(), values)  # the usual kind, which is much quicker by hand
    return tree_map(
        lambda leaf: (
            _functorch._add_batch_dim(leaf, 0, level) if isinstance(leaf, Tensor) else leaf
        ),
        tree,
    )


def _stacked(tree: Any, level: int, count: int) -> Any:
    """What one member sees, as the tree of all."""
    kind = type(tree)
    if kind is Tensor:
        return _functorch._remove_batch_dim(tree, level, count, 0)
    if kind is FrozenDict:
        return frozen_dict(tree.keys(), [_stacked(x, level, count) for x in tree.values()])
    if kind is tuple:
        return tuple([_stacked(x, level, count) for x in tree])
    if kind is Aux:
        return tree.replace(
            buffers=_stacked(tree.buffers, level, count),
            metrics=_stacked(tree.metrics, level, count),
        )
    return tree_map(lambda leaf: _functorch._remove_batch_dim(leaf, level, count, 0), tree)


def _row(tree: Any, index: int) -> Any:
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)


def _count(params: Any) -> int:
    leaf = next(iter(params.values())) if type(params) is FrozenDict and params else params
    return int((leaf if isinstance(leaf, Tensor) else tree_leaves(params)[0]).shape[0])


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else value


def _nonfinite(losses: Tensor, grads: Sequence[Tensor | None]) -> set[int]:
    """The members whose loss or gradient has a NaN or an infinity."""
    finite = losses.isfinite()
    for grad in grads:
        if grad is not None:
            finite = finite & grad.isfinite().reshape(len(losses), -1).all(1)
    return {i for i, good in enumerate(finite.tolist()) if not good}


def _with_rows(new: Any, old: Any, rows: set[int]) -> Any:
    """The new leaves, with the rows of some members from the old ones."""
    count = _count(new)
    kept = torch.tensor([i in rows for i in range(count)])

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(kept.to(a.device).reshape(-1, *[1] * (a.dim() - 1)), b, a)

    return tree_map(chosen, new, old)


def _check_not_transformed() -> None:
    if under_transform():
        raise TransformError(
            "a step of ensemble_step is a vmap already, and can't be called inside of a transform "
            "or torch.compile: use torch.func.vmap(puretrain.train_step(…)) there"
        )


def _check_separate(batch: Any, count: int) -> None:
    for path, leaf in zip(tree_paths(batch), tree_leaves(batch), strict=True):
        if isinstance(leaf, Tensor) and (not leaf.dim() or len(leaf) != count):
            raise StructureError(
                f"{path_string(path)} of the batch has the shape {tuple(leaf.shape)}; with "
                f"batches='separate' it begins with an axis of the {count} members"
            )


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def mean_probabilities(logits: Tensor) -> Tensor:
    """The logarithm of the mean of the members' probabilities: the usual vote of classifiers.

    Args:
        logits: of shape ``(members, ..., classes)``.

    Returns:
        Logits again, of shape ``(..., classes)``; as good a first argument of ``cross_entropy``.

    >>> mean_probabilities(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()).exp()
    tensor([0.7000, 0.3000])
    """
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def ensemble_eval_step(
    function: Callable[[Any, Any, Any, Tensor], Any],
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    *,
    combine: Callable[[Any], Any] = mean_probabilities,
    prefix: str = "ensemble/",
    vectorize: bool = True,
    precision: Precision = "32",
) -> EvalStep:
    """Make a pure function from the state of an ensemble and a batch to metrics.

    The metrics of each member come under their own names, with one value for each member. If the
    outputs and the metrics are given apart, those of the ensemble's one combined output come
    besides, as ``ensemble/…``.

    Args:
        function: of one member. Alone, it returns metrics, as for :func:`puretrain.eval_step`;
            with ``metrics``, the outputs of the model: a tensor or a tree of them.
        metrics: ``metrics(outputs, batch)`` returns metrics by name.
        combine: from the members' outputs, with an axis of the members in front, to one output.
        prefix: in front of the names of the combined output's metrics.
        vectorize: as for :func:`ensemble_step`.
        precision: as for :func:`puretrain.train_step`.

    Raises:
        ConfigurationError: ``precision`` has no such value.
        StructureError: (the step) the state is none of an ensemble.

    Example:
        >>> import puretrain as pt
        >>> step = ensemble_eval_step(
        ...     lambda params, buffers, batch, key: params["w"] * batch,
        ...     lambda outputs, batch: {"error": (outputs - batch).abs().mean()},
        ...     combine=lambda outputs: outputs.mean(0))
        >>> state = pt.ensemble(
        ...     lambda key: pt.TrainState.create({"w": torch.ones(())}, key=key),
        ...     pt.random.split(pt.random.key(0), 2))
        >>> state = state.replace(params=pt.FrozenDict(w=torch.tensor([0.5, 1.5])))
        >>> metrics = step(state, torch.tensor([2.0, 4.0]))
        >>> metrics["error"], metrics["ensemble/error"]
        (tensor([1.5000, 1.5000]), tensor(0.))
    """
    over = _OverMembers(_outputs(function, metrics), (0, 0, None), vectorize=vectorize)

    def all_members(params: Any, buffers: Any, batch: Any, keys: Any) -> Mapping[str, Any]:
        outputs, found = over(_count(params), keys, params, buffers, batch)
        if metrics is None:
            return cast("Mapping[str, Any]", found)
        together = metrics(combine(outputs), batch)
        return FrozenDict(found) | {f"{prefix}{name}": x for name, x in together.items()}

    evaluate = eval_step(all_members, precision=precision)

    def step(state: Any, batch: Any, /) -> FrozenDict[Any]:
        _members_of(state)
        return evaluate(state, batch)

    return step


def _outputs(function: Any, metrics: Any) -> Callable[..., Any]:
    def one(params: Any, buffers: Any, batch: Any, key: Any) -> Any:
        outputs = function(params, buffers, batch, key)
        found = outputs if metrics is None else metrics(outputs, batch)
        if not isinstance(found, Mapping):
            raise LossError(
                f"the metrics of a member are a {type(found).__name__}; give them by name, such "
                "as {'loss': loss}, or give outputs and metrics apart: "
                "ensemble_eval_step(outputs, metrics)"
            )
        found = FrozenDict({name: _as_tensor(x) for name, x in found.items()})
        return (() if metrics is None else outputs), found

    return one


# ── Reducers ──────────────────────────────────────────────────────────────────────────────────────


class PerMember(Record):
    """What a reducer made by :func:`per_member` remembers."""

    per_member: Any
    """The members' memories, stacked."""


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
        count = _members_of(state)
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
            elif name in (*_STACKED, *_BY_MEMBER):
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
        count = _members_of(state)
        return PerMember(tree_stack([freeze(init(member(state, i))) for i in range(count)]))

    return Reducer(reduce, base.name, first, tuple(kind for kind in base.on if kind in on))


def _event_of(event: Event, index: int, count: int) -> Event:
    return event._replace(metrics=_of_member(freeze(event.metrics), index, count), donate=False)


def _own_memories(name: str, memory: Any) -> tuple[str, Any]:
    """What a reducer remembers of each member; None if it does not tell them apart."""
    if isinstance(memory, PerMember):
        return name, memory.per_member
    if isinstance(memory, FrozenDict) and [*memory] == ["per_member"]:  # as a checkpoint holds it
        return name, memory["per_member"]
    return name, None


def _gathered(memory: Any, index: Tensor) -> Any:
    """What a reducer remembers, of the members with these numbers."""
    if isinstance(memory, Average):
        rows = tree_index((memory.params, memory.buffers), index)
        return memory.replace(params=rows[0], buffers=rows[1])
    if isinstance(memory, PerMember):
        return tree_index(memory, index)
    if isinstance(memory, Population):
        return memory.replace(parents=memory.parents[index], copies=memory.copies[index])
    return memory


class Population(Record):
    """What :func:`population` remembers."""

    checks: Tensor
    """How many scores there were, int64 of shape ``()``."""
    parents: Tensor
    """The member that each was last copied from, int64 of shape ``(members,)``; -1: never."""
    copies: Tensor
    """How often each was replaced by a copy, int64 of shape ``(members,)``."""


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
        count = _members_of(state)
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
        memories = {key: _gathered(x, parents) for key, x in state.reducers.items() if key != name}
        memories[name] = Population(
            checks, torch.where(moved, parents, memory.parents), memory.copies + moved
        )
        reducers = FrozenDict({key: memories[key] for key in state.reducers})
        return state.replace(**copied, reducers=reducers)

    def init(state: Any) -> Population:
        count = _members_of(state)
        present = get_hyperparams(state.opt_state)
        wanted = {key: present.get(key, torch.ones(count)) for key in factors}
        set_hyperparams(state.opt_state, **wanted)  # refuses now what it would refuse later
        return Population(
            torch.tensor(0), torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
        )

    return Reducer(reduce, name, init, ("step", "validation", "epoch_end"))
