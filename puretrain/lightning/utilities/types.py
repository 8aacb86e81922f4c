"""Names for the types that hooks take and return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Union

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

__all__ = [
    "EPOCH_OUTPUT",
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "LRSchedulerConfigType",
    "LRSchedulerPLType",
    "LRSchedulerTypeUnion",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
]

_NUMBER = Union[int, float]  # noqa: UP007 - programs look inside with typing's own functions
_METRIC = Union[Any, Tensor, _NUMBER]  # noqa: UP007
_METRIC_COLLECTION = Union[_METRIC, Mapping[str, _METRIC]]  # noqa: UP007
STEP_OUTPUT = Union[Tensor, Mapping[str, Any], None]  # noqa: UP007
EPOCH_OUTPUT = list[STEP_OUTPUT]
_EVALUATE_OUTPUT = list[Mapping[str, float]]
_PREDICT_OUTPUT = Union[list[Any], list[list[Any]], None]  # noqa: UP007
_PARAMETERS = Iterator[Any]
_PATH = Union[str, Path]  # noqa: UP007
_DEVICE = Union[str, int]  # noqa: UP007
_EVALUATE_OUTPUTS = _EVALUATE_OUTPUT
TRAIN_DATALOADERS = Any
EVAL_DATALOADERS = Union[DataLoader, Sequence[DataLoader], Iterable[Any]]  # noqa: UP007
LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]  # noqa: UP007
LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerPLType = LRSchedulerTypeUnion
LRSchedulerType = Union[type[LRScheduler], type[ReduceLROnPlateau]]  # noqa: UP007
_LRScheduler = LRScheduler


class LRSchedulerConfigType(TypedDict, total=False):
    """A scheduler with when and how to step it."""

    scheduler: Any
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerLRSchedulerConfig(TypedDict, total=False):
    """An optimizer with its scheduler."""

    optimizer: Optimizer
    lr_scheduler: Any
    monitor: str


OptimizerConfig = OptimizerLRSchedulerConfig
OptimizerLRScheduler = Union[  # noqa: UP007
    Optimizer,
    Sequence[Optimizer],
    tuple[Sequence[Optimizer], Sequence[Any]],
    Mapping[str, Any],
    None,
]
