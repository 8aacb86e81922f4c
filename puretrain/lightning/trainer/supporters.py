"""Several loaders as one, a running mean, and predictions kept for a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = [
    "Accumulator",
    "CombinedDataset",
    "CombinedLoader",
    "CombinedLoaderIterator",
    "CycleIterator",
    "PredictionCollection",
    "TensorRunningAccum",
    "flatten",
    "length_of",
]

_UNKNOWN = float("inf")


class TensorRunningAccum:
    """The last values of a series, without waiting for their device.

    >>> accumulated = TensorRunningAccum(2)
    >>> for value in (1.0, 2.0, 4.0):
    ...     accumulated.append(torch.tensor(value))
    >>> accumulated.last(), accumulated.mean(), accumulated.min()
    (tensor(4.), tensor(3.), tensor(2.))
    """

    def __init__(self, window_length: int) -> None:
        """Begin empty.

        Args:
            window_length: how many values to keep.
        """
        self.window_length = window_length
        self.reset(window_length)

    def reset(self, window_length: int | None = None) -> None:
        """Forget all values.

        Args:
            window_length: how many to keep from now on; by default as many as before.
        """
        if window_length is not None:
            self.window_length = window_length
        self.memory: Tensor | None = None
        self.current_idx = 0
        self.last_idx: int | None = None
        self.rotated = False

    def append(self, x: Tensor) -> None:
        """Add a value; the oldest goes when there is no room."""
        if self.memory is None:
            dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
            self.memory = torch.zeros(self.window_length, *x.shape, device=x.device, dtype=dtype)
        self.memory = self.memory.to(x.device)
        with torch.no_grad():
            self.memory[self.current_idx] = x
        self.last_idx = self.current_idx
        self.current_idx = (self.current_idx + 1) % self.window_length
        self.rotated = self.rotated or self.current_idx == 0

    def last(self) -> Tensor | None:
        """The newest value, None if there is none."""
        if self.last_idx is None or self.memory is None:
            return None
        return self.memory[self.last_idx].float()

    def _values(self) -> Tensor | None:
        if self.last_idx is None or self.memory is None:
            return None
        return self.memory if self.rotated else self.memory[: self.current_idx]

    def mean(self) -> Tensor | None:
        """The mean of the kept values, None if there are none."""
        values = self._values()
        return None if values is None else values.mean()

    def max(self) -> Tensor | None:
        """The largest kept value, None if there are none."""
        values = self._values()
        return None if values is None else values.max()

    def min(self) -> Tensor | None:
        """The smallest kept value, None if there are none."""
        values = self._values()
        return None if values is None else values.min()


class Accumulator:
    """The mean of numbers, one at a time."""

    def __init__(self) -> None:
        self.num_values = 0
        self.total: Any = 0

    def accumulate(self, x: Any) -> None:
        """Add a number."""
        with torch.no_grad():
            self.total = self.total + x
            self.num_values += 1

    def mean(self) -> Any:
        """The mean, 0 of nothing."""
        return self.total / max(self.num_values, 1)


class PredictionCollection:
    """Predictions by file and column, until they are written."""

    def __init__(self, global_rank: int, world_size: int) -> None:
        """Begin empty.

        Args:
            global_rank: of this process; if there are several, it is in the names of the files.
            world_size: the number of processes.
        """
        self.global_rank = global_rank
        self.world_size = world_size
        self.predictions: dict[str, dict[str, list[Any]]] = {}
        self.num_predictions = 0

    def _add_prediction(self, name: str, values: Any, filename: str) -> None:
        column = self.predictions.setdefault(os.fspath(filename), {}).setdefault(name, [])
        values = values.detach().tolist() if isinstance(values, Tensor) else values
        column.extend(values if isinstance(values, (list, tuple)) else [values])

    def add(self, predictions: Mapping[str, Mapping[str, Any]]) -> None:
        """Add columns of values, by file."""
        for filename, columns in predictions.items():
            for name, values in columns.items():
                self._add_prediction(name, values, filename)

    def to_disk(self) -> None:
        """Write each file with ``torch.save``, as a list with a dictionary for each sample.

        With several processes the rank is added to the name: ``predictions.pt`` becomes
        ``predictions_rank_0.pt``. Tensors are written as numbers, or lists of them.

        Raises:
            ValueError: the columns of a file have different lengths.
        """
        for filename, columns in self.predictions.items():
            path = Path(filename).expanduser()
            if self.world_size > 1:
                path = path.with_name(f"{path.stem}_rank_{self.global_rank}{path.suffix}")
            path.parent.mkdir(exist_ok=True, parents=True)
            if len({len(values) for values in columns.values()}) > 1:
                lengths = {name: len(values) for name, values in columns.items()}
                raise ValueError(
                    f"Mismatching feature column lengths found in stored predictions: {lengths}"
                )
            rows = zip(*columns.values(), strict=True)
            torch.save([dict(zip(columns, row, strict=True)) for row in rows], path)


class CycleIterator:
    """Goes through an iterable again and again, up to a number of items.

    >>> list(CycleIterator(range(3), 5))
    [0, 1, 2, 0, 1]
    """

    def __init__(self, loader: Any, length: int | None = None) -> None:
        """Cycle.

        Args:
            loader: the iterable.
            length: the number of items; by default without end.
        """
        self.length: float = _UNKNOWN if length is None else length
        self.loader = loader
        self.counter = 0
        self._loader_iter: Iterator[Any] | None = None

    def __iter__(self) -> CycleIterator:
        self.counter = 0
        self._loader_iter = iter(self.loader)
        return self

    def __next__(self) -> Any:
        if self.counter >= self.length:
            raise StopIteration
        if self._loader_iter is None:
            self._loader_iter = iter(self.loader)
        self.counter += 1
        try:
            return next(self._loader_iter)
        except StopIteration:
            self._loader_iter = iter(self.loader)
            return next(self._loader_iter)

    def __len__(self) -> float:  # type: ignore[override] - called by name, it may be infinite
        return self.length


_COMPUTE = {
    "min_size": min,
    "max_size": max,
    "max_size_cycle": max,
    "sequential": sum,
}


def flatten(loaders: Any) -> list[Any]:
    """The loaders inside nested sequences and mappings."""
    if isinstance(loaders, Mapping):
        return [leaf for each in loaders.values() for leaf in flatten(each)]
    if isinstance(loaders, Sequence) and not isinstance(loaders, (str, range)):
        return [leaf for each in loaders for leaf in flatten(each)]
    return [loaders]


def length_of(loader: Any) -> float:
    """The number of batches, infinite if it is not known."""
    try:
        return loader.__len__()  # type: ignore[no-any-return]
    except (TypeError, NotImplementedError, AttributeError):
        return _UNKNOWN


class CombinedDataset:
    """The datasets of several loaders, and how many samples they have together."""

    COMPUTE_FUNCS: ClassVar[dict[str, Any]] = {"min_size": min, "max_size_cycle": max}

    def __init__(self, datasets: Any, mode: str = "min_size") -> None:
        """Join datasets.

        Args:
            datasets: a sequence or mapping of them.
            mode: as for :class:`CombinedLoader`.
        """
        self.datasets = datasets
        if mode not in self.COMPUTE_FUNCS:
            raise MisconfigurationException(
                f'You have selected unsupported mode "{mode}", please select one the:'
                f" {list(self.COMPUTE_FUNCS)}."
            )
        self.mode = mode

    @property
    def max_len(self) -> float:
        """The length of the longest."""
        return self._calc_num_data(self.datasets, "max_size_cycle")

    @property
    def min_len(self) -> float:
        """The length of the shortest."""
        return self._calc_num_data(self.datasets, "min_size")

    @staticmethod
    def _calc_num_data(datasets: Any, mode: str) -> float:
        if mode not in CombinedDataset.COMPUTE_FUNCS:
            raise MisconfigurationException(
                f"Invalid Mode: {mode}. Expected one of {list(CombinedDataset.COMPUTE_FUNCS)}."
            )
        # a loader inside counts with its dataset
        lengths = [length_of(getattr(leaf, "dataset", leaf)) for leaf in flatten(datasets)]
        return CombinedDataset.COMPUTE_FUNCS[mode](lengths)

    def __len__(self) -> int:
        return int(self._calc_num_data(self.datasets, self.mode))


class CombinedLoader:
    """Several loaders as one, whose batches have the structure of the loaders.

    >>> loaders = {"a": range(4), "b": range(10, 12)}
    >>> [batch for batch in CombinedLoader(loaders, "max_size_cycle")][-1]
    {'a': 3, 'b': 11}
    >>> len(CombinedLoader(loaders))
    2
    """

    SUPPORTED_MODES = ("min_size", "max_size_cycle", "max_size", "sequential")

    def __init__(self, loaders: Any, mode: str = "min_size") -> None:
        """Join loaders.

        Args:
            loaders: a sequence or mapping of iterables, also nested.
            mode: ``min_size`` ends with the shortest; ``max_size_cycle`` goes on to the end of the
                longest and begins the others again; ``max_size`` gives None in their place;
                ``sequential`` takes one after the other.

        Raises:
            MisconfigurationException: there is no such mode.
        """
        if mode not in self.SUPPORTED_MODES:
            raise MisconfigurationException(
                f"Invalid Mode: {mode}. Expected one of {list(self.SUPPORTED_MODES)}."
            )
        self.loaders = loaders
        self.mode = mode
        datasets = self._map(lambda loader: getattr(loader, "dataset", None))
        self.dataset = CombinedDataset(
            datasets, mode if mode in CombinedDataset.COMPUTE_FUNCS else "max_size_cycle"
        )

    def _map(self, function: Any) -> Any:
        """A structure like that of the loaders, with a function of each."""
        return _map_leaves(self.loaders, function)

    @property
    def flattened(self) -> list[Any]:
        """The loaders in a list."""
        return flatten(self.loaders)

    @property
    def sampler(self) -> Any:
        """The samplers, in the structure of the loaders."""
        return self._map(lambda loader: getattr(loader, "sampler", None))

    def __iter__(self) -> Iterator[Any]:
        if self.mode == "sequential":
            return (batch for loader in self.flattened for batch in loader)
        if self.mode == "min_size":
            return CombinedLoaderIterator(self.loaders)
        return self._to_the_longest(cycle=self.mode == "max_size_cycle")

    def _to_the_longest(self, *, cycle: bool) -> Iterator[Any]:
        loaders = self.flattened
        iterators = [iter(loader) for loader in loaders]
        ended = [False] * len(loaders)
        while True:
            batches = []
            for place, loader in enumerate(loaders):
                batch = None
                if cycle or not ended[place]:
                    try:
                        batch = next(iterators[place])
                    except StopIteration:
                        ended[place] = True
                        if all(ended):
                            return
                        if cycle:
                            iterators[place] = iter(loader)
                            batch = next(iterators[place])
                batches.append(batch)
            values = iter(batches)
            yield self._map(lambda _loader, values=values: next(values))

    @staticmethod
    def _calc_num_batches(loaders: Any, mode: str = "min_size") -> float:
        return _COMPUTE[mode]([length_of(loader) for loader in flatten(loaders)])

    def __len__(self) -> int:
        length = self._calc_num_batches(self.loaders, self.mode)
        if length == _UNKNOWN:
            raise TypeError("a loader without length is among the loaders")
        return int(length)


def _map_leaves(loaders: Any, function: Any) -> Any:
    if isinstance(loaders, Mapping):
        kind: Any = type(loaders)
        return kind({key: _map_leaves(each, function) for key, each in loaders.items()})
    if isinstance(loaders, Sequence) and not isinstance(loaders, (str, range)):
        kind = type(loaders)
        values = [_map_leaves(each, function) for each in loaders]
        return kind(*values) if hasattr(loaders, "_fields") else kind(values)
    return function(loaders)


class CombinedLoaderIterator:
    """Takes a batch of each loader until one has no more."""

    def __init__(self, loaders: Any) -> None:
        """Begin all loaders.

        Args:
            loaders: a sequence or mapping of iterables, also nested.
        """
        self.loaders = loaders
        self._loader_iters: Any = None

    @property
    def loader_iters(self) -> Any:
        """The iterators, in the structure of the loaders."""
        if self._loader_iters is None:
            self._loader_iters = self.create_loader_iters(self.loaders)
        return self._loader_iters

    def __iter__(self) -> CombinedLoaderIterator:
        return self

    def __next__(self) -> Any:
        return self.request_next_batch(self.loader_iters)

    @staticmethod
    def request_next_batch(loader_iters: Any) -> Any:
        """A batch of each."""
        return _map_leaves(loader_iters, next)

    @staticmethod
    def create_loader_iters(loaders: Any) -> Any:
        """An iterator of each."""
        return _map_leaves(loaders, iter)
