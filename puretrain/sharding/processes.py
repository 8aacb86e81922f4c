"""The processes of a run: how they find each other, who they are, and how they agree to stop."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from puretrain.errors import ConfigurationError
from puretrain.loop import Interrupted, Observer

__all__ = ["agreement", "device_of", "everyone", "on_rank_zero", "processes"]

DATA, SHARD = "data", "shard"
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def processes(
    *, shard: int = 1, device: str | None = None, timeout: float = 600.0
) -> Iterator[DeviceMesh]:
    """Join the processes of a run that torchrun has started, for as long as the context lasts.

    In a program that was not started by torchrun there is one process, and everything works the
    same.

    Args:
        shard: over how many processes a state is sharded; the rest of them hold copies of it. It
            divides the number of processes.
        device: ``"cpu"`` (the processes talk through gloo) or ``"cuda"`` (through nccl, one GPU for
            each process, by ``LOCAL_RANK``); by default cuda if there is a GPU for each.
        timeout: seconds after which a process that waits for another one in vain raises.

    Yields:
        A device mesh with the dimensions ``data`` and ``shard``.

    Raises:
        ConfigurationError: torchrun's variables are there in part, or ``shard`` does not divide the
            number of processes, or there is no GPU for this one, or ``timeout`` is not above 0.

    Example:
        >>> with processes() as mesh:
        ...     mesh.shape, mesh.mesh_dim_names
        ((1, 1), ('data', 'shard'))
    """
    if timeout <= 0:
        raise ConfigurationError(f"timeout={timeout!r}: give a number of seconds above 0")
    there = [name for name in _VARIABLES if name in os.environ]
    if there and len(there) < len(_VARIABLES):
        missing = [name for name in _VARIABLES if name not in there]
        raise ConfigurationError(
            f"the environment has {', '.join(there)} but not {', '.join(missing)}: start the "
            "processes with torchrun, which sets all of them, or unset them for one process"
        )
    device = _device_type() if device is None else device
    if device not in ("cpu", "cuda"):
        raise ConfigurationError(f"device is 'cpu' or 'cuda', not {device!r}")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigurationError(
                f"there is no GPU for the process of LOCAL_RANK {local_rank}: this machine has "
                f"{torch.cuda.device_count()}. Start fewer processes, or give device='cpu'"
            )
        torch.cuda.set_device(local_rank)
    mine = not dist.is_initialized()
    if mine:
        backend = "nccl" if device == "cuda" else "gloo"
        patience = datetime.timedelta(seconds=timeout)
        store, rank, size = _meeting_place(patience) if there else (dist.HashStore(), 0, 1)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    try:
        world_size = dist.get_world_size()
        if not 1 <= shard <= world_size or world_size % shard:
            raise ConfigurationError(
                f"a state can't be sharded over {shard} of {world_size} processes: shard must "
                "divide their number"
            )
        shape = (world_size // shard, shard)
        mesh = init_device_mesh(device, shape, mesh_dim_names=(DATA, SHARD))
        for dimension in (DATA, SHARD):  # their own would be torch's half an hour
            _set_timeout(_timeout_of(everyone(mesh)), mesh.get_group(dimension))
        yield mesh
    except Interrupted:
        # What starts the processes kills the others soon after one has ended, and the first one may
        # still be saving the state.
        if mine:
            dist.barrier()
        raise
    finally:
        if mine:
            # Gloo's threads let go of the last call's tensors a moment after it has returned, and
            # a program that ends before that is aborted (pytorch #179291).
            time.sleep(_DRAINED)
            dist.destroy_process_group()


_DRAINED = 0.05
# Torch has no public way to ask for the patience of a group, nor to change it.
_set_timeout: Callable[[datetime.timedelta, dist.ProcessGroup], None]
_set_timeout = dist.distributed_c10d._set_pg_timeout


def _timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    device = torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
    return group._get_backend(device).options._timeout


def new_group(ranks: list[int]) -> dist.ProcessGroup:
    """A further group of some processes, as patient as that of all; all processes call this."""
    world = dist.group.WORLD
    patience = None if world is None else _timeout_of(world)
    return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=patience))


def _meeting_place(patience: datetime.timedelta) -> tuple[Any, int, int]:
    """Where the processes that torchrun has started tell each other their addresses.

    It is a store of torchrun's that outlives the processes. Those that are started again must not
    find the addresses of the ones before; on several hosts, the launcher sees to it.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"puretrain/{start}", store)  # type: ignore[attr-defined]
    return store, rank, size


def _device_type() -> str:
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= needed else "cpu"


def all_gather(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The flat tensors of all processes, one after the other; all have the same length."""
    return start_all_gather(flat, group)()


def start_all_gather(flat: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin an :func:`all_gather`; what is returned waits for its end."""
    every = flat.new_empty(dist.get_world_size(group) * flat.numel())
    work = _all_gather(every, flat, group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return every

    return finish


# Torch 2.13 has given it another name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def everyone(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all processes of a mesh.

    Raises:
        ConfigurationError: the mesh leaves out some processes of the program.
    """
    if mesh.size() != dist.get_world_size():
        raise ConfigurationError(
            f"the mesh has {mesh.size()} of the program's {dist.get_world_size()} processes; a run "
            "is over all of them"
        )
    group = dist.group.WORLD
    if group is None:
        raise ConfigurationError(
            "the process group of the mesh has been destroyed: end the run "
            "before destroy_process_group()"
        )
    return group


def device_of(mesh: DeviceMesh) -> torch.device:
    """Where the tensors of this process live."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def on_rank_zero(mesh: DeviceMesh, observers: Iterable[Observer]) -> list[Observer]:
    """The observers in the first process, none in the others: one of them writes for all.

    Except for an observer that has a true attribute ``on_every_process``, because its processes
    work together.

    >>> with processes() as mesh:
    ...     len(on_rank_zero(mesh, [print]))
    1
    """
    first = mesh.get_rank() == 0
    return [one for one in observers if first or getattr(one, "on_every_process", False)]


def agreement(mesh: DeviceMesh) -> Callable[[int], int]:
    """What lets all processes end after the same step, when a signal has come to one of them.

    Give it to :func:`puretrain.fit` as ``agree``. Each call sends this process's number to the
    others and returns the largest of those sent at the call before, so that nobody waits.
    """
    group, device = everyone(mesh), device_of(mesh)
    if dist.get_world_size(group) == 1:
        return lambda number: number
    pending: list[tuple[Any, Tensor]] = []

    def agree(number: int) -> int:
        agreed = 0
        if pending:
            work, numbers = pending.pop()
            work.wait()
            agreed = int(numbers)
        mine = torch.tensor(max(number, agreed), device=device)
        pending.append((dist.all_reduce(mine, dist.ReduceOp.MAX, group, async_op=True), mine))
        return agreed

    return agree
