"""Warnings that appear once."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.utilities.distributed import (
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_warn,
)

__all__ = ["LightningDeprecationWarning", "PossibleUserWarning", "WarningCache"]


class LightningDeprecationWarning(DeprecationWarning):
    """A name or argument that goes away."""


class PossibleUserWarning(UserWarning):
    """Something that is often, but not always, a mistake."""


class WarningCache(set):  # type: ignore[type-arg]
    """Gives each message once in the life of the cache."""

    def warn(self, message: Any, *args: Any, **kwargs: Any) -> None:
        """Warn, unless this message was given before."""
        if message not in self:
            self.add(message)
            rank_zero_warn(message, *args, **kwargs)

    def deprecation(self, message: Any, *args: Any, **kwargs: Any) -> None:
        """Warn of something that goes away, unless this message was given before."""
        if message not in self:
            self.add(message)
            rank_zero_deprecation(message, *args, **kwargs)

    def info(self, message: Any, *args: Any, **kwargs: Any) -> None:
        """Log a message, unless it was given before."""
        if message not in self:
            self.add(message)
            rank_zero_info(message, *args, **kwargs)
