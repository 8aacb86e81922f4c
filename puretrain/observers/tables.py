"""Metrics as tables on disk: comma-separated values, or a line of JSON for each row."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from puretrain.errors import ConfigurationError, check_whole
from puretrain.loop import Event, Observer
from puretrain.observers.folder import make_folder
from puretrain.observers.scalars import scalars, step_metrics

__all__ = ["csv_log", "jsonl_log"]

_FIRST = ("event", "epoch", "step")

Row = dict[str, Any]


def csv_log(path: str | os.PathLike[str], *, every: int = 50) -> Observer:
    """Write the metrics to a file of comma-separated values.

    The columns are ``event`` (``step``, ``validation`` or ``epoch_end``), ``epoch``, ``step``, and
    one for each metric of one number. A metric that first appears later gets a new column at the
    end; the file is then written anew, and replaced in one go.

    The file holds what this run has done up to its state, no more: at the start, the rows of steps
    that the state has not seen are dropped, and an unfinished last line. So a run that was killed
    and resumed leaves the same bytes as one that was not, if observers that save checkpoints come
    after this one. A run that begins at step 0 begins an empty file.

    Args:
        path: the file; its directory is made if needed.
        every: write a row for every so many steps; validations and epochs all get one.

    Raises:
        ConfigurationError: ``every`` is less than 1; (in the loop) the file is not such a log.

    Example:
        >>> import tempfile, torch
        >>> import puretrain as pt
        >>> from puretrain.loop import Event
        >>> path = Path(tempfile.mkdtemp(), "log.csv")
        >>> log, state = csv_log(path), pt.TrainState.create({}, key=pt.random.key(0))
        >>> log(state, Event("fit_start", 0, 0))
        >>> log(state, Event("validation", 0, 50, {"val/loss": torch.tensor(0.25)}))
        >>> print(path.read_text())
        event,epoch,step,val/loss
        validation,0,50,0.25
        <BLANKLINE>
    """
    return _Log(Path(path), every, _CSV)


def jsonl_log(path: str | os.PathLike[str], *, every: int = 50) -> Observer:
    """Write the metrics to a file with one JSON object in each line.

    The keys are those of :func:`csv_log`, and so is what happens at the start of a run. JSON has
    no numbers that are not finite: they are the strings ``"nan"``, ``"inf"`` and ``"-inf"``.

    Args:
        path: the file; its directory is made if needed.
        every: write a line for every so many steps; validations and epochs all get one.

    Raises:
        ConfigurationError: ``every`` is less than 1; (in the loop) the file is not such a log.
    """
    return _Log(Path(path), every, _JSONL)


class _Format(NamedTuple):
    """How rows are written."""

    parse: Callable[[str, Path], list[Row]]
    header: Callable[[list[str]], str]
    line: Callable[[Row, list[str]], str]


class _Log:
    """Appends rows to a file."""

    def __init__(self, path: Path, every: int, rows: _Format) -> None:
        self._every = check_whole("every", every)
        self._path, self._format = path, rows
        self._columns: list[str] = []
        self._file: int | None = None

    def __call__(self, state: Any, event: Event) -> None:
        kind = event.kind
        if kind == "step":
            if not event.step % self._every:
                self._append(state, event)
        elif kind in ("validation", "epoch_end"):
            self._append(state, event)
        elif kind == "fit_start":
            self._begin(state)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _begin(self, state: Any) -> None:
        make_folder(self._path.parent)
        kept = [row for row in self._rows() if _is_past(row, state)]
        self._columns = [*dict.fromkeys(column for row in kept for column in row)]
        self._rewrite(kept)

    def _append(self, state: Any, event: Event) -> None:
        if self._file is None:
            self._begin(state)
        row: Row = {"event": event.kind, "epoch": event.epoch, "step": event.step}
        row.update(scalars(step_metrics(state, event)))
        new = [column for column in row if column not in self._columns]
        self._columns += new
        if new and self._format.header(new):
            self._rewrite([*self._rows(), row])
        else:
            _write(cast(int, self._file), self._format.line(row, self._columns))

    def _rows(self) -> list[Row]:
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        # What comes after the last end of line was being written when the run was killed.
        return self._format.parse(text[: text.rfind("\n") + 1], self._path)

    def _rewrite(self, rows: Sequence[Row]) -> None:
        """Replace the file in one go, and open it to append."""
        self.close()
        text = self._format.header(self._columns) if rows else ""
        text += "".join(self._format.line(row, self._columns) for row in rows)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write(file, text)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, self._path)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)


def _is_past(row: Row, state: Any) -> bool:
    """Whether a state has what a row tells behind it, so that it will not come again."""
    if row["event"] == "epoch_end":
        return int(row["epoch"]) < int(state.cursor.epoch)
    seen = state.validated if row["event"] == "validation" else state.step
    return int(row["step"]) <= int(seen)


def _write(file: int, text: str) -> None:
    # One call for a whole line: a run that is killed leaves whole lines.
    data = memoryview(text.encode())
    while data:
        data = data[os.write(file, data) :]


def _parse_csv(text: str, path: Path) -> list[Row]:
    lines = csv.reader(io.StringIO(text, newline=""))
    columns = next(lines, None)
    if columns is None:
        return []
    if tuple(columns[:3]) != _FIRST:
        raise _not_a_log(path, 1)
    rows = []
    for values in lines:
        if len(values) != len(columns):
            raise _not_a_log(path, lines.line_num)
        rows.append({k: value for k, value in zip(columns, values, strict=True) if value})
    return rows


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _parse_jsonl(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise _not_a_log(path, number) from None
        if not isinstance(row, dict) or not row.keys() >= set(_FIRST):
            raise _not_a_log(path, number)
        rows.append(row)
    return rows


def _jsonl_line(row: Row) -> str:
    shown = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(shown, ensure_ascii=False, allow_nan=False) + "\n"


def _not_a_log(path: Path, line: int) -> ConfigurationError:
    return ConfigurationError(
        f"{path}, line {line}: this is no log of the kind that is to be continued here; move the "
        "file away, or write the log to another one"
    )


_CSV = _Format(_parse_csv, _csv_line, lambda row, columns: _csv_line(map(row.get, columns)))
_JSONL = _Format(_parse_jsonl, lambda columns: "", lambda row, columns: _jsonl_line(row))
