"""BatchNorm over the whole batch, where each process has a part of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm

from puretrain.sharding.processes import everyone

__all__ = ["sync_batch_norm"]

M = TypeVar("M", bound=nn.Module)

_is_counted: ContextVar[bool] = ContextVar("is_counted", default=True)


@contextmanager
def counted(yes: bool) -> Iterator[None]:
    """Whether the part of the batch that this process evaluates has samples of its own."""
    token = _is_counted.set(yes)
    try:
        yield
    finally:
        _is_counted.reset(token)


def sync_batch_norm(module: M, mesh: DeviceMesh) -> M:
    """A copy of a module whose BatchNorm layers use the mean and variance over all processes.

    Do it before :func:`puretrain.functional`. In evaluation mode, and with one process, nothing
    changes. Parameters and buffers keep their names. Torch's own ``SyncBatchNorm`` needs a GPU;
    this one works everywhere, by two sums over the processes in each direction: of the inputs, and
    of the squares of their deviations, which keeps the variance exact where the mean is large.

    A process that has no sample of a small last batch, or has come to the end of its own data,
    takes part without being counted.

    Args:
        module: any module; it stays as it is.
        mesh: the processes, all of which must call the module together.

    >>> import puretrain as pt
    >>> with pt.sharding.processes() as mesh:
    ...     model = sync_batch_norm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), mesh)
    ...     sorted(model.state_dict())[3:]
    ['1.num_batches_tracked', '1.running_mean', '1.running_var', '1.weight']
    """
    group = everyone(mesh)
    new = copy.deepcopy(module)
    if isinstance(new, _BatchNorm):
        return cast(M, _replaced(new, group))
    for parent in list(new.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _replaced(child, group))
    return new


def _replaced(old: _BatchNorm, group: dist.ProcessGroup) -> _SyncBatchNorm:
    new = _SyncBatchNorm.__new__(_SyncBatchNorm)
    new.__dict__ = dict(old.__dict__)
    new.group = group
    return new


class _SyncBatchNorm(_BatchNorm):
    group: dist.ProcessGroup

    def _check_input_dim(self, input: Tensor) -> None:  # torch's name
        if input.dim() < 2:
            raise ValueError(f"expected an input of 2 dimensions or more, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        whole = not self.training and self.running_mean is not None
        if whole or dist.get_world_size(self.group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        over = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        count = x.new_tensor([x.numel() / x.shape[1]])
        here = 1.0 if _is_counted.get() else 0.0
        sums = _sum_over(torch.cat([x.sum(over), count]) * here, self.group)
        total, mean = sums[-1], sums[:-1] / sums[-1]
        centred = x - mean.view(shape)
        variance = _sum_over(centred.square().sum(over) * here, self.group) / total
        self._remember(mean.detach(), variance.detach(), total.detach())
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        output = centred * scale.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        rate = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if rate is None:
                rate = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (total / (total - 1))
        for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.mul_(1 - (rate or 0.0)).add_(now.to(running.dtype), alpha=rate or 0.0)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all processes; a gradient is the sum of their gradients."""
    return cast(Tensor, _SumOver.apply(x, group))  # type: ignore[no-untyped-call]
