"""What ``self.log`` has been told: values of steps, means of epochs, and where each is shown.

Tensors stay where they were computed; nothing here waits for a device until somebody reads a value.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from puretrain.lightning.utilities.apply_func import move_data_to_device
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import WarningCache

__all__ = ["Results", "is_metric", "metric_states", "restore_metric_states"]

_warnings = WarningCache()

_REDUCTIONS: dict[Any, str] = {
    torch.mean: "mean",
    torch.max: "max",
    max: "max",
    torch.min: "min",
    min: "min",
    torch.sum: "sum",
    sum: "sum",
    "mean": "mean",
    "avg": "mean",
    "max": "max",
    "min": "min",
    "sum": "sum",
    "default": "mean",
}


class _Entry:
    """One logged name."""

    __slots__ = (
        "fx",
        "known",
        "label",
        "loader",
        "metric",
        "mode",
        "name",
        "options",
        "reduce",
        "step",
        "sync",
        "total",
        "values",
        "weight",
    )

    def __init__(self, fx: str, name: str, loader: int | None, options: tuple[Any, ...]) -> None:
        self.fx, self.name, self.loader, self.options = fx, name, loader, options
        self.sync: Any = None
        _on_step, _on_epoch, _prog_bar, _logger, reduce, suffix = options[:6]
        label = name
        if suffix and loader is not None:
            label = f"{name}/dataloader_idx_{loader}"
        self.label = label
        self.reduce = reduce
        self.mode = _REDUCTIONS.get(reduce) if not isinstance(reduce, str) else None
        if isinstance(reduce, str):
            self.mode = _REDUCTIONS.get(reduce.lower())
        if self.mode is None and not callable(reduce):
            raise MisconfigurationException(
                f"self.log({name!r}, reduce_fx={reduce!r}): give 'mean', 'min', 'max', 'sum' or a "
                "function of a tensor of values"
            )
        self.clear()

    def clear(self) -> None:
        self.step: Tensor | None = None
        self.total: Tensor | None = None
        self.weight: int | float | Tensor = 0
        self.values: list[Tensor] = []
        self.metric: Any = None
        self.known: Tensor | None = None

    def forked(self, kind: str) -> str:
        if not (self.options[0] and self.options[1]):
            return self.label
        if self.loader is not None and self.label != self.name:
            return f"{self.name}_{kind}/dataloader_idx_{self.loader}"
        return f"{self.name}_{kind}"

    def epoch_value(self) -> Tensor | None:
        if self.sync is None:
            return self._epoch_value()
        if self.known is None:  # it is asked for often, and not by all processes alike
            self.known = self._synchronized()
        return self.known

    def _epoch_value(self) -> Tensor | None:
        if self.metric is not None:
            value = self.metric.compute()
            return value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        if self.values:
            return self.reduce(torch.stack(self.values))
        if self.total is None:
            return None
        return self.total / self.weight if self.mode == "mean" else self.total

    def _synchronized(self) -> Tensor | None:
        if self.metric is not None or self.mode is None or self.total is None:
            return self._epoch_value()
        total = self.sync(self.total, self.mode)
        if self.mode != "mean":
            return total
        weight = torch.as_tensor(self.weight, dtype=total.dtype, device=total.device)
        return total / self.sync(weight, "mean")


class Results:
    """All that was logged in one stage since the epoch began."""

    def __init__(self, *, training: bool, processes: Any = None) -> None:
        self.training = training
        self.processes = processes
        self.part = 0
        self.entries: dict[tuple[str, str, int | None], _Entry] = {}
        self.loader: int | None = None
        self.batch: Any = None
        self.size: int | None = None
        self.batches_are_over = False

    def reset(self) -> None:
        """Forget all values."""
        for entry in self.entries.values():
            if entry.metric is not None:
                entry.metric.reset()
        self.entries = {}
        self.batches_are_over = False

    def begin_batch(self, batch: Any, loader: int | None = None) -> None:
        """Say which batch the next values belong to."""
        self.batch, self.size, self.loader = batch, None, loader

    def log(
        self,
        fx: str,
        name: str,
        value: Any,
        options: tuple[Any, ...],
        batch_size: int | None,
        enable_graph: bool,
        sync: Any = None,
    ) -> None:
        """Take in one value.

        Args:
            fx: the hook in which it was logged.
            name: its name.
            value: a number, a tensor of one element, or a metric object.
            options: on_step, on_epoch, prog_bar, logger, reduce_fx, add_dataloader_idx.
            batch_size: the weight of the value in the epoch's mean; None: that of the batch.
            enable_graph: keep the value's graph.
            sync: how and over which processes to reduce it: the name of an operation, or None for
                that of ``reduce_fx``; and the group. None: it is this process's own.
        """
        key = (fx, name, self.loader)
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = _Entry(fx, name, self.loader, options)
        elif entry.options != options:
            raise MisconfigurationException(
                f"You called `self.log({name}, ...)` twice in `{fx}` with different arguments. "
                "This is not allowed"
            )
        if not isinstance(value, Tensor):
            if is_metric(value):
                entry.metric = value
                if options[0]:
                    entry.step = _forward_value(value)
                return
            value = _as_tensor(name, value)
        else:
            if value.requires_grad and not enable_graph:
                value = value.detach()
            if value.dim():
                if value.numel() != 1:
                    raise MisconfigurationException(
                        f"self.log({name!r}, ...): the tensor has the shape {tuple(value.shape)}, "
                        "but one number is logged; reduce it, or log metrics by name"
                    )
                value = value.reshape(())
            if value.dtype is not torch.float32 and value.dtype is not torch.float64:
                value = value.to(_float_type())
        entry.known = None
        if sync is not None and self.processes is not None and self.processes.connected:
            operation, group = sync
            if operation is None:
                entry.sync = self._over_processes(group)
                if options[0] and entry.mode is not None:
                    self._take_step(entry, entry.sync(value, entry.mode))
            else:  # as in 1.2, each value at once
                value = self.processes.reduce(value, group, operation)
        if options[0]:
            if entry.sync is None or entry.mode is None:
                self._take_step(entry, value.clone())
            if not options[1]:
                return
        mode = entry.mode
        if mode == "mean":
            if batch_size is None:
                batch_size = self.size
                if batch_size is None:
                    batch_size = self.size = self._batch_size()
            weighted = value * batch_size
            entry.total = weighted if entry.total is None else entry.total + weighted
            entry.weight = entry.weight + batch_size
        elif mode == "sum":
            entry.total = value.clone() if entry.total is None else entry.total + value
        elif mode is None:
            entry.values.append(value.clone())
        else:
            pick = torch.maximum if mode == "max" else torch.minimum
            entry.total = value.clone() if entry.total is None else pick(entry.total, value)

    def _over_processes(self, group: Any = None) -> Callable[[Tensor, str], Tensor]:
        processes = self.processes
        return lambda tensor, operation: processes.reduce(tensor, group, operation)

    def _take_step(self, entry: _Entry, value: Tensor) -> None:
        if self.part and entry.step is not None:  # the mean over the parts of a batch
            value = (entry.step * self.part + value) / (self.part + 1)
        entry.step = value

    def synchronize(self) -> None:
        """Find the values of the epoch while all processes are here; it needs all of them."""
        if self.processes is not None and self.processes.connected:
            for entry in self.entries.values():
                if entry.options[1] and (entry.sync is not None or entry.metric is not None):
                    entry.epoch_value()

    def _batch_size(self) -> int:
        if self.batch is None:
            return 1
        return batch_size_of(self.batch)

    def collect(self, only: set[Any] | None = None) -> dict[str, dict[str, Any]]:
        """What is known now: by kind (``callback``, ``log``, ``bar``) and name.

        While batches run these are the values of the step, after them those of the epoch.

        Args:
            only: the entries to look at; None: all.
        """
        found: dict[str, dict[str, Any]] = {"callback": {}, "log": {}, "bar": {}}
        on_step = not self.batches_are_over
        for key, entry in self.entries.items():
            if only is not None and key not in only:
                continue
            _, on_epoch, prog_bar, logger = entry.options[:4]
            if on_step:
                value, name = entry.step, entry.forked("step")
            else:
                value, name = (entry.epoch_value() if on_epoch else None), entry.forked("epoch")
            if value is None:
                continue
            if isinstance(value, Mapping):
                continue
            if logger:
                found["log"][name] = value
            if self.training or (on_epoch and not on_step):
                found["callback"][entry.label] = value
                found["callback"][name] = value
            if prog_bar:
                found["bar"][name] = value
        return found

    # ── In the state ──────────────────────────────────────────────────────────────────────────────

    def dump(self, module: nn.Module) -> list[dict[str, Any]]:
        """The memory of an unfinished epoch as plain values and tensors.

        Args:
            module: the module whose metric objects are logged; their own memory is not here, see
                :func:`metric_states`.
        """
        found = []
        names = {id(child): name for name, child in module.named_modules()}
        for entry in self.entries.values():
            metric = names.get(id(entry.metric))
            if entry.mode is None or (entry.metric is not None and metric is None):
                continue
            *flags, _reduce, suffix = entry.options
            found.append(
                {
                    "fx": entry.fx,
                    "name": entry.name,
                    "loader": entry.loader,
                    "options": [*flags, entry.mode, suffix],
                    "step": entry.step,
                    "total": entry.total,
                    "weight": entry.weight,
                    "metric": metric,
                    "sync": entry.sync is not None,
                }
            )
        return found

    def restore(self, found: list[dict[str, Any]], module: nn.Module) -> None:
        """Take back what :meth:`dump` has given."""
        functions = {"mean": torch.mean, "max": torch.max, "min": torch.min, "sum": torch.sum}
        for item in found:
            *flags, mode, suffix = item["options"]
            options = (*flags, functions[mode], suffix)
            entry = _Entry(item["fx"], item["name"], item["loader"], options)
            entry.step, entry.total, entry.weight = item["step"], item["total"], item["weight"]
            if item.get("sync"):
                entry.sync = self._over_processes()
            if item.get("metric") is not None:
                entry.metric = module.get_submodule(item["metric"])
            self.entries[(entry.fx, entry.name, entry.loader)] = entry


def is_metric(value: Any) -> bool:
    """Whether a value is a metric object, of this package or of torchmetrics."""
    return callable(getattr(value, "compute", None)) and callable(getattr(value, "update", None))


_COUNTERS = ("_update_called", "_update_count")


def metric_states(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What the metric objects of a module have gathered, by the name of each.

    Their states are attributes, neither parameters nor buffers, so that a ``state_dict`` is without
    them.
    """
    found = {}
    for name, metric in module.named_modules():
        states = getattr(metric, "_defaults", None)
        if is_metric(metric) and isinstance(states, dict):
            counters = {c: metric.__dict__[c] for c in _COUNTERS if c in metric.__dict__}
            found[name] = {**{state: getattr(metric, state) for state in states}, **counters}
    return found


