"""Seeding all random generators of a program at once."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch

from puretrain.lightning.utilities.distributed import log, rank_zero_only, rank_zero_warn

__all__ = ["isolate_rng", "pl_worker_init_function", "reset_seed", "seed_everything"]

_SEED = "PL_GLOBAL_SEED"
_WORKERS = "PL_SEED_WORKERS"
_LARGEST = int(np.iinfo(np.uint32).max)


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, numpy's and torch's generators, on all devices.

    The seed is also left in the environment variable ``PL_GLOBAL_SEED``, for processes that this
    one starts.

    Args:
        seed: from 0 to 2³² - 1; by default the one in ``PL_GLOBAL_SEED``, else a random one.
        workers: whether the Trainer seeds the workers of data loaders as well.
        verbose: whether to log the seed.

    Returns:
        The seed.

    >>> seed_everything(42, verbose=False)
    42
    """
    if seed is None:
        text = os.environ.get(_SEED)
        try:
            chosen = random.randint(0, _LARGEST) if text is None else int(text)
        except ValueError:
            chosen = random.randint(0, _LARGEST)
            rank_zero_warn(f"Invalid seed found: {text!r}, seed set to {chosen}")
        else:
            if text is None:
                rank_zero_warn(f"No seed found, seed set to {chosen}")
    else:
        chosen = int(seed)
    if not 0 <= chosen <= _LARGEST:
        rank_zero_warn(f"{chosen} is not in bounds, numpy accepts from 0 to {_LARGEST}")
        chosen = random.randint(0, _LARGEST)
    if verbose and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        log.info(f"Global seed set to {chosen}")
    os.environ[_SEED] = str(chosen)
    os.environ[_WORKERS] = str(int(workers))
    random.seed(chosen)
    np.random.seed(chosen)  # noqa: NPY002 - users draw from the global generator
    torch.manual_seed(chosen)
    torch.cuda.manual_seed_all(chosen)
    return chosen


def reset_seed() -> None:
    """Seed everything again with the seed of the last :func:`seed_everything`, if there was one."""
    seed = os.environ.get(_SEED)
    if seed is not None:
        seed_everything(int(seed), workers=os.environ.get(_WORKERS) == "1", verbose=False)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Seed the generators of a data loader's worker, differently in each worker and process.

    Args:
        worker_id: the number of the worker.
        rank: of the process that owns it; by default this process's.
    """
    rank = rank if rank is not None else rank_zero_only.rank  # type: ignore[attr-defined]
    process_seed = torch.initial_seed()
    base_seed = process_seed - worker_id  # torch has added the worker's number
    sequence = np.random.SeedSequence([base_seed, worker_id, rank])
    np.random.seed(sequence.generate_state(4))  # noqa: NPY002
    torch_sequence, python_sequence = sequence.spawn(2)
    torch.manual_seed(int(torch_sequence.generate_state(1, dtype=np.uint64)[0]))
    words = python_sequence.generate_state(2, dtype=np.uint64).astype(object)
    random.seed(int((words * [1 << 64, 1]).sum()))


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Generator[None, None, None]:
    """Put all global generators back at the end of a block.

    >>> _ = torch.manual_seed(1)
    >>> with isolate_rng():
    ...     first = torch.rand(2)
    >>> bool((first == torch.rand(2)).all())
    True
    """
    before_torch = torch.get_rng_state()
    before_cuda = torch.cuda.get_rng_state_all() if include_cuda else []
    before_numpy = np.random.get_state()  # noqa: NPY002
    before_python = random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before_torch)
        if before_cuda:
            torch.cuda.set_rng_state_all(before_cuda)
        np.random.set_state(before_numpy)  # noqa: NPY002
        random.setstate(before_python)
