"""What the Trainer's arguments about devices and processes mean."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["Plan", "check_logging_of_memory", "plan_of", "read_plugins"]

_ONE_PROCESS = {"auto", "cpu", "gpu", "cuda", "mps", "single_device"}
_PARALLEL = {"dp", "ddp", "ddp2", "ddp_cpu", "ddp_spawn", "ddp_notebook", "ddp_fork"}
_REFUSED = {
    "deepspeed": "DeepSpeed is not used",
    "fsdp": "parameters are not sharded here, use 'ddp' or puretrain.sharding",
    "sharded": "FairScale is not used",
    "horovod": "Horovod is not used",
    "tpu": "there is no TPU support",
    "xla": "there is no TPU support",
    "hpu": "there is no HPU support",
    "ipu": "there is no IPU support",
    "rpc": "there is no pipeline of processes",
    "colossalai": "ColossalAI is not used",
    "bagua": "Bagua is not used",
}


class Plan(NamedTuple):
    """Over what a run is divided."""

    kind: str
    """``single``, ``dp`` (one process, several devices), ``ddp`` or ``ddp2``."""
    launch: str
    """How a script that was started plainly gets its processes: ``none``, ``script``, ``spawn`` or
    ``fork``."""
    per_node: int
    """The number of processes on each machine."""
    nodes: int
    devices: tuple[torch.device, ...]
    """Of this machine: one for each process, or, with dp and ddp2, those of one process."""
    options: Mapping[str, Any]
    """What a strategy object was made with."""

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.per_node * self.nodes

    @property
    def parts(self) -> int:
        """Into how many parts one process divides its batches."""
        return len(self.devices) if self.kind in {"dp", "ddp2"} else 1


def read_plugins(plugins: Any, strategy: Any, precision: Any) -> tuple[Any, Any]:
    """The strategy and the precision, with those that plugins stand for.

    Raises:
        MisconfigurationException: a plugin can't be used, or says something else than the argument.
    """
    if plugins is None:
        return strategy, precision
    for plugin in plugins if isinstance(plugins, (list, tuple)) else [plugins]:
        word = plugin if isinstance(plugin, str) else getattr(plugin, "accelerator", None)
        if word is not None:
            _check_word("plugins", word)
            strategy = plugin if strategy in (None, "auto") else strategy
        elif getattr(plugin, "precision", None) is not None:
            if str(precision) not in {"32", "None", str(plugin.precision)}:
                raise MisconfigurationException(
                    f"precision={precision!r} and {type(plugin).__name__}, which computes in "
                    f"{plugin.precision}, do not go together; give one of them"
                )
            precision = plugin.precision
        else:
            rank_zero_warn(
                f"the plugin {type(plugin).__name__} has no effect: the processes of a run find "
                "each other by the variables that torchrun sets"
            )
    return strategy, precision


def plan_of(
    accelerator: Any,
    strategy: Any,
    devices: Any,
    num_nodes: Any,
    num_processes: Any,
    gpus: Any,
    tpu_cores: Any,
) -> Plan:
    """What the arguments about devices and processes mean.

    Raises:
        MisconfigurationException: there is no such accelerator, strategy or device, or it can't be
            used.
    """
    if tpu_cores:
        raise MisconfigurationException("there is no TPU support; use gpus= or the CPU")
    _check_word("accelerator", accelerator)
    _check_word("strategy", getattr(strategy, "accelerator", strategy))
    nodes = num_nodes if isinstance(num_nodes, int) and num_nodes > 0 else 1
    word = _parallel_word(strategy) or _parallel_word(accelerator)
    options = getattr(strategy, "options", {})
    lost = sorted({name for name, value in options.items() if value is not None} - _HARMLESS)
    if lost:
        rank_zero_warn(f"{type(strategy).__name__}: {', '.join(lost)} has no effect here")
    ids = None if word == "ddp_cpu" else _gpus(accelerator, devices, gpus)
    if ids:
        count = len(ids)
        places = tuple(torch.device("cuda", number) for number in ids)
    else:
        count = _count("devices", devices, _count("num_processes", num_processes, 1))
        places = (torch.device("cpu"),) * count
    if word in {"dp", "ddp2"}:
        if word == "dp" and nodes > 1:
            raise MisconfigurationException(
                f"dp is one process on one machine, but num_nodes={nodes}; use 'ddp' or 'ddp2'"
            )
        if word == "ddp2" and nodes > 1:
            return Plan("ddp2", "script", 1, nodes, places, options)
        return Plan("dp" if count > 1 else "single", "none", 1, 1, places, options)
    from_torchrun = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if word is not None and count == 1 and not ids and from_torchrun > 1:
        count = from_torchrun  # torchrun was told how many, and the Trainer was not
        places = places * count
    if count * nodes == 1:
        return Plan("single", "none", 1, 1, places, options)
    if word is None:
        word = "ddp"
        if isinstance(devices, str) and devices == "auto" and ids and accelerator is None:
            word = "ddp_spawn"
            rank_zero_warn(
                "You requested multiple GPUs but did not specify a backend, e.g. "
                '`Trainer(accelerator="dp"|"ddp"|"ddp2")`. Setting `accelerator="ddp_spawn"` for '
                "you."
            )
    launch = {"ddp_cpu": "spawn", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
    start = options.get("start_method")
    start = _START.get(start, start) or launch.get(word, "script")
    if start not in {"script", "spawn", "fork"}:
        raise MisconfigurationException(f"start_method={start!r} is not 'popen', 'spawn' or 'fork'")
    return Plan("ddp", start, count, nodes, places, options)


# Of DistributedDataParallel's options, those that do not change what it computes; the first two are
# used.
_HARMLESS = {
    "start_method",
    "timeout",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "bucket_cap_mb",
    "check_reduction",
    "parallel_devices",
    "cluster_environment",
}
_START = {"popen": "script", "forkserver": "spawn"}


def _parallel_word(given: Any) -> str | None:
    word = getattr(given, "accelerator", given)
    if not isinstance(word, str):
        return None
    word = re.sub("_find_unused_parameters_(true|false)$", "", word.lower())
    return word if word in _PARALLEL else None


def _count(name: str, given: Any, default: int) -> int:
    if given is None or given in ("auto", -1, "-1"):
        return default
    if isinstance(given, (list, tuple)):
        return len(given) or default
    try:
        count = int(given)
    except (TypeError, ValueError):
        count = 0
    if count < 1 or isinstance(given, bool):
        raise MisconfigurationException(f"{name}={given!r} is no number of processes")
    return count


def _gpus(accelerator: Any, devices: Any, gpus: Any) -> list[int]:
    """The numbers of the GPUs that are asked for."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = gpus
    anywhere = accelerator == "auto" or (
        accelerator != "cpu" and gpus is None and devices != "auto"
    )
    if accelerator in {"gpu", "cuda"} or (anywhere and available):
        wanted = -1 if devices == "auto" else devices
    if isinstance(wanted, str):
        wanted = wanted.strip()
        wanted = (
            [int(part) for part in wanted.split(",") if part.strip()]
            if "," in wanted
            else int(wanted)
        )
    if wanted == -1:
        wanted = list(range(available))
        if not wanted:
            raise MisconfigurationException("GPUs requested but none are available.")
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted:
        wanted = list(range(wanted))
    missing = [n for n in wanted or [] if n not in range(available)]
    if missing:
        raise MisconfigurationException(
            f"You requested GPUs: {list(wanted)}\n But your machine only has: "
            f"{list(range(available))}"
        )
    return list(wanted) if wanted else []


def check_logging_of_memory(mode: Any, on_gpu: bool) -> None:
    """Say what ``log_gpu_memory`` does not do.

    Raises:
        MisconfigurationException: it is neither ``all`` nor ``min_max``.
    """
    if mode in (None, False):
        return
    if mode not in ("all", "min_max", True):
        raise MisconfigurationException(f"log_gpu_memory is 'all' or 'min_max', not {mode!r}")
    if not on_gpu:
        rank_zero_warn(f"log_gpu_memory={mode!r} has no effect: the run is not on a GPU")


def _check_word(argument: str, word: Any) -> None:
    if not isinstance(word, str):
        return
    plain = word.lower()
    for name, reason in _REFUSED.items():
        if name in plain:
            raise MisconfigurationException(
                f"{argument}={word!r} is not supported: {reason}; use accelerator='cpu' or 'gpu'"
            )
    known = _ONE_PROCESS | _PARALLEL
    if re.sub("_find_unused_parameters_(true|false)$", "", plain) not in known:
        raise MisconfigurationException(
            f"{argument}={word!r} is none of {', '.join(sorted(known))}"
        )
