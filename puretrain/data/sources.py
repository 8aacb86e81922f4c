"""How each kind of source is read: arrays, datasets of samples, and streams.

Each kind has a ``length`` (items of an epoch, None where it is not known) and a method
``read(plan, epoch, offset, state)`` that yields pieces from an item of an epoch to its end. What a
piece holds is a function of the source and these arguments, and torch's, numpy's and Python's
random generators are as they were whenever control returns to the caller.
"""

from __future__ import annotations

import collections
import functools
import itertools
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import optree
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from puretrain.data.collation import collate
from puretrain.data.parts import Share, cut
from puretrain.data.plain import pack, unpack
from puretrain.data.seeds import generators_kept, mix, seed_generators, seeded
from puretrain.errors import DataError
from puretrain.random import fold_in, generator, key, stream
from puretrain.tree import path_string, tree_flatten, tree_paths, tree_unflatten

__all__ = ["Arrays", "DataWarning", "Piece", "Plan", "Samples", "Stream"]

NO_STATE = torch.empty(0, dtype=torch.uint8)


class DataWarning(UserWarning):
    """Data is read in a way that works but costs more than it has to."""


class Piece(NamedTuple):
    """A batch on its way to the caller."""

    batch: Any
    taken: int
    """How many items of the source it was made of."""
    state: Tensor
    """What the source says of its place after it, as ``Cursor.source`` keeps it."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What was asked of :func:`puretrain.data.batches`."""

    batch_size: int | None
    shuffle: bool
    seed: int
    drop_last: bool
    collate: Callable[[list[Any]], Any] | None
    sample_seeds: bool
    num_workers: int
    worker_options: Mapping[str, Any]
    """Further arguments for torch's DataLoader."""
    share: Share | None = None
    """Which parts of each batch are read; None: all of it, undivided."""

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The first item and the one after the last of every batch of an epoch from an offset."""
        size = self.batch_size or 1
        stop = length - (length - offset) % size if self.drop_last else length
        for start in range(offset, stop, size):
            yield start, min(start + size, length)

    def divided(self, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The first item and the one after the last of what is read of each batch."""
        for start, stop in spans:
            if self.share is None or self.batch_size is None:
                yield start, stop
            else:
                yield from ((start + a, start + b) for a, b in self.share.cuts(stop - start))

    def gather(self, fetched: Iterator[Any], length: int) -> Any:
        """The next batch out of what was read of each, given how many items belong to it."""
        if self.share is None:
            return next(fetched)
        if self.batch_size is None:
            return cut(next(fetched), self.share)
        return self.share.of([next(fetched) for _ in self.share.cuts(length)], length)

    def order(self, epoch: int, length: int) -> Tensor | None:
        """The order of an epoch's items, int64 of shape ``(length,)``; None: as they come."""
        if not self.shuffle:
            return None
        random = generator(fold_in(key(self.seed), epoch))
        return torch.randperm(length, generator=random)

    def epoch_seed(self, epoch: int) -> int:
        """The 64-bit seed from which the seeds of an epoch's samples are mixed."""
        high, low = fold_in(stream(key(self.seed), "samples"), epoch).tolist()
        return int(high) << 32 | int(low)

    def generators_kept(self) -> AbstractContextManager[None]:
        """Keep the global generators while a source's own code runs, if it is seeded."""
        return generators_kept() if self.sample_seeds else nullcontext()


