"""The journal of a run: what happened at each step, for reading and for living it again.

:func:`journal` makes the observer that writes one, :func:`read_journal` reads it.
"""

from __future__ import annotations

import copy
import inspect
import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from puretrain.errors import JournalError, check_whole
from puretrain.loop import Event, Observer
from puretrain.metrics import compute_all
from puretrain.observers.scalars import step_metrics
from puretrain.replay.digests import (
    BatchDigest,
    Digests,
    batch_digest,
    leaf_digests,
    read_all,
)
from puretrain.replay.environment import code_facts, environment_facts
from puretrain.replay.format import (
    COLUMNS,
    EVENT,
    HEADER,
    LEAVES,
    SEGMENT,
    STEP,
    Damage,
    encode,
    scan,
)
from puretrain.replay.program import Program, caller_program

__all__ = ["EventRecord", "Journal", "Segment", "StepRecord", "journal", "read_journal"]

NAME = "run.journal"
_WAITING = 32  # steps whose values may still be on an accelerator


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


class StepRecord(NamedTuple):
    """What a journal says of a step."""

    step: int
    """Which: batches consumed after it."""
    epoch: int
    offset: int
    """The cursor after it."""
    time: float
    """When it was over, in seconds since 1970."""
    metrics: Mapping[str, float]
    """Its metrics of one number."""
    batch: BatchDigest | None
    """The digest of its batch."""
    state: Digests | None
    """The digests of the state after it, every so many steps."""


class EventRecord(NamedTuple):
    """What a journal says of something else than a step."""

    kind: str
    """As in :class:`puretrain.Event`."""
    step: int
    epoch: int
    offset: int
    time: float
    metrics: Mapping[str, float]
    state: Digests | None
    """The digests of the state, at the start and the end of ``fit``."""


class Segment(NamedTuple):
    """What one process did: from a start or a restart on."""

    number: int
    """From 0."""
    start: int
    """The step of the state it began with."""
    facts: Mapping[str, Any]
    """Facts of the process, in groups; empty if their record is damaged."""
    steps: tuple[StepRecord, ...]
    events: tuple[EventRecord, ...]

    @property
    def program(self) -> Program | None:
        """What made the run, if known."""
        known = self.facts.get("program")
        if known is None:
            return None
        return Program(known["file"], known["name"], known["arguments"], tuple(known["left_out"]))


class Journal(NamedTuple):
    """A journal that was read."""

    path: Path
    segments: tuple[Segment, ...]
    damage: tuple[Damage, ...]
    """The stretches of the file that hold no whole record; an unfinished last one is normal."""

    def steps(self) -> dict[int, StepRecord]:
        """The steps of the run by number; of those that were taken again after a restart, the last.

        A restart from an earlier state takes back what came after that state.
        """
        line: dict[int, StepRecord] = {}
        for segment in self.segments:
            if line and max(line) > segment.start:
                line = {step: record for step, record in line.items() if step <= segment.start}
            line.update((record.step, record) for record in segment.steps)
        return line

    def events(self) -> list[EventRecord]:
        """What happened besides, without what restarts have taken back; starts and ends stay."""
        line: list[EventRecord] = []
        for segment in self.segments:
            start = segment.facts.get("start", {"validated": -1, "epoch": 0})
            line = [
                event
                for event in line
                if not (
                    (event.kind == "validation" and event.step > start["validated"])
                    or (event.kind == "epoch_end" and event.epoch >= start["epoch"])
                )
            ]
            line += segment.events
        return line

    def segment_of(self, step: int) -> Segment:
        """The last segment that has a step; the last of all if none has it."""
        found = [segment for segment in self.segments if segment.start < step]
        return (found or self.segments)[-1 if found else 0]


