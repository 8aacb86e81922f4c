"""Where checkpoints are: files of this machine, and those at any URL that fsspec knows.

A file appears under its name all at once, or not at all. On this machine that is a temporary file,
fsync, rename. At a URL it is what the other side offers, see :func:`replacing`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from puretrain.errors import CheckpointError, ConfigurationError, PuretrainError

__all__ = [
    "Location",
    "file_name",
    "is_url",
    "join",
    "move",
    "names",
    "parent",
    "plain",
    "reading",
    "remove",
    "replacing",
    "reported",
    "shown",
    "sweep",
]

Location = str | os.PathLike[str]
"""A path of this machine, or a URL."""

_BUFFER = 1 << 16
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_TEMPORARY = re.compile(r"\.puretrain-[0-9a-f]{16}\.tmp")
# Here an upload becomes visible when it is complete, and a rename would be a copy.
_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs"})
_EXTRAS = {"s3": "s3", "s3a": "s3"}


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────


def plain(path: Location) -> str:
    """A location as text; ``file://`` URLs become the path that they stand for.

    >>> plain("file:///tmp/a.ckpt"), plain("s3://bucket/a.ckpt")
    ('/tmp/a.ckpt', 's3://bucket/a.ckpt')
    """
    name = os.fspath(path)
    if name.startswith(("file://", "local://")):
        from fsspec.implementations.local import LocalFileSystem

        return str(LocalFileSystem._strip_protocol(name))
    return name


def is_url(path: Location) -> bool:
    """Whether a location is a URL, and not a path of this machine.

    >>> is_url("s3://bucket/a.ckpt"), is_url("/tmp/a.ckpt"), is_url("file:///tmp/a.ckpt")
    (True, False, False)
    """
    return _URL.match(plain(path)) is not None


def shown(path: Location) -> str:
    """A location for a message: without the user and the password that a URL may have.

    >>> shown("ftp://me:secret@example.org/a.ckpt")
    'ftp://example.org/a.ckpt'
    """
    return re.sub(r"(?<=://)[^/@]*@", "", plain(path)) if is_url(path) else plain(path)


def join(directory: Location, *names: str) -> str:
    """The location of something in a directory."""
    place = plain(directory)
    if is_url(place):
        base = place if place.endswith("://") else place.rstrip("/")
        return "/".join((base, *names))
    return os.path.join(place, *names)


def parent(path: Location) -> str:
    """The directory that a location is in."""
    place = plain(path)
    return place.rpartition("/")[0] if is_url(place) else os.path.dirname(place)


def file_name(path: Location) -> str:
    """The last part of a location."""
    place = plain(path)
    return place.rpartition("/")[2] if is_url(place) else os.path.basename(place)


def _remote(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        raise ConfigurationError(
            f"{shown(url)}: {error}" + (f" (pip install 'puretrain[{extra}]')" if extra else "")
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"{shown(url)}: {error}") from error
    return system, path


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def reported(path: Location, action: str) -> Iterator[None]:
    """Turn what a file system raises into a CheckpointError: ``… can't be {action}: …``."""
    try:
        yield
    except PuretrainError:
        raise
    except OSError as error:
        raise CheckpointError(f"{shown(path)} can't be {action}: {_reason(error, path)}") from error
    except Exception as error:
        if not is_url(path):
            raise
        # Of what the clients of remote systems raise, much is no OSError.
        raise CheckpointError(
            f"{shown(path)} can't be {action}: {type(error).__name__}: {error}"
        ) from error


def _reason(error: OSError, path: Location) -> str:
    known = error.filename is None or error.filename in {path, plain(path)}
    where = "" if known else f": {error.filename}"
    return (error.strerror or str(error) or type(error).__name__) + where


# ── Reading and writing ───────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def reading(path: Location) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file to be read in any order; gives it and its length in bytes."""
    name = plain(path)
    if is_url(name):
        system, inside = _remote(name)
        system.invalidate_cache()
        with system.open(inside, "rb") as file:
            yield file, int(system.size(inside))
        return
    with open(name, "rb", buffering=0, opener=_opener) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name} can't be read: it is no regular file")
        yield file, status.st_size


