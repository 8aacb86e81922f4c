"""A run in several processes: who this one is, what they tell each other, and what each reads.

The processes and what goes between them are those of :mod:`puretrain.sharding`; here is what
Lightning does with them.
"""

from __future__ import annotations

import atexit
import copy
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from puretrain.lightning.trainer.devices import Plan
from puretrain.lightning.trainer.supporters import PredictionCollection
from puretrain.lightning.utilities.apply_func import apply_to_collection
from puretrain.lightning.utilities.distributed import rank_zero_only, rank_zero_warn, sync_ddp
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.seed import pl_worker_init_function, reset_seed
from puretrain.sharding.batch_norm import sync_batch_norm
from puretrain.sharding.exchange import Exchange
from puretrain.sharding.live import AveragedGradients, send_to_all
from puretrain.sharding.processes import everyone, processes

__all__ = ["Processes", "prepared", "take_plan", "take_ranks"]

_TIMEOUT = 1800.0  # seconds, as torch's own


class _Connection:
    """The process group of this program, which all its trainers share."""

    def __init__(self, device: torch.device, timeout: float) -> None:
        self.stack = ExitStack()
        mesh: DeviceMesh = self.stack.enter_context(processes(device=device.type, timeout=timeout))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.mesh, self.group = mesh, everyone(mesh)
        self.device = device
        # What is told apart from gradients is on the CPU, so that nobody waits for a GPU.
        self.quiet: Any = self.group
        if device.type != "cpu":
            self.quiet = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self.facts = Exchange(self.quiet, torch.device("cpu"))


_connections: list[_Connection] = []
before_leaving: list[Callable[[], None]] = []


def leave(*, failed: bool = False) -> None:
    """Leave the process group, at the end of the program."""
    while before_leaving and not failed:
        before_leaving.pop()()
    while _connections:
        connection = _connections.pop()
        if not failed:
            connection.stack.close()


def _ranks(plan: Plan) -> dict[str, int]:
    """Who this process is, from the variables of torchrun or of the trainer that started it.

    Raises:
        MisconfigurationException: another number of processes was started than is asked for.
    """
    if plan.kind not in {"ddp", "ddp2"}:
        return {"_global_rank": 0, "_local_rank": 0, "_node_rank": 0}
    local = int(os.environ.get("LOCAL_RANK", "0"))
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    rank = int(os.environ.get("RANK", node * plan.per_node + local))
    if plan.kind == "ddp2" and "NODE_RANK" not in os.environ and "GROUP_RANK" not in os.environ:
        node = rank
    started = int(os.environ.get("WORLD_SIZE", plan.world_size))
    if "LOCAL_RANK" in os.environ and started != plan.world_size:
        raise MisconfigurationException(
            f"{started} processes were started, but the Trainer's arguments ask for {plan.nodes} "
            f"machines with {plan.per_node} processes each; give the same numbers"
        )
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    return {"_global_rank": rank, "_local_rank": local, "_node_rank": node}


def take_plan(trainer: Any, plan: Plan) -> None:
    """Let a trainer run on what is planned."""
    trainer._processes = Processes(plan, plan.devices[0])
    trainer._splits = plan.parts > 1
    trainer._train_results.processes = trainer._processes
    trainer.num_nodes, trainer.num_processes = plan.nodes, plan.per_node
    gpus = [device.index for device in plan.devices if device.type == "cuda"]
    trainer.data_parallel_device_ids, trainer.num_gpus = gpus or None, len(gpus)
    take_ranks(trainer)


def take_ranks(trainer: Any) -> None:
    """Find out which of the processes this is, and its device."""
    plan = trainer._processes.plan
    vars(trainer).update(_ranks(plan))
    trainer._predictions = PredictionCollection(trainer.global_rank, trainer.world_size)
    trainer._device = plan.devices[trainer.local_rank if plan.kind == "ddp" else 0]
    trainer._processes.root_device = trainer._device


