"""The place of LightningModule in later versions."""

from puretrain.lightning.core.lightning import LightningModule

__all__ = ["LightningModule"]
