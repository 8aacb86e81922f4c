"""What only one process of a run does, and collectives that do nothing in a single process.

A message goes to the logger ``pytorch_lightning``, which programs know how to silence; the loggers
``lightning`` and ``lightning.pytorch`` silence it as well.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as torch_distributed
from torch import Tensor

__all__ = [
    "AllGatherGrad",
    "ReduceOp",
    "all_gather_ddp_if_available",
    "distributed_available",
    "gather_all_tensors",
    "group",
    "log",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "sync_ddp",
    "sync_ddp_if_available",
    "tpu_distributed",
]

R = TypeVar("R")

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
_ALIASES = ("lightning", "lightning.pytorch", "puretrain.lightning")

if torch_distributed.is_available():
    from torch.distributed import ReduceOp, group
else:  # pragma: no cover - torch without distributed

    class ReduceOp:  # type: ignore[no-redef]
        """Stands in for torch's, so that names resolve."""

        SUM = None

    class group:  # noqa: N801 - the name is torch's
        """Stands in for torch's, so that names resolve."""

        WORLD = None


class _ToTerminal(logging.Handler):
    """Prints to stderr as long as the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        if any(record.levelno < logging.getLogger(name).level for name in _ALIASES):
            return
        print(self.format(record), file=sys.stderr, flush=True)


log = logging.getLogger("pytorch_lightning")
if not any(isinstance(handler, _ToTerminal) for handler in log.handlers):
    log.addHandler(_ToTerminal())
    log.setLevel(logging.INFO)


def _rank() -> int:
    """The rank of this process, from the variables that launchers set."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return 0


def rank_zero_only(fn: Callable[..., R]) -> Callable[..., R | None]:
    """Make a function do nothing, and return None, except in the process of rank 0.

    ``rank_zero_only.rank`` is the rank of this process; a launcher sets it.

    >>> @rank_zero_only
    ... def answer():
    ...     return 42
    >>> answer()
    42
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> R | None:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            return fn(*args, **kwargs)
        return None

    return wrapped


rank_zero_only.rank = _rank()  # type: ignore[attr-defined]


@rank_zero_only
def rank_zero_warn(
    message: Any, category: Any = UserWarning, stacklevel: int = 5, **kwargs: Any
) -> None:
    """Warn, in the process of rank 0 only."""
    warnings.warn(message, category, stacklevel=stacklevel, **kwargs)


@rank_zero_only
def rank_zero_deprecation(message: Any, stacklevel: int = 6, **kwargs: Any) -> None:
    """Warn of a name or argument that goes away, in the process of rank 0 only."""
    from puretrain.lightning.utilities.warnings import LightningDeprecationWarning

    warnings.warn(message, LightningDeprecationWarning, stacklevel=stacklevel, **kwargs)


@rank_zero_only
def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level INFO, in the process of rank 0 only."""
    log.info(*args, stacklevel=stacklevel, **kwargs)


@rank_zero_only
def rank_zero_debug(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level DEBUG, in the process of rank 0 only."""
    log.debug(*args, stacklevel=stacklevel, **kwargs)


# ── Collectives ───────────────────────────────────────────────────────────────────────────────────


def distributed_available() -> bool:
    """Whether several processes are connected."""
    return torch_distributed.is_available() and torch_distributed.is_initialized()


def tpu_distributed() -> bool:
    """Whether the run uses several TPU cores; puretrain never does."""
    return False


def gather_all_tensors(result: Tensor, group: Any = None) -> list[Tensor]:
    """The tensors of all processes, in the order of their ranks; their shapes may differ.

    Args:
        result: this process's tensor; all have the same number of dimensions.
        group: the processes; by default all.
    """
    if not distributed_available():
        return [result]
    group = group if group is not None else torch_distributed.group.WORLD
    result = result.contiguous()
    world = torch_distributed.get_world_size(group)
    shape = torch.tensor(result.shape, device=result.device)
    shapes = [torch.zeros_like(shape) for _ in range(world)]
    if result.dim():
        torch_distributed.all_gather(shapes, shape, group=group)
    sizes = [tuple(each.tolist()) for each in shapes]
    if all(size == tuple(result.shape) for size in sizes):
        gathered = [torch.zeros_like(result) for _ in range(world)]
        torch_distributed.all_gather(gathered, result, group=group)
        return gathered
    # collectives take equal shapes: send the largest, and cut what was added
    largest = [max(lengths) for lengths in zip(*sizes, strict=True)]
    padded = result.new_zeros(largest)
    padded[tuple(slice(length) for length in result.shape)] = result
    gathered = [torch.zeros_like(padded) for _ in range(world)]
    torch_distributed.all_gather(gathered, padded, group=group)
    return [
        each[tuple(slice(length) for length in size)]
        for each, size in zip(gathered, sizes, strict=True)
    ]


def sync_ddp_if_available(
    result: Any, group: Any = None, reduce_op: ReduceOp | str | None = None
) -> Any:
    """Reduce a tensor over all processes if there are several; otherwise return it as it is."""
    return sync_ddp(result, group, reduce_op) if distributed_available() else result


def sync_ddp(result: Any, group: Any = None, reduce_op: ReduceOp | str | None = None) -> Any:
    """Reduce a tensor over all processes.

    Args:
        result: the tensor; a number becomes one.
        group: the processes; by default all.
        reduce_op: ``"mean"`` or ``"avg"``, the name of an operation such as ``"max"``, or one of
            torch's; by default the sum.
    """
    mean = False
    if reduce_op is None:
        operation = torch_distributed.ReduceOp.SUM
    elif isinstance(reduce_op, str):
        mean = reduce_op.lower() in ("avg", "mean")
        operation = getattr(torch_distributed.ReduceOp, "SUM" if mean else reduce_op.upper())
    else:
        operation = reduce_op
    group = group if group is not None else torch_distributed.group.WORLD
    result = torch.as_tensor(result).clone()
    if mean and not result.is_floating_point():
        result = result.float()
    torch_distributed.all_reduce(result, op=operation, group=group)
    if mean:
        result = result / torch_distributed.get_world_size(group)
    return result


class AllGatherGrad(torch.autograd.Function):
    """Gather with gradients: each process gets back the sum of the gradients of its own part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any = None) -> Tensor:
        """The tensors of all processes, stacked in a new first dimension."""
        ctx.group = group if group is not None else torch_distributed.group.WORLD
        parts = [torch.zeros_like(tensor) for _ in range(torch_distributed.get_world_size(group))]
        torch_distributed.all_gather(parts, tensor.contiguous(), group=ctx.group)
        return torch.stack(parts, dim=0)

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The sum over the processes, cut to this one's part."""
        gradient = torch.cat(grad_output).contiguous()
        torch_distributed.all_reduce(gradient, async_op=False, group=ctx.group)
        return gradient[torch_distributed.get_rank(ctx.group)], None


def all_gather_ddp_if_available(tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
    """The tensors of all processes stacked; in a single process, the tensor as it is.

    Args:
        tensor: a tensor of the same shape everywhere, or a mapping or sequence of such.
        group: the processes; by default all.
        sync_grads: whether gradients flow back.
    """
    if isinstance(tensor, Mapping):
        return {k: all_gather_ddp_if_available(v, group, sync_grads) for k, v in tensor.items()}
    if isinstance(tensor, (list, tuple)):
        return type(tensor)(all_gather_ddp_if_available(v, group, sync_grads) for v in tensor)
    if not distributed_available() or not isinstance(tensor, Tensor):
        return tensor
    if sync_grads:
        return AllGatherGrad.apply(tensor, group)
    with torch.no_grad():
        return AllGatherGrad.apply(tensor, group)
