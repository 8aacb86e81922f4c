"""Metrics that gather their state over many batches and, on demand, over processes."""

from __future__ import annotations

import functools
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from puretrain.lightning.metrics.utils import dim_zero_cat, dim_zero_mean, dim_zero_sum
from puretrain.lightning.utilities.apply_func import apply_to_collection
from puretrain.lightning.utilities.distributed import (
    distributed_available,
    gather_all_tensors,
    rank_zero_warn,
)

__all__ = ["CompositionalMetric", "Metric", "MetricCollection"]

_REDUCTIONS: dict[str | None, Callable[[Any], Any] | None] = {
    "sum": dim_zero_sum,
    "mean": dim_zero_mean,
    "cat": dim_zero_cat,
    None: None,
}


def _binary(operation: Callable[..., Any]) -> tuple[Any, Any]:
    """The methods of an operator: with the metric on its left, and on its right."""

    def of(self: Metric, other: Any) -> CompositionalMetric:
        return CompositionalMetric(operation, self, other)

    def swapped(self: Metric, other: Any) -> CompositionalMetric:
        return CompositionalMetric(operation, other, self)

    return of, swapped


class Metric(nn.Module, ABC):
    """The base of metrics: one's own declares its state and has ``update`` and ``compute``.

    Example:
        >>> class Hits(Metric):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.add_state("right", default=torch.tensor(0), dist_reduce_fx="sum")
        ...         self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")
        ...     def update(self, preds, target):
        ...         self.right += (preds == target).sum()
        ...         self.total += target.numel()
        ...     def compute(self):
        ...         return self.right / self.total
        >>> hits = Hits()
        >>> hits(torch.tensor([1, 0]), torch.tensor([1, 1]))
        tensor(0.5000)
        >>> hits(torch.tensor([1, 1]), torch.tensor([1, 1])), hits.compute()
        (tensor(1.), tensor(0.7500))
    """

    def __init__(
        self,
        compute_on_step: bool = True,
        dist_sync_on_step: bool = False,
        process_group: Any = None,
        dist_sync_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Begin without state.

        Args:
            compute_on_step: whether calling the metric gives the value of the batch, or None.
            dist_sync_on_step: whether that value is the one of all processes.
            process_group: the processes; by default all.
            dist_sync_fn: gathers a tensor of all processes, in place of torch's collectives.
        """
        super().__init__()
        self.dist_sync_on_step = dist_sync_on_step
        self.compute_on_step = compute_on_step
        self.process_group = process_group
        self.dist_sync_fn = dist_sync_fn
        self._to_sync = True
        self._restore_cache = True
        self._wrap()
        self._computed: Any = None
        self._forward_cache: Any = None
        self._update_called = False
        self._defaults: dict[str, Any] = {}
        self._persistent: dict[str, bool] = {}
        self._reductions: dict[str, Callable[[Any], Any] | None] = {}

    def _wrap(self) -> None:
        self._update_signature = inspect.signature(self.update)
        self.update = self._noting(self.update)  # type: ignore[method-assign]
        self.compute = self._keeping(self.compute)  # type: ignore[method-assign]

    def add_state(
        self,
        name: str,
        default: Tensor | list[Any],
        dist_reduce_fx: str | Callable[[Any], Any] | None = None,
        persistent: bool = False,
    ) -> None:
        """Declare a part of the state, which is then an attribute.

        Args:
            name: of the attribute.
            default: its value at first and after a reset: a tensor, or an empty list to append
                tensors to.
            dist_reduce_fx: how those of several processes become one: ``"sum"``, ``"mean"``,
                ``"cat"``, a function, or None to stack them.
            persistent: whether it is in the ``state_dict``.

        Raises:
            ValueError: the default or the reduction is none of these.
        """
        if not isinstance(default, (Tensor, list)) or (isinstance(default, list) and default):
            raise ValueError(
                "state variable must be a tensor or any empty list (where you can append tensors)"
            )
        reduce: Any = dist_reduce_fx
        if isinstance(dist_reduce_fx, str) or dist_reduce_fx is None:
            if dist_reduce_fx not in _REDUCTIONS:
                raise ValueError(
                    "`dist_reduce_fx` must be callable or one of ['mean', 'sum', 'cat', None]"
                )
            reduce = _REDUCTIONS[dist_reduce_fx]
        elif not callable(dist_reduce_fx):
            raise ValueError(
                "`dist_reduce_fx` must be callable or one of ['mean', 'sum', 'cat', None]"
            )
        setattr(self, name, deepcopy(default))
        self._defaults[name] = deepcopy(default)
        self._persistent[name] = persistent
        self._reductions[name] = reduce

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch to the state, and give the value of the batch alone."""
        with torch.no_grad():
            self.update(*args, **kwargs)
            self._forward_cache = None
            if not self.compute_on_step:
                return None
            self._to_sync, self._restore_cache = self.dist_sync_on_step, False
            gathered = {name: getattr(self, name) for name in self._defaults}
            called = self._update_called
            try:
                self.reset()
                self.update(*args, **kwargs)
                self._forward_cache = self.compute()
            finally:
                for name, value in gathered.items():
                    setattr(self, name, value)
                self._to_sync, self._restore_cache = True, True
                self._update_called, self._computed = called, None
            return self._forward_cache

    def _noting(self, update: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(update)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._computed = None
            self._update_called = True
            return update(*args, **kwargs)

        return wrapped

    def _keeping(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self._update_called:
                rank_zero_warn(
                    f"The ``compute`` method of metric {type(self).__name__}"
                    " was called before the ``update`` method which may lead to errors,"
                    " as metric states have not yet been updated."
                )
            if self._computed is not None:
                return self._computed
            with self.sync_context():
                self._computed = compute(*args, **kwargs)
            return self._computed

        return wrapped

    @contextmanager
    def sync_context(self) -> Iterator[None]:
        """For a block, have the state of all processes; afterwards one's own again."""
        gather = self.dist_sync_fn
        if gather is None and distributed_available():
            gather = gather_all_tensors
        if not self._to_sync or gather is None:
            yield
            return
        own = {name: getattr(self, name) for name in self._defaults}
        self._sync_dist(gather)
        try:
            yield
        finally:
            for name, value in own.items():
                setattr(self, name, value)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors) -> None:
        own = {name: getattr(self, name) for name in self._reductions}
        for name, reduce in self._reductions.items():
            if reduce is dim_zero_cat and isinstance(own[name], list) and own[name]:
                own[name] = [dim_zero_cat(own[name])]  # one collective in place of many
        lengths: dict[str, list[int]] = {}
        if dist_sync_fn is gather_all_tensors:
            for name in [name for name, value in own.items() if isinstance(value, list)]:
                own[name], lengths[name] = _as_long_everywhere(own[name], self.process_group)
        gathered = apply_to_collection(own, Tensor, dist_sync_fn, group=self.process_group)
        for name, reduce in self._reductions.items():
            value = gathered[name]
            if isinstance(own[name], Tensor):
                value = torch.stack(value)
                empty = False
            else:
                value = [
                    tensor
                    for number, of_all in enumerate(value)
                    for rank, tensor in enumerate(of_all)
                    if name not in lengths or number < lengths[name][rank]
                ]
                empty = not value
            setattr(self, name, value if reduce is None or empty else reduce(value))

    @abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch to the state."""

    @abstractmethod
    def compute(self) -> Any:
        """The value of all batches so far."""

    def reset(self) -> None:
        """Forget all batches."""
        self._computed = None
        self._update_called = False
        for name, default in self._defaults.items():
            current = getattr(self, name)
            if isinstance(default, Tensor):
                device = current.device if isinstance(current, Tensor) else default.device
                setattr(self, name, default.detach().clone().to(device))
            else:
                setattr(self, name, [])

    def clone(self) -> Any:
        """A copy with the same state."""
        return deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        # the wrapped methods hold this very object
        return {k: v for k, v in self.__dict__.items() if k not in ("update", "compute")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wrap()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        this = super()._apply(fn, recurse)
        for name in this._defaults:
            setattr(this, name, apply_to_collection(getattr(this, name), Tensor, fn))
        for name in ("_computed", "_forward_cache"):
            setattr(this, name, apply_to_collection(getattr(this, name), Tensor, fn))
        return this

    def persistent(self, mode: bool = False) -> None:
        """Say whether the state is in the ``state_dict``."""
        for name in self._persistent:
            self._persistent[name] = mode

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:  # type: ignore[override]
        """The parameters and buffers, and those parts of the state that are persistent."""
        if args:  # an older calling convention of torch
            destination, prefix, keep_vars = (*args, prefix, keep_vars)[:3]
        result: Any = super().state_dict(
            destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        for name, kept in self._persistent.items():
            if kept:
                value = getattr(self, name)
                if not keep_vars:
                    value = apply_to_collection(value, Tensor, Tensor.detach)
                result[prefix + name] = deepcopy(value)
        return result

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._defaults:
            if prefix + name in state_dict:
                setattr(self, name, deepcopy(state_dict.pop(prefix + name)))
                self._update_called = True
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _filter_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Those named arguments that ``update`` takes."""
        parameters = self._update_signature.parameters
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return kwargs
        named = {name for name, p in parameters.items() if p.kind not in kinds}
        return {name: value for name, value in kwargs.items() if name in named}

    def __hash__(self) -> int:
        # equality gives a metric, so only the very same object may have the same hash
        return hash((type(self).__name__, id(self)))

    # ── Arithmetic ────────────────────────────────────────────────────────────────────────────────

    __add__, __radd__ = _binary(torch.add)
    __sub__, __rsub__ = _binary(torch.sub)
    __mul__, __rmul__ = _binary(torch.mul)
    __truediv__, __rtruediv__ = _binary(torch.true_divide)
    __floordiv__, __rfloordiv__ = _binary(torch.floor_divide)
    __mod__, __rmod__ = _binary(torch.fmod)
    __pow__, __rpow__ = _binary(torch.pow)
    __matmul__, __rmatmul__ = _binary(torch.matmul)
    __and__, __rand__ = _binary(torch.bitwise_and)
    __or__, __ror__ = _binary(torch.bitwise_or)
    __xor__, __rxor__ = _binary(torch.bitwise_xor)
    __eq__ = _binary(torch.eq)[0]
    __ne__ = _binary(torch.ne)[0]
    __lt__ = _binary(torch.lt)[0]
    __le__ = _binary(torch.le)[0]
    __gt__ = _binary(torch.gt)[0]
    __ge__ = _binary(torch.ge)[0]

    def __abs__(self) -> CompositionalMetric:
        return CompositionalMetric(torch.abs, self, None)

    def __pos__(self) -> CompositionalMetric:
        return CompositionalMetric(torch.abs, self, None)

    def __neg__(self) -> CompositionalMetric:
        return CompositionalMetric(_minus_abs, self, None)

    def __invert__(self) -> CompositionalMetric:
        return CompositionalMetric(torch.bitwise_not, self, None)

    def __getitem__(self, index: Any) -> CompositionalMetric:
        return CompositionalMetric(operator.itemgetter(index), self, None)


def _as_long_everywhere(tensors: list[Tensor], group: Any) -> tuple[list[Tensor], list[int]]:
    """A list with empty tensors at its end where others have more, and all lengths.

    A process that has seen no batch would else leave the others waiting.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    mine = (len(tensors), tensors[0].dtype, tensors[0].shape[1:]) if tensors else (0, None, None)
    torch.distributed.all_gather_object(found, mine, group)
    lengths = [length for length, _, _ in found]
    missing = max(lengths) - len(tensors)
    if not missing:
        return tensors, lengths
    _, dtype, shape = max(found, key=lambda each: each[0])
    device = tensors[0].device if tensors else None
    return [*tensors, *(torch.empty((0, *shape), dtype=dtype, device=device),) * missing], lengths


def _minus_abs(value: Tensor) -> Tensor:
    return -torch.abs(value)


class CompositionalMetric(Metric):
    """What arithmetic of metrics gives: a metric that computes from the values of others."""

    def __init__(self, operation: Callable[..., Any], metric_a: Any, metric_b: Any) -> None:
        """Join two metrics, or a metric and a number.

        Args:
            operation: of their values.
            metric_a: a metric, a number or a tensor.
            metric_b: the same, or None if the operation takes one value.
        """
        super().__init__()
        self.op = operation
        for name, value in (("metric_a", metric_a), ("metric_b", metric_b)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def _sync_dist(self, dist_sync_fn: Any = None) -> None:
        """The parts do that."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch to both."""
        for metric in (self.metric_a, self.metric_b):
            if isinstance(metric, Metric):
                metric.update(*args, **metric._filter_kwargs(**kwargs))

    def compute(self) -> Any:
        """The operation of the values of all batches."""
        return self._of(lambda metric: metric.compute())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch to both, and give the operation of its values."""
        return self._of(lambda metric: metric(*args, **metric._filter_kwargs(**kwargs)))

    def _of(self, value_of: Callable[[Metric], Any]) -> Any:
        values = [
            value_of(metric) if isinstance(metric, Metric) else metric
            for metric in (self.metric_a, self.metric_b)
        ]
        if values[0] is None:
            return None
        if values[1] is None:
            return None if isinstance(self.metric_b, Metric) else self.op(values[0])
        # torch's functions want a tensor first
        if not isinstance(values[0], Tensor):
            values[0] = torch.as_tensor(values[0])
        return self.op(*values)

    def reset(self) -> None:
        """Forget all batches in both."""
        for metric in (self.metric_a, self.metric_b):
            if isinstance(metric, Metric):
                metric.reset()

    def persistent(self, mode: bool = False) -> None:
        """Say of both whether their state is in the ``state_dict``."""
        for metric in (self.metric_a, self.metric_b):
            if isinstance(metric, Metric):
                metric.persistent(mode=mode)

    def __repr__(self) -> str:
        name = getattr(self.op, "__name__", repr(self.op))
        inside = f"{name}(\n    {self.metric_a!r},\n    {self.metric_b!r}\n  )"
        return f"{type(self).__name__}(\n  {inside}\n)"

    __hash__ = Metric.__hash__


class MetricCollection(nn.ModuleDict):
    """Several metrics of the same inputs.

    Example:
        >>> from puretrain.lightning.metrics import MeanAbsoluteError, MeanSquaredError
        >>> both = MetricCollection([MeanAbsoluteError(), MeanSquaredError()], prefix="val_")
        >>> both(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        {'val_MeanAbsoluteError': tensor(2.), 'val_MeanSquaredError': tensor(4.)}
    """

    def __init__(
        self,
        metrics: Metric | Sequence[Metric] | Mapping[str, Metric],
        *additional_metrics: Metric,
        prefix: str | None = None,
        postfix: str | None = None,
    ) -> None:
        """Join metrics.

        Args:
            metrics: a sequence, whose names are those of the classes, or a mapping.
            *additional_metrics: more, after a single metric.
            prefix: stands in front of the names in results.
            postfix: stands behind them.

        Raises:
            ValueError: something is no metric, or two have the same name.
        """
        super().__init__()
        if isinstance(metrics, nn.Module) and not isinstance(metrics, nn.ModuleDict):
            metrics = [metrics, *additional_metrics]  # type: ignore[list-item]
        if isinstance(metrics, (Mapping, nn.ModuleDict)):
            for name, metric in metrics.items():
                if not _is_metric(metric):
                    raise ValueError(
                        f"Value {metric} belonging to key {name}"
                        " is not an instance of `pl.metrics.Metric`"
                    )
                self[name] = metric
        elif isinstance(metrics, (tuple, list)):
            for metric in metrics:
                if not _is_metric(metric):
                    raise ValueError(
                        f"Input {metric} to `MetricCollection` is not a instance"
                        " of `pl.metrics.Metric`"
                    )
                name = type(metric).__name__
                if name in self:
                    raise ValueError(f"Encountered two metrics both named {name}")
                self[name] = metric
        else:
            raise ValueError("Unknown input to MetricCollection.")  # noqa: TRY004 - programs catch it
        self.prefix = self._checked(prefix)
        self.postfix = self._checked(postfix)

    @staticmethod
    def _checked(text: Any) -> str:
        if text is not None and not isinstance(text, str):
            raise ValueError("Expected input `prefix` to be a string")
        return text or ""

    def _named(self, name: str) -> str:
        return f"{self.prefix}{name}{self.postfix}"

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Add a batch to all, and give its values."""
        return {
            self._named(name): metric(*args, **metric._filter_kwargs(**kwargs))
            for name, metric in self.items()
        }

    def update(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Add a batch to all."""
        for metric in self.values():
            metric.update(*args, **metric._filter_kwargs(**kwargs))

    def compute(self) -> dict[str, Any]:
        """The values of all batches."""
        return {self._named(name): metric.compute() for name, metric in self.items()}

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.values():
            metric.reset()

    def clone(self, prefix: str | None = None, postfix: str | None = None) -> MetricCollection:
        """A copy, with other text around the names if given."""
        copy = deepcopy(self)
        if prefix is not None:
            copy.prefix = self._checked(prefix)
        if postfix is not None:
            copy.postfix = self._checked(postfix)
        return copy

    def persistent(self, mode: bool = True) -> None:
        """Say of all whether their state is in the ``state_dict``."""
        for metric in self.values():
            metric.persistent(mode)


def _is_metric(value: Any) -> bool:
    """Ours, or one of torchmetrics."""
    return isinstance(value, Metric) or (
        isinstance(value, nn.Module) and hasattr(value, "update") and hasattr(value, "compute")
    )
