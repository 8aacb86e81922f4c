"""Reading and writing files, local or remote, without ever running what is in them."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import pickle
import urllib.request
from collections.abc import Callable
from typing import IO, Any

import fsspec
import torch
from torch import nn

from puretrain.checkpoint.conversion import stand_ins
from puretrain.errors import CheckpointError
from puretrain.lightning.utilities.parsing import AttributeDict

__all__ = ["atomic_save", "get_filesystem", "load", "open_binary"]

_ROOTS = ("pytorch_lightning", "lightning.pytorch", "lightning")


def load(
    path_or_url: str | os.PathLike[str] | IO[bytes],
    map_location: Any = None,
    weights_only: bool | None = None,
) -> Any:
    """Load a file that ``torch.save`` wrote, and a Lightning checkpoint in particular.

    The file is read with torch's weights-only unpickler: tensors, plain values, containers,
    Lightning's own records of hyper-parameters, and layers of :mod:`torch.nn`. A name found in a
    file is never imported.

    Args:
        path_or_url: a path, local or of any file system that fsspec knows, a URL, or an open file.
        map_location: where the tensors go, as for :func:`torch.load`.
        weights_only: accepted because programs pass it; files are always read so.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds something else, which only running it could restore.
    """
    if isinstance(path_or_url, (str, os.PathLike)):
        with open_binary(path_or_url) as file:
            return _read(file, os.fspath(path_or_url), map_location)
    return _read(path_or_url, getattr(path_or_url, "name", "the open file"), map_location)


def open_binary(path_or_url: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file to read it: local, remote, or behind a URL, which is downloaded into memory."""
    path = os.fspath(path_or_url)
    if path.startswith(("http://", "https://")):
        with urllib.request.urlopen(path) as answer:
            return io.BytesIO(answer.read())
    return get_filesystem(path).open(path, "rb")  # type: ignore[no-any-return]


def _read(file: Any, name: str, map_location: Any) -> Any:
    known = _known()
    named = {each[1] for each in known if isinstance(each, tuple)}
    named |= {f"{each.__module__}.{each.__qualname__}" for each in known if isinstance(each, type)}
    known += [each for each in stand_ins(file) if each[1] not in named]
    with torch.serialization.safe_globals(known):
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            # what torch says around it is advice about its own arguments
            telling = ("WeightsUnpickler error", "GLOBAL", "Can only", "Unsupported")
            lines = [line.strip() for line in str(error).splitlines()]
            found = [line for line in lines if any(word in line for word in telling)]
            reason = " ".join(found or lines[:1])
            raise CheckpointError(
                f"{name} holds more than tensors and plain values, or is damaged; to restore more "
                f"would run code that the file names ({reason}). If you trust the file, read it "
                "with torch.load(file, weights_only=False) and save it again without these "
                "objects, or name their classes to torch.serialization.add_safe_globals"
            ) from None


class _Named:
    """Stands for an object of Lightning's own that a checkpoint names and nothing needs."""


def _known() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What may stand in a file beside what torch allows: it is looked up here, not imported."""
    from collections import deque
    from datetime import timedelta

    known: list[Any] = [argparse.Namespace, AttributeDict, deque, timedelta]
    # the unpickler fills dictionaries of Python's own types only
    known += [(dict, f"{root}.utilities.parsing.AttributeDict") for root in _ROOTS]
    known += [(dict, "lightning_fabric.utilities.data.AttributeDict")]
    known += [(dict, "lightning.fabric.utilities.data.AttributeDict")]
    for module, names in _RECORDS.items():
        known += [(_Named, f"{root}.{module}.{name}") for root in _ROOTS for name in names]
    known += [pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath]
    known += [pathlib.Path, (pathlib.PurePosixPath, "pathlib.PosixPath")]
    known += [(pathlib.PosixPath, "pathlib.PosixPath")] if os.name == "posix" else []
    layers = vars(torch.nn.modules).values()
    known += [each for each in layers if isinstance(each, type) and issubclass(each, nn.Module)]
    return known


# Enumerations of Lightning that its checkpoints of some versions hold.
_RECORDS = {
    "trainer.states": ("TrainerFn", "RunningStage", "TrainerStatus", "TrainerState"),
    "utilities.enums": ("AMPType", "DeviceType", "DistributedType"),
}


def get_filesystem(path: str | os.PathLike[str]) -> Any:
    """The file system that a path is on: the local one, or what stands before ``://``.

    >>> get_filesystem("/tmp/model.ckpt").protocol
    ('file', 'local')
    """
    return fsspec.core.url_to_fs(os.fspath(path))[0]


def atomic_save(checkpoint: Any, filepath: str | os.PathLike[str]) -> None:
    """Save with ``torch.save`` so that the file is either whole or not there.

    Args:
        checkpoint: what to save.
        filepath: where; its directory is made if needed.
    """
    path = os.fspath(filepath)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    system = get_filesystem(path)
    system.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with fsspec.open(path, "wb") if "://" in path else _Replacing(path) as file:
        file.write(buffer.getbuffer())


class _Replacing:
    """A file that takes its place only once it is whole and on disk."""

    def __init__(self, path: str) -> None:
        self._path, self._part = path, f"{path}.part"

    def __enter__(self) -> IO[bytes]:
        self._file = open(self._part, "wb")
        return self._file

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._part, self._path)
        else:
            os.unlink(self._part)
