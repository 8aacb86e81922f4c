"""Where 2.x has the base class of callbacks."""

from puretrain.lightning.callbacks.base import Callback

__all__ = ["Callback"]
