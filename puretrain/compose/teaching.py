"""Losses with a teacher, and the step that makes a teacher of the moving average."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from puretrain.compose.evaluation import check_between, pair
from puretrain.errors import LossError
from puretrain.gradients import Loss
from puretrain.state import TrainState
from puretrain.step import Step
from puretrain.tree import FrozenDict, freeze, tree_map

__all__ = ["distillation", "ema_teacher", "with_teacher"]

S = TypeVar("S", bound=TrainState)


def with_teacher(buffers: Any, params: Any, teacher_buffers: Any = None) -> FrozenDict[Any]:
    """The buffers of a model and a teacher beside them, for :func:`distillation`.

    A teacher is what the loss reads and does not train, so it lives with the buffers: it is saved
    and restored with them.

    Args:
        buffers: the model's own.
        params: the teacher's parameters.
        teacher_buffers: the teacher's buffers, if it has any.

    Returns:
        ``{"model": …, "teacher": {"params": …, "buffers": …}}``, to create a state with.
    """
    # Tensors of its own: the model may begin as a copy of it, and steps overwrite the model's.
    teacher = tree_map(torch.clone, freeze({"params": params, "buffers": teacher_buffers or {}}))
    return cast(FrozenDict[Any], freeze({"model": buffers or {}, "teacher": teacher}))


def distillation(
    loss: Loss,
    logits: Callable[[Any, Any, Any], Tensor],
    teacher_logits: Callable[[Any, Any, Any], Tensor] | None = None,
    *,
    weight: float = 0.5,
    temperature: float = 2.0,
) -> Loss:
    r"""Let a model learn from a teacher as well as from the targets.

    .. math:: (1 - w)\, L + w\, T^2\, \mathrm{KL}\bigl(
        \mathrm{softmax}(z_{\mathrm{teacher}} / T) \,\Vert\, \mathrm{softmax}(z / T)\bigr)

    (Hinton et al., "Distilling the knowledge in a neural network", 2015). With the moving average
    of the model itself as the teacher, :func:`ema_teacher`, it is the mean teacher of Tarvainen and
    Valpola ("Mean teachers are better role models", NeurIPS 2017). The model runs once for the
    loss and once for the logits.

    Args:
        loss: the loss of the model, with the model's own buffers.
        logits: ``logits(params, buffers, batch)`` of the model, of shape ``(n, classes)``.
        teacher_logits: those of the teacher; by default it is a model of the same kind.
        weight: w, from 0 to 1.
        temperature: T, above 0.

    Returns:
        The loss. Its buffers are those of :func:`with_teacher`; ``distillation`` is a metric.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> import puretrain as pt
        >>> def logits(params, buffers, batch):
        ...     return batch @ params["w"]
        >>> taught = distillation(lambda p, b, batch, key: p["w"].sum(), logits, weight=1.0)
        >>> params, buffers = {"w": torch.eye(2)}, with_teacher({}, {"w": torch.eye(2)})
        >>> taught(params, buffers, torch.eye(2), None)[0] < 1e-6  # they agree
        tensor(True)
    """
    check_between("distillation", "weight", weight, 0.0, 1.0)
    check_between("distillation", "temperature", temperature, 1e-6, math.inf)
    of_teacher = teacher_logits or logits

    def taught(params: Any, buffers: Any, batch: Any, key: Tensor, /) -> Any:
        model, teacher = _parts(buffers)
        value, aux = pair(loss(params, model, batch, key))
        with torch.no_grad():
            wanted = of_teacher(teacher["params"], teacher["buffers"], batch).detach()
        own = (logits(params, model, batch) / temperature).log_softmax(-1)
        apart = kl_div(own, (wanted / temperature).softmax(-1), reduction="batchmean")
        apart = apart * temperature**2
        new = model if aux.buffers is None else aux.buffers
        kept = FrozenDict({"model": new, "teacher": teacher})
        metrics = FrozenDict({**aux.metrics, "distillation": apart.detach()})
        return (1 - weight) * value + weight * apart, aux.replace(buffers=kept, metrics=metrics)

    return taught


def ema_teacher(step: Step, decay: float = 0.99) -> Step:
    """Let the teacher in the buffers follow the model: after each update of the optimizer.

    ``teacher = teacher + (1 - decay) * (model - teacher)``, for its parameters and its
    floating-point buffers; other buffers are copied.

    Args:
        step: a step of a loss with a teacher (:func:`distillation`), of a model of the same kind.
        decay: how much of the teacher stays, from 0 to 1.

    Raises:
        ConfigurationError: an argument is out of its range.
    """
    check_between("ema_teacher", "decay", decay, 0.0, 1.0)

    def moved(before: Tensor, after: S) -> S:
        model, teacher = _parts(after.buffers)
        weight = (after.updates > before).to(torch.float64) * (1 - decay)

        def move(old: Tensor, new: Tensor) -> Tensor:
            if not old.is_floating_point():
                return new.clone()
            return old + weight.to(old.device, old.dtype) * (new - old)

        current = FrozenDict({"params": after.params, "buffers": model})
        following = tree_map(move, teacher, current)
        buffers = FrozenDict({"model": model, "teacher": following})
        return after.replace(buffers=buffers)

    @functools.wraps(step)
    def run(state: S, batch: Any, /, *, donate: bool = False) -> S:
        before = state.updates
        return moved(before, step(state, batch, donate=True) if donate else step(state, batch))

    vars(run).pop("recipe", None)  # it would make the step without this
    flush = getattr(step, "flush", None)
    if flush is not None:

        def flush_and_move(state: S, /, *, donate: bool = False) -> S:
            before = state.updates
            return cast(S, moved(before, flush(state, donate=donate)))

        run.flush = flush_and_move  # type: ignore[attr-defined]
    return cast(Step, run)


def _parts(buffers: Any) -> tuple[Any, Any]:
    try:
        return buffers["model"], buffers["teacher"]
    except (KeyError, TypeError):
        raise LossError(
            "there is no teacher in the buffers: create the state with "
            "puretrain.compose.with_teacher(buffers, teacher's params, teacher's buffers)"
        ) from None
