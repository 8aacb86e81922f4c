"""Which packages are installed, and which versions of torch the installed one is at least."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["_compare_version", "_module_available"]


def _module_available(module_path: str) -> bool:
    """Whether a module could be imported.

    >>> _module_available("os"), _module_available("no.such.module")
    (True, False)
    """
    try:
        return importlib.util.find_spec(module_path) is not None
    except (AttributeError, ModuleNotFoundError, ValueError):
        return False


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers at the front of a version: ``1.9.0+cpu`` is ``(1, 9, 0)``."""
    found = []
    for part in version.split("+", maxsplit=1)[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found + [0] * (3 - len(found)))


def _compare_version(package: str, op: Callable[[Any, Any], bool], version: str) -> bool:
    """Compare the version of an installed package; False if it is not installed.

    >>> import operator
    >>> _compare_version("torch", operator.ge, "1.6")
    True
    """
    if not _module_available(package):
        return False
    module = importlib.import_module(package)
    return op(_numbers(str(getattr(module, "__version__", "0"))), _numbers(version))


_TORCH = _numbers(str(torch.__version__))

_IS_WINDOWS = sys.platform == "win32"
_IS_INTERACTIVE = hasattr(sys, "ps1")
_PYTHON_GREATER_EQUAL_3_8_0 = True
_TORCH_LOWER_EQUAL_1_4 = False
_TORCH_GREATER_EQUAL_1_5 = _TORCH >= (1, 5)
_TORCH_GREATER_EQUAL_1_6 = _TORCH >= (1, 6)
_TORCH_GREATER_EQUAL_1_7 = _TORCH >= (1, 7)
_TORCH_GREATER_EQUAL_1_8 = _TORCH >= (1, 8)
_TORCH_GREATER_EQUAL_1_8_1 = _TORCH >= (1, 8, 1)
_TORCH_GREATER_EQUAL_1_9 = _TORCH >= (1, 9)
_TORCH_GREATER_EQUAL_1_10 = _TORCH >= (1, 10)
_TORCH_GREATER_EQUAL_1_11 = _TORCH >= (1, 11)
_TORCH_GREATER_EQUAL_2_0 = _TORCH >= (2, 0)
_TORCH_GREATER_EQUAL_2_1 = _TORCH >= (2, 1)

# What Lightning would use if it were there, and puretrain never does, counts as absent.
_APEX_AVAILABLE = False
_DEEPSPEED_AVAILABLE = False
_FAIRSCALE_AVAILABLE = False
_FAIRSCALE_FULLY_SHARDED_AVAILABLE = False
_FAIRSCALE_PIPE_AVAILABLE = False
_GROUP_AVAILABLE = torch.distributed.is_available()
_HOROVOD_AVAILABLE = False
_RPC_AVAILABLE = False
_TPU_AVAILABLE = False
_XLA_AVAILABLE = False

_BOLTS_AVAILABLE = _module_available("pl_bolts")
_HYDRA_AVAILABLE = _module_available("hydra")
_HYDRA_EXPERIMENTAL_AVAILABLE = _HYDRA_AVAILABLE
_JSONARGPARSE_AVAILABLE = _module_available("jsonargparse")
_KINETO_AVAILABLE = torch.profiler.kineto_available()
_NATIVE_AMP_AVAILABLE = hasattr(torch, "autocast")
_OMEGACONF_AVAILABLE = _module_available("omegaconf")
_RICH_AVAILABLE = True  # a dependency of puretrain
_TORCH_QUANTIZE_AVAILABLE = any(
    engine != "none" for engine in torch.backends.quantized.supported_engines
)
_TORCHTEXT_AVAILABLE = _module_available("torchtext")
_TORCHVISION_AVAILABLE = _module_available("torchvision")
_TORCHMETRICS_AVAILABLE = _module_available("torchmetrics")
