"""What the Trainer's arguments mean: their checks, their defaults, and which of them imply others.

Those about devices are read in :mod:`~puretrain.lightning.trainer.devices`, and what becomes a
callback, a logger or a profiler in :mod:`~puretrain.lightning.trainer.connecting`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from inspect import Parameter
from typing import Any

from puretrain.lightning.utilities.distributed import rank_zero_info
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["are_of_2", "settings"]

# What is kept as it was given, under its own name.
_KEPT = (
    "auto_lr_find", "auto_scale_batch_size", "automatic_optimization", "benchmark",
    "check_val_every_n_epoch", "deterministic", "fast_dev_run", "flush_logs_every_n_steps",
    "gradient_clip_val", "log_every_n_steps", "log_gpu_memory", "max_epochs", "max_steps",
    "min_steps", "move_metrics_to_cpu", "multiple_trainloader_mode", "overfit_batches",
    "prepare_data_per_node", "process_position", "reload_dataloaders_every_epoch",
    "resume_from_checkpoint", "sync_batchnorm", "terminate_on_nan", "track_grad_norm",
    "truncated_bptt_steps", "val_check_interval", "weights_summary",
)  # fmt: skip
_LIMITS = tuple(f"limit_{kind}_batches" for kind in ("train", "val", "test", "predict"))


def are_of_2(given: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> bool:
    """Whether arguments, or values of them, are given that 1.x has not."""
    later = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    return (
        any(given[p.name] != p.default for p in later)
        or given["accelerator"] in ("auto", "cpu", "gpu", "cuda")
        or str(given["precision"]).endswith(("-mixed", "-true"))
    )


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a trainer that its arguments give, by their names.

    Args:
        given: all arguments.

    Raises:
        MisconfigurationException: a value is none that the argument can have.
    """
    _check(given)
    found = {name: given[name] for name in _KEPT}
    found |= {name: 1.0 if given[name] is None else given[name] for name in _LIMITS}
    max_epochs, max_steps, min_epochs = given["max_epochs"], given["max_steps"], given["min_epochs"]
    if max_epochs is None and max_steps in (None, -1) and given["max_time"] is None:
        found["max_epochs"] = 1000
    if min_epochs is None and given["min_steps"] is None:
        min_epochs = 1
    sanity = 0 if given["barebones"] else given["num_sanity_val_steps"]
    every = given["reload_dataloaders_every_n_epochs"]
    found |= {
        "default_root_dir": os.fspath(given["default_root_dir"] or os.getcwd()),
        "_weights_save_path": given["weights_save_path"],
        "min_epochs": min_epochs,
        "_epochs_are_given": max_epochs is not None,
        "gradient_clip_algorithm": str(given["gradient_clip_algorithm"] or "norm").lower(),
        "_tracks_norms": given["track_grad_norm"] == "inf" or float(given["track_grad_norm"]) > 0,
        "val_check_batch": 1,
        "num_sanity_val_steps": {None: 2, -1: math.inf}.get(sanity, sanity),
        "replace_sampler_ddp": given["replace_sampler_ddp"] and given["use_distributed_sampler"],
        "_detects_anomaly": given["detect_anomaly"],
        "_reload_every": 1 if given["reload_dataloaders_every_epoch"] else every,
        "accelerator_name": given["accelerator"] or given["distributed_backend"],
    }
    if given["enable_model_summary"] is False or given["barebones"]:
        found["weights_summary"] = None
    return found | _of_fast_dev_run(given["fast_dev_run"])


def _of_fast_dev_run(given: Any) -> dict[str, Any]:
    if not given:
        return {}
    count = int(given)
    rank_zero_info(
        "Running in fast_dev_run mode: will run a full train, val and test loop using "
        f"{count} batch(es)."
    )
    return {
        **dict.fromkeys(_LIMITS, count),
        "max_steps": count,
        "max_epochs": 1,
        "_epochs_are_given": True,
        "num_sanity_val_steps": 0,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
    }


def _check(given: Mapping[str, Any]) -> None:
    for name in ("max_epochs", "max_steps"):
        value = given[name]
        if value is not None and value < -1:
            raise MisconfigurationException(
                f"`{name}` must be a non-negative integer or -1, not {value}"
            )
    algorithm, clip = given["gradient_clip_algorithm"], given["gradient_clip_val"]
    if str(algorithm or "norm").lower() not in {"norm", "value"}:
        raise MisconfigurationException(
            f"`gradient_clip_algorithm` {algorithm} is invalid. "
            "Allowed algorithms: ['value', 'norm']."
        )
    if clip is not None and not isinstance(clip, (int, float)):
        raise TypeError(f"`gradient_clip_val` should be an int or a float. Got {clip}.")
    norm = given["track_grad_norm"]
    if not isinstance(norm, (int, float)) and norm != "inf":
        raise MisconfigurationException(
            f"`track_grad_norm` must be a positive number or 'inf' (infinity norm). Got {norm}."
        )
    if isinstance(given["val_check_interval"], (str, timedelta, dict)):
        raise MisconfigurationException("`val_check_interval` as a time is not supported")
    for name in (*_LIMITS, "val_check_interval", "overfit_batches"):
        _check_limit(name, given[name])
    fast = given["fast_dev_run"]
    if not isinstance(fast, (bool, int)) or fast < 0:
        raise MisconfigurationException(
            f"fast_dev_run={fast} is not a valid configuration. It should be either a "
            "bool or an int >= 0"
        )
    summary = given["weights_summary"]
    if summary not in (None, "top", "full", "default"):
        raise MisconfigurationException(f"`weights_summary` can be None, top, full, got {summary}")
    backend = given["amp_backend"]
    if str(backend).lower() not in {"native", "apex"}:
        raise MisconfigurationException(f"amp_backend is 'native', not {backend!r}")
    if str(backend).lower() == "apex" and str(given["precision"]) == "16":
        raise MisconfigurationException(
            "Apex is not used here; leave amp_backend='native', which is torch's autocast"
        )


def _check_limit(name: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value < 0 or (isinstance(value, float) and value > 1.0):
        raise MisconfigurationException(
            f"You have passed invalid value {value} for {name}, it has to be in "
            "[0.0, 1.0] or an int."
        )
