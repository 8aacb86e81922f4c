"""An optimizer that follows another one slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puretrain.errors import OptimizerError, check_whole
from puretrain.optim.base import Optimizer, check_number
from puretrain.tree import Record, tree_flatten, tree_map, tree_unflatten, under_transform

__all__ = ["LookaheadState", "lookahead"]


class LookaheadState(Record):
    """The state of :func:`lookahead`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    slow: Any
    """The slow weights, a tree like the parameters."""
    inner: Any
    """The state of the optimizer."""


def lookahead(optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> Optimizer:
    r"""Let an optimizer run ahead, and after every k updates follow it part of the way.

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi

    with the slow weights φ and the fast ones θ, which are the parameters (Zhang et al., "Lookahead
    optimizer: k steps forward, 1 step back", NeurIPS 2019).

    Args:
        optimizer: what makes the fast updates; a chain that ends with one will do.
        k: after how many updates to follow.
        alpha: α, from 0 to 1.

    Raises:
        OptimizerError: ``optimizer`` is none, or a number is out of its range.

    Example:
        >>> import puretrain as pt
        >>> optimizer = lookahead(pt.optim.sgd(lr=1.0), k=2, alpha=0.5)
        >>> params = {"w": torch.tensor(0.0)}
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     params, state = optimizer.update({"w": torch.tensor(-1.0)}, state, params)
        >>> params["w"]  # two steps forward, one back
        tensor(1.)
    """
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"lookahead takes an optimizer, not {optimizer!r}")
    k = check_whole("lookahead: k", k, error=OptimizerError)
    check_number("lookahead", "alpha", alpha, most=1.0)

    def init(params: Any, /) -> LookaheadState:
        slow = tree_map(lambda leaf: leaf.detach().clone(), params)
        return LookaheadState(torch.tensor(0, dtype=torch.int64), slow, optimizer.init(params))

    def update(
        grads: Any, state: Any, params: Any, /, *, donate: bool = False
    ) -> tuple[Any, LookaheadState]:
        if not isinstance(state, LookaheadState):
            raise OptimizerError(
                f"lookahead: the state is of type {type(state).__name__}; make one with "
                "init(params)"
            )
        params, inner = optimizer.update(grads, state.inner, params, donate=donate)
        count = state.count + 1
        (fast, structure), (slow, _) = tree_flatten(params), tree_flatten(state.slow)
        if under_transform():
            due = count % k == 0
            slow = [torch.where(due, _moved(s, f), s) for s, f in zip(slow, fast, strict=True)]
            fast = [torch.where(due, s, f) for s, f in zip(slow, fast, strict=True)]
        elif int(count) % k == 0:
            slow = [_moved(s, f) for s, f in zip(slow, fast, strict=True)]
            fast = [s.clone() for s in slow]
        elif not donate:
            slow = [s.clone() for s in slow]
        changes = {"count": count, "slow": tree_unflatten(structure, slow), "inner": inner}
        return tree_unflatten(structure, fast), state.replace(**changes)

    def _moved(slow: Tensor, fast: Tensor) -> Tensor:
        return slow + alpha * (fast - slow)

    return Optimizer(init, update)
