"""The trainer."""

from puretrain.lightning.trainer.trainer import Trainer
from puretrain.lightning.utilities.seed import seed_everything

__all__ = ["Trainer", "seed_everything"]
