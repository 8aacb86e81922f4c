"""Where 2.x has the base class of callbacks that write checkpoints."""

from puretrain.lightning.callbacks.model_checkpoint import ModelCheckpoint

__all__ = ["Checkpoint"]

Checkpoint = ModelCheckpoint
