"""Batches of a source as a value: :func:`batches` makes it, a cursor says where to read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from puretrain.data.parts import Parts, Share, first_dimension
from puretrain.data.sources import (
    Arrays,
    DataWarning,
    Plan,
    Samples,
    Stream,
    has_ended,
    is_stateful,
    raise_if_lost,
)
from puretrain.errors import ConfigurationError, DataError, check_whole
from puretrain.random import key as random_key
from puretrain.state import Cursor
from puretrain.tree import FrozenDict, Record, tree_map

__all__ = ["Batches", "Read", "batches"]


class Read(NamedTuple):
    """One batch and where it leaves the reader."""

    batch: Any
    """The batch: a tree of tensors, or what ``collate`` or the source made."""
    cursor: Cursor
    """The place after the batch; after the last one of an epoch still in that epoch."""
    size: int
    """How many samples are in the batch. Of a source's ready batch: the first dimension of its
    first tensor that has one, else 1."""


@dataclass(frozen=True, eq=False, repr=False)
class Batches:
    """The batches of a source, read from any place. Made by :func:`batches`; it never changes.

    Iterating over it gives the batches of epoch 0.
    """

    source: Any
    """What was given to :func:`batches`."""
    plan: Plan
    """How to read it."""
    items: Arrays | Samples | Stream
    """The source in the form in which it is read."""
    transform: Callable[[Any], Any] | None
    device: torch.device | None
    pin_memory: bool

    def read(self, cursor: Cursor) -> Generator[Read, None, None]:
        """Read from a cursor to the end of its epoch.

        Close the iterator (or drop it) to stop early; that also ends its workers.

        Raises:
            DataError: the source is empty, the cursor does not fit it, samples can't be collated,
                or a worker died. What the source's own code raises passes through.
        """
        epoch, offset = self._place(cursor)
        epoch_tensor = torch.tensor(epoch)
        sizes_known = self.plan.batch_size is not None
        pieces = self.items.read(self.plan, epoch, offset, cursor.source)
        try:
            for batch, taken, state in pieces:
                offset += taken
                size = taken if sizes_known else _size(batch)
                # torch.full takes a quarter of torch.tensor's time, which shows in a tiny step
                place = Cursor(epoch_tensor, torch.full((), offset, dtype=torch.int64), state)
                yield Read(self._deliver(batch), place, size)
        except RuntimeError as error:
            # Torch's handler of signals tells of a lost worker in whatever line is being executed.
            raise_if_lost(error)
            raise

    def length(self, cursor: Cursor) -> int | None:
        """How many batches are left in the cursor's epoch; None if only reading can tell.

        For a stream it is what its ``len()`` promises, if it has one.
        """
        _, offset = self._place(cursor)
        if self.items.length is None:
            return None
        left, size = max(self.items.length - offset, 0), self.plan.batch_size or 1
        return left // size if self.plan.drop_last else -(-left // size)

    def position(self, cursor: Cursor) -> int:
        """How many batches of the cursor's epoch have been read, the last one perhaps in part."""
        _, offset = self._place(cursor)
        return -(-offset // (self.plan.batch_size or 1))

    def exhausted(self, cursor: Cursor) -> bool | None:
        """Whether no batch is left in the cursor's epoch; None if only reading can tell."""
        if isinstance(self.items, Stream):
            return True if has_ended(int(cursor.offset), cursor.source) else None
        return self.length(cursor) == 0

    def next_epoch(self, cursor: Cursor) -> Cursor:
        """The beginning of the epoch after the cursor's.

        A source with ``state_dict`` takes its state along, for it may count epochs itself; what is
        left of its epoch is read and dropped when the next one is read.
        """
        keep = isinstance(self.items, Stream) and self.items.initial.numel() > 0
        epoch = torch.tensor(int(cursor.epoch) + 1)
        return Cursor(epoch=epoch, source=cursor.source) if keep else Cursor(epoch=epoch)

    def divided(self, parts: int, start: int, stop: int | None = None) -> Batches:
        """The same batches, of which only some parts are read; each is a :class:`Parts`.

        The place in the data stays that in the whole: a cursor counts the samples of all parts, so
        a run may go on with another division.

        Args:
            parts: how many parts every batch is divided into, as equal as can be.
            start: the first part to read, from 0.
            stop: the one after the last; one part by default.

        Raises:
            ConfigurationError: there are no such parts.

        >>> data = batches(torch.arange(10), batch_size=4).divided(2, 1)
        >>> [read.batch.parts[0].tolist() for read in data.read(Cursor())]
        [[2, 3], [6, 7], [9]]
        """
        stop = start + 1 if stop is None else stop
        if not 0 <= start < stop <= parts:
            raise ConfigurationError(
                f"parts {start} to {stop} of {parts} can't be read: there must be at least one, "
                "and all of them within the batch"
            )
        return replace(self, plan=replace(self.plan, share=Share(parts, start, stop)))

    def __iter__(self) -> Iterator[Any]:
        for read in self.read(Cursor()):
            yield read.batch

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        length = self.length(Cursor())
        if length is None:
            # list() asks for the length and takes a TypeError, and nothing else, for an answer.
            raise TypeError("the length of this stream is not known; see Batches.length")
        return length

    def __repr__(self) -> str:
        count = "?" if self.items.length is None else self.items.length
        unit = "samples" if self.plan.batch_size else "batches"
        shuffle = f"shuffle=True, seed={self.plan.seed}" if self.plan.shuffle else "shuffle=False"
        kind = type(self.source).__qualname__
        return f"<Batches of {count} {unit} ({kind}), batch_size={self.plan.batch_size}, {shuffle}>"

    def _place(self, cursor: Cursor) -> tuple[int, int]:
        epoch, offset = int(cursor.epoch), int(cursor.offset)
        length = None if isinstance(self.items, Stream) else self.items.length
        if epoch < 0 or offset < 0 or (length is not None and offset > length):
            raise DataError(
                f"the cursor stands after item {offset} of epoch {epoch}, but an epoch of this "
                f"source has {length} items: it is a cursor of another source. Begin with Cursor()"
            )
        if length is not None and cursor.source.numel():
            raise DataError(
                "the cursor holds the state of a source with state_dict, but this source has none: "
                "it is a cursor of another source. Begin with Cursor()"
            )
        return epoch, offset

    def _deliver(self, batch: Any) -> Any:
        if isinstance(batch, Parts):
            return batch.replace(parts=tuple(map(self._deliver, batch.parts)))
        if self.pin_memory:
            batch = tree_map(
                lambda leaf: leaf.pin_memory() if _can_be_pinned(leaf) else leaf, batch
            )
        if self.device is not None:
            batch = tree_map(self._moved, batch)
        return batch if self.transform is None else self.transform(batch)

    def _moved(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(self.device, non_blocking=self.pin_memory)
        # Other libraries' batches know how to move themselves.
        return leaf.to(self.device) if hasattr(leaf, "to") else leaf


def _size(batch: Any) -> int:
    return int(batch.total) if isinstance(batch, Parts) else first_dimension(batch)


def _can_be_pinned(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu" and not leaf.is_pinned()


def batches(
    source: Any,
    batch_size: int | None = None,
    *,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    collate: Callable[[list[Any]], Any] | None = None,
    transform: Callable[[Any], Any] | None = None,
    sample_seeds: bool = True,
    num_workers: int = 0,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
    timeout: float = 0.0,
    multiprocessing_context: Any = None,
    worker_init_fn: Callable[[int], None] | None = None,
    pin_memory: bool = False,
    device: torch.device | str | None = None,
) -> Batches:
    """Describe the batches of a source; nothing is read yet.

    What a source can be:
        - A tree of **tensors or numpy arrays** with one row per sample (a tensor, an array, or a
          dict, tuple, record … of them), or torch's ``TensorDataset``: batches are cut out of the
          arrays directly. Arrays become tensors. Without ``shuffle`` a batch is a view of the
          source; don't write into it.
        - A **Dataset**, list, or anything with ``__getitem__`` and ``__len__``: read sample by
          sample and collated, in this process or in ``num_workers`` processes.
        - A **stream** of samples: an iterable that can be iterated over again, an
          ``IterableDataset``, or a function that gets the number of the epoch and returns an
          iterable or generator. It may be endless. If it (or its iterator) has ``state_dict()`` and
          ``load_state_dict(state)``, it is resumed through them: the state must count an item
          *before* it is yielded, and consist of plain values. Otherwise resuming reads again what
          was read of the epoch, with a :class:`DataWarning`. ``set_epoch(epoch)`` is called where
          there is one.
        - A torch **DataLoader** in sequential order: its dataset, batch size, collation and worker
          options are used. For another order hand over its dataset and ``shuffle=True``.

    The order of an epoch is a function of ``(seed, epoch)`` alone: the cursor counts samples, so
    that ``batch_size`` and ``num_workers`` may change at any sample. Torch's, numpy's and Python's
    random generators are left as they were.

    Several workers of an ``IterableDataset`` each iterate over a copy of it, and their items are
    taken in turn. Its ``__iter__`` must yield this worker's share only, for example every
    ``info.num_workers``-th item from ``info.id`` on with
    ``info = torch.utils.data.get_worker_info()``; such a stream resumes with the same number of
    workers only, or at the beginning of an epoch.

    Args:
        source: see above.
        batch_size: samples per batch; the last batch of an epoch may be smaller. None: the source's
            items are batches already.
        shuffle: read each epoch in a new random order. Streams can't be shuffled.
        seed: decides the orders and the samples' random draws.
        drop_last: leave out the last batch of an epoch if it is smaller.
        collate: makes a batch of a list of samples; :func:`puretrain.data.collate` by default.
            With ``batch_size=None`` it gets each item, which is left as it is by default.
        transform: a pure function of a batch, applied last, in this process. What draws random
            numbers belongs in the dataset, or in the loss, which gets a key.
        sample_seeds: read each sample with torch's, numpy's and Python's global generators seeded
            from ``(seed, epoch, index of the sample)``, so that random augmentations don't depend
            on workers and interruptions. Takes about 8 µs a sample, and 0.1 ms a batch without
            workers. Without it, such draws are not reproducible in workers, and move the global
            generators otherwise; a dataset's ``__getitems__`` is then used if it has one.
        num_workers: processes that read; 0: this one. Arrays are always read in this process.
        persistent_workers: keep the workers from one epoch to the next (not of a stream).
        prefetch_factor: batches (of a stream: items) that each worker reads ahead; 2 by default.
        timeout: seconds to wait for a worker; 0: as long as it lives.
        multiprocessing_context: how workers are started, for example ``"spawn"``.
        worker_init_fn: called in each worker with its number.
        pin_memory: copy batches into page-locked memory, for a faster transfer to an accelerator.
        device: where to move the batches; without waiting if ``pin_memory``.

    Raises:
        DataError: the source is empty, can't be read twice, or has no order that can be reproduced.
        ConfigurationError: an argument has a value that can't work.

    Example:
        >>> data = batches({"x": torch.arange(10.0), "y": torch.arange(10)}, 4, shuffle=True)
        >>> reads = list(data.read(Cursor()))
        >>> [read.size for read in reads], reads[1].cursor.offset
        ([4, 4, 2], tensor(8))
        >>> rest = list(batches(data.source, 3, shuffle=True).read(reads[0].cursor))
        >>> torch.equal(
        ...     torch.cat([reads[1].batch["y"], reads[2].batch["y"]]),
        ...     torch.cat([read.batch["y"] for read in rest]),
        ... )
        True
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "collate": collate,
        "num_workers": num_workers,
        "persistent_workers": persistent_workers,
        "prefetch_factor": prefetch_factor,
        "timeout": timeout,
        "multiprocessing_context": multiprocessing_context,
        "worker_init_fn": worker_init_fn,
        "pin_memory": pin_memory,
    }
    given = source
    if isinstance(source, DataLoader):
        twice = [name for name, value in options.items() if value]
        if twice:
            raise ConfigurationError(
                f"a DataLoader brings its own {', '.join(twice)}; set it there, or give "
                "batches() the loader's dataset instead of the loader"
            )
        if not is_stateful(source):
            options |= _options_of(source)
            source = source.dataset
    pin = _check_options(options)
    plan = Plan(
        batch_size=options["batch_size"],
        shuffle=options["shuffle"],
        seed=seed,
        drop_last=options["drop_last"],
        collate=options["collate"],
        sample_seeds=sample_seeds,
        num_workers=options["num_workers"],
        worker_options={name: options[name] for name in _WORKER_OPTIONS},
    )
    random_key(seed)  # refuses what is no seed
    items = _items(source, plan, in_loader=given is not source)
    if items.length is not None and not isinstance(items, Stream):
        if items.length == 0:
            raise DataError("source is empty: it holds no sample")
        if plan.drop_last and items.length < (plan.batch_size or 1):
            raise DataError(
                f"drop_last=True leaves no batch: the source has {items.length} samples, fewer "
                f"than batch_size={plan.batch_size}; use drop_last=False, or smaller batches"
            )
    return Batches(given, plan, items, transform, _device(device), pin)


_WORKER_OPTIONS = (
    "persistent_workers",
    "prefetch_factor",
    "timeout",
    "multiprocessing_context",
    "worker_init_fn",
)


def _options_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """The options of a loader whose order can be reproduced."""
    problem = None
    if not isinstance(loader.dataset, IterableDataset):
        if type(loader.sampler) is not SequentialSampler:
            problem = f"its order comes from a {type(loader.sampler).__name__}"
        elif loader.batch_size is not None and type(loader.batch_sampler) is not BatchSampler:
            problem = f"its batches come from a {type(loader.batch_sampler).__name__}"
    if loader.batch_size is None and loader.batch_sampler is not None:
        problem = f"its batches come from a {type(loader.batch_sampler).__name__}"
    if not loader.in_order:
        problem = "in_order=False gives the batches as they get ready"
    if problem:
        raise DataError(
            f"the order of this DataLoader can't be reproduced from a cursor: {problem}. Write "
            f"batches(loader.dataset, batch_size={loader.batch_size or '…'}, shuffle=True, "
            f"seed=0, num_workers={loader.num_workers}) instead"
        )
    return {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "collate": loader.collate_fn,
        "num_workers": loader.num_workers,
        "persistent_workers": loader.persistent_workers,
        "prefetch_factor": loader.prefetch_factor if loader.num_workers else None,
        "timeout": loader.timeout,
        "multiprocessing_context": loader.multiprocessing_context,
        "worker_init_fn": loader.worker_init_fn if loader.num_workers else None,
        "pin_memory": loader.pin_memory,
    }


def _check_options(options: Mapping[str, Any]) -> bool:
    """Refuse options that can't work; returns whether memory is to be pinned."""
    batch_size, num_workers = options["batch_size"], options["num_workers"]
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    check_whole("num_workers", num_workers, 0)
    if batch_size is None and options["drop_last"]:
        raise ConfigurationError(
            "drop_last needs a batch_size; ready batches are taken as they are"
        )
    arguments = {name: options[name] for name in _WORKER_OPTIONS}
    if num_workers == 0:
        useless = [name for name, value in arguments.items() if value]
        if useless:
            raise ConfigurationError(f"{', '.join(useless)} needs num_workers of at least 1")
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come again when the workers start
                DataLoader([0], batch_size=None, num_workers=num_workers, **arguments)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"torch's DataLoader refuses the options: {error}") from None
    if options["pin_memory"] and not torch.accelerator.is_available():
        warnings.warn(
            "pin_memory has no effect: torch finds no accelerator", DataWarning, stacklevel=3
        )
        return False
    return bool(options["pin_memory"])


def _items(source: Any, plan: Plan, *, in_loader: bool) -> Arrays | Samples | Stream:
    """Find out how a source is to be read."""
    if type(source) is TensorDataset and plan.batch_size is not None:
        if plan.collate is None:
            return Arrays.of(source.tensors)
        if in_loader and plan.collate is default_collate:
            # What the loader would yield, a list, and none of it a view of the dataset.
            return Arrays.of(list(source.tensors), copy=True)
    if isinstance(source, Tensor | np.ndarray | dict | FrozenDict | tuple | Record):
        if plan.batch_size is None or plan.collate is not None:
            raise ConfigurationError(
                "batch_size is missing: arrays are cut into batches. If the items are batches "
                "already, give a list of them"
                if plan.batch_size is None
                else "collate is of no use with arrays, which are cut, not collated; use transform"
            )
        return Arrays.of(source)
    refusal = _why_not(source)
    if refusal:
        raise DataError(refusal)
    if _has_samples(source):
        return Samples(source, len(source))
    if plan.shuffle:
        raise ConfigurationError(
            "shuffle: a stream has no order to change. Shuffle where it is made, for example in a "
            "function of the epoch, or give a list or a Dataset with __getitem__ and __len__"
        )
    if plan.num_workers and (is_stateful(source) or not isinstance(source, IterableDataset)):
        raise ConfigurationError(
            "num_workers: a stream that keeps its own state is read in this process; use "
            "num_workers=0, or torchdata's StatefulDataLoader as the source"
            if is_stateful(source)
            else "num_workers: only a Dataset or an IterableDataset can be read in workers; make "
            "the source one, or use num_workers=0"
        )
    return Stream.of(source)


def _has_samples(source: Any) -> bool:
    # Torch's Dataset gives even an IterableDataset a __getitem__, which only raises.
    return (
        not isinstance(source, IterableDataset)
        and hasattr(source, "__getitem__")
        and hasattr(source, "__len__")
    )


def _why_not(source: Any) -> str | None:
    kind = type(source).__name__
    if isinstance(source, type):
        return f"source is the class {source.__name__}; give an instance of it"
    if isinstance(source, str | bytes):
        return f"source is a {kind}; open what it names, and give arrays, samples or a Dataset"
    if isinstance(source, Mapping):
        return f"source is a {kind}; give dict(source), if its values are arrays"
    if isinstance(source, Set):
        return f"source is a {kind}, whose order changes from run to run; give sorted(source)"
    if _has_samples(source) or is_stateful(source):
        return None
    if hasattr(source, "__next__"):
        return (
            f"source is a {kind}, which can be iterated over only once, so neither a second epoch "
            "nor resuming could read it. Give a function that makes it, "
            "`batches(lambda epoch: …)`, or list(source)"
        )
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return f"source is a {kind} without __len__; define it, or make it an IterableDataset"
    if isinstance(source, Iterable) or callable(source):
        return None
    return (
        f"source is a {kind}, which can't be read; give tensors, arrays, a list, a Dataset, an "
        "iterable, or a function from the epoch to an iterable"
    )


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device: {error}") from None