class Processes:
    """Stands for ``trainer.strategy``, and does for the trainer what needs all processes.

    Before they are connected, and with one process, everything is what one process does.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Do not connect yet."""
        self.root_device, self.plan = device, plan
        self._connection: _Connection | None = None
        self._averaged: AveragedGradients | None = None
        self._buffers: list[Tensor] = []
        self._buffers_are_due = True

    def __getstate__(self) -> dict[str, Any]:
        none = {"_connection": None, "_averaged": None, "_buffers": []}
        return {**self.__dict__, **none}

    @property
    def connected(self) -> bool:
        """Whether there are others to talk to."""
        return self._connection is not None

    def connect(self, trainer: Any) -> None:
        """Find the other processes, once; then all begin from the same seed."""
        if self.plan.world_size == 1:
            return
        if not _connections:
            if "MASTER_ADDR" not in os.environ:
                raise MisconfigurationException(
                    f"{self.plan.nodes} machines find each other by MASTER_ADDR and MASTER_PORT: "
                    "start the program on each with torchrun, or set them, and NODE_RANK"
                )
            os.environ["RANK"] = str(trainer.global_rank)
            os.environ["WORLD_SIZE"] = str(self.plan.world_size)
            timeout = self.plan.options.get("timeout", _TIMEOUT)
            if isinstance(timeout, datetime.timedelta):
                timeout = timeout.total_seconds()
            _connections.append(_Connection(self.root_device, timeout))
            atexit.register(leave)
        self._connection = _connections[0]
        if "OMP_NUM_THREADS" not in os.environ:  # the processes share this machine's cores
            threads = max(1, (os.cpu_count() or 1) // self.plan.per_node)
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)
        reset_seed()
        for logger in trainer.loggers:  # its number must not depend on who looks first
            if "_version" in vars(logger):
                version = self.broadcast(logger.version if trainer.is_global_zero else None)
                logger._version = version
        bar = trainer.progress_bar_callback
        if not trainer.is_global_zero and bar is not None and hasattr(bar, "disable"):
            bar.disable()

    def disconnect(self) -> None:
        """Talk to nobody any more: this process has failed, and the others must not be awaited."""
        self._connection = None
        self.release()

    def release(self) -> None:
        """Watch gradients no more: what is computed after a run is this process's own affair."""
        if self._averaged is not None:
            self._averaged.active = False
            self._averaged.remove()
            self._averaged = None

    # ── What callbacks ask, too ───────────────────────────────────────────────────────────────────

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The value of one process, in all."""
        if self._connection is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, src, self._connection.quiet)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the first; nothing in the others."""
        if self._connection is None:
            return [value]
        first = dist.get_rank() == 0
        found: list[Any] | None = [None] * self.plan.world_size if first else None
        dist.gather_object(value, found, 0, self._connection.quiet)
        return found or []

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any of them, say yes."""
        found = [bool(number) for number in self.each(int(bool(decision)))]
        return min(found) if all else max(found)

    def each(self, number: int) -> list[int]:
        """A whole number of every process, in the order of their ranks."""
        return [row[0] for row in self._exchanged(number)]

    def largest(self, *numbers: int) -> list[int]:
        """Of up to three whole numbers, the largest of all processes."""
        return [max(column) for column in zip(*self._exchanged(*numbers), strict=True)]

    def _exchanged(self, *numbers: int) -> list[list[int]]:
        if self._connection is None:
            return [list(numbers)]
        padded = torch.tensor([*numbers, 0, 0, 0][:3])
        every = self._connection.facts({"numbers": padded}, "what the processes agree on")
        return [found["numbers"].tolist()[: len(numbers)] for found in every]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean", **named: Any) -> Any:
        """Tensors reduced over all processes."""
        if self._connection is None:
            return tensor
        op = "mean" if reduce_op is None else reduce_op

        def reduced(value: Tensor) -> Tensor:
            of = group
            if of is None and value.device.type == "cpu":  # a number, though the run is on a GPU
                of = self._connection.quiet
            return sync_ddp(value, of, op)

        return apply_to_collection(tensor, Tensor, reduced)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, in the first process."""
        if self._connection is None or dist.get_rank() == 0:
            Path(path).unlink(missing_ok=True)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes."""
        self.each(0)

    # ── Gradients, parameters and buffers ─────────────────────────────────────────────────────────

    def begin(self, module: Any, *, training: bool) -> None:
        """Give all processes the parameters and buffers of the first, and watch the gradients."""
        if self._connection is None:
            return
        self.release()
        tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
        with torch.no_grad():
            send_to_all(tensors, self._connection.group)
        self._buffers_are_due = True
        if training:
            self.watch(module)
        else:
            self._buffers = list(module.buffers())

    def watch(self, module: Any) -> None:
        """Look for parameters that came or went since the last epoch."""
        if self._connection is None:
            return
        self._buffers = list(module.buffers())
        parameters = list(module.parameters())
        if self._averaged is None or not self._averaged.watches(parameters):
            self.release()
            self._averaged = AveragedGradients(parameters, self._connection.group)

    def before_step(self, accumulating: bool = False, automatic: bool = True) -> None:
        """Before a batch is computed: all take the buffers of the first if a batch changed them.

        As torch's DistributedDataParallel does in Lightning: after batches whose gradients were
        averaged, but not with manual optimization, where each keeps its own.
        """
        if self._connection is None:
            return
        if self._averaged is not None:
            self._averaged.active = not accumulating
        if self._buffers and self._buffers_are_due:
            with torch.no_grad():
                send_to_all(self._buffers, self._connection.group)
        self._buffers_are_due = torch.is_grad_enabled() and automatic and not accumulating

    def synchronize_norms(self, module: Any) -> None:
        """Let the batch norms of a module see the batches of all processes."""
        if self._connection is None:
            return
        kind = torch.nn.modules.batchnorm._BatchNorm
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, kind):
                    new = sync_batch_norm(child, self._connection.mesh)
                    new._parameters, new._buffers = child._parameters, child._buffers
                    setattr(parent, name, new)


# ── Loaders ───────────────────────────────────────────────────────────────────────────────────────


class _InOrder(Dataset[Any]):
    """What a sampler gives, drawn anew for each epoch, as a dataset."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: list[Any] = []

    def draw(self) -> None:
        self.drawn = list(self.sampler)

    def __getitem__(self, index: int) -> Any:
        return self.drawn[index]

    def __len__(self) -> int:
        return len(self.sampler)


