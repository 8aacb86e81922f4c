"""ZeRO: what data-parallel processes hold in copies is cut among them instead.

After Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
SC 2020. A process of plain data parallelism holds all parameters, all gradients and all of the
optimizer's state. Of k processes each needs only a k-th of the optimizer's state (stage 1), of the
gradients (stage 2) and, but for the block that is being computed, of the parameters (stage 3).
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from puretrain.errors import ConfigurationError, StructureError, TransformError
from puretrain.gradients import Across, Passage
from puretrain.optim import Optimizer
from puretrain.optim.shards import Shards, sharded
from puretrain.sharding.data_parallel import averaged, ddp
from puretrain.sharding.placements import Placements, chunk, gather, padded, piece, shard
from puretrain.sharding.processes import (
    DATA,
    SHARD,
    all_gather,
    device_of,
    everyone,
    new_group,
)
from puretrain.sharding.reduction import Reduced, bucketed, group_for_gradients, soon
from puretrain.state import TrainState, address
from puretrain.tree import (
    FrozenDict,
    Path,
    Record,
    freeze,
    match_paths,
    path_string,
    tree_flatten,
    tree_flatten_up_to,
    tree_leaves,
    tree_paths,
    tree_unflatten,
)

__all__ = ["Zero", "block_of", "zero"]

Stage = Literal[1, 2, 3]


class Zero(NamedTuple):
    """What :func:`zero` returns."""

    params: Any
    """The parameters as this process holds them, to make its state of."""
    optimizer: Optimizer
    """The optimizer for the state and the step; what it remembers is sharded from the start."""
    across: Across
    """For :func:`puretrain.train_step`."""
    placements: Callable[[TrainState], Placements]
    """Which leaves of such a state are cut: for :func:`puretrain.sharding.gather`, ``shard``,
    ``table`` and checkpoints. The state may be sharded or whole."""
    whole: Callable[[TrainState], TrainState]
    """The state with whole parameters, to evaluate it; all processes call this. As long as the
    state exists they are gathered only once."""


def zero(
    mesh: DeviceMesh,
    params: Any,
    optimizer: Optimizer,
    *,
    stage: Stage,
    whole: Iterable[str] = (),
    smallest: int = 1024,
    bucket_megabytes: float = 25.0,
    blocks: Callable[[str], str] | None = None,
) -> Zero:
    r"""Cut optimizer state, gradients and parameters over the processes of a mesh.

    A leaf is cut over the dimension ``shard`` of the mesh, along its largest dimension that the
    number of processes divides, or the largest at all. Batches are divided over all processes, as
    for :func:`puretrain.sharding.ddp`, with which each stage agrees to the bit where both sum in
    the same order (on two processes always), but for what a norm over shards rounds.

    1. Every process has the parameters and gets all gradients, updates a shard of the parameters,
       and gets the others' shards.
    2. The state has shards of the parameters. They are gathered for the evaluation of the loss;
       of gradients, which leave in buckets during the backward pass, a process keeps its shard.
    3. The parameters are gathered block by block, when the loss uses them, let go of when it uses
       another block, and gathered again in the backward pass. So a step needs memory for one
       whole block of parameters and gradients. Bytes moved are half as many again.

    Stages 2 and 3 reduce gradients after every batch, also with ``accumulate``. In stage 3 all
    processes must use the parameters in the same order; it does not go with ``torch.compile``, and
    under ``precision='bf16'`` copies of the weights in bfloat16 are kept for the backward pass.

    Optimizers of puretrain know what to do about a shard: norms (:func:`~puretrain.optim.lamb`,
    :func:`~puretrain.optim.clip_by_global_norm`) are over all shards; one that needs whole leaves
    (:func:`~puretrain.optim.muon`) refuses a shard. One of your own must work on each element by
    itself, or leave its leaves ``whole``.

    Args:
        mesh: the processes, from ``puretrain.sharding.processes(shard=k)``.
        params: all parameters, whole, the same in all processes.
        optimizer: an optimizer for whole parameters.
        stage: 1, 2 or 3.
        whole: patterns of parameters (see :func:`puretrain.tree.match_paths`) that are not cut.
        smallest: a leaf with fewer elements is not cut.
        bucket_megabytes: how much travels together in stages 1 and 2.
        blocks: (stage 3) the name of the block that a parameter belongs to, given its path; by
            default :func:`block_of`.

    Raises:
        ConfigurationError: there is no such stage, or ``params`` holds what is no tensor.
        PatternError: a pattern of ``whole`` matches nothing.
        StructureError: (the step) a batch or state does not fit, or processes have used parameters
            in another order.
        OptimizerError: (``init`` of the optimizer) it can't work on shards.

    Example:
        >>> import puretrain as pt
        >>> apply, params, buffers = pt.functional(torch.nn.Linear(2, 1))
        >>> def loss(params, buffers, batch, key):
        ...     return apply(params, buffers, batch)[0].square().mean()
        >>> with pt.sharding.processes() as mesh:
        ...     run = zero(mesh, params, pt.optim.adamw(1e-3), stage=3)
        ...     state = pt.TrainState.create(
        ...         run.params, buffers, run.optimizer, key=pt.random.key(0))
        ...     step = pt.train_step(loss, run.optimizer, across=run.across)
        ...     batches = pt.sharding.divide(pt.batches(torch.ones(4, 2), 4), mesh)
        ...     state = pt.fit(state, step, batches, epochs=1)
        >>> int(state.step)
        1
    """
    if stage not in (1, 2, 3):
        raise ConfigurationError(f"stage is 1, 2 or 3, not {stage!r}")
    params = freeze(params)
    count = dist.get_world_size(mesh.get_group(SHARD))
    leaves = _leaves(params, count, whole, smallest)
    held = Placements(
        FrozenDict({path_string(leaf.path): leaf.dim for leaf in leaves if leaf.dim is not None})
    )
    shards = Shards(
        frozenset(leaf.path for leaf in leaves if leaf.dim is not None),
        lambda part: _total(part, mesh),
    )
    bucket_bytes = int(bucket_megabytes * 2**20)
    if stage == 1:
        by_size = _blocks_by_size(mesh, leaves, bucket_bytes)
        across = ddp(mesh, bucket_megabytes=bucket_megabytes)
        return Zero(
            params,
            _updating_shards(optimizer, shards, mesh, leaves, by_size),
            across,
            lambda state: _placements(state, leaves, stage),
            lambda state: state,
        )
    if stage == 2:
        grouped = _blocks_by_size(mesh, leaves, bucket_bytes)
    else:
        grouped = _blocks_by_name(mesh, leaves, blocks or block_of)

    groups = group_for_gradients(everyone(mesh)), _another_group(mesh)

    def reducing(weight: float) -> Reduced:
        return _scattered(mesh, groups, leaves, grouped, weight, bucket_bytes, lazy=stage == 3)

    return Zero(
        shard(params, mesh, held),
        _of_shards(optimizer, shards),
        averaged(mesh, reducing),
        lambda state: _placements(state, leaves, stage),
        _gathering(mesh, held),
    )


def block_of(path: str) -> str:
    """The module that a parameter is gathered with: up to the first number, or its own.

    >>> block_of("encoder.layers.3.attention.weight"), block_of("embedding.weight"), block_of("w")
    ('encoder.layers.3', 'embedding', 'w')
    """
    numbered = re.match(r"(?:.*?[./])?\d+(?=[./])", path)
    if numbered is not None:
        return numbered[0]
    module = re.match(r"(.*)[./]", path)
    return path if module is None else module[1]


# ── What is cut ───────────────────────────────────────────────────────────────────────────────────


class _Leaf(NamedTuple):
    """A leaf of the parameters."""

    path: Path
    shape: torch.Size
    """Of the whole."""
    dim: int | None
    """Along which dimension it is cut."""
    like: Tensor
    """A tensor of no element, of its dtype and device."""

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.like.element_size()


def _leaves(params: Any, count: int, whole: Iterable[str], smallest: int) -> list[_Leaf]:
    paths = tree_paths(params)
    kept = {path for pattern in whole for path in match_paths(pattern, paths)}
    leaves = []
    for path, leaf in zip(paths, tree_leaves(params), strict=True):
        if not isinstance(leaf, Tensor):
            raise ConfigurationError(f"params/{path_string(path)} is {leaf!r}, not a tensor")
        dim = None
        if path not in kept and leaf.numel() >= smallest:
            dim = _largest(leaf.shape, count)
        leaves.append(_Leaf(path, leaf.shape, dim, leaf.detach().new_empty(0)))
    return leaves


def _largest(shape: Sequence[int], count: int) -> int | None:
    """The dimension along which to cut: the largest that divides evenly, or the largest.

    >>> _largest((3, 8, 9), 4), _largest((3, 9), 4), _largest((3, 2), 4)
    (1, 1, None)
    """
    large = [dim for dim, size in enumerate(shape) if size >= count]
    even = [dim for dim in large if shape[dim] % count == 0]
    return max(even or large, key=shape.__getitem__, default=None)


def _placements(state: TrainState, leaves: Sequence[_Leaf], stage: Stage) -> Placements:
    cut = {leaf.path: leaf for leaf in leaves if leaf.dim is not None}
    lengths = sorted({len(path) for path in cut}, reverse=True)
    dims: dict[str, int] = {}
    for path, tensor in zip(tree_paths(state), tree_leaves(state), strict=True):
        if path[0] in _NEVER or (stage == 1 and path[0] != "opt_state"):
            continue
        leaf = next((cut[path[-n:]] for n in lengths if path[-n:] in cut), None)
        if leaf is not None and leaf.dim is not None and _fits(tensor, leaf, leaf.dim):
            dims[path_string(path)] = leaf.dim
    return Placements(FrozenDict(dims))


_NEVER = ("buffers", "metrics", "epoch_metrics")


def _fits(tensor: Any, leaf: _Leaf, dim: int) -> bool:
    """Whether a tensor is a whole leaf, or may be a shard of it."""
    if not isinstance(tensor, Tensor) or tensor.dim() != len(leaf.shape):
        return False
    others = [size for i, size in enumerate(leaf.shape) if i != dim]
    return [size for i, size in enumerate(tensor.shape) if i != dim] == others


# ── Blocks ────────────────────────────────────────────────────────────────────────────────────────


class _Block(NamedTuple):
    """Leaves that are cut and travel together."""

    number: int
    group: dist.ProcessGroup
    numbers: list[int]
    """Their places among all leaves."""
    leaves: list[_Leaf]

    @property
    def parts(self) -> int:
        """Into how many shards each is cut."""
        return dist.get_world_size(self.group)

    def padded_shape(self, leaf: _Leaf) -> list[int]:
        """The shape that all shards of a leaf have when they travel."""
        shape, dim = [*leaf.shape], cast(int, leaf.dim)
        shape[dim] = chunk(shape[dim], self.parts, 0)[1]
        return shape

    def gather(self, shards: Sequence[Tensor], wrong: list[Tensor] | None = None) -> list[Tensor]:
        """The whole leaves, contiguous.

        The number of the block travels with them. Where not all have sent the same one, a tensor
        that says so is put into ``wrong``.
        """
        pieces = [
            padded(part, cast(int, leaf.dim), self.padded_shape(leaf)[cast(int, leaf.dim)])
            for part, leaf in zip(shards, self.leaves, strict=True)
        ]
        # Numbers up to 128 are exact in any floating-point type from 16 bits on.
        mark = pieces[0].new_full((1,), self.number % 128)
        flat = all_gather(torch.cat([*(part.reshape(-1) for part in pieces), mark]), self.group)
        rows = flat.view(self.parts, -1)
        if wrong is not None:
            wrong.append((rows[:, -1] != self.number % 128).any())
        whole, start = [], 0
        for leaf in self.leaves:
            shape, dim = self.padded_shape(leaf), cast(int, leaf.dim)
            size = math.prod(shape)
            parts = rows[:, start : start + size].view(self.parts, *shape)
            joined = torch.cat(list(parts.unbind()), dim)
            whole.append(joined.narrow(dim, 0, leaf.shape[dim]).contiguous())
            start += size
        return whole

    def laid_out(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Whole gradients as a flat tensor, first what belongs to the first process."""
        columns = []
        for grad, leaf in zip(grads, self.leaves, strict=True):
            shape, dim = self.padded_shape(leaf), cast(int, leaf.dim)
            if grad is None:
                columns.append(leaf.like.new_zeros(self.parts, math.prod(shape)))
                continue
            full = padded(grad, dim, shape[dim] * self.parts)
            parts = full.view(*shape[:dim], self.parts, *shape[dim:]).movedim(dim, 0)
            columns.append(parts.reshape(self.parts, -1))
        return torch.cat(columns, 1).view(-1)

    def shards_of(self, flat: Tensor) -> list[Tensor]:
        """The shards of this process, out of what was laid out and scattered."""
        found, start, rank = [], 0, dist.get_rank(self.group)
        for leaf in self.leaves:
            shape, dim = self.padded_shape(leaf), cast(int, leaf.dim)
            size = math.prod(shape)
            length = chunk(leaf.shape[dim], self.parts, rank)[1]
            part = flat[start : start + size].view(shape).narrow(dim, 0, length)
            found.append(part.clone(memory_format=torch.contiguous_format))
            start += size
        return found


