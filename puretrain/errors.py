"""The exceptions that puretrain raises on bad input. All of them are a :class:`PuretrainError`.

Every message says what was wrong, where (a tree path, a file and an offset, an argument), and what
to do about it. Where an exception of the standard library fits as well, ours derives from it, so
that ``except ValueError`` keeps working.
"""

from __future__ import annotations

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