def restore_metric_states(module: nn.Module, found: dict[str, dict[str, Any]]) -> None:
    """Take back what :func:`metric_states` has given."""
    metrics = dict(module.named_modules())
    for name, values in found.items():
        metric = metrics[name]
        for state, value in values.items():
            if state not in _COUNTERS:
                device = getattr(metric, "device", None) or _device_of(getattr(metric, state))
                value = move_data_to_device(value, device) if device is not None else value
            setattr(metric, state, value)


def _device_of(value: Any) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None


def _forward_value(metric: Any) -> Tensor | None:
    for name in ("_forward_cache", "_cache_forward"):
        value = getattr(metric, name, None)
        if isinstance(value, Tensor):
            return value.detach()
    return None


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, bool | numbers.Number):
        return torch.tensor(value, dtype=_float_type())
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # numpy
        return torch.tensor(value.item(), dtype=_float_type())
    raise MisconfigurationException(
        f"self.log({name!r}, {value!r}) was called with a {type(value).__name__}; a number, a "
        "tensor of one element or a metric is logged; use self.log_dict for a dict"
    )


def _float_type() -> torch.dtype:
    dtype = torch.get_default_dtype()
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def batch_size_of(batch: Any) -> int:
    """The first dimension of the tensors in a batch; with a warning if they differ."""
    sizes = set()
    for size in _sizes(batch):
        sizes.add(size)
        if len(sizes) > 1:
            _warnings.warn(
                "Trying to infer the `batch_size` from an ambiguous collection. The batch size we "
                f"found is {min(sizes, key=lambda s: s != size)}. To avoid any miscalculations, "
                "use `self.log(..., batch_size=batch_size)`."
            )
            break
    first = next(_sizes(batch), None)
    return 1 if first is None else first


def _sizes(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        yield 1 if batch.dim() == 0 else batch.size(0)
    elif isinstance(batch, str):
        yield len(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _sizes(value)
    elif hasattr(batch, "__dataclass_fields__"):
        for name in batch.__dataclass_fields__:
            yield from _sizes(getattr(batch, name))


Reduction = Callable[[Tensor], Tensor]
