"""The loaders of a run: where they come from, how much of them is read, and their place.

:class:`LoaderSource` gives the batches of a loader to the core's loop. The order of an epoch comes
from torch's global generator and the generators of the samplers, as in any torch program; their
states at the beginning of the epoch are in the cursor, so that an interrupted epoch is read on with
its next batch.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from puretrain.data import Read
from puretrain.data.plain import pack, unpack
from puretrain.lightning.trainer.calls import calling, implements, profiled
from puretrain.lightning.trainer.distributed import prepared
from puretrain.lightning.trainer.supporters import CombinedLoader, flatten, length_of
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import PossibleUserWarning, WarningCache
from puretrain.state import Cursor

__all__ = [
    "Item",
    "LoaderSource",
    "are_due",
    "capture",
    "evaluation_loaders",
    "has_loaders",
    "limited",
    "loaders_for",
    "put_back",
    "training_loader",
]

_warnings = WarningCache()


class Item:
    """One batch as the loop sees it: a leaf, whatever the batch is made of."""

    __slots__ = ("batch", "index", "last")

    def __init__(self, batch: Any, index: int, last: bool) -> None:
        self.batch, self.index, self.last = batch, index, last


# ── Generators ────────────────────────────────────────────────────────────────────────────────────


def capture(loader: Any = None) -> Tensor:
    """The states of all random generators, and of those that a loader has of its own.

    Returns:
        uint8 of shape ``(n,)``.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, np.asarray(keys), position, has_gauss, gauss),
        "python": random.getstate(),
        "own": [generator.get_state() for generator in _generators(loader)],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [s.cpu() for s in torch.cuda.get_rng_state_all()]
    return pack(state)


def put_back(states: Tensor, loader: Any = None) -> None:
    """Set all random generators to what :func:`capture` has found."""
    state = unpack(states)
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, own in zip(_generators(loader), state["own"], strict=False):
        generator.set_state(own)


def _generators(loader: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for each in _single_loaders(loader):
        samplers = [each, getattr(each, "sampler", None), getattr(each, "batch_sampler", None)]
        samplers.append(getattr(samplers[-1], "sampler", None))
        for owner in samplers:
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
                found.append(generator)
    return found


def _single_loaders(loader: Any) -> list[Any]:
    if loader is None:
        return []
    return loader.flattened if isinstance(loader, CombinedLoader) else [loader]


# ── Where loaders come from ───────────────────────────────────────────────────────────────────────


def loaders_for(trainer: Any, kind: str) -> Any:
    """The loader or loaders of a stage as the user gave them: to the method, or by a hook."""
    given = trainer._given_loaders.get(kind)
    if given is not None:
        return given
    name = f"{kind}_dataloader"
    for owner in (trainer.datamodule, trainer._module):
        if owner is not None and implements(owner, name):
            with calling(trainer, name):
                return getattr(owner, name)()
    return None


def has_loaders(trainer: Any, kind: str) -> bool:
    """Whether a stage has loaders, without asking for them."""
    if trainer._given_loaders.get(kind) is not None:
        return True
    name = f"{kind}_dataloader"
    return any(implements(owner, name) for owner in (trainer.datamodule, trainer._module) if owner)


def are_due(trainer: Any, kind: str) -> bool:
    """Whether the loaders must be asked for again."""
    if not trainer._reload_every or trainer.sanity_checking:
        return False
    before = trainer._loaded_at.get(kind)
    return before is not None and (trainer.current_epoch - before) >= trainer._reload_every


def training_loader(trainer: Any) -> Any:
    """One loader for training."""
    loaders = loaders_for(trainer, "train")
    if loaders is None:
        raise MisconfigurationException(
            "No `train_dataloader()` method defined, and no loader given to `fit`. Lightning "
            "`Trainer` expects as minimum `training_step()`, `train_dataloader()` and "
            "`configure_optimizers()` to be defined."
        )
    if isinstance(loaders, (list, tuple, dict)) and not (
        isinstance(loaders, (list, tuple)) and not any(_is_loader(x) for x in flatten(loaders))
    ):
        loaders = CombinedLoader(_mapped(loaders, trainer), trainer.multiple_trainloader_mode)
    else:
        loaders = _prepared(loaders, trainer, "train")
    if trainer.overfit_batches > 0:
        loaders = _without_shuffling(loaders)
    return loaders


def _is_loader(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, Tensor | str)


def _mapped(loaders: Any, trainer: Any) -> Any:
    if isinstance(loaders, dict):
        return {key: _mapped(value, trainer) for key, value in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_mapped(value, trainer) for value in loaders]
    return _prepared(loaders, trainer, "train")


def evaluation_loaders(trainer: Any, kind: str) -> list[Any]:
    """The loaders for validation, test or prediction."""
    if trainer.overfit_batches > 0 and kind in {"val", "test"} and has_loaders(trainer, "train"):
        loader = trainer._train_loader
        return [training_loader(trainer) if loader is None else loader]
    loaders = loaders_for(trainer, kind)
    if loaders is None:
        return []
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.flattened
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if not isinstance(loaders, (list, tuple)) or not any(_is_loader(x) for x in loaders):
        loaders = [loaders]
    return [_prepared(loader, trainer, kind) for loader in loaders if loader is not None]


def _prepared(loader: Any, trainer: Any, kind: str) -> Any:
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise MisconfigurationException(
            f"the {kind} loader is a {type(loader).__name__}; give a DataLoader or another iterable"
        )
    if not isinstance(loader, DataLoader):
        return loader
    shuffles = isinstance(loader.sampler, RandomSampler)
    if kind != "train" and shuffles:
        _warnings.warn(
            f"Your {kind}_dataloader has `shuffle=True`, it is best practice to turn this off for "
            "validation and test dataloaders."
        )
    if loader.num_workers <= 2 and _may_warn_of_workers(trainer, loader):
        _warnings.warn(
            f"The dataloader, {kind} dataloader, does not have many workers which may be a "
            "bottleneck. Consider increasing the value of the `num_workers` argument in the "
            "`DataLoader` init to improve performance.",
            category=PossibleUserWarning,
        )
    return prepared(loader, trainer, kind)


def _may_warn_of_workers(trainer: Any, loader: DataLoader[Any]) -> bool:
    if not hasattr(loader.dataset, "__len__"):
        return False
    return (os.cpu_count() or 1) > 2 and not trainer.fast_dev_run and len(loader.dataset) > 10_000


def _without_shuffling(loader: Any) -> Any:
    if isinstance(loader, CombinedLoader):
        loaders = [_without_shuffling(each) for each in loader.flattened]
        if not isinstance(loader.loaders, list):
            return loader
        return CombinedLoader(loaders, loader.mode)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, SequentialSampler) or not isinstance(
        loader.sampler, RandomSampler
    ):
        return loader
    _warnings.warn(
        "You requested to overfit but enabled training dataloader shuffling. "
        "We are turning off the training dataloader shuffling for you."
    )
    names = ("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout")
    options = {name: getattr(loader, name) for name in names}
    options["worker_init_fn"] = loader.worker_init_fn
    options["sampler"] = SequentialSampler(loader.dataset)
    return DataLoader(loader.dataset, **options)


