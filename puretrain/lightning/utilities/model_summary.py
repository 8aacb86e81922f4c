"""The place of the model's summary in later versions."""

from puretrain.lightning.core.memory import (
    PARAMETER_NUM_UNITS,
    UNKNOWN_SIZE,
    LayerSummary,
    ModelSummary,
    get_human_readable_count,
    parse_batch_shape,
    summarize,
)

__all__ = [
    "PARAMETER_NUM_UNITS",
    "UNKNOWN_SIZE",
    "LayerSummary",
    "ModelSummary",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]
