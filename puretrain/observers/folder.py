"""The directory that an observer writes to."""

from __future__ import annotations

from pathlib import Path

from puretrain.errors import ConfigurationError

__all__ = ["make_folder"]


def make_folder(path: Path) -> None:
    """Make a directory and those above it, where they are not there.

    Raises:
        ConfigurationError: that can't be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"the directory {path} can't be made: {error.strerror or error}; give another one"
        ) from error