def _opener(path: str, flags: int) -> int:
    # Opening a pipe would wait for its other end.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def replacing(path: Location) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` when the block ends without an exception.

    Directories are made as needed. The file can be positioned (``seek``) only on this machine. At a
    URL it is written under a temporary name and renamed, after its length was checked; S3 and GCS
    show an upload only when it is complete, and need no other name.
    """
    name = plain(path)
    if is_url(name):
        with _uploading(name) as file:
            yield file
        return
    if os.path.isdir(name):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    directory = os.path.dirname(name)
    _make_directory(Path(directory))
    temporary = os.path.join(directory, _temporary_name())
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with open(descriptor, "wb", buffering=_BUFFER) as file:
            _lock(descriptor)
            yield file
            file.flush()
            os.fsync(descriptor)
            if os.name != "nt":  # still locked, so that a sweep can't take it away
                os.replace(temporary, name)
        if os.name == "nt":  # pragma: no cover - where an open file can't be renamed
            os.replace(temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(temporary)
        raise
    _sync_directory(Path(directory))


@contextlib.contextmanager
def _uploading(url: str) -> Iterator[IO[bytes]]:
    system, path = _remote(url)
    if url.partition("://")[0] in _ATOMIC:
        file = system.open(path, "wb", autocommit=False)
        try:
            yield file
            file.close()
        except BaseException:
            file.discard()
            raise
        file.commit()
        return
    system.makedirs(parent(path), exist_ok=True)
    temporary = f"{parent(path)}/{_temporary_name()}"
    try:
        with system.open(temporary, "wb") as file:
            yield file
            length = file.tell()
        system.invalidate_cache()
        found = system.size(temporary)
        if found != length:
            raise CheckpointError(
                f"{shown(url)} can't be written: {found:,} of {length:,} bytes have "
                "arrived; save again"
            )
        _rename(system, temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            system.rm_file(temporary)
        raise


def _rename(system: Any, source: str, target: str) -> None:
    try:
        system.mv(source, target)
    except Exception:
        # Some servers refuse to replace a file. Then there is a moment without it.
        if not system.exists(target) or not system.exists(source):
            raise
        system.rm_file(target)
        system.mv(source, target)
    system.invalidate_cache()


def _temporary_name() -> str:
    return f".puretrain-{secrets.token_hex(8)}.tmp"


def _lock(descriptor: int) -> bool:
    """Lock a file for as long as this process has it open; whether that worked."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows, where an open file can't be deleted anyway
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks: then nothing says that a file is still being written.
        return error.errno not in {errno.EWOULDBLOCK, errno.EACCES}
    return True


def _make_directory(path: Path) -> None:
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    if os.name == "nt":  # pragma: no cover - Windows has no such thing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that can't, and needn't, do this
            raise
    finally:
        os.close(descriptor)


# ── Directories ───────────────────────────────────────────────────────────────────────────────────


def names(directory: Location) -> list[str]:
    """The names of what is in a directory, sorted; none if it does not exist."""
    place = plain(directory)
    try:
        if not is_url(place):
            return sorted(os.listdir(place))
        system, path = _remote(place)
        system.invalidate_cache()
        found = system.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted({file_name(name.rstrip("/")) for name in found} - {""})


def move(path: Location, target: Location) -> None:
    """Give a file another name in the same directory."""
    source = plain(path)
    if is_url(source):
        system, inside = _remote(source)
        _rename(system, inside, _remote(plain(target))[1])
    else:
        os.replace(source, plain(target))
        _sync_directory(Path(os.path.dirname(source)))


def remove(path: Location) -> None:
    """Delete a file, if it is there."""
    name = plain(path)
    with contextlib.suppress(FileNotFoundError):
        if is_url(name):
            system, inside = _remote(name)
            system.rm_file(inside)
            system.invalidate_cache()
        else:
            os.unlink(name)


def sweep(directory: Location) -> list[str]:
    """Delete the temporary files of processes that were killed; returns their names.

    On this machine a file that is still being written is locked by its process, and stays. At a URL
    nothing says so: call this only where nobody else writes.
    """
    swept = []
    for name in names(directory):
        if not _TEMPORARY.fullmatch(name):
            continue
        path = join(directory, name)
        if is_url(path):
            remove(path)
            swept.append(name)
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # its process has just finished it
            continue
        try:
            if _lock(descriptor):
                remove(path)
                swept.append(name)
        finally:
            os.close(descriptor)
    return swept
