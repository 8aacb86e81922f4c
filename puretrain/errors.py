"""The exceptions that puretrain raises on bad input. All of them are a :class:`PuretrainError`.

Every message says what was wrong, where (a tree path, a file and an offset, an argument), and what
to do about it. Where an exception of the standard library fits as well, ours derives from it, so
that ``except ValueError`` keeps working.

The arguments that are checked alike everywhere, a choice and a whole number, are checked here, so
that all functions refuse them in the same words.
"""

from __future__ import annotations

import numbers
from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DonatedStateError",
    "JournalError",
    "LossError",
    "NonFiniteError",
    "OptimizerError",
    "PatternError",
    "PuretrainError",
    "StructureError",
    "TransformError",
]


class PuretrainError(Exception):
    """Base class of everything that puretrain raises on purpose."""


class StructureError(PuretrainError, ValueError):
    """Trees that must agree in structure, shapes or dtypes do not, or a leaf can't be used."""


class DonatedStateError(PuretrainError, RuntimeError):
    """A state was read after its memory had been given to a step (``donate=True``)."""


class PatternError(PuretrainError, ValueError):
    """A path pattern is malformed or matches no leaf."""


class LossError(PuretrainError, ValueError):
    """A loss function returned something else than a scalar loss, or that and an ``Aux``."""


class NonFiniteError(PuretrainError, ArithmeticError):
    """A loss, gradient or metric became NaN or infinite, and the policy is to stop."""


class OptimizerError(PuretrainError, ValueError):
    """An optimizer has bad hyper-parameters, or does not fit the parameters or its state."""


class TransformError(PuretrainError, RuntimeError):
    """A function transform or ``torch.compile`` was applied to something that it can't take."""


class DataError(PuretrainError, ValueError):
    """A data source is empty, has no reproducible order, or doesn't fit the cursor."""


class CheckpointError(PuretrainError, ValueError):
    """A checkpoint can't be written, is damaged, or does not fit what it is loaded into."""


class JournalError(PuretrainError, ValueError):
    """A journal is missing, is damaged, or does not have what a replay needs."""


class ConfigurationError(PuretrainError, ValueError):
    """An argument has a value that can't work, or an optional dependency is missing."""


def check_choice(
    argument: str,
    value: Any,
    choices: tuple[str | None, ...],
    error: type[PuretrainError] = ConfigurationError,
) -> None:
    """Raise the error, which names the argument, unless its value is one of the choices."""
    if value not in choices:
        raise error(f"{argument} is one of {', '.join(map(repr, choices))}, not {value!r}")


def check_whole(
    argument: str,
    value: Any,
    least: int = 1,
    most: int | None = None,
    error: type[PuretrainError] = ConfigurationError,
) -> int:
    """The value as an int, if it is a whole number in its range (numpy's will do, a bool won't).

    >>> check_whole("every", 0)
    Traceback (most recent call last):
    puretrain.errors.ConfigurationError: every is a whole number from 1, not 0
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        up_to = "" if most is None else f" to {most}"
        raise error(f"{argument} is a whole number from {least}{up_to}, not {value!r}")
    return int(value)