def _blocks_by_name(
    mesh: DeviceMesh, leaves: Sequence[_Leaf], name: Callable[[str], str]
) -> list[_Block]:
    """Blocks of one module each, from the last to the first."""
    found: dict[Any, list[int]] = {}
    for i, leaf in reversed(list(enumerate(leaves))):
        if leaf.dim is not None:
            kind = (name(path_string(leaf.path)), leaf.like.dtype, leaf.like.device)
            found.setdefault(kind, []).append(i)
    return _as_blocks(mesh, leaves, found.values())


def _blocks_by_size(mesh: DeviceMesh, leaves: Sequence[_Leaf], limit: int) -> list[_Block]:
    """Blocks of about one size, from the last to the first."""
    found: list[list[int]] = []
    opened: dict[Any, tuple[list[int], int]] = {}
    for i, leaf in reversed(list(enumerate(leaves))):
        if leaf.dim is None:
            continue
        kind = (leaf.like.dtype, leaf.like.device)
        if kind not in opened:
            opened[kind] = ([], 0)
            found.append(opened[kind][0])
        numbers, size = opened[kind]
        numbers.append(i)
        opened[kind] = (numbers, size + leaf.nbytes)
        if size + leaf.nbytes >= limit:
            del opened[kind]
    return _as_blocks(mesh, leaves, found)


