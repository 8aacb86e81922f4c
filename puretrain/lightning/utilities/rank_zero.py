"""The place of ``rank_zero_only`` and its relatives in later versions."""

from puretrain.lightning.utilities.distributed import (
    log,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from puretrain.lightning.utilities.warnings import LightningDeprecationWarning, WarningCache

rank_zero_module = log

__all__ = [
    "LightningDeprecationWarning",
    "WarningCache",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_module",
    "rank_zero_only",
    "rank_zero_warn",
]