# ── How much of them is read ──────────────────────────────────────────────────────────────────────


def limited(length: float, limit: float | int, name: str) -> float:
    """How many batches to read of a loader.

    Args:
        length: how many it has; infinity if that is not known.
        limit: a number of batches, or a fraction.
        name: the argument, for errors.
    """
    if isinstance(limit, int) or limit == 0.0:
        return min(length, int(limit))
    if length == math.inf:
        if limit == 1.0:
            return math.inf
        raise MisconfigurationException(
            f"When using an IterableDataset for `{name}`, `Trainer({name})` must be `0.0`, `1.0` "
            f"or an int, not {limit}. An int k specifies the number of batches to use."
        )
    count = int(length * limit)
    if count == 0 and length > 0 and limit > 0.0:
        raise MisconfigurationException(
            f"you requested to check {limit} of the {name.split('_')[1]} dataloader but {limit} * "
            f"{int(length)} < 1. Please increase the `{name}` argument. Try at least "
            f"`{name}={1.0 / length}`"
        )
    return count


class LoaderSource:
    """The training batches of a trainer, for the core's loop."""

    def __init__(self, trainer: Any) -> None:
        """Read the loader of a trainer."""
        self.trainer = trainer
        self.cut = False

    def length(self, cursor: Cursor) -> int | None:
        """How many batches are left in the epoch, if that is known."""
        total = self.trainer.num_training_batches
        return None if total == math.inf else max(int(total) - int(cursor.offset), 0)

    def position(self, cursor: Cursor) -> int:
        """How many batches of the epoch have been read."""
        return int(cursor.offset)

    def exhausted(self, cursor: Cursor) -> bool | None:
        """Whether the epoch has ended; also because the trainer wants to stop."""
        if self.trainer._epoch_over:
            return True
        total = self.trainer.num_training_batches
        return None if total == math.inf else int(cursor.offset) >= total

    def next_epoch(self, cursor: Cursor) -> Cursor:
        """The beginning of the next epoch; an epoch that was cut stays where it is."""
        if self.trainer._epoch_cut:
            return cursor
        return Cursor(epoch=torch.tensor(int(cursor.epoch) + 1))

    def read(self, cursor: Cursor) -> Iterator[Read]:
        """Read from a cursor to the end of its epoch."""
        trainer = self.trainer
        loader, total = trainer._train_loader, trainer.num_training_batches
        number, offset = int(cursor.epoch), int(cursor.offset)
        for each in _single_loaders(loader):
            batches = getattr(each, "batch_sampler", None)
            samplers = {id(s): s for s in (each, getattr(each, "sampler", None),
                                           getattr(batches, "sampler", None))}  # fmt: skip
            for sampler in samplers.values():
                if callable(getattr(sampler, "set_epoch", None)):
                    sampler.set_epoch(number)
        now = capture(loader)
        if offset:
            put_back(cursor.source, loader)
            source = cursor.source
            iterator = _skipped(loader, offset)
            put_back(now, None)
        else:
            source = now
            iterator = iter(loader)
        epoch = torch.tensor(number)
        sized = length_of(loader) != math.inf
        index = offset
        ahead: Any = None
        if not sized:  # whether a batch is the last can only be told by looking for another
            ahead = next(iterator, self)
        while index < total and not trainer._epoch_over:
            if sized:
                with profiled(trainer, "get_train_batch"):
                    batch = next(iterator, self)
                last = index + 1 == total
            else:
                batch = ahead
                if batch is not self:
                    with profiled(trainer, "get_train_batch"):
                        ahead = next(iterator, self) if index + 1 < total else self
                last = ahead is self
                over, last = map(bool, trainer._processes.largest(batch is self, last))
                if over:
                    return
            if batch is self:
                return
            index += 1
            place_after = Cursor(epoch, torch.full((), index, dtype=torch.int64), source)
            yield Read(Item(batch, index - 1, last), place_after, 1)


def _skipped(loader: Any, count: int) -> Iterator[Any]:
    """An iterator over a loader that stands behind so many batches."""
    iterator = iter(loader)
    plain = (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )
    if plain:
        # only the order is drawn again, the samples are not read
        sampler = iterator._sampler_iter
        for _ in range(count):
            next(sampler, None)
        iterator._num_yielded = count
        return iterator
    for _ in range(count):
        next(iterator, None)
    return iterator
