"""Where the time of a run goes."""

from puretrain.lightning.profiler.advanced import AdvancedProfiler
from puretrain.lightning.profiler.base import (
    AbstractProfiler,
    BaseProfiler,
    PassThroughProfiler,
    Profiler,
)
from puretrain.lightning.profiler.pytorch import PyTorchProfiler
from puretrain.lightning.profiler.simple import SimpleProfiler

__all__ = [
    "AbstractProfiler",
    "AdvancedProfiler",
    "BaseProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
]
