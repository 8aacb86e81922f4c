"""Several steps as one function that can be differentiated, for learning how to learn.

``scan`` folds a step over batches. A derivative flows through all of the steps to every leaf of the
first state (parameters, learning rates in ``opt_state``, buffers) and to the batches. With
``remat`` most of what the derivative needs is computed a second time instead of being kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, StructureError, TransformError
from puretrain.state import TrainState
from puretrain.tree import tree_flatten, tree_leaves, tree_stack, tree_unflatten, under_transform

__all__ = ["scan"]

S = TypeVar("S", bound=TrainState)


@overload
def scan(
    step: Callable[[S, Any], S],
    state: S,
    batches: Iterable[Any],
    *,
    remat: bool | int = False,
    collect: None = None,
) -> S: ...


@overload
def scan(
    step: Callable[[S, Any], S],
    state: S,
    batches: Iterable[Any],
    *,
    remat: bool | int = False,
    collect: Callable[[S], Any],
) -> tuple[S, Any]: ...


def scan(
    step: Callable[[S, Any], S],
    state: S,
    batches: Iterable[Any],
    *,
    remat: bool | int = False,
    collect: Callable[[S], Any] | None = None,
) -> S | tuple[S, Any]:
    """Fold a step over batches, as a function that can be differentiated.

    Inside of ``torch.func.grad`` and the like, and where a leaf of the state or of a batch requires
    grad, derivatives flow through the updates, at any order; there the optimizers follow their
    formulas. Otherwise the result is that of a loop over ``step``, to the bit.

    The derivative of k steps keeps what each of them computed: memory grows with k. With ``remat``
    the steps are cut into segments; only the states between segments are kept, and the derivative
    takes the steps of a segment again when it comes to it (Chen et al., "Training deep nets with
    sublinear memory cost", 2016). In segments of √k steps, memory grows with √k, for the price of
    taking each step twice. The steps are pure, dropout included, so the second time gives the same.

    Args:
        step: ``step(state, batch) -> state``, made by :func:`puretrain.train_step` or composed out
            of such.
        state: where to begin. It stays as it is.
        batches: the batches, in order. Cut a stacked tree with
            :func:`puretrain.tree.tree_unstack`.
        remat: True for segments of ⌈√k⌉ steps, or the number of steps of a segment. The derivative
            then flows to the leaves of ``state`` and ``batches`` only, in reverse mode: a step that
            holds another tensor to be differentiated by is refused.
        collect: a function of each new state, for example ``lambda s: s.metrics["loss"]``.

    Returns:
        The last state. With ``collect``, a pair of it and the collected values, stacked along a new
        first dimension of k.

    Raises:
        ConfigurationError: ``remat`` has no such value, or there is nothing to collect from.
        TransformError: with ``remat``, the step holds a tensor that a derivative is taken by, or
            the derivative is one in forward mode.

    Example:
        The gradient of the loss after two steps, by the learning rate that all of them use:

        >>> import puretrain as pt
        >>> optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.25)
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] - batch) ** 2
        >>> step = pt.train_step(loss, optimizer, draws=False)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(1.0)}, None, optimizer, key=pt.random.key(0))
        >>> def loss_after(lr):
        ...     start = state.replace(opt_state=pt.optim.set_hyperparams(state.opt_state, lr=lr))
        ...     return pt.scan(step, start, torch.zeros(2)).params["w"] ** 2
        >>> loss_after(0.25), torch.func.grad(loss_after)(torch.tensor(0.25))  # (1 - 2 lr)^4
        (tensor(0.0625), tensor(-1.))
    """
    given = list(batches)
    size = _segment(remat, len(given))
    if collect is not None and not given:
        raise ConfigurationError("scan: there is no batch, so there is nothing to collect")
    if not under_transform():
        if not _wants_grad((state, given)):
            size = 0
        elif not size:
            return cast("S | tuple[S, Any]", _as_formula(_fold, step, state, given, collect))
    if not size:
        return _fold(step, state, given, collect)
    collected: list[Any] = []
    for start in range(0, len(given), size):
        state, outputs = _remembered_by_its_start(step, state, given[start : start + size], collect)
        collected += outputs
    return state if collect is None else (state, tree_stack(collected))


def _segment(remat: Any, count: int) -> int:
    """The number of steps of a segment; 0 for none."""
    if remat is True:
        return math.isqrt(max(count - 1, 0)) + 1
    if not isinstance(remat, int) or remat < 0:
        raise ConfigurationError(
            f"scan: remat is True, False, or the number of steps of a segment, not {remat!r}"
        )
    return int(remat)


def _fold(
    step: Callable[[S, Any], S],
    state: S,
    batches: Sequence[Any],
    collect: Callable[[S], Any] | None,
) -> S | tuple[S, Any]:
    collected = []
    for batch in batches:
        state = step(state, batch)
        if collect is not None:
            collected.append(collect(state))
    return state if collect is None else (state, tree_stack(collected))


def _as_formula(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function as it is called inside of a transform, where steps can be differentiated."""

    def beside(zero: Tensor) -> tuple[Tensor, Any]:
        return zero, function(*arguments)

    # The derivative by a number of which nothing depends: it costs nothing.
    return torch.func.grad(beside, has_aux=True)(torch.zeros(()))[1]


