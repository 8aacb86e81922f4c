"""Sources that each process has for itself, and that end at different times."""

from __future__ import annotations

from collections.abc import Generator
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from puretrain.data import Batches, Parts, Read
from puretrain.errors import ConfigurationError
from puretrain.loop import as_batches
from puretrain.sharding.processes import device_of, everyone
from puretrain.state import Cursor

__all__ = ["uneven"]


def uneven(batches: Any, mesh: DeviceMesh) -> Uneven:
    """Read batches that are each process's own, as parts of common batches.

    For data that is divided already: a file for each process, a ``DataLoader`` with a sampler of
    its own. The processes tell each other how many samples each of them has, so that every sample
    counts the same however large the parts are; and one that has come to its end goes on with a
    weight of zero until all have. Nobody waits for ever, and nothing is left out or read twice.

    The cursor counts rounds: a run may go on in the middle of an epoch, with the same number of
    processes. Where one process can reach all the data, :func:`divide` is better.

    Args:
        batches: this process's own ready batches: an iterable as for :func:`puretrain.fit`.
        mesh: the processes.

    Raises:
        ConfigurationError: the source has no ready batches, or keeps its place itself.
        DataError: (when read) a process has no batch at all.

    >>> import puretrain as pt
    >>> with pt.sharding.processes() as mesh:
    ...     source = uneven([torch.zeros(4), torch.zeros(2)], mesh)
    ...     [int(read.batch.total) for read in source.read(pt.Cursor())]
    [4, 2]
    """
    source = as_batches(batches)
    if not isinstance(source, Batches):
        raise ConfigurationError(
            f"uneven() reads what puretrain.batches can read, not a {type(source).__name__}"
        )
    return Uneven(source, mesh)


class Uneven:
    """Made by :func:`uneven`; a source for :func:`puretrain.fit`."""

    def __init__(self, source: Batches, mesh: DeviceMesh) -> None:
        self._source = source
        self._group = everyone(mesh)
        self._device = device_of(mesh)

    def read(self, cursor: Cursor) -> Generator[Read, None, None]:
        """Read from a round of an epoch to the end of all processes' data."""
        epoch, rounds = cursor.epoch.clone(), int(cursor.offset)
        source = self._source.read(Cursor(epoch=epoch))
        last = next(source)  # a source without a batch raises
        reads = chain([last], source)
        for skipped in islice(reads, rounds):
            last = skipped
        while True:
            read = next(reads, None)
            size = 0 if read is None else read.size
            total = torch.tensor(size, device=self._device)
            dist.all_reduce(total, group=self._group)
            if not int(total):
                return
            last = last if read is None else read
            rounds += 1
            yield Read(
                Parts((last.batch,), torch.tensor([size]), total.cpu()),
                Cursor(epoch=epoch, offset=torch.tensor(rounds)),
                int(total),
            )

    def length(self, cursor: Cursor) -> int | None:
        """Not known: the others' data may be longer."""
        return None

    def position(self, cursor: Cursor) -> int:
        """How many rounds of the epoch have been read."""
        return int(cursor.offset)

    def exhausted(self, cursor: Cursor) -> bool | None:
        """Only reading can tell."""
        return None

    def next_epoch(self, cursor: Cursor) -> Cursor:
        """The beginning of the epoch after the cursor's."""
        return Cursor(epoch=cursor.epoch + 1)
