"""Where 2.x has the base class of progress bars."""

from puretrain.lightning.callbacks.progress import ProgressBarBase

__all__ = ["ProgressBar"]

ProgressBar = ProgressBarBase
