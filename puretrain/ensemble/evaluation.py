"""Metrics of each member of an ensemble, and of what they say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from puretrain.ensemble.members import members_of
from puretrain.ensemble.vectorized import OverMembers, as_tensor, count_of
from puretrain.errors import LossError
from puretrain.gradients import Precision
from puretrain.step import EvalStep, eval_step
from puretrain.tree import FrozenDict

__all__ = ["ensemble_eval_step", "mean_probabilities"]


def mean_probabilities(logits: Tensor) -> Tensor:
    """The logarithm of the mean of the members' probabilities: the usual vote of classifiers.

    Args:
        logits: of shape ``(members, ..., classes)``.

    Returns:
        Logits again, of shape ``(..., classes)``; as good a first argument of ``cross_entropy``.

    >>> import torch
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
        >>> import torch, puretrain as pt
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
    over = OverMembers(_outputs(function, metrics), (0, 0, None), vectorize=vectorize)

    def all_members(params: Any, buffers: Any, batch: Any, keys: Any) -> Mapping[str, Any]:
        outputs, found = over(count_of(params), keys, params, buffers, batch)
        if metrics is None:
            return cast("Mapping[str, Any]", found)
        together = metrics(combine(outputs), batch)
        return FrozenDict(found) | {f"{prefix}{name}": x for name, x in together.items()}

    evaluate = eval_step(all_members, precision=precision)

    def step(state: Any, batch: Any, /) -> FrozenDict[Any]:
        members_of(state)
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
        found = FrozenDict({name: as_tensor(x) for name, x in found.items()})
        return (() if metrics is None else outputs), found

    return one
