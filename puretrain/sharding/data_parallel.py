"""A batch divided over devices or processes: what to give :func:`puretrain.train_step` for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from puretrain import random
from puretrain.data import Batches, Parts
from puretrain.errors import ConfigurationError, DataError
from puretrain.gradients import Across, Evaluate, Gradients, Passage
from puretrain.loop import as_batches
from puretrain.optim import GradientTransformation
from puretrain.sharding.batch_norm import counted
from puretrain.sharding.exchange import Exchange, changed, merged_buffers, merged_metrics
from puretrain.sharding.processes import device_of, everyone
from puretrain.sharding.reduction import (
    Reduced,
    bucketed,
    group_for_gradients,
    summed_as_tree,
)
from puretrain.state import TrainState
from puretrain.step import EvalStep
from puretrain.tree import (
    FrozenDict,
    tree_flatten,
    tree_flatten_up_to,
    tree_leaves,
    tree_map,
    tree_to,
    tree_unflatten,
)

__all__ = ["all_reduce", "ddp", "divide", "dp", "elastic", "eval_across"]


def divide(batches: Any, mesh: DeviceMesh, *, logical_shards: int | None = None) -> Batches:
    """The batches of which each process reads its part.

    The batch size stays that of the whole batch, and the cursor counts samples of the whole, so a
    run may go on with another number of processes in the middle of an epoch. Every process has the
    same number of batches, however many samples there are: the last one may be small, and a process
    that has no sample of it takes part with a weight of zero.

    Args:
        batches: made by :func:`puretrain.batches`, or an iterable as for :func:`puretrain.fit`.
        mesh: the processes.
        logical_shards: how many parts a batch is divided into, a multiple of the number of
            processes; one for each by default. See :func:`elastic`.

    Raises:
        ConfigurationError: the number of processes does not divide ``logical_shards``, or the
            source can't be divided.

    >>> import puretrain as pt
    >>> with pt.sharding.processes() as mesh:
    ...     [parts.parts[0].tolist() for parts in divide(pt.batches(torch.arange(3), 2), mesh)]
    [[0, 1], [2]]
    """
    source = as_batches(batches)
    if not isinstance(source, Batches):
        raise ConfigurationError(
            f"a {type(source).__name__} can't be divided; make the source with puretrain.batches"
        )
    world_size = dist.get_world_size(everyone(mesh))
    each = _parts_each(world_size if logical_shards is None else logical_shards, world_size)
    rank = mesh.get_rank()
    return source.divided(each * world_size, rank * each, (rank + 1) * each)


def _parts_each(parts: int, world_size: int) -> int:
    if not isinstance(parts, int) or parts < 1 or parts % world_size:
        raise ConfigurationError(
            f"logical_shards={parts!r} can't be divided among {world_size} processes: it is a "
            "multiple of their number"
        )
    return parts // world_size


class _Mine(NamedTuple):
    """What this process has of a batch."""

    parts: tuple[Any, ...]
    sizes: Sequence[int]
    total: int


def _mine(batch: Any, count: int, world_size: int) -> _Mine:
    if not isinstance(batch, Parts):
        if count > 1:
            raise DataError(
                f"a batch must come in {count} parts for each process: divide the source with "
                "puretrain.sharding.divide(batches, mesh, logical_shards=…)"
            )
        # A loader of this process's own. Nothing is known of the others' sizes, so all count alike.
        return _Mine((batch,), [1], world_size)
    if len(batch.parts) != count:
        raise DataError(
            f"the batch comes in {len(batch.parts)} parts for this process, but the step is for "
            f"{count}: give divide() and the step the same mesh and logical_shards"
        )
    return _Mine(batch.parts, batch.sizes.tolist(), int(batch.total))


def ddp(mesh: DeviceMesh, *, bucket_megabytes: float = 25.0, reduce: bool = True) -> Across:
    """Every process evaluates its part of each batch, and the gradients are averaged over all.

    Give it to :func:`puretrain.train_step` as ``across``, and :func:`divide` the batches. The
    gradients are those of the mean over the whole batch, each sample counting the same also where
    the parts differ in size. They are summed in buckets during the backward pass. Metrics are
    merged to those of the whole batch, buffers (running statistics) are averaged, and the random
    draws of a process come from the step's key and its rank. So the states of all processes are the
    same, to the bit, in every step.

    On one process the step is the plain one, bit for bit. Between different numbers of processes
    results differ by rounding; :func:`elastic` avoids that.

    Args:
        mesh: the processes.
        bucket_megabytes: how many gradients travel together.
        reduce: False leaves the gradients as each process has them, weighted with its share. Put
            :func:`all_reduce` in front of the optimizer then: with ``accumulate`` the processes
            talk once for each update instead of each batch. The accumulated sums differ between
            the processes until then, so checkpoints belong between updates.

    Raises:
        DataError: (the step) a batch comes in another number of parts.
        StructureError: (the step) the metrics of two processes have different structures.
    """
    group = group_for_gradients(everyone(mesh))
    bucket_bytes = int(bucket_megabytes * 2**20)
    return averaged(mesh, lambda weight: bucketed(group, weight, bucket_bytes, reduce))


def averaged(mesh: DeviceMesh, reducing: Callable[[float], Reduced]) -> Across:
    """Every process evaluates its part of each batch; how gradients are added up is given.

    Args:
        mesh: the processes.
        reducing: what sums the gradients of one evaluation over the processes, given the share of
            this process's part in the batch.
    """
    group, device = everyone(mesh), device_of(mesh)
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    combine = _Combine(group, device)

    def across(evaluate: Evaluate, state: TrainState, batch: Any, key: Tensor | None) -> Gradients:
        mine = _mine(batch, 1, world_size)
        reduced = reducing(mine.sizes[0] / mine.total)
        own_key = _part_of_key(key, rank, world_size)
        with counted(mine.sizes[0] > 0), own_key as own, reduced.scope:
            result = evaluate(state, mine.parts[0], own, reduced.passage)
        finish = combine.start(state, [result], mine.sizes, reduced.present, result.grads)
        reduced.finish()
        return finish()._replace(everywhere=reduced.everywhere)

    return across


def all_reduce(mesh: DeviceMesh) -> GradientTransformation:
    """Sum gradients over all processes, as a gradient transformation.

    For a step with ``across=ddp(mesh, reduce=False)`` and ``accumulate``: gradients are summed when
    the optimizer is called, not after every batch.

    >>> import puretrain as pt
    >>> with pt.sharding.processes() as mesh:
    ...     optimizer = pt.optim.chain(all_reduce(mesh), pt.optim.adamw(1e-3))
    """
    group = everyone(mesh)

    def update(grads: Any, state: Any, params: Any, /, *, donate: bool = False) -> tuple[Any, Any]:
        # A leaf may have a gradient in some processes only; it takes part with zeros elsewhere.
        leaves, structure = tree_flatten(params)
        given: list[Tensor | None] = tree_flatten_up_to(structure, grads)
        here = torch.tensor([grad is not None for grad in given], dtype=torch.int32)
        there = here.to(device_of(mesh))
        dist.all_reduce(there, dist.ReduceOp.MAX, group)
        reduced = bucketed(group, 1.0, 25 * 2**20)
        with torch.enable_grad():
            inputs = [leaf.detach().requires_grad_() for leaf in leaves]
            passed = reduced.passage.into(inputs)
            used = [i for i, grad in enumerate(given) if grad is not None]
            backward = torch.autograd.grad(
                [passed[i] for i in used], inputs, [given[i] for i in used], allow_unused=True
            )
        summed = list(reduced.passage.out(backward))
        reduced.finish()
        kept = [grad if seen else None for grad, seen in zip(summed, there.tolist(), strict=True)]
        return tree_unflatten(structure, kept), state

    return GradientTransformation(lambda params: (), update)


def elastic(mesh: DeviceMesh, logical_shards: int) -> Across:
    """The same bits on any number of processes that divides the number of logical shards.

    A batch is always divided into ``logical_shards`` parts; a process evaluates those that fall to
    it one by one, each with a random key of its own, and the gradients of all parts are added up in
    one fixed order. So the state after n steps does not depend on the number of processes, which
    may change in the middle of a run. All processes must compute with the same number of threads
    (``OMP_NUM_THREADS``), for torch's kernels may add up in another order with another number.

    Give it to :func:`puretrain.train_step` as ``across``, and the batches from
    ``divide(batches, mesh, logical_shards=…)``.

    Raises:
        ConfigurationError: the number of processes does not divide ``logical_shards``.
        DataError: (the step) a batch comes in another number of parts.
        StructureError: (the step) the metrics of two parts have different structures.
    """
    group, device = everyone(mesh), device_of(mesh)
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    each = _parts_each(logical_shards, world_size)
    combine = _Combine(group, device)

    def across(evaluate: Evaluate, state: TrainState, batch: Any, key: Tensor | None) -> Gradients:
        mine = _mine(batch, each, world_size)

        def part(number: int) -> Gradients:
            i = number - rank * each
            with _part_of_key(key, number, logical_shards) as own:
                return evaluate(state, mine.parts[i], own, _weighted(mine.sizes[i] / mine.total))

        return _in_parts(combine, group, logical_shards, state, mine.sizes, part)

    return across


def dp(devices: Sequence[torch.device | str]) -> Across:
    """One process divides each batch over several devices.

    The state stays on the first device; in every step its parameters and buffers are copied to the
    others. Give it to :func:`puretrain.train_step` as ``across``, and the batches from
    ``batches.divided(len(devices), 0, len(devices))``. The gradients are added up in the same order
    as those of :func:`elastic`, so it gives the bits that as many processes would. For several
    GPUs :func:`ddp` is faster: its processes don't share one Python interpreter.

    Raises:
        ConfigurationError: there is no device, or torch does not know one.
        DataError: (the step) a batch comes in another number of parts.
    """
    try:
        places = [torch.device(device) for device in devices]
    except RuntimeError as error:
        raise ConfigurationError(f"devices: {error}") from None
    if not places:
        raise ConfigurationError("dp needs at least one device, as in dp(['cpu'])")
    combine = _Combine(None, places[0])

    def across(evaluate: Evaluate, state: TrainState, batch: Any, key: Tensor | None) -> Gradients:
        mine = _mine(batch, len(places), 1)

        def part(number: int) -> Gradients:
            place = places[number]
            there = state.replace(
                params=tree_to(state.params, place), buffers=tree_to(state.buffers, place)
            )
            weighted = _weighted(mine.sizes[number] / mine.total)
            with _part_of_key(key, number, len(places)) as own:
                found = evaluate(there, tree_to(mine.parts[number], place), own, weighted)
            return found._replace(
                loss=found.loss.to(places[0]),
                buffers=_brought(state.buffers, there.buffers, found.buffers),
                metrics=tree_to(found.metrics, places[0]),
                grads=tree_to(tuple(found.grads), places[0]),
            )

        return _in_parts(combine, None, len(places), state, mine.sizes, part)

    return across


def _brought(here: Any, there: Any, after: Any) -> Any:
    """Buffers from another device, the very ones of before where they did not change."""
    return tree_map(
        lambda old, moved, new: (
            old if new is moved or not isinstance(new, Tensor) else new.to(old.device)
        ),
        here,
        there,
        after,
    )


def _weighted(weight: float) -> Passage:
    return Passage(list, lambda grads: grads, weight)


@contextmanager
def _part_of_key(key: Tensor | None, number: int, parts: int) -> Iterator[Tensor | None]:
    """A context in which torch's generators, and the key that it gives, are those of a part."""
    if key is None or parts == 1:
        yield key
        return
    own = random.fold_in(key, number)
    with random.scope(own):
        yield own