def read_journal(path: str | os.PathLike[str]) -> Journal:
    """Read a journal, whole records only.

    Args:
        path: the file, or the directory of the run.

    Returns:
        What it holds. What is damaged is not in it, and named in ``damage``; a record that needs a
        damaged one to be understood has None, or no metrics, in the place of what is lost.

    Raises:
        JournalError: there is none, or the file is no journal.
    """
    file = _file_of(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise JournalError(
            f"{file} can't be read: {error.strerror}. A run has a journal if puretrain.journal "
            "is among its observers"
        ) from error
    found = scan(data, str(file))
    segments: dict[int, _Reading] = {}
    for offset, record in found.records:
        try:
            segments.setdefault(record[1], _Reading()).take(record)
        except (ValueError, TypeError, KeyError, struct.error) as error:
            raise JournalError(
                f"{file}: the record at byte {offset} is none of this version ({error})"
            ) from None
    read = tuple(reading.segment(number) for number, reading in sorted(segments.items()))
    return Journal(file, read, found.damage)


def _file_of(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / NAME if path.is_dir() else path


class _Reading:
    """A segment while its records are read."""

    def __init__(self) -> None:
        self._facts: Mapping[str, Any] = {}
        self._columns: dict[int, tuple[str, ...]] = {}
        self._leaves: dict[int, tuple[tuple[str, str], ...]] = {}
        self._steps: list[StepRecord] = []
        self._events: list[EventRecord] = []

    def take(self, record: Sequence[Any]) -> None:
        kind = record[0]
        if kind == STEP:
            _, _, step, epoch, offset, when, batch, columns, values, leaves, digests = record
            self._steps.append(
                StepRecord(
                    step,
                    epoch,
                    offset,
                    when,
                    self._metrics(columns, values),
                    _unpack_batch(batch),
                    self._digests(leaves, digests),
                )
            )
        elif kind == EVENT:
            _, _, name, step, epoch, offset, when, columns, values, leaves, digests = record
            metrics = self._metrics(columns, values)
            state = self._digests(leaves, digests)
            self._events.append(EventRecord(name, step, epoch, offset, when, metrics, state))
        elif kind == SEGMENT:
            _, _, self._facts = record
        elif kind == COLUMNS:
            _, _, number, names = record
            self._columns[number] = tuple(names)
        elif kind == LEAVES:
            _, _, number, leaves = record
            self._leaves[number] = tuple((path, kind) for path, kind in leaves)
        else:
            raise ValueError(f"kind {kind}")

    def segment(self, number: int) -> Segment:
        if self._facts:
            start = self._facts["start"]["step"]
        else:  # the record is lost: the first thing that is known of it
            start = min([r.step - 1 for r in self._steps] + [e.step for e in self._events] or [0])
        return Segment(number, start, self._facts, tuple(self._steps), tuple(self._events))

    def _metrics(self, columns: int, values: Sequence[float]) -> Mapping[str, float]:
        names = self._columns.get(columns)
        return {} if names is None else dict(zip(names, values, strict=True))

    def _digests(self, leaves: int | None, packed: bytes | None) -> Digests | None:
        known = None if leaves is None else self._leaves.get(leaves)
        if known is None or packed is None:
            return None
        return Digests(known, struct.unpack(f"<{len(known)}Q", packed))


def _unpack_batch(packed: bytes | None) -> BatchDigest | None:
    if packed is None:
        return None
    (value,) = struct.unpack_from("<Q", packed, 1)
    return BatchDigest("host" if packed[:1] == b"h" else "device", value)


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def journal(
    directory: str | os.PathLike[str],
    *,
    every: int = 100,
    batches: bool = True,
    program: tuple[str | os.PathLike[str], str | None, Mapping[str, Any]] | None = None,
) -> Observer:
    """Keep a journal of the run in ``run.journal``, from which it can be lived again.

    Of every step it has the number, the place in the data, the metrics and a digest of the batch;
    every so many steps, a digest of each leaf of the state; at each start, the facts of the
    process: versions, threads, devices, flags, the command, the state of the git repository, and
    what made the run. With it and the checkpoints, ``puretrain replay`` takes the steps again and
    compares them, ``puretrain bisect`` finds where two runs part, and
    :func:`puretrain.open_run` goes back in time.

    Put it in front of :func:`puretrain.checkpoints`, so that it holds every step that a checkpoint
    has behind it. Records are only ever appended, one write each: a process that is killed leaves
    whole records, and a torn one at the end is cut off when the run goes on. Values on an
    accelerator are fetched some steps later, together, so that no step waits for them.

    Args:
        directory: of the run; the file ``run.journal`` goes there.
        every: digest the state after every so many steps; always at the start and the end.
        batches: digest every batch.
        program: the file, the name of the function in it that returns the
            :class:`~puretrain.Run`, and its arguments. By default it is the function at the top of
            a file that calls this one, with the arguments that it has just now.

    Raises:
        ConfigurationError: an argument is out of its range.
        JournalError: (in the loop) the file can't be written, or is no journal.

    Example:
        >>> import tempfile
        >>> import puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=1.0)
        >>> step = pt.train_step(lambda params, buffers, batch, key: params["w"] * batch, optimizer)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> directory = tempfile.mkdtemp()
        >>> _ = pt.fit(state, step, [torch.tensor(-1.0)] * 3, epochs=1,
        ...            observers=[journal(directory, every=2)])
        >>> steps = read_journal(directory).steps()
        >>> [(record.step, record.metrics["loss"], record.state is not None)
        ...  for record in steps.values()]
        [(1, -0.0, False), (2, -1.0, True), (3, -2.0, False)]
    """
    every = check_whole("every", every)
    if program is None:
        frame = inspect.currentframe()
        known = caller_program(None if frame is None else frame.f_back)
    else:
        file, name, arguments = program
        known = Program(str(Path(file).resolve()), name, dict(arguments))
    return _Writer(Path(directory), every, batches, known)


class _Writer:
    """See :func:`journal`."""

    def __init__(self, directory: Path, every: int, batches: bool, program: Program | None) -> None:
        self._path, self._every, self._batches = directory / NAME, every, batches
        self._program = program
        self._shards: int | None = None
        self._file: int | None = None
        self._end = self._segment = 0
        self._columns: dict[tuple[str, ...], int] = {}
        self._leaves: dict[tuple[tuple[str, str], ...], int] = {}
        self._waiting: list[_Unread] = []
        self._read: tuple[Any, BatchDigest | None] | None = None  # a batch and its digest

    def before_step(self, batch: Any) -> None:
        """Digest a batch while it is in the processor's cache, and the step finds it there, too."""
        if self._batches:
            self._read = batch, batch_digest(batch)

    def __call__(self, state: Any, event: Event) -> None:
        kind = event.kind
        if kind == "epoch_start":
            return
        if self._file is None or kind == "fit_start":
            self._open(state, event)
        if kind == "step":
            digests = None if event.step % self._every else leaf_digests(state)
            batch = self._digest(event.batch)
            head: list[Any] = [STEP, self._segment]
        else:
            ends = kind in ("fit_start", "fit_end", "interrupt")
            digests, batch = leaf_digests(state) if ends else None, None
            head = [EVENT, self._segment, kind]
        head += [event.step, event.epoch, int(state.cursor.offset), time.time()]
        names: list[str] = []
        values: list[Tensor] = []
        away = batch is not None and batch.kind == "device"
        for name, value in compute_all(step_metrics(state, event)).items():
            if value.numel() == 1:
                names.append(name)
                values.append(value)
                away = away or not value.is_cpu
        if digests is not None:
            away = away or any(isinstance(value, Tensor) for value in digests.values)
        unread = _Unread(head, kind == "step", batch, tuple(names), values, digests)
        # Reading what is on a device would wait for it.
        if away or self._waiting:
            self._waiting.append(unread)
            if kind != "step" or len(self._waiting) >= _WAITING:
                self._flush()
        else:
            self._write(unread)

    def _digest(self, batch: Any) -> BatchDigest | None:
        read, self._read = self._read, None
        if read is not None and read[0] is batch:
            return read[1]
        # Somebody between the loop and this observer has handed on events alone.
        return batch_digest(batch) if self._batches else None

    def divided(self, logical_shards: int | None) -> _Writer:
        """The same for a run whose batches are divided into so many parts, which it notes."""
        other = copy.copy(self)
        other._shards = logical_shards
        return other

    def close(self) -> None:
        self._read = None
        if self._file is None:
            return
        try:
            self._flush()
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(self._file)
            self._file = None

    def _open(self, state: Any, event: Event) -> None:
        self.close()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = os.open(self._path, flags, 0o666)
            with open(self._file, "rb", closefd=False) as reader:
                found = scan(reader.read(), str(self._path))
            if any(damage.tail for damage in found.damage):
                os.ftruncate(self._file, found.end)  # the record that a killed process left
            os.lseek(self._file, found.end, os.SEEK_SET)
        except OSError as error:
            raise self._failed(error) from error
        self._end = found.end
        self._segment = 1 + max((record[1] for _, record in found.records), default=-1)
        self._columns, self._leaves, self._waiting = {}, {}, []
        if not self._end:
            self._append_bytes(HEADER)
        self._append([SEGMENT, self._segment, self._facts(state, event)])

    def _facts(self, state: Any, event: Event) -> dict[str, Any]:
        program, facts = self._program, environment_facts(state)
        if self._shards is not None:
            facts["division"]["logical_shards"] = self._shards
        return {
            **facts,
            "code": code_facts(None if program is None else program.file),
            "program": None
            if program is None
            else {**program._asdict(), "arguments": dict(program.arguments)},
            "start": {
                "step": event.step,
                "epoch": int(state.cursor.epoch),
                "offset": int(state.cursor.offset),
                "validated": int(state.validated),
                "limit": event.limit,
            },
            "every": self._every,
        }

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        _fetch(waiting)
        for unread in waiting:
            self._write(unread)

    def _write(self, unread: _Unread) -> None:
        columns = self._columns.get(unread.names)
        if columns is None:
            columns = self._columns[unread.names] = len(self._columns)
            self._append([COLUMNS, self._segment, columns, list(unread.names)])
        record = unread.head
        if unread.is_step:
            batch = unread.batch
            record.append(None if batch is None else _BATCH.pack(_KINDS[batch.kind], batch.value))
        record += [columns, [value.item() for value in unread.values]]
        if unread.digests is None:
            record += [None, None]
        else:
            known, packed = unread.digests.leaves, unread.digests.read()
            leaves = self._leaves.get(known)
            if leaves is None:
                leaves = self._leaves[known] = len(self._leaves)
                self._append([LEAVES, self._segment, leaves, [list(leaf) for leaf in known]])
            record += [leaves, struct.pack(f"<{len(packed)}Q", *packed)]
        self._append(record)

    def _append(self, record: list[Any]) -> None:
        self._append_bytes(encode(record, self._end))

    def _append_bytes(self, data: bytes) -> None:
        # One call for a whole record: a run that is killed leaves whole records.
        file = cast(int, self._file)
        try:
            written = os.write(file, data)
            while written < len(data):
                written += os.write(file, data[written:])
        except OSError as error:
            raise self._failed(error) from error
        self._end += len(data)

    def _failed(self, error: OSError) -> JournalError:
        return JournalError(f"{self._path} can't be written: {error.strerror or error}")


_BATCH = struct.Struct("<cQ")
_KINDS = {"host": b"h", "device": b"d"}


class _Unread(NamedTuple):
    """A record whose values may still be on an accelerator."""

    head: list[Any]
    is_step: bool
    batch: BatchDigest | None
    names: tuple[str, ...]
    values: list[Tensor]
    digests: Digests | None


def _fetch(records: list[_Unread]) -> None:
    """Bring the values of records to the host, with one transfer per device and kind."""
    places: dict[tuple[torch.device, torch.dtype], list[tuple[list[Tensor], int]]] = {}
    for record in records:
        for i, value in enumerate(record.values):
            if value.device.type != "cpu":
                places.setdefault((value.device, value.dtype), []).append((record.values, i))
    for found in places.values():
        fetched = torch.stack([values[i].reshape(()) for values, i in found]).cpu()
        for (values, i), value in zip(found, fetched, strict=True):
            values[i] = value
    digests: list[int | Tensor] = []
    for record in records:
        digests += () if record.batch is None else (record.batch.value,)
        digests += () if record.digests is None else record.digests.values
    read = iter(read_all(digests))
    for number, record in enumerate(records):
        if record.batch is not None:
            record = record._replace(batch=record.batch._replace(value=next(read)))
        if record.digests is not None:
            own = tuple(next(read) for _ in record.digests.values)
            record = record._replace(digests=record.digests._replace(values=own))
        records[number] = record