# ── Arrays ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Arrays:
    """Tensors with a common first dimension, in a tree."""

    leaves: list[Tensor]
    structure: optree.PyTreeSpec
    length: int
    copy: bool
    """Whether batches that could be views of the source are copied."""

    @classmethod
    def of(cls, tree: Any, *, copy: bool = False) -> Arrays:
        """Take a tree of tensors and numpy arrays; an array shares its memory with its tensor.

        Raises:
            DataError: a leaf is something else, or the first dimensions differ.
        """
        leaves, structure = tree_flatten(tree)
        names = [path_string(path) for path in tree_paths(tree)]
        if not leaves:
            raise DataError("source is a tree without a leaf; give it tensors or arrays")
        tensors = [_tensor(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
        length = tensors[0].shape[0]
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.shape[0] != length:
                raise DataError(
                    f"source: {name} has {tensor.shape[0]} samples, but {names[0]} has {length}; "
                    "all leaves need the same first dimension"
                )
        return cls(tensors, structure, length, copy)

    def read(self, plan: Plan, epoch: int, offset: int, state: Tensor) -> Iterator[Piece]:
        """Yield the batches of an epoch from a sample on."""
        cut_out = self._cutter(plan.order(epoch, self.length))
        fetched = (cut_out(*span) for span in plan.divided(plan.spans(offset, self.length)))
        for start, stop in plan.spans(offset, self.length):
            yield Piece(plan.gather(fetched, stop - start), stop - start, NO_STATE)

    def _cutter(self, order: Tensor | None) -> Callable[[int, int], Any]:
        """A function that makes a batch of the items from one place of an order to another."""
        if order is None:

            def cut_out(start: int, stop: int) -> Any:
                rows = [leaf[start:stop] for leaf in self.leaves]
                if self.copy:
                    rows = [part.clone() for part in rows]
                return tree_unflatten(self.structure, rows)

            return cut_out
        orders = {leaf.device: order.to(leaf.device) for leaf in self.leaves}

        def pick(start: int, stop: int) -> Any:
            indices = {device: order[start:stop] for device, order in orders.items()}
            rows = [leaf.index_select(0, indices[leaf.device]) for leaf in self.leaves]
            return tree_unflatten(self.structure, rows)

        return pick


def _tensor(leaf: Any, name: str) -> Tensor:
    if isinstance(leaf, np.ndarray):
        if any(stride < 0 for stride in leaf.strides):
            leaf = np.ascontiguousarray(leaf)
        try:
            with warnings.catch_warnings():
                # Read-only memory (a file mapped by numpy) is fine: batches are for reading.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                leaf = torch.from_numpy(leaf)
        except TypeError:
            raise DataError(
                f"source: {name} is an array of dtype {leaf.dtype}, which torch does not have; "
                "convert it with .astype, or give a list of samples and `collate=`"
            ) from None
    if not isinstance(leaf, Tensor):
        raise DataError(
            f"source: {name} is of type {type(leaf).__name__}; the leaves of a dict, tuple or "
            "record are tensors or arrays with one row per sample. For samples one by one give a "
            "list or a Dataset"
        )
    if leaf.layout != torch.strided:
        raise DataError(f"source: {name} is a {leaf.layout} tensor; use .to_dense()")
    if leaf.dim() == 0:
        raise DataError(f"source: {name} has no first dimension to count samples by")
    return leaf


# ── Samples ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Samples:
    """Anything with ``__getitem__`` and ``__len__``."""

    dataset: Any
    length: int
    idle: list[DataLoader[Any]] = field(default_factory=list)
    """Loaders with persistent workers that no one reads from at present."""

    def read(self, plan: Plan, epoch: int, offset: int, state: Tensor) -> Iterator[Piece]:
        """Yield the batches of an epoch from a sample on."""
        order = plan.order(epoch, self.length)
        # Lists and ranges run no code of the caller that could draw anything.
        plain = type(self.dataset) in (list, range) and plan.collate is None
        seed = plan.epoch_seed(epoch) if plan.sample_seeds and not plain else None

        def requests() -> Iterator[_Request]:
            for start, stop in plan.divided(plan.spans(offset, self.length)):
                yield seed, range(start, stop) if order is None else order[start:stop].tolist()

        fetch = _Fetch(self.dataset, plan.collate, ready=plan.batch_size is None)
        if plan.num_workers:
            fetched = self._in_workers(plan, fetch, requests(), plan.epoch_seed(epoch))
        else:
            fetched = _here(fetch, requests())
        try:
            for start, stop in plan.spans(offset, self.length):
                yield Piece(plan.gather(fetched, stop - start), stop - start, NO_STATE)
        finally:
            fetched.close()

    def _in_workers(
        self, plan: Plan, fetch: _Fetch, requests: Iterator[_Request], seed: int
    ) -> Generator[Any, None, None]:
        loader = self.idle.pop() if self.idle else _loader(fetch, plan, seed, sampler=_Requests())
        cast(_Requests, loader.sampler).current = requests
        workers = _started(loader)
        reusable = False
        try:
            yield from _received(workers)
            reusable = loader.persistent_workers
        except GeneratorExit:
            reusable = loader.persistent_workers
            raise
        finally:
            if reusable:
                self.idle.append(loader)
            else:
                _shut_down(workers)


_Request = tuple[int | None, Sequence[int]]
"""Which samples to make a batch of, and the epoch's seed if they are to be seeded."""


class _Requests:
    """The sampler of a loader: what its workers are to read in the current epoch."""

    current: Iterator[_Request] = iter(())

    def __iter__(self) -> Iterator[_Request]:
        return self.current


class _Fetch:
    """Reads one batch, in this process or in a worker: a dataset whose indices are requests."""

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any] | None, *, ready: bool
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.ready = ready

    def __getitem__(self, request: _Request) -> Any:
        seed, indices = request
        if seed is None and hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(list(indices))
        else:
            samples = [self._sample(index, seed) for index in indices]
        return _batch_of(samples, indices, self.collate, seed, ready=self.ready)

    def _sample(self, index: int, seed: int | None) -> Any:
        if seed is not None:
            seed_generators(mix(seed, index))
        try:
            return self.dataset[index]
        except Exception as error:
            error.add_note(f"raised by sample {index} of the source, {_name(self.dataset)}")
            raise


def _here(fetch: _Fetch, requests: Iterator[_Request]) -> Generator[Any, None, None]:
    for request in requests:
        with nullcontext() if request[0] is None else generators_kept():
            batch = fetch[request]
        yield batch


def _batch_of(
    items: list[Any],
    indices: Sequence[int],
    user_collate: Callable[[Any], Any] | None,
    seed: int | None,
    *,
    ready: bool,
) -> Any:
    if user_collate is None:
        return items[0] if ready else collate(items, indices)
    if seed is not None:
        seed_generators(mix(seed, -2 - indices[0]))
    return user_collate(items[0] if ready else items)


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Stream:
    """An iterable, or a function from the epoch to an iterable."""

    source: Any
    length: int | None
    initial: Tensor = NO_STATE
    """The state of a source that has ``state_dict``, before anything was read from it."""

    @classmethod
    def of(cls, source: Any) -> Stream:
        """Take an iterable, or a function from the epoch to one.

        Raises:
            DataError: the source keeps a state that is not plain.
        """
        try:
            length = len(source)
        except (TypeError, NotImplementedError):
            length = None
        if is_stateful(source):
            with generators_kept():
                return cls(source, length, pack([False, source.state_dict()]))
        return cls(source, length)

    def read(self, plan: Plan, epoch: int, offset: int, state: Tensor) -> Iterator[Piece]:
        """Yield the batches of an epoch from an item on."""
        if has_ended(offset, state):
            return
        size = plan.batch_size or 1
        at_start = offset == 0
        seed = plan.epoch_seed(epoch) if plan.sample_seeds else None
        with plan.generators_kept():
            run = (self._in_workers if plan.num_workers else self._here)(plan, epoch, offset, state)
        try:
            skipped = 0 if state.numel() and not plan.num_workers else offset
            if skipped:
                self._skip(run, plan, epoch, skipped)
            while True:
                with plan.generators_kept():
                    items = list(itertools.islice(run.items, size))
                    if not items or (plan.drop_last and len(items) < size):
                        break
                    ready = plan.batch_size is None
                    parts = (
                        _batch_of(
                            items[a:b],
                            range(offset + a, offset + b),
                            plan.collate,
                            seed,
                            ready=ready,
                        )
                        for a, b in plan.divided([(0, len(items))])
                    )
                    batch = plan.gather(parts, len(items))
                    state = run.state(len(items) < size)
                offset += len(items)
                at_start = False
                yield Piece(batch, len(items), state)
                if len(items) < size:
                    break
        finally:
            run.close()
        if at_start:
            what = f"fewer than {size} samples, and drop_last=True" if items else "nothing"
            raise DataError(
                f"the source, {_name(self.source)}, yielded {what} in epoch {epoch}; "
                "it must yield a batch in every epoch"
            )

    def _skip(self, run: _Run, plan: Plan, epoch: int, count: int) -> None:
        warnings.warn(
            f"the source, {_name(self.source)}, can't be set to a place: {count} items of epoch "
            f"{epoch} are read again and dropped. Give it state_dict() and load_state_dict(state), "
            "or make it a Dataset with __getitem__ and __len__",
            DataWarning,
            stacklevel=4,
        )
        with plan.generators_kept():
            found = sum(1 for _ in itertools.islice(run.items, count))
        if found < count:
            raise DataError(
                f"the cursor stands after {count} items of epoch {epoch}, but the source, "
                f"{_name(self.source)}, ended after {found}: it is a cursor of "
                "another source. Begin with Cursor()"
            )

    def _here(self, plan: Plan, epoch: int, offset: int, state: Tensor) -> _Run:
        seed = plan.epoch_seed(epoch)
        first = offset if state.numel() else 0

        def begin(state: Tensor) -> tuple[Iterator[Any], Any, Any]:
            if plan.sample_seeds:
                seed_generators(mix(seed, -1))
            iterator, owner = self._iterate(epoch, state)
            items = seeded(iterator, seed, first) if plan.sample_seeds else iterator
            return items, iterator, owner

        items, iterator, owner = begin(state if state.numel() else self.initial)
        if state.numel() and offset == 0:
            # The state is from the last epoch. What was left of that is dropped: nothing, or the
            # samples that drop_last left out.
            if not _read_state(state)[0]:
                collections.deque(items, maxlen=0)
            # Having come to their end, some sources go on with the next epoch, and some stay there
            # until they are put back to their beginning.
            for following in (NO_STATE, self.initial):
                ahead = list(itertools.islice(items, 1))
                if ahead:
                    items = itertools.chain(ahead, items)
                    break
                items, iterator, owner = begin(following)

        def state_now(ended: bool) -> Tensor:
            return NO_STATE if owner is None else pack([ended, owner.state_dict()])

        def close() -> None:
            if isinstance(iterator, Generator):
                iterator.close()

        return _Run(items, state_now, close)

    def _iterate(self, epoch: int, state: Tensor) -> tuple[Iterator[Any], Any]:
        iterable = self._of_epoch(epoch)
        if is_stateful(iterable):
            if state.numel():
                iterable.load_state_dict(_read_state(state)[1])
            return iter(iterable), iterable
        iterator = iter(iterable)
        owner = iterator if is_stateful(iterator) else None
        if state.numel():
            if owner is None:
                raise DataError(
                    f"the cursor holds the state of another source: this one, {_name(self.source)},"
                    " has no load_state_dict (or was read with another num_workers). Begin with "
                    "Cursor()"
                )
            owner.load_state_dict(_read_state(state)[1])
        return iterator, owner

    def _of_epoch(self, epoch: int) -> Any:
        iterable = self.source
        if is_function(iterable):
            iterable = iterable(epoch)
        if hasattr(iterable, "set_epoch"):
            iterable.set_epoch(epoch)
        return iterable

    def _in_workers(self, plan: Plan, epoch: int, offset: int, state: Tensor) -> _Run:
        # Who yields which items, and so their order, depends on the number of workers.
        number = plan.num_workers
        mark = pack({"num_workers": number}) if number > 1 else NO_STATE
        if offset and not torch.equal(state, mark):
            before = unpack(state) if state.numel() else {"num_workers": "0 or 1"}
            raise DataError(
                f"the cursor stands within epoch {epoch} of a stream read with {before}; the order "
                f"of a stream depends on its workers. Resume with that number, not with {number}"
            )
        seed = plan.epoch_seed(epoch)
        share = _WorkerShare(self._of_epoch(epoch), seed if plan.sample_seeds else None)
        workers = _started(_loader(share, plan, seed))
        return _Run(_received(workers), lambda _: mark, functools.partial(_shut_down, workers))


class _Run(NamedTuple):
    """A running iteration of a stream."""

    items: Iterator[Any]
    state: Callable[[bool], Tensor]
    """The state of the source now, as ``Cursor.source`` keeps it, given whether it has ended."""
    close: Callable[[], None]


class _WorkerShare(IterableDataset[Any]):
    """What one worker yields of a stream, its draws seeded."""

    def __init__(self, dataset: Iterable[Any], seed: int | None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        if self.seed is None:
            return iter(self.dataset)
        info = get_worker_info()
        seed = mix(self.seed, -2 - info.id) if info is not None and info.id else self.seed
        seed_generators(mix(seed, -1))
        return seeded(iter(self.dataset), seed)


# ── Workers ───────────────────────────────────────────────────────────────────────────────────────


def _loader(dataset: Any, plan: Plan, seed: int, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=plan.num_workers,
        worker_init_fn=functools.partial(_start_worker, plan.worker_options.get("worker_init_fn")),
        # Without one of its own, a loader draws the seed of its workers from torch's global one.
        generator=torch.Generator().manual_seed(seed),
        **{name: x for name, x in plan.worker_options.items() if name != "worker_init_fn"},
        **arguments,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker_init: Callable[[int], None] | None, number: int) -> None:
    # The dataset that the caller's code finds there has to be the caller's, not our wrapper.
    info = get_worker_info()
    object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[union-attr]
    if worker_init is not None:
        worker_init(number)


_LOSSES = (RuntimeError, ConnectionError, EOFError)
"""What torch raises when a worker is gone, among other things."""


def _started(loader: DataLoader[Any]) -> Any:
    try:
        return iter(loader)
    except _LOSSES as error:
        raise_if_lost(error)
        raise


def _received(workers: Any) -> Iterator[Any]:
    while True:
        try:
            batch = next(workers)
        except StopIteration:
            return
        except _LOSSES as error:
            raise_if_lost(error)
            raise
        yield batch


def raise_if_lost(error: BaseException) -> None:
    """Raise a DataError if an exception tells that a worker is gone."""
    # Else it is the caller's own error, which holds the traceback from the worker.
    if _tells_of_a_lost_worker(error):
        what = str(error) or type(error).__name__
        raise DataError(
            f"a worker that reads the source is gone or stuck: {what}. If it was killed for "
            "lack of memory, use fewer workers or a smaller prefetch_factor; num_workers=0 "
            "shows an error of the dataset itself; timeout= is in seconds"
        ) from error


def _tells_of_a_lost_worker(error: BaseException) -> bool:
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith(("DataLoader worker (pid", "DataLoader timed out"))
    # The connection over which a worker hands its tensors broke, unless the error was raised in
    # the worker, by the dataset: torch raises that again as the same type, and says so.
    return not (text.startswith("Caught ") and "in DataLoader worker process" in text)


def _shut_down(workers: Any) -> None:
    # Their iterator does so when it is collected, but a traceback may keep it alive for long.
    try:
        workers._shutdown_workers()
    except RuntimeError as error:
        # Torch's signal handler raises wherever the main thread is when a worker was killed. Here
        # they are to end anyway; if that has lost a batch, a DataError is on its way.
        if not _tells_of_a_lost_worker(error):
            raise


# ── What a source is ──────────────────────────────────────────────────────────────────────────────


def is_stateful(source: Any) -> bool:
    """Whether an object can say where it is and be put there (torchdata's protocol)."""
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")


def has_ended(offset: int, state: Tensor) -> bool:
    """Whether a stateful source was seen to end its epoch where a cursor stands."""
    # Such a source may be at the beginning of its next epoch already.
    if offset == 0 or state.numel() == 0:
        return False
    content = unpack(state)
    return isinstance(content, list) and content[:1] == [True]


def _read_state(state: Tensor) -> tuple[bool, Any]:
    match unpack(state):
        case [bool() as ended, content]:
            return ended, content
        case content:
            raise DataError(
                f"the cursor holds {content!r}, which is no state of this source: it is one of "
                "another source, or of this one read with another num_workers. Begin with Cursor()"
            )


def is_function(source: Any) -> bool:
    """Whether a source is a function from the epoch to an iterable."""
    return callable(source) and not hasattr(source, "__iter__")


def _name(source: Any) -> str:
    name: str = getattr(source, "__qualname__", type(source).__qualname__)
    return name