def _in_parts(
    combine: _Combine,
    group: dist.ProcessGroup | None,
    parts: int,
    state: TrainState,
    sizes: Sequence[int],
    part: Callable[[int], Gradients],
) -> Gradients:
    """Evaluate the parts of this process and combine them with those of the others."""
    leaves = tree_leaves(state.params)
    results: list[Gradients] = []
    present = [False] * len(leaves)

    def grads(number: int) -> list[Tensor]:
        result = part(number)
        for i, grad in enumerate(result.grads):
            present[i] = present[i] or grad is not None
        # The gradients are let go of: those of all parts together need not fit into memory.
        results.append(result._replace(grads=()))
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, result.grads, strict=True)
        ]

    summed = summed_as_tree(group, parts, grads)
    return combine(state, results, sizes, present, summed)


class _Combine:
    """Makes of what the parts of a batch gave what the whole batch gives, in every process."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._facts: Callable[[Any, str], Callable[[], list[Any]]] = _alone
        self._buffers = self._facts
        if group is not None:
            self._facts = Exchange(group, device).start
            self._buffers = Exchange(group, device).start

    def __call__(self, *facts: Any) -> Gradients:
        return self.start(*facts)()

    def start(
        self,
        state: TrainState,
        results: Sequence[Gradients],
        sizes: Sequence[int],
        present: Sequence[bool],
        grads: Sequence[Tensor | None],
    ) -> Callable[[], Gradients]:
        """Begin to tell the other processes; what is returned waits for them."""
        facts = {
            "metrics": tuple(result.metrics for result in results),
            "sizes": torch.tensor(sizes),
            "present": torch.tensor(present),
            "changed": torch.tensor(
                [any(flags) for flags in zip(*_changed(state, results), strict=True)],
                dtype=torch.bool,
            ),
        }
        received = self._facts(facts, "the metrics of a step")
        return lambda: self._combined(state, results, received(), grads)

    def _combined(
        self,
        state: TrainState,
        results: Sequence[Gradients],
        every: Sequence[Mapping[str, Any]],
        grads: Sequence[Tensor | None],
    ) -> Gradients:
        all_sizes = [size for found in every for size in found["sizes"].tolist()]
        metrics = merged_metrics([part for found in every for part in found["metrics"]], all_sizes)
        anywhere = torch.stack([found["present"] for found in every]).any(0).tolist()
        return results[0]._replace(
            loss=metrics["loss"],
            metrics=metrics,
            buffers=self._merged_buffers(state, results, every, all_sizes),
            grads=[grad if there else None for grad, there in zip(grads, anywhere, strict=True)],
        )

    def _merged_buffers(
        self,
        state: TrainState,
        results: Sequence[Gradients],
        every: Sequence[Mapping[str, Any]],
        sizes: Sequence[int],
    ) -> Any:
        """Gather the buffers that some part has changed; the others are what they were."""
        flags = torch.stack([found["changed"] for found in every]).any(0).tolist()
        if not any(flags):
            return state.buffers
        before, structure = tree_flatten(state.buffers)
        moved = [i for i, flag in enumerate(flags) if flag]
        mine = tuple(
            tuple(leaves[i] for i in moved)
            for leaves in (tree_leaves(result.buffers) for result in results)
        )
        parts = [part for found in self._buffers(mine, "the buffers")() for part in found]
        merged = merged_buffers(tuple(before[i] for i in moved), parts, sizes)
        after = list(before)
        for i, leaf in zip(moved, merged, strict=True):
            after[i] = leaf
        return tree_unflatten(structure, after)


def _alone(tree: Any, what: str) -> Callable[[], list[Any]]:
    return lambda: [tree]


def _changed(state: TrainState, results: Sequence[Gradients]) -> list[list[bool]]:
    return [changed(state.buffers, result.buffers) for result in results]


def eval_across(step: EvalStep, mesh: DeviceMesh) -> EvalStep:
    """An evaluation step for divided batches: its metrics are those of the whole batch.

    Args:
        step: made by :func:`puretrain.eval_step`.
        mesh: the processes. Divide the batches with :func:`divide`.
    """
    combine = Exchange(everyone(mesh), device_of(mesh))

    def across(state: TrainState, batch: Any, /) -> FrozenDict[Any]:
        if not isinstance(batch, Parts):
            raise DataError(
                "the batch of an evaluation is not divided: divide the source with "
                "puretrain.sharding.divide(batches, mesh)"
            )
        facts = {
            "metrics": tuple(step(state, part) for part in batch.parts),
            "sizes": batch.sizes,
        }
        every = combine(facts, "the metrics of an evaluation")
        sizes = [size for found in every for size in found["sizes"].tolist()]
        return merged_metrics([part for found in every for part in found["metrics"]], sizes)

    return across