def _wants_grad(tree: Any) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(tree)
    )


# ── Rematerialisation ─────────────────────────────────────────────────────────────────────────────


def _remembered_by_its_start(
    step: Callable[[S, Any], S],
    state: S,
    batches: Sequence[Any],
    collect: Callable[[S], Any] | None,
) -> tuple[S, list[Any]]:
    """Take some steps, and keep for their derivative only what they begin from."""
    leaves, structure = tree_flatten((state, tuple(batches)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    made: list[Any] = []  # the structure of the outcome, which is not known before

    def segment(*tensors: Tensor) -> tuple[Tensor, ...]:
        whole = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            whole[place] = tensor
        now, these = tree_unflatten(structure, whole)
        outputs = []
        for batch in these:
            now = step(now, batch)
            if collect is not None:
                outputs.append(collect(now))
        outcome, shape = tree_flatten((now, outputs))
        made[:] = [shape]
        for leaf in outcome:
            if not isinstance(leaf, Tensor):
                raise StructureError(
                    f"scan: a step or `collect` gave a {type(leaf).__name__} where remat needs a "
                    "tensor; make it one, or use remat=False"
                )
        return tuple(outcome)

    outcome = _apply(segment, [leaves[place] for place in places])
    return cast("tuple[S, list[Any]]", tree_unflatten(made[0], outcome))


class _Segment(torch.autograd.Function):
    """A function of tensors whose derivative is computed from its arguments alone.

    Torch's own checkpoints work with hooks on saved tensors, which ``torch.func.grad`` refuses.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(segment: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
        """Run it once, without keeping anything."""
        with torch.enable_grad():
            # By two ways a derivative may flow around the arguments: plain autograd's is seen
            # outside, that of a transform, which torch has set aside for the time of this call,
            # inside, where a level takes its place.
            try:
                outcome = _as_formula(_refusing, segment, [tensor.detach() for tensor in tensors])
            except RuntimeError as error:
                if "INTERNAL ASSERT" not in str(error):
                    raise
                raise TransformError(_HELD) from error  # torch met a level that it has set aside
            _refuse(outcome)
        # One tensor at two places (a counter that another field repeats) would be one output.
        once = {id(leaf): i for i, leaf in reversed(list(enumerate(outcome)))}
        return tuple(
            leaf if once[id(leaf)] == i else leaf.clone() for i, leaf in enumerate(outcome)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the arguments."""
        segment, *tensors = inputs
        ctx.segment = segment
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(x for x in output if not _is_real(x)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Run it again, now with all that its derivative needs."""
        tensors = ctx.saved_tensors
        count, places = len(tensors), [i for i, x in enumerate(tensors) if _is_real(x)]

        def derivative(*given: Tensor) -> tuple[Tensor, ...]:
            def of_reals(*reals: Tensor) -> tuple[Tensor, ...]:
                whole = list(given[:count])
                for place, tensor in zip(places, reals, strict=True):
                    whole[place] = tensor
                return tuple(leaf for leaf in ctx.segment(*whole) if _is_real(leaf))

            pull = torch.func.vjp(of_reals, *(given[place] for place in places))[1]
            return cast("tuple[Tensor, ...]", pull(given[count:]))

        # torch.func.grad records what the derivative does, though nobody can ask its level for a
        # second one; recorded, all segments together would take what remat is there to save.
        # A level below, whose derivative this is a part of, keeps recording, again by the start.
        with torch.no_grad() if _grad_is_active() else nullcontext():
            grads = _apply(derivative, (*tensors, *filter(_is_real, cotangents)))
        by_place = dict(zip(places, grads, strict=True))
        return (None, *map(by_place.get, range(count)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse: nothing would be saved."""
        raise TransformError(
            "scan: remat is for derivatives in reverse mode (grad, vjp); in forward mode nothing "
            "is kept in any case: use remat=False"
        )


def _apply(segment: Callable[..., tuple[Tensor, ...]], tensors: Iterable[Tensor]) -> Any:
    return _Segment.apply(segment, *tensors)  # type: ignore[no-untyped-call]


def _grad_is_active() -> bool:
    """Whether a level of ``torch.func.grad`` and the like is being traced."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() is torch._C._functorch.TransformType.Grad for level in levels)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _refusing(segment: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> Any:
    outcome = segment(*tensors)
    _refuse(outcome)
    return outcome


def _refuse(outcome: Iterable[Tensor]) -> None:
    if any(tensor.requires_grad for tensor in outcome):
        raise TransformError(_HELD)


_HELD = (
    "scan: a derivative is taken by a tensor that the step holds, where remat would lose it. Put "
    "that tensor into the state (a learning rate with inject_hyperparams and set_hyperparams, "
    "another one in the buffers), or use remat=False"
)
