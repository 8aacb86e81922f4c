"""Where 1.5 and later have the progress bar in colours."""

from puretrain.lightning.callbacks.progress import RichProgressBar, RichProgressBarTheme

__all__ = ["RichProgressBar", "RichProgressBarTheme"]
