"""Where 1.5 and later have the base class of progress bars."""

from puretrain.lightning.callbacks.progress import ProgressBarBase

__all__ = ["ProgressBarBase"]
