"""The place of the loggers' base in later versions."""

from puretrain.lightning.loggers.base import (
    DummyExperiment,
    DummyLogger,
    LightningLoggerBase,
    merge_dicts,
    rank_zero_experiment,
)

Logger = LightningLoggerBase

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "merge_dicts", "rank_zero_experiment"]
