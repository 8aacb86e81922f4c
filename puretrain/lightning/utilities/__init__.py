"""Odds and ends under the import paths that programs use."""

from __future__ import annotations

import importlib
from types import ModuleType

from puretrain.lightning.utilities.apply_func import (
    apply_to_collection,
    apply_to_collections,
    move_data_to_device,
)
from puretrain.lightning.utilities.distributed import (
    AllGatherGrad,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from puretrain.lightning.utilities.enums import (
    AMPType,
    DeviceType,
    DistributedType,
    GradClipAlgorithmType,
    LightningEnum,
    ModelSummaryMode,
)
from puretrain.lightning.utilities.grads import grad_norm
from puretrain.lightning.utilities.imports import (
    _APEX_AVAILABLE,
    _BOLTS_AVAILABLE,
    _DEEPSPEED_AVAILABLE,
    _FAIRSCALE_AVAILABLE,
    _FAIRSCALE_FULLY_SHARDED_AVAILABLE,
    _FAIRSCALE_PIPE_AVAILABLE,
    _GROUP_AVAILABLE,
    _HOROVOD_AVAILABLE,
    _HYDRA_AVAILABLE,
    _HYDRA_EXPERIMENTAL_AVAILABLE,
    _IS_INTERACTIVE,
    _JSONARGPARSE_AVAILABLE,
    _KINETO_AVAILABLE,
    _NATIVE_AMP_AVAILABLE,
    _OMEGACONF_AVAILABLE,
    _RPC_AVAILABLE,
    _TORCH_GREATER_EQUAL_1_5,
    _TORCH_GREATER_EQUAL_1_6,
    _TORCH_GREATER_EQUAL_1_7,
    _TORCH_GREATER_EQUAL_1_8,
    _TORCH_GREATER_EQUAL_1_8_1,
    _TORCH_GREATER_EQUAL_1_9,
    _TORCH_LOWER_EQUAL_1_4,
    _TORCH_QUANTIZE_AVAILABLE,
    _TORCHTEXT_AVAILABLE,
    _TORCHVISION_AVAILABLE,
    _TPU_AVAILABLE,
    _XLA_AVAILABLE,
    _module_available,
)
from puretrain.lightning.utilities.parsing import (
    AttributeDict,
    flatten_dict,
    is_picklable,
    parse_class_init_keys,
)

FLOAT16_EPSILON = 2.0**-10
FLOAT32_EPSILON = 2.0**-23
FLOAT64_EPSILON = 2.0**-52

__all__ = [
    "FLOAT16_EPSILON",
    "FLOAT32_EPSILON",
    "FLOAT64_EPSILON",
    "_APEX_AVAILABLE",
    "_BOLTS_AVAILABLE",
    "_DEEPSPEED_AVAILABLE",
    "_FAIRSCALE_AVAILABLE",
    "_FAIRSCALE_FULLY_SHARDED_AVAILABLE",
    "_FAIRSCALE_PIPE_AVAILABLE",
    "_GROUP_AVAILABLE",
    "_HOROVOD_AVAILABLE",
    "_HYDRA_AVAILABLE",
    "_HYDRA_EXPERIMENTAL_AVAILABLE",
    "_IS_INTERACTIVE",
    "_JSONARGPARSE_AVAILABLE",
    "_KINETO_AVAILABLE",
    "_NATIVE_AMP_AVAILABLE",
    "_OMEGACONF_AVAILABLE",
    "_RPC_AVAILABLE",
    "_TORCHTEXT_AVAILABLE",
    "_TORCHVISION_AVAILABLE",
    "_TORCH_GREATER_EQUAL_1_5",
    "_TORCH_GREATER_EQUAL_1_6",
    "_TORCH_GREATER_EQUAL_1_7",
    "_TORCH_GREATER_EQUAL_1_8",
    "_TORCH_GREATER_EQUAL_1_8_1",
    "_TORCH_GREATER_EQUAL_1_9",
    "_TORCH_LOWER_EQUAL_1_4",
    "_TORCH_QUANTIZE_AVAILABLE",
    "_TPU_AVAILABLE",
    "_XLA_AVAILABLE",
    "AMPType",
    "AllGatherGrad",
    "AttributeDict",
    "DeviceType",
    "DistributedType",
    "GradClipAlgorithmType",
    "LightningEnum",
    "ModelSummaryMode",
    "_module_available",
    "apply_to_collection",
    "apply_to_collections",
    "flatten_dict",
    "grad_norm",
    "is_picklable",
    "move_data_to_device",
    "parse_class_init_keys",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]


def __getattr__(name: str) -> ModuleType:
    # pl.utilities.cloud_io works without an import of its own
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
