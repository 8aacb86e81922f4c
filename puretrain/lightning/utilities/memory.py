"""Memory: giving it back, and telling when there was not enough."""

from __future__ import annotations

import gc
import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from puretrain.lightning.core.memory import get_gpu_memory_map, get_memory_profile

__all__ = [
    "garbage_collection_cuda",
    "get_gpu_memory_map",
    "get_memory_profile",
    "get_model_size_mb",
    "is_cuda_out_of_memory",
    "is_cudnn_snafu",
    "is_oom_error",
    "is_out_of_cpu_memory",
    "recursive_detach",
]


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """Cut all tensors of a nested dictionary from their graphs.

    Args:
        in_dict: the dictionary; other containers are left alone.
        to_cpu: whether to move them to the CPU as well.

    >>> recursive_detach({"a": torch.ones(1, requires_grad=True)})
    {'a': tensor([1.])}
    """
    if isinstance(in_dict, dict):
        return {key: recursive_detach(value, to_cpu) for key, value in in_dict.items()}
    if isinstance(in_dict, Tensor) or callable(getattr(in_dict, "detach", None)):
        value = in_dict.detach()
        return value.cpu() if to_cpu and isinstance(value, Tensor) else value
    return in_dict


def is_oom_error(exception: BaseException) -> bool:
    """Whether an exception says that there was not enough memory, on whichever device."""
    return (
        is_cuda_out_of_memory(exception)
        or is_cudnn_snafu(exception)
        or is_out_of_cpu_memory(exception)
    )


def _says(exception: BaseException, *words: str) -> bool:
    return (
        isinstance(exception, RuntimeError)
        and len(exception.args) == 1
        and all(word in str(exception.args[0]) for word in words)
    )


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Whether CUDA had not enough memory."""
    return isinstance(exception, torch.OutOfMemoryError) or (
        _says(exception, "CUDA", "out of memory")
    )


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether cuDNN failed in the way in which it does without enough memory."""
    return _says(exception, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.")


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether the CPU had not enough memory."""
    return isinstance(exception, MemoryError) or (
        _says(exception, "DefaultCPUAllocator: can't allocate memory")
        or _says(exception, "DefaultCPUAllocator: not enough memory")
    )


def garbage_collection_cuda() -> None:
    """Collect garbage, and give CUDA's cache back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def get_model_size_mb(model: nn.Module) -> float:
    """The size of a model's saved state in megabytes (10⁶ bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt")
        torch.save(model.state_dict(), path)
        return os.path.getsize(path) / 1e6
