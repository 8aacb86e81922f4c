"""What all loggers have in common, and how to write one's own."""

from __future__ import annotations

import argparse
import os
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from puretrain.lightning.utilities.distributed import rank_zero_only
from puretrain.lightning.utilities.imports import _module_available

__all__ = [
    "DummyExperiment",
    "DummyLogger",
    "LightningLoggerBase",
    "LoggerCollection",
    "merge_dicts",
    "rank_zero_experiment",
]


def rank_zero_experiment(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Give the real experiment to the process of rank 0, and a dummy to all others."""

    @wraps(fn)
    def experiment(self: Any) -> Any:
        real = fn(self) if rank_zero_only.rank == 0 else None  # type: ignore[attr-defined]
        return DummyExperiment() if real is None else real

    return experiment


class LightningLoggerBase(ABC):
    """The base of all loggers.

    One's own needs the properties ``experiment``, ``name`` and ``version`` and the methods
    ``log_metrics`` and ``log_hyperparams``.

    Example:
        >>> class ListLogger(LightningLoggerBase):
        ...     name, version, experiment = "list", 0, None
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rows = []
        ...     def log_metrics(self, metrics, step=None):
        ...         self.rows.append((step, metrics))
        ...     def log_hyperparams(self, params):
        ...         self.rows.append(params)
        >>> logger = ListLogger()
        >>> logger.agg_and_log_metrics({"loss": 1.0}, step=0)
        >>> logger.agg_and_log_metrics({"loss": 3.0}, step=0)
        >>> logger.save()
        >>> logger.rows
        [(0, {'loss': 2.0})]
    """

    LOGGER_JOIN_CHAR = "-"

    # a logger that does not call super().__init__() works as well
    _prev_step: int | None = None
    _metrics_to_agg: tuple[dict[str, float], ...] = ()
    _agg_key_funcs: Mapping[str, Callable[[Sequence[float]], float]] = MappingProxyType({})
    _agg_default_func: Callable[[Sequence[float]], float] = staticmethod(np.mean)

    def __init__(
        self,
        agg_key_funcs: Mapping[str, Callable[[Sequence[float]], float]] | None = None,
        agg_default_func: Callable[[Sequence[float]], float] = np.mean,
    ) -> None:
        """Say how several values of one step become one.

        Args:
            agg_key_funcs: functions of a list of values, by the name of the metric.
            agg_default_func: the function of all other metrics.
        """
        self._rank = rank_zero_only.rank  # type: ignore[attr-defined]
        self._agg_key_funcs = dict(agg_key_funcs or {})
        self._agg_default_func = agg_default_func

    def update_agg_funcs(
        self,
        agg_key_funcs: Mapping[str, Callable[[Sequence[float]], float]] | None = None,
        agg_default_func: Callable[[Sequence[float]], float] = np.mean,
    ) -> None:
        """Change how several values of one step become one; see ``__init__``."""
        self._agg_key_funcs = {**self._agg_key_funcs, **(agg_key_funcs or {})}
        if agg_default_func:
            self._agg_default_func = agg_default_func

    @property
    @abstractmethod
    def experiment(self) -> Any:
        """The object of the service or library underneath."""

    def _aggregate_metrics(
        self, metrics: dict[str, float], step: int | None = None
    ) -> tuple[int | None, dict[str, float] | None]:
        """Keep a step's metrics, and give those of the step before once it is complete."""
        if step == self._prev_step:
            self._metrics_to_agg = (*self._metrics_to_agg, metrics)
            return step, None
        finished = self._reduce_agg_metrics()
        self._metrics_to_agg = (metrics,)
        self._prev_step = step
        return finished

    def _reduce_agg_metrics(self) -> tuple[int | None, dict[str, float] | None]:
        if not self._metrics_to_agg:
            return self._prev_step, None
        if len(self._metrics_to_agg) == 1:
            return self._prev_step, self._metrics_to_agg[0]
        merged = merge_dicts(self._metrics_to_agg, self._agg_key_funcs, self._agg_default_func)
        return self._prev_step, merged

    def _finalize_agg_metrics(self) -> None:
        """Log what was kept."""
        step, metrics = self._reduce_agg_metrics()
        self._metrics_to_agg = ()
        if metrics is not None:
            self.log_metrics(metrics=metrics, step=step)

    def agg_and_log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics, several of the same step as one; they appear with the next step or save."""
        finished_step, finished = self._aggregate_metrics(metrics=metrics, step=step)
        if finished:
            self.log_metrics(metrics=finished, step=finished_step)

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write metrics.

        Args:
            metrics: values by name.
            step: the number of the step that they belong to.
        """

    @abstractmethod
    def log_hyperparams(
        self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Write hyper-parameters.

        Args:
            params: a dictionary or Namespace.
            *args: of the particular logger.
            **kwargs: of the particular logger.
        """

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Write the model's graph; does nothing where a logger has no way to."""

    def log_text(self, *args: Any, **kwargs: Any) -> None:
        """Write text; only some loggers can."""
        raise NotImplementedError(f"{type(self).__name__} has no log_text")

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        """Write an image; only some loggers can."""
        raise NotImplementedError(f"{type(self).__name__} has no log_image")

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Is called after a checkpoint was saved, with the callback that did it."""

    def save(self) -> None:
        """Write what was kept back."""
        self._finalize_agg_metrics()

    def finalize(self, status: str) -> None:
        """Is called at the end of a run.

        Args:
            status: how it ended: ``success``, ``failed`` or ``aborted``.
        """
        self.save()

    def close(self) -> None:
        """Is called when the logger is not needed any more."""
        self.save()

    @property
    def save_dir(self) -> str | None:
        """The directory that the logger writes to, None if to none."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The directory of all versions of this experiment, None if there is none."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The directory of this version, None if there is none."""
        return None

    @property
    def group_separator(self) -> str:
        """What stands between a group and a metric."""
        return "/"

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """The version of the experiment."""

    # ── Helpers for hyper-parameters ──────────────────────────────────────────────────────────────

    @staticmethod
    def _convert_params(params: dict[str, Any] | Namespace | None) -> dict[str, Any]:
        if params is None:
            return {}
        return vars(params) if isinstance(params, Namespace) else params  # type: ignore[return-value]

    @staticmethod
    def _sanitize_callable_params(params: dict[str, Any]) -> dict[str, Any]:
        """Functions become what they return without arguments, or their names."""

        def sanitized(value: Any) -> Any:
            if not callable(value):
                return value
            try:
                result = value()
            except Exception:  # noqa: BLE001 - it is the user's function
                return getattr(value, "__name__", type(value).__name__)
            if callable(result):
                return getattr(value, "__name__", type(value).__name__)
            return result

        return {key: sanitized(value) for key, value in params.items()}

    @staticmethod
    def _flatten_dict(params: Mapping[Any, Any], delimiter: str = "/") -> dict[str, Any]:
        """Put nested entries under the names of their path.

        >>> LightningLoggerBase._flatten_dict({"a": {"b": "c"}, 5: {"e": 1}})
        {'a/b': 'c', '5/e': 1}
        """

        def entries(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
            value = vars(value) if isinstance(value, Namespace) else value
            if isinstance(value, MutableMapping):
                for key, inner in value.items():
                    yield from entries(inner, (*path, str(key)))
            else:
                yield delimiter.join(path), value

        return {
            key: value
            for name, inner in params.items()
            for key, value in entries(inner, (str(name),))
        }

    @staticmethod
    def _sanitize_params(params: dict[str, Any]) -> dict[str, Any]:
        """Everything that is no number, text or tensor becomes text.

        >>> LightningLoggerBase._sanitize_params({"a": 1, "b": [2], "c": np.float64(0.5)})
        {'a': 1, 'b': '[2]', 'c': 0.5}
        """
        plain = (bool, int, float, str, Tensor)
        values = {
            key: value.item() if isinstance(value, (np.bool_, np.integer, np.floating)) else value
            for key, value in params.items()
        }
        return {
            k: v if type(v) in plain or isinstance(v, Tensor) else str(v) for k, v in values.items()
        }

    def _add_prefix(self, metrics: dict[str, float]) -> dict[str, float]:
        prefix = getattr(self, "_prefix", "")
        if not prefix:
            return metrics
        return {f"{prefix}{self.LOGGER_JOIN_CHAR}{name}": value for name, value in metrics.items()}


class LoggerCollection(LightningLoggerBase):
    """Several loggers as one: what is logged goes to all of them."""

    def __init__(self, logger_iterable: Iterable[LightningLoggerBase]) -> None:
        """Join loggers.

        Args:
            logger_iterable: the loggers.
        """
        super().__init__()
        self._logger_iterable = logger_iterable

    def __getitem__(self, index: int) -> LightningLoggerBase:
        return list(self._logger_iterable)[index]

    def __iter__(self) -> Iterator[LightningLoggerBase]:
        return iter(self._logger_iterable)

    def __len__(self) -> int:
        return len(list(self._logger_iterable))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Tell all of them."""
        for logger in self:
            logger.after_save_checkpoint(checkpoint_callback)

    def update_agg_funcs(
        self,
        agg_key_funcs: Mapping[str, Callable[[Sequence[float]], float]] | None = None,
        agg_default_func: Callable[[Sequence[float]], float] = np.mean,
    ) -> None:
        """Change how several values of one step become one, in all of them."""
        for logger in self:
            logger.update_agg_funcs(agg_key_funcs, agg_default_func)

    @property
    def experiment(self) -> list[Any]:
        """The experiments of all of them."""
        return [logger.experiment for logger in self]

    def agg_and_log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics to all of them."""
        for logger in self:
            logger.agg_and_log_metrics(metrics=metrics, step=step)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write metrics to all of them."""
        for logger in self:
            logger.log_metrics(metrics=metrics, step=step)

    def log_hyperparams(
        self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Write hyper-parameters to all of them."""
        for logger in self:
            logger.log_hyperparams(params, *args, **kwargs)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Write the model's graph to all of them."""
        for logger in self:
            logger.log_graph(model, input_array)

    def log_text(self, *args: Any, **kwargs: Any) -> None:
        """Write text to all of them."""
        for logger in self:
            logger.log_text(*args, **kwargs)

    def save(self) -> None:
        """Save all of them."""
        for logger in self:
            logger.save()

    def finalize(self, status: str) -> None:
        """End all of them."""
        for logger in self:
            logger.finalize(status)

    def close(self) -> None:
        """Close all of them."""
        for logger in self:
            logger.close()

    @property
    def save_dir(self) -> str | None:
        """None: they may have different directories, so checkpoints go to the default place."""
        return None

    @property
    def name(self) -> str:
        """The names, joined by ``_``."""
        return "_".join(str(logger.name) for logger in self)

    @property
    def version(self) -> str:
        """The versions, joined by ``_``."""
        return "_".join(str(logger.version) for logger in self)


class DummyExperiment:
    """Takes any call, and any index, and does nothing."""

    def nop(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.nop

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class DummyLogger(LightningLoggerBase):
    """Takes the place of a logger where nothing is to be logged."""

    def __init__(self) -> None:
        super().__init__()
        self._experiment = DummyExperiment()

    @property
    def experiment(self) -> DummyExperiment:
        """A dummy as well."""
        return self._experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    @property
    def name(self) -> str:
        """Empty."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    def __getitem__(self, index: int) -> DummyLogger:
        return self

    def __iter__(self) -> Iterator[LightningLoggerBase]:
        # where it takes the place of a collection, it is an empty one
        return iter(())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.experiment.nop


def merge_dicts(
    dicts: Sequence[Mapping[str, Any]],
    agg_key_funcs: Mapping[str, Any] | None = None,
    default_func: Callable[[Sequence[float]], float] = np.mean,
) -> dict[str, Any]:
    """Merge dictionaries, nested ones as well: several values of a key become one.

    Args:
        dicts: the dictionaries; a key may be missing in some.
        agg_key_funcs: functions of a list of values, by key, nested like the dictionaries.
        default_func: the function of all other keys.

    >>> merge_dicts([{"a": 1.5, "d": {"x": 1}}, {"a": 1.0, "d": {"x": 2}}], {"a": min})
    {'a': 1.0, 'd': {'x': 1.5}}
    """
    agg_key_funcs = agg_key_funcs or {}
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in dicts for key in each):
        function = agg_key_funcs.get(key)
        values = [each[key] for each in dicts if each.get(key) is not None]
        if not values:
            continue
        if isinstance(values[0], dict):
            merged[key] = merge_dicts(values, function, default_func)
        else:
            value = (function or default_func)(values)
            merged[key] = value.item() if isinstance(value, np.generic) else value
    return merged


def require(package: str) -> None:
    """See that the client of a service is installed.

    Raises:
        ImportError: it is not.
    """
    if not _module_available(package):
        raise ImportError(
            f"You want to use `{package}` logger which is not installed yet,"
            f" install it with `pip install {package.replace('_', '-')}`."
        )


class FolderLogger(LightningLoggerBase):
    """A logger that writes files: those of each version into a folder of their own."""

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None,
        version: int | str | None,
        prefix: str,
    ) -> None:
        """Write nothing before the first use."""
        super().__init__()
        self._save_dir = os.fspath(save_dir)
        self._name, self._version, self._prefix = name or "", version, prefix
        self._experiment: Any = None

    @property
    def save_dir(self) -> str:
        """Where the experiments are."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """The directory of all versions."""
        return os.path.join(self.save_dir, self.name) if self.name else self.save_dir

    @property
    def log_dir(self) -> str:
        """The directory of this version."""
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return os.path.join(self.root_dir, version)

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._name

    @property
    def version(self) -> int | str:
        """The version: a number, or the directory's name."""
        if self._version is None:
            self._version = self._get_next_version()
        return self._version

    def _get_next_version(self) -> int:
        return next_version(self.root_dir)


def next_version(root_dir: str) -> int:
    """The number after the largest N of the directories ``version_N`` inside one."""
    from puretrain.lightning.utilities.cloud_io import get_filesystem

    system = get_filesystem(root_dir)
    if not system.isdir(root_dir):
        return 0
    names = [
        os.path.basename(os.path.normpath(each["name"]))
        for each in system.ls(root_dir, detail=True)
        if each["type"] == "directory"
    ]
    numbers = [name.removeprefix("version_") for name in names if name.startswith("version_")]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
