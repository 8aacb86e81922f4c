"""The place of the combined loader in later versions."""

from puretrain.lightning.trainer.supporters import CombinedLoader

__all__ = ["CombinedLoader"]
