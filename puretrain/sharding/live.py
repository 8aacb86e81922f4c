"""Tensors that are changed in place, kept equal in all processes.

The steps of this library are pure functions and need nothing of this. It is for code that calls
``backward`` itself on a module's own parameters, as programs written for other libraries do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puretrain.errors import StructureError
from puretrain.sharding.reduction import buckets_of

__all__ = ["AveragedGradients", "send_to_all"]


class _Sending:
    """Buckets of gradients on their way to being summed over a group.

    A bucket leaves when it is full and those before it have left, so that the order is the same in
    all processes.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        leaves: Sequence[Tensor],
        bucket_bytes: int,
        weight: float,
    ) -> None:
        """Put leaves into buckets.

        Args:
            group: the processes.
            leaves: what the gradients are of.
            bucket_bytes: the size at which a bucket is full.
            weight: what the gradients are multiplied with before they leave.
        """
        self.buckets = buckets_of(leaves, bucket_bytes)
        self._group, self._weight = group, weight
        self._count = len(leaves)
        self._filled: dict[int, Tensor] = {}
        self._works: list[tuple[dist.Work, Tensor]] = []
        self._whole: set[int] = set()

    def fill(self, number: int, grads: Sequence[Tensor | None]) -> None:
        """Give the gradients of a bucket, in its order; None counts as zero."""
        like = self.buckets[number].like
        pieces = [
            leaf.new_zeros(leaf.numel()) if grad is None else grad.reshape(-1)
            for grad, leaf in zip(grads, like, strict=True)
        ]
        if all(grad is not None for grad in grads):
            self._whole.add(number)
        pieces.append(like[0].new_tensor([grad is not None for grad in grads]))
        self._filled[number] = torch.cat(pieces).mul_(self._weight)
        while len(self._works) in self._filled:
            flat = self._filled.pop(len(self._works))
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            self._works.append((work, flat))

    def finish(self) -> list[Tensor | None]:
        """Send what has not been filled as zeros, wait, and give the sum for each leaf.

        The sum is None for a leaf that has a gradient in no process.
        """
        while len(self._works) < len(self.buckets):  # the next bucket has not been filled
            number = len(self._works)
            self.fill(number, [None] * len(self.buckets[number].numbers))
        summed: list[Tensor | None] = [None] * self._count
        for number, ((work, flat), bucket) in enumerate(
            zip(self._works, self.buckets, strict=True)
        ):
            work.wait()
            sizes = [leaf.numel() for leaf in bucket.like]
            *pieces, marks = torch.split(flat, [*sizes, len(sizes)])
            # What is here is somewhere: there is no need to look, and to wait for a device.
            there = [1.0] * len(sizes) if number in self._whole else marks.tolist()
            for i, leaf, piece, seen in zip(
                bucket.numbers, bucket.like, pieces, there, strict=True
            ):
                if seen:
                    summed[i] = torch.empty_like(leaf).copy_(piece.view(leaf.shape))
        return summed


class AveragedGradients:
    """Averages the gradients of parameters over processes whenever ``backward`` has run.

    A bucket of gradients is on its way while the backward pass still computes others. A gradient
    that was there before is part of what is averaged, so with accumulation only the last backward
    pass needs it: set ``active`` to False for those before. Parameters that took part in no process
    keep what they have; one that took part in some counts as zero in the others. In each pass those
    that require a gradient must be the same in all processes.

    A process in which backward is not called leaves the others waiting.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        group: dist.ProcessGroup,
        *,
        bucket_megabytes: float = 25.0,
    ) -> None:
        """Watch parameters until :meth:`remove` is called.

        Args:
            parameters: leaves of autograd; also those that do not require gradients now.
            group: the processes.
            bucket_megabytes: how many gradients travel together.
        """
        self.active = True
        self._group = group
        self._bucket_bytes = int(bucket_megabytes * 2**20)
        self._weight = 1.0 / dist.get_world_size(group)
        self.parameters = [p for p in parameters if p.is_floating_point() or p.is_complex()]
        self._handles = [self._watch(i, p) for i, p in enumerate(self.parameters)]
        self._sending: _Sending | None = None
        self._leaves: list[Tensor] = []
        self._place: dict[int, tuple[int, int]] = {}
        self._arrived: list[list[Tensor | None]] = []
        self._missing: list[int] = []

    def _watch(self, number: int, parameter: Tensor) -> Any:
        required = parameter.requires_grad
        parameter.requires_grad_(True)  # else it can't have a hook; it may be trained later on
        handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            partial(self._arrive, number)
        )
        parameter.requires_grad_(required)
        return handle

    def watches(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these are the parameters that are watched."""
        given = {id(p) for p in parameters if p.is_floating_point() or p.is_complex()}
        return given == {id(p) for p in self.parameters}

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self) -> _Sending:
        numbers = [i for i, p in enumerate(self.parameters) if p.requires_grad]
        self._leaves = [self.parameters[i] for i in numbers]
        sending = _Sending(self._group, self._leaves, self._bucket_bytes, self._weight)
        self._place = {
            numbers[leaf]: (bucket, place)
            for bucket, content in enumerate(sending.buckets)
            for place, leaf in enumerate(content.numbers)
        }
        self._arrived = [[None] * len(bucket.numbers) for bucket in sending.buckets]
        self._missing = [len(bucket.numbers) for bucket in sending.buckets]
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        return sending

    def _arrive(self, number: int, parameter: Tensor) -> None:
        if not self.active:
            return
        grad = parameter.grad
        if grad is None or grad.layout is not torch.strided:
            layout = "no gradient" if grad is None else f"a gradient of layout {grad.layout}"
            raise StructureError(
                f"parameter {number} of shape {tuple(parameter.shape)} has {layout}, which can't "
                "be averaged over processes; make the layer with sparse=False"
            )
        if self._sending is None:
            self._sending = self._begin()
        bucket, place = self._place[number]
        self._arrived[bucket][place] = grad.detach()
        self._missing[bucket] -= 1
        if not self._missing[bucket]:
            self._sending.fill(bucket, self._arrived[bucket])

    @torch.no_grad()
    def _end(self) -> None:
        sending, self._sending = self._sending, None
        if sending is None:
            return
        for bucket, missing in enumerate(self._missing):
            if missing:
                sending.fill(bucket, self._arrived[bucket])
        for leaf, average in zip(self._leaves, sending.finish(), strict=True):
            if average is None:
                continue
            if leaf.grad is None:
                leaf.grad = average
            else:
                leaf.grad.detach().copy_(average)


def send_to_all(tensors: Sequence[Tensor], group: dist.ProcessGroup, source: int = 0) -> None:
    """Overwrite tensors with those of one process.

    Args:
        tensors: the same number, shapes and dtypes in all processes.
        group: the processes.
        source: the rank whose tensors all are to have.
    """
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    for kind in kinds:
        same = [t.detach() for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.broadcast(flat, source, group)
        for tensor, piece in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
            tensor.copy_(piece.view(tensor.shape))
