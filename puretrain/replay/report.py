"""A page about a run, drawn from its journal: one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import html
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from puretrain.errors import ConfigurationError
from puretrain.replay.environment import compare_facts
from puretrain.replay.journal import Journal, Segment, StepRecord
from puretrain.replay.playback import Recorded, StoredCheckpoint, changed_leaves

__all__ = ["write_report"]

_POINTS = 1200  # drawn of a curve; of more, each stretch is drawn by its extremes

# The drawing has no colours of its own. These stand for the page's, which know light and dark.
_INK, _GRID, _FAINT = "#010203", "#040506", "#070809"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_VARIABLES = {
    _INK: "var(--ink)",
    _GRID: "var(--grid)",
    _FAINT: "var(--faint)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, start=1)},
}


class _Curve(NamedTuple):
    name: str
    steps: Any
    values: Any
    points: bool
    """Whether each value is marked, as of validations, which are few."""


def write_report(recorded: Recorded, path: str | os.PathLike[str]) -> None:
    """Write a page about a run.

    It has the curves of all metrics (those of the steps, of validations and of epochs that belong
    together in one), a time line of checkpoints and restarts, a table of the processes that the run
    ran in, and their facts. It is drawn with matplotlib as SVG, follows the light or dark scheme of
    the reader's system, and has no script.

    Args:
        recorded: from :func:`puretrain.open_run`.
        path: the HTML file.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file can't be written.
    """
    page = _page(recorded)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{os.fspath(path)} can't be written: {error.strerror}") from error


def _page(recorded: Recorded) -> str:
    journal = recorded.journal
    name = recorded.directory.resolve().name
    charts = [
        _figure(title, _draw(curves, journal, recorded.last))
        for title, curves in _charts(recorded).items()
    ]
    checkpoints = recorded.checkpoints()
    parts = [
        f"<h1>{_text(name)}</h1>",
        _summary(recorded, checkpoints),
        _warnings(recorded),
        '<section class="charts">',
        *charts,
        "</section>",
        "<h2>Time line</h2>",
        _figure("Checkpoints and restarts, by step", _draw_time_line(recorded, checkpoints)),
        "<h2>Processes</h2>",
        _processes(journal),
        "<h2>Environment</h2>",
        _environment(journal),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(name)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


_STYLE = """
:root {
  --page: #ffffff; --card: #f7f8fa; --ink: #1c2230; --quiet: #5d6677; --line: #dfe3ea;
  --grid: #e3e7ee; --faint: #aab3c2; --warn: #b42318; --warn-page: #fef3f2;
  --series-1: #2563eb; --series-2: #d97706; --series-3: #059669; --series-4: #be3a8a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151c; --card: #1a1f29; --ink: #e6e9ef; --quiet: #9aa4b5; --line: #2c3340;
    --grid: #2a313d; --faint: #576173; --warn: #fda29b; --warn-page: #33191a;
    --series-1: #6ea8fe; --series-2: #fbbf4c; --series-3: #4ade9f; --series-4: #f28fc6;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 0 0 1.25rem; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .55rem .9rem; min-width: 7rem; }
.facts dt { color: var(--quiet); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); }
@media (max-width: 30rem) { .charts { grid-template-columns: 1fr; } }
figure { margin: 0; padding: .9rem 1rem .5rem; background: var(--card); min-width: 0;
  border: 1px solid var(--line); border-radius: .6rem; }
