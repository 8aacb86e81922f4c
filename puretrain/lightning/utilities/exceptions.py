"""Exceptions of the Lightning interface, under the names that programs catch."""

from __future__ import annotations

from puretrain.errors import ConfigurationError

__all__ = ["DeadlockDetectedException", "ExitGracefullyException", "MisconfigurationException"]


class MisconfigurationException(ConfigurationError):
    """Arguments, hooks or data that can't work together."""


class DeadlockDetectedException(Exception):
    """Processes of one run wait for each other and none can go on."""


class ExitGracefullyException(SystemExit):
    """A signal asked the run to save its state and end."""
