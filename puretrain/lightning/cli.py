"""The place of the command line interface in later versions."""

from puretrain.lightning.utilities.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)

__all__ = ["LightningArgumentParser", "LightningCLI", "SaveConfigCallback"]
