"""The place of the reductions in older versions."""

from puretrain.lightning.metrics.utils import class_reduce, reduce

__all__ = ["class_reduce", "reduce"]
