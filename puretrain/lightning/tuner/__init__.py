"""Finding a learning rate and a batch size."""

from puretrain.lightning.tuner.tuning import Tuner

__all__ = ["Tuner"]