class _Divided(DistributedSampler[Any]):
    """A sampler of the user's, of which each process takes its part."""

    def __init__(self, sampler: Any, **options: Any) -> None:
        super().__init__(_InOrder(sampler), **options)

    def __iter__(self) -> Iterator[Any]:
        self.dataset.draw()
        return (self.dataset[index] for index in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if callable(getattr(self.dataset.sampler, "set_epoch", None)):
            self.dataset.sampler.set_epoch(epoch)


class _Unrepeated:
    """A sampler of which each process takes its part, and no sample is taken twice."""

    def __init__(self, sampler: Any, world_size: int, rank: int) -> None:
        self.sampler, self.world_size, self.rank = sampler, world_size, rank

    def __iter__(self) -> Iterator[Any]:
        for number, index in enumerate(self.sampler):
            if number % self.world_size == self.rank:
                yield index

    def __len__(self) -> int:
        return len(range(self.rank, len(self.sampler), self.world_size))


def prepared(loader: DataLoader[Any], trainer: Any, kind: str) -> DataLoader[Any]:
    """A loader that reads what falls to this process, as ``replace_sampler_ddp`` asks.

    Args:
        loader: the user's.
        trainer: who reads it.
        kind: ``train``, ``val``, ``test`` or ``predict``.

    Raises:
        MisconfigurationException: the loader has a batch sampler that can't be given a sampler.
    """
    plan = trainer._processes.plan
    if plan.world_size == 1:
        return loader
    loader = _seeded(loader, trainer)
    if not trainer.replace_sampler_ddp or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    sampler = loader.sampler
    if kind == "predict":
        new: Any = _Unrepeated(sampler, plan.world_size, trainer.global_rank)
    else:
        plain = isinstance(sampler, (RandomSampler, SequentialSampler))
        shuffle = kind == "train" or isinstance(sampler, RandomSampler)
        options: dict[str, Any] = {
            "num_replicas": plan.world_size,
            "rank": trainer.global_rank,
            "shuffle": shuffle and not trainer.overfit_batches,
            "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
        }
        if plain:
            new = DistributedSampler(loader.dataset, **options)
        else:
            new = _Divided(sampler, **options)
    return _with_sampler(loader, new)


def _with_sampler(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    """The same loader, of whatever class, with another sampler."""
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler:
        batches = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    elif batches is not None:
        if "sampler" not in vars(batches):
            raise MisconfigurationException(
                f"the loader's batch sampler, a {type(batches).__name__}, has no attribute "
                "`sampler`, so no part of it can be given to each process; divide it yourself by "
                "trainer.global_rank and trainer.world_size, and give the Trainer "
                "replace_sampler_ddp=False (2.x: use_distributed_sampler=False)"
            )
        batches = copy.copy(batches)
        batches.sampler = sampler
    new = copy.copy(loader)
    vars(new).update(sampler=sampler, batch_sampler=batches, _iterator=None)
    return new


def _seeded(loader: DataLoader[Any], trainer: Any) -> DataLoader[Any]:
    """A loader whose workers draw differently in each process, as ``seed_everything`` asks."""
    if os.environ.get("PL_SEED_WORKERS") != "1" or loader.worker_init_fn is not None:
        return loader
    new = copy.copy(loader)
    new.worker_init_fn = partial(pl_worker_init_function, rank=trainer.global_rank)
    vars(new)["_iterator"] = None
    return new


def equal_number(trainer: Any, total: float) -> float:
    """The number of training batches that every process has."""
    processes = trainer._processes
    if not processes.connected:
        return total
    every = processes.each(-1 if total == float("inf") else int(total))
    if len(set(every)) == 1:
        return total
    if -1 in every:
        raise MisconfigurationException(
            "some processes have a training loader of known length and others have none"
        )
    rank_zero_warn(
        f"the processes have {every} training batches; each reads {min(every)}, since all take "
        "part in every step"
    )
    return min(every)


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────


def prepares_data(trainer: Any, owner: Any) -> bool:
    """Whether this process is the one that calls ``prepare_data``."""
    per_node = trainer.prepare_data_per_node and getattr(owner, "prepare_data_per_node", True)
    if trainer.local_rank:
        return False
    return bool(per_node or trainer.node_rank == 0)
