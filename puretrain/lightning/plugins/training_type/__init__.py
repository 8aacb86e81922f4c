"""The place of the plugins in some versions."""

from puretrain.lightning.plugins import *  # noqa: F403
