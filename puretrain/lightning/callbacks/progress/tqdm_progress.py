"""Where 1.5 and later have the plain progress bar."""

from puretrain.lightning.callbacks.progress import TQDMProgressBar, tqdm

__all__ = ["TQDMProgressBar", "tqdm"]
