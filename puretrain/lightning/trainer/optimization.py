"""The optimizers and schedulers that ``configure_optimizers`` returns, in all its forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import WarningCache

__all__ = ["Configuration", "configure", "scheduler_config", "step_schedulers"]

_warnings = WarningCache()
_DEFAULTS: dict[str, Any] = {
    "scheduler": None,
    "name": None,
    "interval": "epoch",
    "frequency": 1,
    "reduce_on_plateau": False,
    "monitor": None,
    "strict": True,
    "opt_idx": None,
}


class NoOptimizer(Optimizer):
    """Stands where ``configure_optimizers`` returned None: it changes nothing."""

    def __init__(self) -> None:
        """Make one, with a parameter of its own."""
        super().__init__([torch.zeros(1)], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients, and leave the parameters."""
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is remembered."""


class Configuration(NamedTuple):
    """What ``configure_optimizers`` has given."""

    optimizers: list[Any]
    schedulers: list[dict[str, Any]]
    frequencies: list[int]


def configure(returned: Any) -> Configuration:
    """Read what ``configure_optimizers`` returned.

    Raises:
        MisconfigurationException: it has none of the six forms.
    """
    monitor = None
    if returned is None:
        _warnings.warn(
            "`LightningModule.configure_optimizers` returned `None`, this fit will run with no "
            "optimizer"
        )
        return Configuration([NoOptimizer()], [], [])
    optimizers: list[Any]
    schedulers: list[Any] = []
    frequencies: list[int] = []
    if isinstance(returned, Optimizer):
        optimizers = [returned]
    elif isinstance(returned, Mapping):
        if "optimizer" not in returned:
            raise MisconfigurationException(_forms(returned))
        optimizers = [returned["optimizer"]]
        monitor = returned.get("monitor")
        if returned.get("lr_scheduler") is not None:
            schedulers = [returned["lr_scheduler"]]
    elif isinstance(returned, (list, tuple)):
        if len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned):
            first, second = returned
            optimizers = list(first)
            schedulers = [s for s in second if s is not None]
        elif returned and all(isinstance(part, Mapping) for part in returned):
            optimizers = [part["optimizer"] for part in returned]
            for number, part in enumerate(returned):
                scheduler = part.get("lr_scheduler")
                if scheduler is not None:
                    config = dict(scheduler) if isinstance(scheduler, Mapping) else None
                    config = {"scheduler": scheduler} if config is None else config
                    if "monitor" in part:
                        config.setdefault("monitor", part["monitor"])
                    schedulers.append({**config, "opt_idx": number})
            frequencies = [part["frequency"] for part in returned if part.get("frequency")]
            if frequencies and len(frequencies) != len(optimizers):
                raise MisconfigurationException("A frequency must be given to each optimizer.")
        elif returned and all(isinstance(part, Optimizer) for part in returned):
            optimizers = list(returned)
        elif not returned:
            optimizers = []
        else:
            raise MisconfigurationException(_forms(returned))
    else:
        raise MisconfigurationException(_forms(returned))
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "step"):
            raise MisconfigurationException(_forms(returned))
    if not optimizers:
        return configure(None)
    configs = [scheduler_config(each, monitor) for each in schedulers]
    return Configuration(optimizers, configs, frequencies)


def _forms(returned: Any) -> str:
    return (
        f"Unknown configuration for model optimizers: {type(returned).__name__}. Output from "
        "`model.configure_optimizers()` should be one of: an optimizer; a list or tuple of "
        "optimizers; a list of optimizers and a list of schedulers; a dict with 'optimizer' and "
        "optionally 'lr_scheduler' and 'monitor'; several such dicts, optionally with 'frequency'; "
        "or None"
    )


def scheduler_config(given: Any, monitor: str | None = None) -> dict[str, Any]:
    """A scheduler with its options, all of them.

    Args:
        given: the scheduler, or a dict of it and some of its options.
        monitor: the metric that it looks at, unless the dict says so.

    Raises:
        MisconfigurationException: an option has no such value, or there is no scheduler.
    """
    config = {**_DEFAULTS, "monitor": monitor}
    if isinstance(given, Mapping):
        extra = [key for key in given if key not in _DEFAULTS]
        if extra:
            _warnings.warn(f"Found unsupported keys in the lr scheduler dict: {extra}")
        if "scheduler" not in given:
            raise MisconfigurationException(
                'The lr scheduler dict must have the key "scheduler" with its item being an lr '
                "scheduler"
            )
        config.update({key: value for key, value in given.items() if key in _DEFAULTS})
        if config["interval"] not in {"step", "epoch"}:
            raise MisconfigurationException(
                'The "interval" key in lr scheduler dict must be "step" or "epoch" but is '
                f'"{config["interval"]}"'
            )
    else:
        config["scheduler"] = given
    scheduler = config["scheduler"]
    if not callable(getattr(scheduler, "step", None)):
        raise MisconfigurationException(
            f"the lr scheduler is a {type(scheduler).__name__}, which has no method `step`"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        config["reduce_on_plateau"] = True
    if config["reduce_on_plateau"] and config["monitor"] is None:
        raise MisconfigurationException(
            "`configure_optimizers` must include a monitor when a `ReduceLROnPlateau` scheduler is "
            "used. For example: {'optimizer': optimizer, 'lr_scheduler': scheduler, 'monitor': "
            "'metric_to_track'}"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR) and config["interval"] == "epoch":
        _warnings.warn(
            "A `OneCycleLR` scheduler is using 'interval': 'epoch'. Are you sure you didn't mean "
            "'interval': 'step'?"
        )
    return config


def step_schedulers(trainer: Any, interval: str, *, plateau: bool) -> None:
    """Make a step of the schedulers that are due.

    Args:
        trainer: whose schedulers.
        interval: ``step`` or ``epoch``.
        plateau: those that monitor a metric, or the others.
    """
    current = trainer.batch_idx if interval == "step" else trainer.current_epoch
    for config in trainer.lr_schedulers:
        if config["reduce_on_plateau"] != plateau or config["interval"] != interval:
            continue
        if (current + 1) % config["frequency"]:
            continue
        metric = None
        if plateau:
            name = config["monitor"]
            metrics = trainer.callback_metrics
            metric = metrics.get(name)
            if metric is None:
                message = (
                    f"ReduceLROnPlateau conditioned on metric {name} which is not available. "
                    f"Available metrics are: {sorted(metrics)}. Condition can be set using "
                    "`monitor` key in lr scheduler dict"
                )
                if config["strict"]:
                    raise MisconfigurationException(message)
                _warnings.warn(message)
                continue
            if trainer.world_size > 1:  # else the learning rates would differ
                metric = trainer.strategy.broadcast(metric)
        scheduler = config["scheduler"]
        method = trainer._lr_scheduler_step
        if method is not None:
            arguments = (scheduler, metric)
            if method[1] >= 3:
                arguments = (scheduler, config["opt_idx"] or 0, metric)
            method[0](*arguments)
        elif metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)
