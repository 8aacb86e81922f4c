"""Gradient transformations, and the ways to put optimizers together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from optree import PyTreeSpec
from torch import Tensor

from puretrain.errors import OptimizerError, StructureError, check_whole
from puretrain.optim.base import (
    GradientTransformation,
    Optimizer,
    Schedule,
    check_number,
    check_rate,
    plain_value,
    schedule_value,
)
from puretrain.optim.members import Active, Together, together
from puretrain.optim.shards import Shards, cut_leaves, parts_are_given
from puretrain.tree import (
    FrozenDict,
    Path,
    Record,
    match_paths,
    path_string,
    tree_flatten,
    tree_flatten_up_to,
    tree_map,
    tree_structure,
    tree_unflatten,
    under_transform,
)

__all__ = [
    "AccumulationState",
    "CountState",
    "Mask",
    "add_decayed_weights",
    "apply_every",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "freeze",
    "global_norm",
    "masked",
    "multi_transform",
    "scale",
]

Mask = str | Iterable[str] | Callable[[Path], bool]
"""Which leaves: a pattern of paths (see :func:`puretrain.tree.match_paths`), several of them, or a
function from a leaf's path to a bool."""


class CountState(Record):
    """The state of a transformation that follows a schedule."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""


class AccumulationState(Record):
    """The state of :func:`apply_every`."""

    count: Tensor
    """Updates since the last one that was applied, int64 of shape ``()``."""
    grads: Any
    """The sum of their gradients, a tree like the parameters."""
    seen: Tensor
    """Which leaves have had a gradient among them, bool of shape ``(leaves,)`` on the CPU."""
    inner: Any
    """The state of the optimizer."""


# ── Putting together ──────────────────────────────────────────────────────────────────────────────


def chain(*parts: Optimizer | GradientTransformation) -> Any:
    """Apply gradient transformations one after the other, and at the end an optimizer.

    Args:
        *parts: any number of transformations; the last part may be an optimizer.

    Returns:
        An :class:`Optimizer` if the last part is one, else a :class:`GradientTransformation`. Its
        state is the tuple of the parts' states.

    Raises:
        OptimizerError: a part is neither, or an optimizer is not the last part.

    Example:
        >>> import puretrain as pt
        >>> optimizer = chain(pt.optim.scale(0.5), pt.optim.sgd(lr=1.0))
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> params, _ = optimizer.update(
        ...     {"w": torch.tensor([1.0, 1.0])}, optimizer.init(params), params)
        >>> params["w"]
        tensor([0.5000, 1.5000])
    """
    for place, part in enumerate(parts):
        if not isinstance(part, (Optimizer, GradientTransformation)):
            raise OptimizerError(
                f"chain: part {place} is {part!r}; the parts are gradient transformations, such as "
                "clip_by_global_norm(1.0), and at the end an optimizer, such as adamw(1e-3)"
            )
        if isinstance(part, Optimizer) and place < len(parts) - 1:
            raise OptimizerError(
                f"chain: part {place} is an optimizer, whose result is parameters, so nothing can "
                "come after it; put it last"
            )
    if not parts:
        raise OptimizerError("chain: there are no parts; give it at least one")

    def init(params: Any, /) -> tuple[Any, ...]:
        return tuple(part.init(params) for part in parts)

    def update(
        grads: Any, state: Any, params: Any, /, *, donate: bool = False
    ) -> tuple[Any, tuple[Any, ...]]:
        if not isinstance(state, tuple) or len(state) != len(parts):
            what = f"{len(state)} parts" if isinstance(state, tuple) else type(state).__name__
            raise OptimizerError(
                f"chain: the state is one of {what}, not of {len(parts)} parts; make one with "
                "init(params)"
            )
        states = []
        for part, part_state in zip(parts, state, strict=True):
            grads, part_state = part.update(grads, part_state, params, donate=donate)
            states.append(part_state)
        return grads, tuple(states)

    update.together = Together(_chain_together, parts)  # type: ignore[attr-defined]
    return (Optimizer if isinstance(parts[-1], Optimizer) else GradientTransformation)(init, update)


def _chain_together(
    chains: Any, grads: Any, states: Any, params: Any, active: Active
) -> tuple[Any, tuple[Any, ...]]:
    new = []
    for parts, state in zip(zip(*chains, strict=True), states, strict=True):
        grads, state = together(parts, grads, state, params, active)
        new.append(state)
    return grads, tuple(new)


def masked(part: Any, mask: Mask) -> Any:
    """Apply a transformation or an optimizer to some leaves and leave the others alone.

    Args:
        part: the transformation or optimizer.
        mask: which leaves it sees. The gradients of the others pass through a masked
            transformation, and their parameters are left as they are by a masked optimizer.

    Raises:
        OptimizerError: ``part`` is neither.
        PatternError: (``init``) a pattern matches no leaf.

    Example:
        >>> import puretrain as pt
        >>> decay = masked(pt.optim.add_decayed_weights(0.5), "**weight")
        >>> params = pt.FrozenDict(weight=torch.tensor(4.0), bias=torch.tensor(4.0))
        >>> grads = pt.FrozenDict(weight=torch.tensor(1.0), bias=torch.tensor(1.0))
        >>> decay.update(grads, decay.init(params), params)[0]
        {'weight': f32 3.0, 'bias': f32 1.0}
    """
    kind = _kind("masked", part)
    members = _members(mask)

    def init(params: Any, /) -> Any:
        leaves, structure = tree_flatten(params)
        return part.init(tree_unflatten(structure, _only(leaves, members(structure))))

    def update(grads: Any, state: Any, params: Any, /, *, donate: bool = False) -> tuple[Any, Any]:
        leaves, structure = tree_flatten(params)
        here = members(structure)
        slopes = _aligned("masked", structure, grads)
        new, state = part.update(
            tree_unflatten(structure, _only(slopes, here)),
            state,
            tree_unflatten(structure, _only(leaves, here)),
            donate=donate,
        )
        rest = slopes
        if kind is Optimizer:
            rest = leaves if donate else [leaf.clone() for leaf in leaves]
        changed = tree_flatten_up_to(structure, new)
        merged = [a if wanted else b for a, b, wanted in zip(changed, rest, here, strict=True)]
        return tree_unflatten(structure, merged), state

    return kind(init, update)


def multi_transform(parts: Mapping[str, Any]) -> Any:
    """Treat groups of parameters differently.

    Args:
        parts: optimizers (or only transformations) by the pattern of the paths that each is for,
            or None for parameters that are not to be trained (gradients that pass unchanged). A
            leaf that several patterns match belongs to the first, so ``"**"`` at the end takes what
            is left.

    Returns:
        An optimizer (or a transformation); its state is a frozen dict of the parts' states by
        pattern.

    Raises:
        OptimizerError: the parts are of both kinds; (``init``) a leaf belongs to none of them, or
            a part is left without a leaf.
        PatternError: (``init``) a pattern matches no leaf.

    Example:
        >>> import puretrain as pt
        >>> optimizer = multi_transform({"head.**": pt.optim.sgd(1.0), "**": pt.optim.sgd(0.1)})
        >>> params = pt.FrozenDict({"body.w": torch.tensor(1.0), "head.w": torch.tensor(1.0)})
        >>> state = optimizer.init(params)
        >>> optimizer.update(pt.tree.tree_map(torch.ones_like, params), state, params)[0]
        {'body.w': f32 0.8999999761581421, 'head.w': f32 0.0}
    """
    parts = dict(parts)
    kinds = {_kind("multi_transform", part) for part in parts.values() if part is not None}
    if len(kinds) != 1:
        raise OptimizerError(
            "multi_transform: the parts are optimizers, or all of them transformations; "
            + (
                "there are none"
                if not kinds
                else "end each chain with an optimizer, and give None for what is not to be trained"
            )
        )
    (kind,) = kinds

    @functools.lru_cache(maxsize=8)
    def groups(structure: PyTreeSpec) -> dict[str, list[bool]]:
        paths: list[Path] = structure.paths()
        free = dict.fromkeys(paths)
        found = {}
        for pattern in parts:
            members = {path for path in match_paths(pattern, paths) if path in free}
            if not members:
                raise OptimizerError(
                    f"multi_transform: nothing is left for {pattern!r}: the patterns before it "
                    "match all of its leaves; put the narrower pattern first"
                )
            found[pattern] = [path in members for path in paths]
            for path in members:
                del free[path]
        if free:
            names = ", ".join(path_string(path) for path in list(free)[:4])
            raise OptimizerError(
                f"multi_transform: no pattern matches {names}{', …' if len(free) > 4 else ''}; "
                "add '**' as the last one for what is left"
            )
        return found

    def init(params: Any, /) -> FrozenDict[Any]:
        leaves, structure = tree_flatten(params)
        states = {}
        for pattern, here in groups(structure).items():
            part, mine = parts[pattern], tree_unflatten(structure, _only(leaves, here))
            states[pattern] = () if part is None else part.init(mine)
        return FrozenDict(states)

    def update(
        grads: Any, state: Any, params: Any, /, *, donate: bool = False
    ) -> tuple[Any, FrozenDict[Any]]:
        if not isinstance(state, FrozenDict) or list(state) != list(parts):
            raise OptimizerError(
                f"multi_transform: the state is not one of the groups {', '.join(parts)}; make one "
                "with init(params)"
            )
        leaves, structure = tree_flatten(params)
        slopes = _aligned("multi_transform", structure, grads)
        result = list(slopes if kind is GradientTransformation else leaves)
        states: dict[str, Any] = {}
        for pattern, here in groups(structure).items():
            part, chosen = parts[pattern], [i for i, wanted in enumerate(here) if wanted]
            if part is None:
                states[pattern] = ()
                if kind is Optimizer and not donate:
                    for i in chosen:
                        result[i] = leaves[i].clone()
                continue
            new, states[pattern] = part.update(
                tree_unflatten(structure, _only(slopes, here)),
                state[pattern],
                tree_unflatten(structure, _only(leaves, here)),
                donate=donate,
            )
            changed = tree_flatten_up_to(structure, new)
            for i in chosen:
                result[i] = changed[i]
        return tree_unflatten(structure, result), FrozenDict(states)

    return kind(init, update)


def freeze(mask: Mask = "**") -> GradientTransformation:
    """Take the gradients of some leaves away, so that the optimizer leaves those leaves alone.

    Neither the parameter nor what is remembered of it moves, also not by weight decay. Moving a
    parameter to the buffers is cheaper: its gradient is not even computed then.

    Args:
        mask: which leaves.

    Raises:
        PatternError: (``init``) a pattern matches no leaf.

    Example:
        >>> import puretrain as pt
        >>> optimizer = chain(freeze("encoder.**"), pt.optim.sgd(lr=1.0, weight_decay=0.1))
        >>> params = pt.FrozenDict({"encoder.w": torch.tensor(1.0), "head.w": torch.tensor(1.0)})
        >>> state = optimizer.init(params)
        >>> optimizer.update(pt.tree.tree_map(torch.zeros_like, params), state, params)[0]
        {'encoder.w': f32 1.0, 'head.w': f32 0.8999999761581421}
    """
    members = _members(mask)

    def init(params: Any, /) -> tuple[()]:
        members(tree_structure(params))
        return ()

    def update(grads: Any, state: Any, params: Any, /, *, donate: bool = False) -> tuple[Any, Any]:
        structure = tree_structure(params)
        pairs = zip(_aligned("freeze", structure, grads), members(structure), strict=True)
        return tree_unflatten(structure, [None if frozen else g for g, frozen in pairs]), state

    return GradientTransformation(init, update)


def apply_every(k: int, optimizer: Optimizer, *, mean: bool = False) -> Optimizer:
    """Let an optimizer update only every k-th time, with the sum of the gradients until then.

    In between, parameters and optimizer state stay as they are. A leaf that had no gradient in all
    of the k calls has none for the optimizer either; under a transform, where that can't be looked
    at, it has one of zeros. The loop knows nothing of it: each call counts as an update, and what
    waits at the end of an epoch waits for the next one. For accumulation with a mean over what
    there was, use ``train_step(accumulate=k)``.

    Args:
        k: how many calls make an update.
        optimizer: the optimizer, or a chain that ends with one.
        mean: divide the sum by ``k``.

    Raises:
        OptimizerError: ``k`` is no whole number from 1, or ``optimizer`` is none.

    Example:
        >>> import puretrain as pt
        >>> optimizer = apply_every(2, pt.optim.sgd(lr=1.0))
        >>> params = {"w": torch.tensor(0.0)}
        >>> state = optimizer.init(params)
        >>> for _ in range(3):
        ...     params, state = optimizer.update({"w": torch.tensor(1.0)}, state, params)
        >>> params["w"], state.grads["w"]
        (tensor(-2.), tensor(1.))
    """
    k = check_whole("apply_every: k", k, error=OptimizerError)
    if _kind("apply_every", optimizer) is not Optimizer:
        raise OptimizerError(
            "apply_every: it takes an optimizer, or a chain that ends with "
            "one; this one ends with a transformation, so put adamw(1e-3), for "
            "example, behind it"
        )

    def init(params: Any, /) -> AccumulationState:
        leaves, structure = tree_flatten(params)
        with torch.no_grad():
            zeros = tree_unflatten(structure, map(torch.zeros_like, leaves))
        return AccumulationState(
            torch.tensor(0, dtype=torch.int64),
            zeros,
            torch.zeros(len(leaves), dtype=torch.bool),
            optimizer.init(params),
        )

    def update(
        grads: Any, state: Any, params: Any, /, *, donate: bool = False
    ) -> tuple[Any, AccumulationState]:
        structure = tree_structure(params)
        slopes = _aligned("apply_every", structure, grads)
        try:
            before = tree_flatten_up_to(structure, state.grads)
            fits = isinstance(state, AccumulationState) and state.seen.shape == (len(before),)
        except (AttributeError, StructureError):
            fits = False
        if not fits:
            raise OptimizerError(
                f"apply_every: the state, of type {type(state).__name__}, does not fit the "
                "parameters; make one with init(params)"
            )
        count = state.count + 1
        if under_transform():
            sums = [
                total if grad is None else torch.where(had, total + grad, grad)
                for total, grad, had in zip(before, slopes, state.seen, strict=True)
            ]
            seen = state.seen | torch.tensor([grad is not None for grad in slopes])
            passed = [total / k for total in sums] if mean else sums
            full = count == k
            new, inner = tree_map(
                lambda a, b: torch.where(full, a, b),
                optimizer.update(tree_unflatten(structure, passed), state.inner, params),
                (params, state.inner),
            )
            count, seen = torch.where(full, 0, count), seen & ~full
            sums = [torch.where(full, 0.0, total) for total in sums]
            return new, AccumulationState(count, tree_unflatten(structure, sums), seen, inner)

        had = state.seen.tolist()
        with torch.no_grad():
            pairs = zip(before, slopes, had, strict=True)
            sums = [_sum(total, grad, old, donate) for total, grad, old in pairs]
        had = [old or grad is not None for old, grad in zip(had, slopes, strict=True)]
        if int(count) < k:
            new, inner = params, state.inner
            if not donate:
                new, inner = tree_map(torch.clone, (new, inner))
            waiting = tree_unflatten(structure, sums)
            return new, AccumulationState(count, waiting, torch.tensor(had), inner)
        passed = [x / k for x in sums] if mean else sums
        given = [x if old else None for x, old in zip(passed, had, strict=True)]
        new, inner = optimizer.update(
            tree_unflatten(structure, given), state.inner, params, donate=donate
        )
        zeros = tree_unflatten(structure, map(torch.zeros_like, before))
        none = torch.zeros_like(state.seen)
        return new, AccumulationState(torch.zeros_like(count), zeros, none, inner)

    return Optimizer(init, update)


def _sum(total: Tensor, grad: Tensor | None, had: bool, donate: bool) -> Tensor:
    """A sum that begins with its first term: zero and -0.0 would make 0.0."""
    if grad is None:
        return total if donate else total.clone()
    if not had:
        return total.copy_(grad) if donate else grad.clone()
    return total.add_(grad) if donate else total + grad


# ── Transformations ───────────────────────────────────────────────────────────────────────────────


def global_norm(tree: Any) -> Tensor:
    """The Euclidean norm of all tensors of a tree together, a tensor of shape ``()``.

    The norm of the leaves' norms, in the order of the leaves, as
    :func:`torch.nn.utils.get_total_norm` computes it, to the bit.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])})
    tensor(5.)
    """
    return _norm([leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)])


_Cut = tuple[Shards, list[bool]]


def _norm(tensors: list[Tensor], cut: _Cut | None = None) -> Tensor:
    if not tensors:
        return torch.tensor(0.0)
    if cut is not None:
        return _norm_over_parts(tensors, *cut)
    if under_transform():
        norms = [torch.linalg.vector_norm(x).to(tensors[0].device) for x in tensors]
    elif len({(x.device, x.dtype) for x in tensors}) == 1:
        norms = list(torch._foreach_norm(tensors))
    else:
        return torch.nn.utils.get_total_norm(tensors)
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))


def _norm_over_parts(tensors: list[Tensor], shards: Shards, cut: list[bool]) -> Tensor:
    """The norm of all tensors together, where of some only a part is here."""
    squares = torch.stack(
        [torch.linalg.vector_norm(x).double().square().to(tensors[0].device) for x in tensors]
    )
    is_cut = torch.tensor(cut, device=squares.device)
    squares[is_cut] = shards.total(squares[is_cut])
    return squares.sum().sqrt().to(tensors[0].dtype)


def clip_by_global_norm(max_norm: float | Tensor | Schedule) -> GradientTransformation:
    """Scale all gradients down together where their norm is larger than a limit.

    ``grad · min(1, max_norm / (norm + 1e-6))`` with the norm of all gradients as one vector
    (Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013); the bits
    are those of :func:`torch.nn.utils.clip_grad_norm_`.

    Args:
        max_norm: the limit, 0 or more; may be a schedule.

    Raises:
        OptimizerError: the limit is negative or no number.

    Example:
        >>> clip = clip_by_global_norm(1.0)
        >>> params = {"w": torch.zeros(2)}
        >>> clip.update({"w": torch.tensor([3.0, 4.0])}, clip.init(params), params)[0]["w"]
        tensor([0.6000, 0.8000])
    """
    check_rate("clip_by_global_norm", "max_norm", max_norm)

    def clip(
        grads: list[Tensor], limit: Any, params: Any, donate: bool, cut: _Cut | None
    ) -> list[Tensor]:
        norm = _norm(grads, cut)
        if isinstance(limit, Tensor):
            limit = limit.to(device=norm.device, dtype=norm.dtype)
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        return _multiplied(grads, factor, donate)

    made = _elementwise("clip_by_global_norm", "max_norm", clip, max_norm)
    if isinstance(max_norm, Tensor) or not callable(max_norm):
        made.update.together = Together(_clip_together, max_norm)  # type: ignore[attr-defined]
    return made


def _clip_together(
    limits: Any, grads: Any, state: Any, params: Any, active: Active
) -> tuple[Any, Any]:
    column = _aligned("clip_by_global_norm", tree_structure(params), grads)
    there = [x for x in column if x is not None]
    if not there:
        return grads, state
    # The norm of each member's rows by itself: a sum along an axis has another order of its terms
    rows = [list(x) for x in zip(*(x.unbind() for x in there), strict=True)]
    norms = torch.stack([_norm(row) for row in rows])
    plain = [plain_value("clip_by_global_norm", "max_norm", limit) for limit in limits]
    if len(set(plain)) == 1:
        factor = torch.clamp(plain[0] / (norms + 1e-6), max=1.0)
    else:  # a number divided by a tensor, as for one member, which rounds otherwise than a tensor
        pairs = zip(plain, norms.unbind(), strict=True)
        factor = torch.stack([torch.clamp(x / (norm + 1e-6), max=1.0) for x, norm in pairs])
    for x in there:
        x.mul_(factor.reshape(-1, *[1] * (x.dim() - 1)))
    return grads, state


def clip_by_value(max_value: float | Tensor | Schedule) -> GradientTransformation:
    """Clip each element of the gradients to ``[-max_value, max_value]``.

    As :func:`torch.nn.utils.clip_grad_value_`.

    Args:
        max_value: the limit, 0 or more; may be a schedule.

    Raises:
        OptimizerError: the limit is negative or no number.

    Example:
        >>> clip = clip_by_value(1.0)
        >>> params = {"w": torch.zeros(3)}
        >>> clip.update({"w": torch.tensor([3.0, -4.0, 0.5])}, clip.init(params), params)[0]["w"]
        tensor([ 1.0000, -1.0000,  0.5000])
    """
    check_rate("clip_by_value", "max_value", max_value)

    def clip(grads: list[Tensor], limit: Any, params: Any, donate: bool, cut: Any) -> list[Tensor]:
        if isinstance(limit, Tensor):
            limits = [limit.to(device=g.device, dtype=g.dtype) for g in grads]
            return [g.clamp(-most, most) for g, most in zip(grads, limits, strict=True)]
        return [g.clamp_(-limit, limit) if donate else g.clamp(-limit, limit) for g in grads]

    return _elementwise("clip_by_value", "max_value", clip, max_value)


def add_decayed_weights(
    weight_decay: float | Tensor | Schedule, mask: Mask | None = None
) -> GradientTransformation:
    """Add the gradient of an L2 penalty, ``grad + weight_decay · param``.

    In front of :func:`puretrain.optim.sgd` this is weight decay; in front of an optimizer that
    normalizes gradients it is not, which is why :func:`puretrain.optim.adamw` has one of its own
    (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019).

    Args:
        weight_decay: the factor, 0 or more; may be a schedule.
        mask: which leaves; all by default.

    Raises:
        OptimizerError: the factor is negative or no number.

    Example:
        >>> decay = add_decayed_weights(0.5)
        >>> params = {"w": torch.tensor([1.0, -2.0])}
        >>> decay.update({"w": torch.zeros(2)}, decay.init(params), params)[0]["w"]
        tensor([ 0.5000, -1.0000])
    """
    check_rate("add_decayed_weights", "weight_decay", weight_decay)

    def decay(
        grads: list[Tensor], factor: Any, params: list[Tensor], donate: bool, cut: Any
    ) -> list[Tensor]:
        if isinstance(factor, Tensor):
            pairs = zip(grads, params, strict=True)
            return [g + factor.to(device=g.device, dtype=g.dtype) * p for g, p in pairs]
        pairs = zip(grads, params, strict=True)
        return [g.add_(p, alpha=factor) if donate else g.add(p, alpha=factor) for g, p in pairs]

    made = _elementwise("add_decayed_weights", "weight_decay", decay, weight_decay)
    return made if mask is None else cast(GradientTransformation, masked(made, mask))


def scale(factor: float | Tensor | Schedule) -> GradientTransformation:
    """Multiply all gradients by a factor, ``factor · grad``.

    Args:
        factor: any finite number; may be a schedule.

    Raises:
        OptimizerError: the factor is not finite or no number.

    Example:
        >>> half = scale(0.5)
        >>> params = {"w": torch.zeros(2)}
        >>> half.update({"w": torch.tensor([3.0, 4.0])}, half.init(params), params)[0]["w"]
        tensor([1.5000, 2.0000])
    """
    if not callable(factor):
        check_number("scale", "factor", factor, least=-math.inf)

    def multiply(grads: list[Tensor], by: Any, params: Any, donate: bool, cut: Any) -> list[Tensor]:
        return _multiplied(grads, by, donate)

    return _elementwise("scale", "factor", multiply, factor)


def _elementwise(
    name: str,
    argument: str,
    function: Callable[[list[Tensor], Any, list[Tensor], bool, _Cut | None], list[Tensor]],
    value: float | Tensor | Schedule,
) -> GradientTransformation:
    """A transformation of the gradients that there are, with one number that may be a schedule.

    The function is also given which of the gradients are parts, if any are.
    """
    scheduled = callable(value) and not isinstance(value, Tensor)

    def init(params: Any, /) -> Any:
        return CountState(torch.tensor(0, dtype=torch.int64)) if scheduled else ()

    def update(grads: Any, state: Any, params: Any, /, *, donate: bool = False) -> tuple[Any, Any]:
        if isinstance(state, CountState) is not scheduled:
            raise OptimizerError(
                f"{name}: the state is of type {type(state).__name__}; make one with init(params)"
            )
        current = value
        if scheduled:
            current = schedule_value(value, state.count)
            state = CountState(state.count + 1)
        transformed = under_transform()
        if not transformed:
            current = plain_value(name, argument, current)
        leaves, structure = tree_flatten(params)
        column = _aligned(name, structure, grads)
        pairs = [(g, p) for g, p in zip(column, leaves, strict=True) if g is not None]
        cut = None
        if parts_are_given():
            places = zip(structure.paths(), column, strict=True)
            cut = cut_leaves([path for path, g in places if g is not None])
        with nullcontext() if transformed else torch.no_grad():
            new = iter(
                function(
                    [g for g, _ in pairs],
                    current,
                    [p for _, p in pairs],
                    donate and not transformed,
                    cut,
                )
            )
        changed = [None if g is None else next(new) for g in column]
        return tree_unflatten(structure, changed), state

    return GradientTransformation(init, update)


def _multiplied(grads: list[Tensor], factor: Any, donate: bool) -> list[Tensor]:
    if not isinstance(factor, Tensor):
        # Not _foreach_mul_: it rounds a number to bfloat16 first, which _foreach_mul does not
        return [g.mul_(factor) if donate else g * factor for g in grads]
    if not grads:
        return []
    if under_transform() or len({g.device for g in grads}) > 1:
        return [g * factor.to(device=g.device, dtype=g.dtype) for g in grads]
    if donate:
        torch._foreach_mul_(grads, factor)
        return grads
    return list(torch._foreach_mul(grads, factor))


# ── Details ───────────────────────────────────────────────────────────────────────────────────────


def _kind(who: str, part: Any) -> type[Optimizer] | type[GradientTransformation]:
    for kind in (Optimizer, GradientTransformation):
        if isinstance(part, kind):
            return kind
    raise OptimizerError(f"{who} takes optimizers and gradient transformations, not {part!r}")


def _members(mask: Mask) -> Callable[[PyTreeSpec], list[bool]]:
    """A function that says for each leaf of a structure whether the mask chooses it."""
    if not isinstance(mask, str) and not callable(mask):
        mask = tuple(mask)

    @functools.lru_cache(maxsize=8)  # it is asked at each update
    def members(structure: PyTreeSpec) -> list[bool]:
        paths: list[Path] = structure.paths()
        if callable(mask):
            return [bool(mask(path)) for path in paths]
        patterns = (mask,) if isinstance(mask, str) else mask
        chosen = {path for pattern in patterns for path in match_paths(pattern, paths)}
        return [path in chosen for path in paths]

    return members


def _only(column: list[Any], here: list[bool]) -> list[Any]:
    """The column with None in the place of the others."""
    return [x if wanted else None for x, wanted in zip(column, here, strict=True)]


def _aligned(name: str, structure: PyTreeSpec, grads: Any) -> list[Tensor | None]:
    """The gradients in the order of the leaves, None where there is none."""
    try:
        return tree_flatten_up_to(structure, grads)
    except StructureError as error:
        raise OptimizerError(f"{name}: the gradients do not fit the parameters: {error}") from None
