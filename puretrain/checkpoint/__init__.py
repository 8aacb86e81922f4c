"""Checkpoints: a tree in one file, written atomically, verified on reading, never pickled.

:func:`save` writes a tree of tensors and plain values, :func:`load` reads it back, whole, partly or
mapped into memory. A file holds data only: nothing in it names code, so nothing is imported or run.
Whatever is damaged raises :class:`~puretrain.errors.CheckpointError`. The bytes are specified in
``docs/checkpoint-format.md``.
"""

from puretrain.checkpoint.conversion import convert
from puretrain.checkpoint.file import (
    Found,
    find_checkpoint,
    latest,
    load,
    read_index,
    save,
    verify,
)
from puretrain.checkpoint.format import Entry, Index, Piece
from puretrain.checkpoint.partial import Checkpoint, load_part, open_checkpoint, read_slice

__all__ = [
    "Checkpoint",
    "Entry",
    "Found",
    "Index",
    "Piece",
    "convert",
    "find_checkpoint",
    "latest",
    "load",
    "load_part",
    "open_checkpoint",
    "read_index",
    "read_slice",
    "save",
    "verify",
]
