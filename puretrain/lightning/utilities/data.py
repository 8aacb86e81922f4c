"""Questions about data loaders."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.warnings import WarningCache

__all__ = ["extract_batch_size", "get_len", "has_iterable_dataset", "has_len"]

_cache = WarningCache()


def has_iterable_dataset(dataloader: Any) -> bool:
    """Whether a loader reads an :class:`IterableDataset`."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def has_len(dataloader: Any) -> bool:
    """Whether a loader knows how many batches it has.

    Raises:
        ValueError: it has none.
    """
    try:
        # an iterable dataset may have a length, a loader of it only then
        if len(dataloader) == 0:
            raise ValueError(
                "`Dataloader` returned 0 length. Please make sure that it returns at least 1 batch"
            )
    except (TypeError, NotImplementedError):
        return False
    if has_iterable_dataset(dataloader):
        rank_zero_warn(
            "Your `IterableDataset` has `__len__` defined."
            " In combination with multi-process data loading (when num_workers > 1),"
            " `__len__` could be inaccurate if each worker is not configured independently"
            " to avoid having duplicate data."
        )
    return True


def get_len(dataloader: Any) -> int | float:
    """The number of batches, infinite if it is not known.

    >>> from torch.utils.data import DataLoader
    >>> get_len(DataLoader(list(range(6)), batch_size=4)), get_len(iter(()))
    (2, inf)
    """
    return len(dataloader) if has_len(dataloader) else float("inf")


def _batch_sizes(batch: Any) -> Generator[int, None, None]:
    if isinstance(batch, Tensor):
        yield batch.size(0) if batch.ndim > 0 else 1
    elif isinstance(batch, str):
        yield len(batch)
    elif isinstance(batch, (Iterable, Mapping)):
        parts = batch.values() if isinstance(batch, Mapping) else batch
        for part in parts:
            yield from _batch_sizes(part)


def extract_batch_size(batch: Any) -> int:
    """The first length of the tensors of a batch.

    Warns if they differ.

    >>> import torch
    >>> extract_batch_size({"x": torch.zeros(4, 3), "y": torch.zeros(4)})
    4

    Raises:
        RuntimeError: there is no tensor.
    """
    sizes = list(_batch_sizes(batch))
    if not sizes:
        raise RuntimeError(
            "We could not infer the batch_size from the batch. Either simplify its structure or"
            " provide the batch_size as `self.log(..., batch_size=batch_size)`."
        )
    if len(set(sizes)) > 1:
        _cache.warn(
            "Trying to infer the `batch_size` from an ambiguous collection. The batch size we"
            f" found is {sizes[0]}. To avoid any miscalculations,"
            " use `self.log(..., batch_size=batch_size)`."
        )
    return sizes[0]
