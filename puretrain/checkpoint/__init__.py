"""Checkpoints: a tree in one file, written atomically, verified on reading, never pickled.

:func:`save` writes a tree of tensors and plain values, :func:`load` reads it back, whole, partly or
mapped into memory. A file holds data only: nothing in it names code, so nothing is imported or run.
Whatever is damaged raises :class:`~puretrain.errors.CheckpointError`. The bytes are specified in
``docs/checkpoint-format.md``.
"""

from puretrain.checkpoint.file import (
    Found,
    find_checkpoint,
    load,
    newest,
    read_index,
    save,
    verify,
)
from puretrain.checkpoint.format import Entry, Index

__all__ = [
    "Entry",
    "Found",
    "Index",
    "find_checkpoint",
    "load",
    "newest",
    "read_index",
    "save",
    "verify",
]