figcaption { font-weight: 600; margin-bottom: .25rem; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .4rem .75rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { overflow-wrap: break-word; }
td:first-child { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { background: var(--card); font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.changed td { background: var(--warn-page); }
.warning { background: var(--warn-page); color: var(--warn); border: 1px solid currentColor;
  border-radius: .6rem; padding: .6rem .9rem; margin: 0 0 .75rem; }
code { font-family: ui-monospace, "Liberation Mono", monospace; font-size: .86em; }
"""


# ── Facts ─────────────────────────────────────────────────────────────────────────────────────────


def _summary(recorded: Recorded, checkpoints: Sequence[StoredCheckpoint]) -> str:
    journal = recorded.journal
    steps = journal.steps()
    facts: dict[str, str] = {"steps": f"{recorded.last:,}"}
    if steps:
        last = steps[max(steps)]
        ends = sum(event.kind == "epoch_end" for event in journal.events())
        if ends:
            facts["epochs"] = str(ends)
        spans = np.diff([record.time for _, record in sorted(steps.items())])
        if len(spans):
            facts["median step"] = _duration(float(np.median(spans)))
        facts["last step"] = _moment(last.time)
    facts["time in all"] = _duration(sum(map(_seconds, journal.segments)))
    facts["checkpoints"] = str(len(checkpoints))
    restarts = len(journal.segments) - 1
    facts["restarts"] = str(restarts)
    for kind in ("validation", "epoch_end"):
        latest = [event for event in journal.events() if event.kind == kind][-1:]
        for event in latest:
            facts.update((name, f"{value:.4g}") for name, value in [*event.metrics.items()][:3])
    cells = (
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _warnings(recorded: Recorded) -> str:
    journal, found = recorded.journal, []
    for name, step in _diverged(journal).items():
        found.append(f"The metric {name} is not finite from step {step} on.")
    for before, after in _relived(journal):
        if before is not None and after is not None:
            found.append(
                f"Step {after.step} was taken again after a restart and came out differently: the "
                "restart did not continue to the bit."
            )
    damaged = sum(damage.length for damage in journal.damage if not damage.tail)
    if damaged:
        found.append(f"The journal has {damaged} damaged bytes; what they held is missing here.")
    return "\n".join(f'<p class="warning">{_text(text)}</p>' for text in found)


def _diverged(journal: Journal) -> dict[str, int]:
    """The metrics whose last values are not finite, and since which step."""
    since: dict[str, int | None] = {}
    for step, record in sorted(journal.steps().items()):
        for name, value in record.metrics.items():
            if math.isfinite(value):
                since[name] = None
            elif since.get(name) is None:
                since[name] = step
    return {name: step for name, step in since.items() if step is not None}


def _relived(journal: Journal) -> Iterable[tuple[StepRecord | None, StepRecord | None]]:
    """Of each restart, the first step that was taken twice with different results."""
    line: dict[int, StepRecord] = {}
    for segment in journal.segments:
        for record in segment.steps:
            before = line.get(record.step)
            if before is not None and record.step > segment.start and _parted(before, record):
                yield before, record
                break
        line = {step: record for step, record in line.items() if step <= segment.start}
        line.update((record.step, record) for record in segment.steps)


def _parted(one: StepRecord, other: StepRecord) -> bool:
    if one.batch is not None and other.batch is not None and one.batch != other.batch:
        return True
    if any(
        not (other.metrics[name] == value or math.isnan(value) or math.isnan(other.metrics[name]))
        for name, value in one.metrics.items()
        if name in other.metrics
    ):
        return True
    return bool(one.state and other.state and changed_leaves(one.state, other.state))


def _seconds(segment: Segment) -> float:
    times = [event.time for event in segment.events]
    times += [record.time for record in segment.steps]
    return max(times) - min(times) if times else 0.0


def _processes(journal: Journal) -> str:
    rows = []
    highest = -1  # the last step of the segments before
    for segment in journal.segments:
        process = segment.facts.get("process", {})
        last = max((record.step for record in segment.steps), default=segment.start)
        ends = [event.kind for event in segment.events if event.kind in _ENDS]
        again = max(min(last, highest) - segment.start, 0)
        highest = max(highest, last)
        command = " ".join(process.get("command", []))
        rows.append(
            [
                str(segment.number + 1),
                f"{segment.start:,} – {last:,}",
                f"{again:,}",
                _moment(min((event.time for event in segment.events), default=math.nan)),
                _duration(_seconds(segment)),
                _ENDS[ends[-1]] if ends else "killed, or still going on",
                str(process.get("host", "?")),
                str(segment.facts.get("settings", {}).get("threads", "?")),
                command,
            ]
        )
    header = ["", "steps", "taken again", "began", "took", "end", "host", "threads", "command"]
    return _table(header, rows, numbers={0, 1, 2, 3, 4, 5, 7}, code={8})


_ENDS = {"fit_end": "finished", "interrupt": "interrupted"}


def _environment(journal: Journal) -> str:
    last = journal.segments[-1].facts
    changed = {
        fact.name
        for segment in journal.segments[:-1]
        for fact in compare_facts(segment.facts, last)
        if segment.facts
    }
    rows, marked = [], set()
    for group in ("program", "code", "settings", "environment"):
        for name, value in (last.get(group) or {}).items():
            if name == "left_out" and not value:
                continue
            shown = value
            if isinstance(value, Mapping):
                shown = ", ".join(f"{key}={item!r}" for key, item in value.items())
            rows.append([f"{group}/{name}", "" if shown is None else str(shown)])
            if f"{group}/{name}" in changed:
                marked.add(len(rows) - 1)
                rows[-1][1] += "  (was another one in an earlier process)"
    return _table(["fact", "value"], rows, code={0}, marked=marked)


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    code: Iterable[int] = (),
    marked: Iterable[int] = (),
) -> str:
    numbers, code, marked = set(numbers), set(code), set(marked)
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>"]
    for place, row in enumerate(rows):
        cells = []
        for column, cell in enumerate(row):
            kind = ' class="number"' if column in numbers else ""
            text = f"<code>{_text(cell)}</code>" if column in code else _text(cell)
            cells.append(f"<td{kind}>{text}</td>")
        mark = ' class="changed"' if place in marked else ""
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _text(text: str) -> str:
    return html.escape(text)


def _moment(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    """A duration in the unit that fits.

    >>> [_duration(x) for x in (0.0021, 4.25, 75, 7260)]
    ['2.1 ms', '4.2 s', '1 min 15 s', '2 h 01 min']
    """
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


# ── Drawing ───────────────────────────────────────────────────────────────────────────────────────


def _charts(recorded: Recorded) -> dict[str, list[_Curve]]:
    """The curves to draw, by the title of their chart: a loss with its validation, and so on."""
    charts: dict[str, list[_Curve]] = {}
    for kind in ("step", "validation", "epoch_end"):
        columns = recorded.metrics(kind)
        steps = columns["step"]
        for name, values in columns.items():
            if name in ("step", "epoch", "time") or not len(values):
                continue
            title = name.partition("/")[2] if kind != "step" and "/" in name else name
            if title == "lr" or title.startswith("lr/"):
                title = title.replace("lr", "learning rate", 1)
            there = np.isfinite(values)
            shown = name if kind != "step" else f"{name} (each step)"
            curve = _Curve(shown, steps[there], values[there], kind != "step")
            charts.setdefault(title, []).append(curve)
    return charts


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
        import matplotlib.backends.backend_svg
        import matplotlib.figure
    except ImportError as error:
        raise ConfigurationError(
            "the report is drawn with matplotlib, which is not installed: "
            "pip install 'puretrain[report]'"
        ) from error
    return mpl


_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and in the reader's own font
    "svg.hashsalt": "puretrain",  # the same run gives the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
}


def _draw(curves: Sequence[_Curve], journal: Journal, last: int) -> str:
    mpl = _matplotlib()
    with mpl.rc_context(_SETTINGS):
        figure = mpl.figure.Figure(figsize=(6.2, 3.0), facecolor="none", layout="constrained")
        axes = figure.add_subplot()
        for number, curve in enumerate(curves):
            steps, values = _thinned(curve.steps, curve.values)
            color = _SERIES[number % len(_SERIES)]
            style = {"marker": "o", "markersize": 3} if curve.points else {}
            width = 1.6 if curve.points else 1.0
            axes.plot(steps, values, color=color, linewidth=width, label=curve.name, **style)
        for segment in journal.segments[1:]:
            axes.axvline(segment.start, color=_FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        every = np.concatenate([curve.values for curve in curves])
        if len(every) and every.min() > 0 and every.max() / every.min() > 50:
            axes.set_yscale("log")
        axes.set_xlim(-0.02 * last, 1.02 * max(last, 1))
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(curves) > 1:
            figure.legend(loc="outside upper left", ncols=len(curves), fontsize=9)
        return _svg(figure)


def _thinned(steps: Any, values: Any) -> tuple[Any, Any]:
    """A curve with at most so many points: of each stretch its least and its greatest value."""
    if len(steps) <= _POINTS:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), _POINTS // 2):
        kept += sorted({int(part[values[part].argmin()]), int(part[values[part].argmax()])})
    return steps[kept], values[kept]


_ROWS = dict(
    zip(("checkpoints", "validations", "ends of epochs", "restarts"), _SERIES, strict=True)
)


def _draw_time_line(recorded: Recorded, checkpoints: Sequence[StoredCheckpoint]) -> str:
    mpl = _matplotlib()
    journal = recorded.journal
    events = journal.events()
    rows = {
        "checkpoints": [found.step for found in checkpoints],
        "validations": [event.step for event in events if event.kind == "validation"],
        "ends of epochs": [event.step for event in events if event.kind == "epoch_end"],
        "restarts": [segment.start for segment in journal.segments[1:]],
    }
    rows = {name: steps for name, steps in rows.items() if steps or name == "checkpoints"}
    with mpl.rc_context({**_SETTINGS, "axes.spines.left": False}):
        height = 0.75 + 0.32 * len(rows)
        figure = mpl.figure.Figure(figsize=(12.4, height), facecolor="none", layout="constrained")
        axes = figure.add_subplot()
        for place, (name, steps) in enumerate(rows.items()):
            color = _ROWS[name]
            shown = np.unique(steps)
            axes.plot(shown, [place] * len(shown), "D", color=color, markersize=5)
        if "restarts" in rows:
            place = [*rows].index("restarts")
            highest = 0
            for segment in journal.segments:
                if highest > segment.start:  # steps that had to be taken again
                    axes.plot(
                        [segment.start, highest], [place, place], color=_SERIES[3], linewidth=2
                    )
                highest = max([highest, *(record.step for record in segment.steps)])
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-0.01 * recorded.last, max(1.01 * recorded.last, 1))
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


def _svg(figure: Any) -> str:
    mpl = _matplotlib()
    mpl.backends.backend_svg.FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    # Only what is referred to needs an id, and several drawings are on one page.
    drawing = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawing)
    drawing = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", drawing, count=1)
    drawing = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", drawing, count=1)
    drawing = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", drawing)
    for color, variable in _VARIABLES.items():
        drawing = drawing.replace(color, variable)
    return drawing.strip()


def _figure(title: str, drawing: str) -> str:
    label = html.escape(title, quote=True)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure><figcaption>{_text(title)}</figcaption>\n{drawing}\n</figure>"
