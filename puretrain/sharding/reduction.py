"""Gradients summed over processes: in buckets during the backward pass, or in one fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from puretrain.gradients import Passage
from puretrain.sharding.processes import all_gather, new_group

__all__ = ["Reduced", "bucketed", "summed_as_tree"]


class Reduced(NamedTuple):
    """A passage whose gradients come out summed over all processes."""

    passage: Passage
    present: list[bool]
    """Which leaves had a gradient in this process; filled in by ``out``."""
    finish: Callable[[], None]
    """Waits until the gradients that ``out`` has returned have their values."""
    scope: AbstractContextManager[Any] = nullcontext()
    """In which the loss is evaluated and differentiated."""
    everywhere: Callable[[bool], bool] = bool
    """See :class:`puretrain.gradients.Gradients`."""


def group_for_gradients(everyone: dist.ProcessGroup) -> dist.ProcessGroup:
    """A new group of all processes; all of them call this.

    Gradients travel during the backward pass, which may talk itself (batch normalization over all
    processes). In a group of their own it does not matter in which order the two meet, which
    differs where the processes have used different parameters.
    """
    if dist.get_world_size(everyone) == 1:
        return everyone
    return new_group(dist.get_process_group_ranks(everyone))


class _Bucket(NamedTuple):
    """Leaves whose gradients travel together."""

    numbers: list[int]
    """Their places among all leaves."""
    like: list[Tensor]
    """The leaves."""


def bucketed(
    group: dist.ProcessGroup, weight: float, bucket_bytes: int, reduce: bool = True
) -> Reduced:
    """Sum gradients over a group while the backward pass still computes others.

    The leaves are put into buckets, from the last to the first, since gradients become known in
    about that order. A bucket is on its way as soon as its last gradient is there (Li et al.,
    "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020). Buckets
    leave in one fixed order, and those of which no gradient was needed leave at the end, as zeros;
    so processes in which different leaves took part don't wait for each other for ever.

    Args:
        group: the processes.
        weight: the share of this process's part in the batch.
        bucket_bytes: the size at which a bucket is full; the first is a tenth of it, to leave soon.
        reduce: False leaves the gradients as they are.
    """
    present: list[bool] = []
    if not reduce or dist.get_world_size(group) == 1:

        def keep(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            present.extend(grad is not None for grad in grads)
            return grads

        return Reduced(Passage(list, keep, weight), present, lambda: None)

    buckets: list[_Bucket] = []
    filled: dict[int, Tensor] = {}
    works: list[tuple[dist.Work, Tensor]] = []
    summed: dict[int, Tensor] = {}

    def launch() -> None:
        """Send the buckets that are ready, in order."""
        while len(works) in filled:
            flat = filled.pop(len(works))
            works.append((dist.all_reduce(flat, group=group, async_op=True), flat))

    def fill(number: int, grads: Sequence[Tensor | None]) -> None:
        bucket = buckets[number]
        for i, grad in zip(bucket.numbers, grads, strict=True):
            present[i] = grad is not None
        pieces = [
            leaf.new_zeros(leaf.numel()) if grad is None else grad.reshape(-1)
            for grad, leaf in zip(grads, bucket.like, strict=True)
        ]
        filled[number] = torch.cat(pieces)
        launch()

    def into(leaves: list[Tensor]) -> list[Tensor]:
        buckets.extend(buckets_of(leaves, bucket_bytes))
        present.extend([False] * len(leaves))
        passed = list(leaves)
        for number, bucket in enumerate(buckets):
            through = _through(number, fill, *(leaves[i] for i in bucket.numbers))
            for i, leaf in zip(bucket.numbers, through, strict=True):
                passed[i] = leaf
        return passed

    def out(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        while len(works) < len(buckets):  # the next bucket has not been filled
            fill(len(works), [None] * len(buckets[len(works)].numbers))
        while len(works) > 1:  # so that not all are there twice, summed flat and apart
            settle()
        places = [
            pair for bucket in buckets for pair in zip(bucket.numbers, bucket.like, strict=True)
        ]
        summed.update((i, torch.empty_like(leaf)) for i, leaf in places)
        if any(summed[i].stride() != leaf.stride() for i, leaf in places):
            finish()  # what has another layout than its leaf is copied, and must be there
        return [summed[i] for i in range(len(grads))]

    def settle() -> None:
        """Wait for the next bucket, and let go of it when its leaves are apart."""
        work, flat = works.pop(0)
        work.wait()
        bucket = buckets.pop(0)
        for i, leaf in zip(bucket.numbers, bucket.like, strict=True):
            if i not in summed:
                summed[i] = torch.empty_like(leaf)
        targets = [summed[i] for i in bucket.numbers]
        pieces = torch.split(flat, [leaf.numel() for leaf in bucket.like])
        torch._foreach_copy_(
            targets, [x.view(y.shape) for x, y in zip(pieces, targets, strict=True)]
        )

    def finish() -> None:
        while works:
            settle()

    return Reduced(Passage(into, out, weight), present, finish)


class _Through(torch.autograd.Function):
    """Hands leaves on as they are, and their gradients to a function when all are there."""

    @staticmethod
    def forward(ctx: Any, number: int, fill: Callable[..., None], *leaves: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.number, ctx.fill = number, fill
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.fill(ctx.number, grads)
        return (None, None, *[None] * len(grads))  # else they would be held until the end


def _through(number: int, fill: Callable[..., None], *leaves: Tensor) -> tuple[Tensor, ...]:
    through: Any = _Through.apply(number, fill, *leaves)  # type: ignore[no-untyped-call]
    soon(through)
    return cast(tuple[Tensor, ...], through)


def soon(outputs: Sequence[Tensor]) -> None:
    """Let the backward pass come to what made these as soon as their gradients are there.

    Of what is ready autograd takes first what the forward pass did last, and so it would come to
    the parameters at the very end; gradients would not travel before, and all be held until then.
    It makes an exception for leaves, and torch allows the same for others.
    """
    node: Any = next((output.grad_fn for output in outputs if output.grad_fn is not None), None)
    prefer = getattr(node, "_set_sequence_nr", None)
    if prefer is not None:
        prefer(_FIRST)


_FIRST = 2**64 - 1  # the number that leaves have


def buckets_of(leaves: Sequence[Tensor], bucket_bytes: int) -> list[_Bucket]:
    """Leaves by dtype and device, from the last to the first, cut where a bucket is full."""
    open_buckets: dict[Any, tuple[_Bucket, int]] = {}
    buckets: list[_Bucket] = []
    for i in reversed(range(len(leaves))):
        leaf = leaves[i].detach()
        kind = (leaf.dtype, leaf.device)
        if kind not in open_buckets:
            open_buckets[kind] = (_Bucket([], []), 0)
            buckets.append(open_buckets[kind][0])
        bucket, size = open_buckets[kind]
        bucket.numbers.append(i)
        bucket.like.append(leaf)
        size += leaf.numel() * leaf.element_size()
        open_buckets[kind] = (bucket, size)
        if size >= (bucket_bytes // 10 if bucket is buckets[0] else bucket_bytes):
            del open_buckets[kind]
    return buckets


# ── In one fixed order ────────────────────────────────────────────────────────────────────────────


class _Node(NamedTuple):
    """A node of the binary tree in which the gradients of all parts are added up."""

    start: int
    stop: int

    def children(self) -> tuple[_Node, _Node]:
        middle = (self.start + self.stop) // 2
        return _Node(self.start, middle), _Node(middle, self.stop)


def _within(node: _Node, start: int, stop: int) -> list[_Node]:
    """The largest nodes that lie in a range of parts, in order."""
    if node.start >= stop or node.stop <= start:
        return []
    if start <= node.start and node.stop <= stop:
        return [node]
    return [inner for child in node.children() for inner in _within(child, start, stop)]


def summed_as_tree(
    group: dist.ProcessGroup | None,
    parts: int,
    evaluate: Callable[[int], list[Tensor]],
) -> list[Tensor]:
    """The sum of the gradients of all parts of a batch, the same to the bit for every division.

    The order of additions is that of one binary tree over the parts, whoever evaluates them. Each
    process adds up what it has whole subtrees of; then every process gets one section of these
    sums from all others, adds them up, and the sections are gathered. That moves as many bytes as
    an all-reduce in a ring, if the parts of a process make one subtree (powers of two do).

    Args:
        group: the processes; None if there is only this one. Their number divides ``parts``.
        parts: how many parts the batch has.
        evaluate: the gradients of a part, given its number: new tensors, the same in number, shape
            and dtype for all parts. It is called in order for the parts of this process.
    """
    world_size = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    each, root = parts // world_size, _Node(0, parts)
    owned = [_within(root, i * each, (i + 1) * each) for i in range(world_size)]

    def total(node: _Node) -> list[Tensor]:
        if node.stop - node.start == 1:
            return evaluate(node.start)
        left, right = map(total, node.children())
        torch._foreach_add_(left, right)
        return left

    mine = [total(node) for node in owned[rank]]
    if group is None or world_size == 1:
        return mine[0]
    summed: list[Tensor | None] = [None] * len(mine[0])
    kinds = dict.fromkeys((leaf.dtype, leaf.device) for leaf in mine[0])
    for kind in kinds:
        numbers = [i for i, leaf in enumerate(mine[0]) if (leaf.dtype, leaf.device) == kind]
        rows = [torch.cat([leaves[i].reshape(-1) for i in numbers]) for leaves in mine]
        flat = _exchanged(group, root, owned, rows)
        sizes = [mine[0][i].numel() for i in numbers]
        for i, piece in zip(numbers, torch.split(flat[: sum(sizes)], sizes), strict=True):
            summed[i] = torch.empty_like(mine[0][i]).copy_(piece.view(mine[0][i].shape))
    return [leaf for leaf in summed if leaf is not None]


def _exchanged(
    group: dist.ProcessGroup, root: _Node, owned: list[list[_Node]], rows: list[Tensor]
) -> Tensor:
    """Add up the flat sums of the nodes of all processes, each process a section of them."""
    world_size, rank = len(owned), dist.get_rank(group)
    section = -(-rows[0].numel() // world_size)
    padded = rows[0].new_zeros(len(rows), section * world_size)
    for row, content in zip(padded, rows, strict=True):
        row[: content.numel()] = content
    sent = padded.view(len(rows), world_size, section).transpose(0, 1).contiguous()
    received = padded.new_empty(sum(map(len, owned)), section)
    dist.all_to_all_single(
        received,
        sent.view(-1, section),
        [len(nodes) for nodes in owned],
        [len(owned[rank])] * world_size,
        group=group,
    )
    nodes = [node for nodes in owned for node in nodes]
    values: dict[_Node, Tensor] = dict(zip(nodes, received, strict=True))

    def total(node: _Node) -> Tensor:
        if node in values:
            return values[node]
        left, right = map(total, node.children())
        return left + right

    return all_gather(total(root), group)
