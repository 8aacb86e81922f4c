"""The place of the profilers in older versions."""

from puretrain.lightning.profiler.advanced import AdvancedProfiler
from puretrain.lightning.profiler.base import BaseProfiler, PassThroughProfiler
from puretrain.lightning.profiler.simple import SimpleProfiler

__all__ = ["AdvancedProfiler", "BaseProfiler", "PassThroughProfiler", "SimpleProfiler"]
