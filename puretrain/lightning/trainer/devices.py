"""What the Trainer's arguments about devices and processes mean for a run in one process."""

from __future__ import annotations

from typing import Any

import torch

from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["check_devices", "check_logging_of_memory", "read_plugins"]

_ONE_PROCESS = {"auto", "cpu", "gpu", "cuda", "mps", "single_device"}
_PARALLEL = {"dp", "ddp", "ddp2", "ddp_cpu", "ddp_spawn", "ddp_notebook", "ddp_fork"}
_REFUSED = {
    "deepspeed": "DeepSpeed is not used",
    "fsdp": "parameters are not sharded here",
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


def read_plugins(plugins: Any, accelerator: Any, precision: Any) -> tuple[Any, Any]:
    """The accelerator and the precision, with those that plugins stand for.

    Raises:
        MisconfigurationException: a plugin can't be used, or says something else than the argument.
    """
    if plugins is None:
        return accelerator, precision
    for plugin in plugins if isinstance(plugins, (list, tuple)) else [plugins]:
        word = plugin if isinstance(plugin, str) else getattr(plugin, "accelerator", None)
        if word is not None:
            _check_word("plugins", word)
            accelerator = word if accelerator is None else accelerator
        elif getattr(plugin, "precision", None) is not None:
            if str(precision) not in {"32", "None", str(plugin.precision)}:
                raise MisconfigurationException(
                    f"precision={precision!r} and {type(plugin).__name__}, which computes in "
                    f"{plugin.precision}, do not go together; give one of them"
                )
            precision = plugin.precision
        else:
            rank_zero_warn(
                f"the plugin {type(plugin).__name__} has no effect: the run is in one process"
            )
    return accelerator, precision


def check_devices(
    accelerator: Any,
    strategy: Any,
    devices: Any,
    num_nodes: Any,
    num_processes: Any,
    sync_batchnorm: bool,
) -> None:
    """Say what is not done with these arguments in one process.

    Raises:
        MisconfigurationException: there is no such accelerator or strategy, or it can't be used.
    """
    _check_word("accelerator", accelerator)
    _check_word("strategy", getattr(strategy, "accelerator", strategy))
    missing = []
    if isinstance(num_nodes, int) and num_nodes > 1:
        missing.append(f"num_nodes={num_nodes}")
    if isinstance(num_processes, int) and num_processes > 1:
        missing.append(f"num_processes={num_processes}")
    count = int(devices) if str(devices).isdigit() and not isinstance(devices, bool) else 1
    if accelerator in {"cpu", "auto", None} and count > 1 and not torch.cuda.is_available():
        missing.append(f"devices={count}")
    if missing:
        rank_zero_warn(
            f"{' and '.join(missing)}: several processes are not supported yet; the run is in this "
            "one process, and sees all of the data and no other's gradients"
        )
    if sync_batchnorm:
        rank_zero_warn(
            "sync_batchnorm=True has no effect: in one process there is nothing to synchronize"
        )


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
    if plain.removesuffix("_find_unused_parameters_false") not in known:
        raise MisconfigurationException(
            f"{argument}={word!r} is none of {', '.join(sorted(known))}"
        )
