"""One step of all members of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from puretrain import random
from puretrain.ensemble.members import members_of
from puretrain.ensemble.vectorized import OverMembers, as_tensor, count_of
from puretrain.errors import (
    ConfigurationError,
    LossError,
    NonFiniteError,
    OptimizerError,
    StructureError,
    TransformError,
    check_choice,
)
from puretrain.gradients import Aux, Loss, Precision, evaluate_loss
from puretrain.optim import Optimizer
from puretrain.optim.leafwise import ONE
from puretrain.optim.members import update_members
from puretrain.step import NonFinite, Step, hand_over
from puretrain.tree import (
    FrozenDict,
    freeze,
    path_string,
    tree_leaves,
    tree_map,
    tree_paths,
    under_transform,
)

__all__ = ["ensemble_step"]

T = TypeVar("T")

_NOTHING = Aux()


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
    over = OverMembers(
        _one_member(loss), (0, 0, 0 if batches == "separate" else None), vectorize=vectorize
    )

    def total(params: Any, buffers: Any, batch: Any, keys: Any) -> tuple[Tensor, Aux]:
        # The members are independent, so the gradient of the sum is that of each member's loss.
        losses, aux = over(count_of(params), keys, params, buffers, batch)
        return losses.sum(), aux.replace(metrics=FrozenDict({"loss": losses}) | aux.metrics)

    def step(state: Any, batch: Any, /, *, donate: bool = False) -> Any:
        count = members_of(state)
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
        metrics = {name: as_tensor(x) for name, x in aux.metrics.items()}
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


def _nonfinite(losses: Tensor, grads: Sequence[Tensor | None]) -> set[int]:
    """The members whose loss or gradient has a NaN or an infinity."""
    finite = losses.isfinite()
    for grad in grads:
        if grad is not None:
            finite = finite & grad.isfinite().reshape(len(losses), -1).all(1)
    return {i for i, good in enumerate(finite.tolist()) if not good}


def _with_rows(new: Any, old: Any, rows: set[int]) -> Any:
    """The new leaves, with the rows of some members from the old ones."""
    count = count_of(new)
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
