"""A callback made of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["LambdaCallback"]


class LambdaCallback(Callback):
    """Calls a function for each hook that one is given for.

    Example:
        >>> callback = LambdaCallback(on_train_end=lambda trainer, module: print("done"))
        >>> callback.on_train_end(None, None)
        done
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        """Take functions by the names of the hooks."""
        for name, function in hooks.items():
            if not hasattr(Callback, name):
                raise MisconfigurationException(
                    f"The event function: `{name}` doesn't exist. Please, check "
                    "`puretrain.lightning.callbacks.Callback` for supported functions."
                )
            if function is not None:
                setattr(self, name, function)
