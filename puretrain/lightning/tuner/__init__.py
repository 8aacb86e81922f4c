"""Finding a learning rate and a batch size."""

from puretrain.lightning.tuner import auto_gpu_select, batch_size_scaling, lr_finder
from puretrain.lightning.tuner.tuning import Tuner

__all__ = ["Tuner", "auto_gpu_select", "batch_size_scaling", "lr_finder"]