def _as_blocks(
    mesh: DeviceMesh, leaves: Sequence[_Leaf], found: Iterable[list[int]]
) -> list[_Block]:
    group = mesh.get_group(SHARD)
    return [
        _Block(number, group, numbers, [leaves[i] for i in numbers])
        for number, numbers in enumerate(found)
    ]


# ── Gradients, of which a process keeps its shards ────────────────────────────────────────────────


def _another_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """A new group of the processes that have the shards of one copy; all processes call this."""
    mine: Any = None
    for ranks in mesh.mesh.tolist():
        group = new_group(ranks)
        mine = group if mesh.get_rank() in ranks else mine
    return cast(dist.ProcessGroup, mine)


class _Scatter:
    """Sums the gradients of blocks over all processes while the backward pass computes others.

    As in :func:`puretrain.sharding.reduction.bucketed` blocks leave in one fixed order. At most one
    is under way, so that no more gradients are whole than that one and those being computed.
    """

    def __init__(
        self, mesh: DeviceMesh, group: dist.ProcessGroup, blocks: Sequence[_Block]
    ) -> None:
        self._blocks = blocks
        self._group = group
        self._data = mesh.get_group(DATA)
        self._filled: dict[int, Tensor] = {}
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None
        self._launched = 0
        self._sums: list[tuple[dist.Work | None, Tensor]] = []

    def fill(self, number: int, grads: Sequence[Tensor | None]) -> None:
        """Take the gradients of a block."""
        self._filled[number] = self._blocks[number].laid_out(grads)
        while self._launched in self._filled:
            self._settle()
            flat = self._filled.pop(self._launched)
            block = self._blocks[self._launched]
            own = flat.new_empty(flat.numel() // block.parts)
            work = _reduce_scatter(own, flat, group=self._group, async_op=True)
            self._under_way = (work, own, flat)
            self._launched += 1

    def _settle(self) -> None:
        if self._under_way is None:
            return
        work, own, _ = self._under_way
        work.wait()
        self._under_way = further = None
        if dist.get_world_size(self._data) > 1:
            further = dist.all_reduce(own, group=self._data, async_op=True)
        self._sums.append((further, own))

    def shards(self) -> list[list[Tensor]]:
        """The sums, block by block; blocks without a gradient here take part with zeros."""
        while self._launched < len(self._blocks):  # the next block has not been filled
            self.fill(self._launched, [None] * len(self._blocks[self._launched].leaves))
        self._settle()
        found = []
        for block in self._blocks:
            further, own = self._sums.pop(0)  # it is let go of when its shards are apart
            if further is not None:
                further.wait()
            found.append(block.shards_of(own))
        return found


# Torch 2.13 has given it another name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _scattered(
    mesh: DeviceMesh,
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
    leaves: Sequence[_Leaf],
    blocks: Sequence[_Block],
    weight: float,
    bucket_bytes: int,
    *,
    lazy: bool,
) -> Reduced:
    """Hand whole parameters to the loss, and of the sums of their gradients keep the own shards.

    Args:
        mesh: the processes.
        groups: all processes, and those that have the shards of one copy; for gradients only.
            Parameters travel in others, so that it does not matter in which order they meet.
        leaves: all leaves of the parameters.
        blocks: those of them that are cut.
        weight: the share of this process's part in the batch.
        bucket_bytes: how many bytes of gradients of the other leaves travel together.
        lazy: gather a block when it is used, and only for that time.
    """
    copies = [i for i, leaf in enumerate(leaves) if leaf.dim is None]
    rest = bucketed(groups[0], 1.0, bucket_bytes)
    scatter = _Scatter(mesh, groups[1], blocks)
    gathered = _Gathered(blocks)
    present = [False] * len(leaves)

    def fill(number: int, grads: Sequence[Tensor | None]) -> None:
        for i, grad in zip(blocks[number].numbers, grads, strict=True):
            present[i] = grad is not None
        scatter.fill(number, grads)

    def into(given: list[Tensor]) -> list[Tensor]:
        _check_shards(given, leaves, blocks)
        passed = list(given)
        for i, leaf in zip(copies, rest.passage.into([given[i] for i in copies]), strict=True):
            passed[i] = leaf
        gathered.shards = [[given[i].detach() for i in block.numbers] for block in blocks]
        for block in blocks:
            make = gathered.placeholders if lazy else gathered.once
            through = _through(block.number, make, fill, *(given[i] for i in block.numbers))
            for place, (i, leaf) in enumerate(zip(block.numbers, through, strict=True)):
                passed[i] = _lazy(leaf, gathered, block.number, place) if lazy else leaf
        return passed

    def out(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        gathered.let_go()
        summed: list[Tensor | None] = [None] * len(leaves)
        for block, shards in zip(blocks, scatter.shards(), strict=True):
            for i, part in zip(block.numbers, shards, strict=True):
                summed[i] = part
        kept = rest.passage.out([grads[i] for i in copies])
        for i, grad, there in zip(copies, kept, rest.present, strict=True):
            summed[i], present[i] = grad, there
        gathered.check()
        return summed

    def everywhere(here: bool) -> bool:
        flag = torch.tensor(int(here), device=device_of(mesh))
        dist.all_reduce(flag, dist.ReduceOp.MIN, mesh.get_group(SHARD))
        return bool(flag)

    scope: AbstractContextManager[Any] = nullcontext()
    if lazy:
        scope = torch.autograd.graph.saved_tensors_hooks(gathered.pack, gathered.unpack)
    return Reduced(Passage(into, out, weight), present, rest.finish, scope, everywhere)


def _check_shards(
    given: Sequence[Tensor], leaves: Sequence[_Leaf], blocks: Sequence[_Block]
) -> None:
    if len(given) != len(leaves):
        raise StructureError(
            f"the state has {len(given)} parameters, but the run was made for {len(leaves)}"
        )
    for block in blocks:
        rank = dist.get_rank(block.group)
        for i, leaf in zip(block.numbers, block.leaves, strict=True):
            shape, dim = [*leaf.shape], cast(int, leaf.dim)
            shape[dim] = chunk(shape[dim], block.parts, rank)[1]
            if [*given[i].shape] != shape:
                raise StructureError(
                    f"params/{path_string(leaf.path)} has shape {[*given[i].shape]}, but the shard "
                    f"of this process has {shape}: make the state of the params that zero() "
                    "returned, or shard(state, mesh, …) a whole one"
                )


class _Through(torch.autograd.Function):
    """From the shards of a block to its leaves, and with their gradients to a function."""

    @staticmethod
    def forward(
        ctx: Any,
        number: int,
        make: Callable[[int], Sequence[Tensor]],
        fill: Callable[..., None],
        *shards: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.number, ctx.fill, ctx.count = number, fill, len(shards)
        return tuple(make(number))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.fill(ctx.number, grads)
        return (None, None, None, *[None] * ctx.count)  # the shards are not known yet


def _through(
    number: int, make: Callable[[int], Sequence[Tensor]], fill: Any, *shards: Tensor
) -> tuple[Tensor, ...]:
    through: Any = _Through.apply(number, make, fill, *shards)  # type: ignore[no-untyped-call]
    soon(through)
    return cast(tuple[Tensor, ...], through)


# ── Parameters, gathered block by block ───────────────────────────────────────────────────────────
#
# A loss is given placeholders: tensors of the right shape with one element of memory, of a class
# whose operations come to `_Placeholder.__torch_function__`. There the block of the parameter is
# gathered, and the operation is done with the whole one. Autograd saves whole parameters for the
# backward pass; a hook notes in their place which they were, and gathers the block again when they
# are asked for. Nothing here frees memory that somebody may still look at: a block is let go of,
# and is gone as soon as nobody else holds a view of it.


class _Saved(NamedTuple):
    """A view of a whole parameter that autograd wants to see again."""

    number: int
    place: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Gathered:
    """The blocks that are whole right now, of one evaluation."""

    def __init__(self, blocks: Sequence[_Block]) -> None:
        self._blocks = blocks
        self.shards: list[list[Tensor]] = []
        self._whole: dict[int, list[Tensor]] = {}
        self._owners: dict[int, tuple[int, int]] = {}
        self._wrong: list[Tensor] = []

    def once(self, number: int) -> list[Tensor]:
        """The whole leaves of a block, which the caller keeps."""
        whole = self._blocks[number].gather(self.shards[number], self._wrong)
        if whole[0].device.type == "cpu":  # elsewhere at the end, since to look is to wait
            self.check()
        return whole

    def placeholders(self, number: int) -> list[Tensor]:
        """Tensors that stand for the whole leaves of a block."""
        return [leaf.like.new_zeros(()).expand(leaf.shape) for leaf in self._blocks[number].leaves]

    def need(self, numbers: Iterable[int]) -> None:
        """Make these blocks whole, and let go of the others."""
        wanted = sorted(set(numbers))
        for number in [number for number in self._whole if number not in wanted]:
            self._forget(number)
        for number in wanted:
            if number not in self._whole:
                self._whole[number] = self.once(number)
                for place, whole in enumerate(self._whole[number]):
                    self._owners[address(whole)] = (number, place)

    def leaf(self, number: int, place: int) -> Tensor:
        return self._whole[number][place]

    def _forget(self, number: int) -> None:
        for whole in self._whole.pop(number):
            del self._owners[address(whole)]

    def let_go(self) -> None:
        """Let go of all blocks."""
        for number in list(self._whole):
            self._forget(number)

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        owner = self._owners.get(address(tensor))
        if owner is None or tensor.dtype != self.leaf(*owner).dtype:
            return tensor
        return _Saved(*owner, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.need([saved.number])
        whole = self.leaf(saved.number, saved.place)
        return whole.as_strided(saved.size, saved.stride, saved.offset)

    def check(self) -> None:
        """Raise if the processes have gathered blocks in different orders."""
        if self._wrong and bool(torch.stack(self._wrong).any()):
            raise StructureError(
                "the processes have used the parameters in different orders, so that their shards "
                "do not belong together: with stage 3 the order must not depend on the batch"
            )
        self._wrong = []


class _Placeholder(Tensor):
    """Stands for a parameter that is gathered when it is used."""

    _of: tuple[_Gathered, int, int]
    _leaf: Tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise TransformError(
                "parameters that are gathered when they are used (stage 3) can't be compiled; use "
                "stage=2, where they are whole"
            )
        used: dict[int, _Placeholder] = {}
        _find(args, used)
        _find(kwargs, used)
        by_gathered: dict[int, tuple[_Gathered, list[int]]] = {}
        for leaf in used.values():
            gathered, number, _ = leaf._of
            by_gathered.setdefault(id(gathered), (gathered, []))[1].append(number)
        for gathered, numbers in by_gathered.values():
            gathered.need(numbers)
        whole = {key: _used(leaf) for key, leaf in used.items()}
        return func(*_put(args, whole), **_put(kwargs, whole))


def _lazy(leaf: Tensor, gathered: _Gathered, number: int, place: int) -> Tensor:
    placeholder = leaf.as_subclass(_Placeholder)
    placeholder._of, placeholder._leaf = (gathered, number, place), leaf
    return placeholder


def _used(placeholder: _Placeholder) -> Tensor:
    gathered, number, place = placeholder._of
    whole = gathered.leaf(number, place)
    return cast(Tensor, _Use.apply(placeholder._leaf, whole))  # type: ignore[no-untyped-call]


class _Use(torch.autograd.Function):
    """The whole parameter in the place of what stands for it."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


_ABOUT = frozenset(
    [
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.__len__),
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda"),
                *("is_cpu", "is_sparse", "is_quantized", "is_nested", "is_meta", "is_mkldnn"),
            )
        ),
    ]
)


def _find(tree: Any, found: dict[int, _Placeholder]) -> None:
    if isinstance(tree, _Placeholder):
        found[id(tree)] = tree
    elif isinstance(tree, Mapping):
        for child in tree.values():
            _find(child, found)
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            _find(child, found)


def _put(tree: Any, whole: Mapping[int, Tensor]) -> Any:
    if isinstance(tree, _Placeholder):
        return whole[id(tree)]
    if isinstance(tree, dict):
        return {key: _put(child, whole) for key, child in tree.items()}
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        return type(tree)(_put(child, whole) for child in tree)
    return tree


# ── Optimizers ────────────────────────────────────────────────────────────────────────────────────


def _total(part: Tensor, mesh: DeviceMesh) -> Tensor:
    total = part.detach().to(device_of(mesh), copy=True)
    dist.all_reduce(total, group=mesh.get_group(SHARD))
    return total.to(part.device)


def _of_shards(optimizer: Optimizer, shards: Shards) -> Optimizer:
    """An optimizer for parameters that are shards."""

    def init(params: Any, /) -> Any:
        with sharded(shards):
            return optimizer.init(params)

    def update(grads: Any, state: Any, params: Any, /, *, donate: bool = False) -> tuple[Any, Any]:
        with sharded(shards):
            return optimizer.update(grads, state, params, donate=donate)

    return Optimizer(init, update)


def _updating_shards(
    optimizer: Optimizer,
    shards: Shards,
    mesh: DeviceMesh,
    leaves: Sequence[_Leaf],
    blocks: Sequence[_Block],
) -> Optimizer:
    """An optimizer for whole parameters that updates its own shards and gets the others'."""
    count, rank = dist.get_world_size(mesh.get_group(SHARD)), mesh.get_local_rank(SHARD)

    def own(column: Sequence[Any]) -> list[Any]:
        return [
            tensor
            if tensor is None or leaf.dim is None
            else piece(tensor, leaf.dim, count, rank).contiguous()
            for tensor, leaf in zip(column, leaves, strict=True)
        ]

    def column_of(params: Any) -> tuple[list[Tensor], Any]:
        column, structure = tree_flatten(params)
        shapes = [getattr(tensor, "shape", None) for tensor in column]
        if shapes != [leaf.shape for leaf in leaves]:
            raise StructureError(
                "the parameters are not those that zero() was given: their shapes are "
                f"{shapes[:4]}, …, but were {[leaf.shape for leaf in leaves][:4]}, …"
            )
        return column, structure

    def init(params: Any, /) -> Any:
        column, structure = column_of(params)
        with sharded(shards):
            return optimizer.init(tree_unflatten(structure, own(column)))

    def update(grads: Any, state: Any, params: Any, /, *, donate: bool = False) -> tuple[Any, Any]:
        column, structure = column_of(params)
        with sharded(shards):
            new, state = optimizer.update(
                tree_unflatten(structure, own(tree_flatten_up_to(structure, grads))),
                state,
                tree_unflatten(structure, own(column)),
                donate=donate,
            )
        result = list(tree_flatten_up_to(structure, new))
        with torch.no_grad():
            for block in blocks:
                whole = block.gather([result[i] for i in block.numbers])
                for i, tensor in zip(block.numbers, whole, strict=True):
                    result[i] = column[i].copy_(tensor) if donate else tensor
        return tree_unflatten(structure, result), state

    return Optimizer(init, update)


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def _gathering(mesh: DeviceMesh, held: Placements) -> Callable[[TrainState], TrainState]:
    known: list[tuple[weakref.ReferenceType[Any], Any]] = []

    def whole(state: TrainState) -> TrainState:
        if not isinstance(state.params, (FrozenDict, Record)):
            return state.replace(params=gather(state.params, mesh, held))
        if not known or known[0][0]() is not state.params:
            params = gather(state.params, mesh, held)
            # It goes when the state goes.
            known[:] = [(weakref.ref(state.params, lambda gone: known.clear()), params)]
        return state.replace(params=known[0][1])

    return whole
