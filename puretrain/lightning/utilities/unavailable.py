"""Names that can be imported, but not used."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["unavailable"]


def unavailable(name: str, module: str, reason: str, base: type = object) -> Any:
    """A class that can be imported and checked for, and that raises when it is called.

    Args:
        name: of the class.
        module: where it is defined.
        reason: why it can't work, and what to use instead.
        base: its base class.

    >>> unavailable("Warp", __name__, "there is no warp; use a GPU")()
    Traceback (most recent call last):
        ...
    puretrain.lightning.utilities.exceptions.MisconfigurationException: Warp is not available in \
puretrain: there is no warp; use a GPU
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        raise MisconfigurationException(f"{name} is not available in puretrain: {reason}")

    body = {
        "__init__": __init__,
        "__module__": module,
        "__doc__": f"Not available: {reason}.",
        "__qualname__": name,
    }
    return type(name, (base,), body)
