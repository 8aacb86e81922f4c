"""Metrics, histograms and hyper-parameters as event files, which TensorBoard shows."""

from __future__ import annotations

import functools
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, check_whole
from puretrain.loop import Event, Observer
from puretrain.observers.folder import make_folder
from puretrain.observers.scalars import scalars, step_metrics
from puretrain.tree import path_string, tree_leaves, tree_map, tree_paths

__all__ = ["tensorboard"]

_BINS = 64  # of a histogram


def tensorboard(
    directory: str | os.PathLike[str],
    *,
    every: int = 50,
    histograms_every: int | None = None,
    hparams: Mapping[str, bool | int | float | str] | None = None,
) -> Observer:
    """Write metrics where TensorBoard finds them: ``tensorboard --logdir DIRECTORY``.

    All points are over the number of steps: metrics of the step (with what reducers such as
    :func:`puretrain.reducers.lr_monitor` add), of validations and the means of epochs, under their
    own names. A metric of an ensemble is written as ``loss/mean`` and ``loss/std``, over the
    members whose value is finite, and as ``loss/0``, …, of each member. What is written is in the
    file at once. After a resume, TensorBoard drops the points beyond the state, and those at its
    step are not written twice.

    Args:
        directory: where the event files go; made if needed.
        every: write the metrics of every so many steps; validations and epochs all are.
        histograms_every: after every so many steps, write histograms of each parameter
            (``params/…``) and of what the step has changed about it (``updates/…``), of finite
            values. None: never.
        hparams: the hyper-parameters of the run by name, for the table that compares runs. They
            are written at the end of the first epoch or the run, with the names of the metrics.

    Raises:
        ConfigurationError: an argument is out of its range or of the wrong type.
    """
    for name, value in (("every", every), ("histograms_every", histograms_every)):
        if value is not None:
            check_whole(name, value)
    for name, setting in (hparams or {}).items():
        if not isinstance(setting, (bool, int, float, str)):
            raise ConfigurationError(
                f"hparams[{name!r}] is a {type(setting).__name__}; hyper-parameters are bool, int, "
                "float or str: convert it with str()"
            )
    return _TensorBoard(Path(directory), every, histograms_every, dict(hparams or {}))


class _TensorBoard:
    """See :func:`tensorboard`."""

    def __init__(
        self,
        directory: Path,
        every: int,
        histograms_every: int | None,
        hparams: dict[str, bool | int | float | str],
    ) -> None:
        self._directory, self._every = directory, every
        self._histograms_every, self._hparams = histograms_every, hparams
        self._file: BinaryIO | None = None
        self._start = -1
        self._written: set[str] = set()  # what the files have at the first step already
        self._tags: dict[str, None] = {}  # the metrics seen, in order
        self._before: Any = None  # the parameters before the step whose histograms are due

    def __call__(self, state: Any, event: Event) -> None:
        kind, often = event.kind, self._histograms_every
        if kind == "step":
            if not event.step % self._every:
                self._write_scalars(state, event)
            if often is not None and not event.step % often:
                self._write_histograms(state, event)
        elif kind in ("validation", "epoch_end"):
            self._write_scalars(state, event)
        elif kind == "fit_start":
            self._open(event.step)
        if kind in ("epoch_end", "interrupt", "fit_end") and self._hparams:
            self._write_hparams(event)
        if often is not None and kind in ("fit_start", "step") and not (event.step + 1) % often:
            self._before = tree_map(lambda leaf: leaf.clone(), state.params)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, step: int) -> None:
        proto = _protobuf()
        self.close()
        make_folder(self._directory)
        before = sorted(self._directory.glob("*tfevents*"))
        self._start, self._written = step, _tags_at(before, step)
        # Readers take the files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._directory / name).open("xb")
        self._write(proto.Event(file_version="brain.Event:2"))
        if before:
            self._write(
                proto.Event(
                    step=step + 1, session_log=proto.SessionLog(status=proto.SessionLog.START)
                )
            )

    def _write(self, record: Any) -> None:
        file = cast(BinaryIO, self._file)
        record.wall_time = time.time()
        _protobuf().RecordWriter(file).write(record.SerializeToString())
        file.flush()  # a run that is killed has written what it has seen

    def _write_values(self, step: int, values: Iterable[Any]) -> None:
        proto = _protobuf()
        if self._file is None:
            self._open(step)
        new = [value for value in values if step != self._start or value.tag not in self._written]
        if new:
            self._write(proto.Event(step=step, summary=proto.Summary(value=new)))

    def _write_scalars(self, state: Any, event: Event) -> None:
        proto = _protobuf()
        found = scalars(step_metrics(state, event))
        self._tags |= dict.fromkeys(found)
        self._write_values(
            event.step,
            (proto.Summary.Value(tag=name, simple_value=value) for name, value in found.items()),
        )

    def _write_histograms(self, state: Any, event: Event) -> None:
        from torch.utils.tensorboard.summary import histogram

        named = [("params", state.params)]
        if self._before is not None:
            named.append(("updates", tree_map(Tensor.sub, state.params, self._before)))
            self._before = None
        values = []
        for name, tree in named:
            for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
                real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
                finite = real[real.isfinite()].double()
                if finite.numel():
                    tag = f"{name}/{path_string(path)}"
                    values.extend(histogram(tag, finite, _BINS).value)  # type: ignore[no-untyped-call]
        self._write_values(event.step, values)

    def _write_hparams(self, event: Event) -> None:
        from torch.utils.tensorboard.summary import hparams

        parts = hparams(self._hparams, self._tags)  # type: ignore[no-untyped-call]
        self._hparams = {}
        values = [value for part in parts for value in part.value]
        if not self._written >= {value.tag for value in values}:
            self._write_values(event.step, values)


@functools.cache
def _protobuf() -> Any:
    """The records of event files and their writer, which load on first use."""
    from tensorboard.compat.proto import (  # type: ignore[import-untyped]
        event_pb2,
        summary_pb2,
    )
    from tensorboard.summary.writer import record_writer  # type: ignore[import-untyped]

    return SimpleNamespace(
        Event=event_pb2.Event,
        SessionLog=event_pb2.SessionLog,
        Summary=summary_pb2.Summary,
        RecordWriter=record_writer.RecordWriter,
    )


def _tags_at(files: Iterable[Path], step: int) -> set[str]:
    """The tags that have a point at a step, in event files in order; and those of the run."""
    proto = _protobuf()
    tags: set[str] = set()
    of_run: set[str] = set()  # stand for the whole run, at whatever step they were written
    for file in files:
        for content in _read(file):
            record = proto.Event.FromString(content)
            if record.session_log.status == proto.SessionLog.START and record.step <= step:
                tags.clear()
            for value in record.summary.value:
                if value.tag.startswith("_hparams_/"):
                    of_run.add(value.tag)
                elif record.step == step:
                    tags.add(value.tag)
    return tags | of_run


def _read(path: Path) -> Iterator[bytes]:
    """The records of an event file, up to one that is not whole.

    A record is its length (8 bytes, little-endian), 4 bytes of checksum, the content, and another
    4 bytes of checksum.
    """
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            content = file.read(length)
            if len(content) < length or len(file.read(4)) < 4:
                return
            yield content
