"""A progress bar in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Any

from puretrain.errors import ConfigurationError
from puretrain.loop import Event, Observer
from puretrain.metrics import compute_all
from puretrain.observers.scalars import scalars, spread

__all__ = ["folded", "progress"]

_WINDOW = 10.0  # seconds over which the rate is taken
_FASTEST = 0.1  # seconds between two drawings at least
_SMALLEST_BAR, _LARGEST_BAR = 8, 40  # columns


def progress(
    *,
    enabled: bool = True,
    metrics: Sequence[str] | None = None,
    refresh: float = 0.2,
    interval: float = 10.0,
    file: IO[str] | None = None,
) -> Observer:
    """Show how far the run is: epoch, batches, rate, time left in the epoch, and metrics.

    In a terminal this is a bar that is redrawn now and then; elsewhere (a file, a pipe, a terminal
    that can't move its cursor) a plain line now and then. Both add a line for each validation, each
    epoch, an interrupt, and the end. What else is printed appears above the bar. In a notebook the
    bar stays above the lines, and says how the run ended when it has. Colour is left out if the
    environment variable ``NO_COLOR`` is set; ``FORCE_COLOR`` makes no bar where there is no
    terminal.

    Metrics are fetched from the device only when they are shown. Those of an ensemble are shown as
    the mean over its members ± the standard deviation; with ``!`` and a number behind it, so many
    members have a value that is not finite and left out.

    Args:
        enabled: False shows nothing.
        metrics: the names of the step's metrics to show, in order; all by default. The bar leaves
            out what the width of the terminal has no room for.
        refresh: seconds between two drawings of the bar, at least 0.1.
        interval: seconds between two plain lines.
        file: where to write; standard output by default.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> import io, torch
        >>> import puretrain as pt
        >>> from puretrain.loop import Event
        >>> out, state = io.StringIO(), pt.TrainState.create({}, key=pt.random.key(0))
        >>> show = progress(file=out)
        >>> show(state, Event("validation", 2, 300, {"val/loss": torch.tensor(0.25)}))
        >>> print(out.getvalue(), end="")
        step 300  val/loss 0.25
    """
    if not refresh >= _FASTEST:
        raise ConfigurationError(f"refresh is at least 0.1 seconds, not {refresh!r}")
    if not interval > 0:
        raise ConfigurationError(f"interval is more than 0 seconds, not {interval!r}")
    if not enabled:
        return _silent
    return _Progress(None if metrics is None else [*metrics], refresh, interval, file)


def _silent(state: Any, event: Event) -> None:
    """Show nothing."""


class _Progress:
    """See :func:`progress`."""

    def __init__(
        self, metrics: list[str] | None, refresh: float, interval: float, file: IO[str] | None
    ) -> None:
        self._names, self._file = metrics, file
        self._refresh, self._interval = refresh, interval
        self._due = 0.0  # when to show a step next
        self._last_is_due = 0.0  # when to show the last step of an epoch: a full bar
        self._bar = False
        self._notebook = False  # whether the bar is the output of a cell
        self._shown: Any = None  # that output
        self._console: Any = None
        self._live: Any = None
        self._began = self._epoch_began = 0.0
        self._samples: deque[tuple[float, int]] = deque()  # times and steps, for the rate
        self._rate: float | None = None  # steps in a second, as last known

    def __call__(self, state: Any, event: Event) -> None:
        if event.kind != "step":
            self._tell(state, event)
            return
        now = time.monotonic()
        if now >= self._due or (event.position == event.total and now >= self._last_is_due):
            self._show(state, event, now)

    def close(self) -> None:
        self._remove_bar()
        self._console = None

    # ── Steps ─────────────────────────────────────────────────────────────────────────────────────

    def _show(self, state: Any, event: Event, now: float) -> None:
        self._start()
        self._due = now + (self._refresh if self._bar else self._interval)
        self._last_is_due = now + _FASTEST if self._bar else self._due
        self._samples.append((now, event.step))
        while now - self._samples[0][0] > _WINDOW and len(self._samples) > 2:
            self._samples.popleft()
        values, pace = _written(state, _chosen(state.metrics, self._names)), self._pace(event)
        if self._bar:
            self._draw(event, pace, values)
        elif pace:
            self._print([f"epoch {event.epoch}", _count(event), *pace, *values])

    def _draw(self, event: Event, pace: list[str], values: list[str]) -> None:
        from rich.live import Live

        line = _bar_line(event, pace, values, self._console, colored=not self._notebook)
        if self._notebook:
            self._show_in_cell(line.plain)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(line, refresh=True)

    def _show_in_cell(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text}
        if self._shown is None:
            self._shown = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(content, raw=True)

    def _pace(self, event: Event) -> list[str]:
        """The rate and the time left in the epoch, once they are known."""
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        if last != first and end != begin:
            self._rate = (last - first) / (end - begin)
        rate = self._rate
        if rate is None:
            return []
        unit = f"{_three_digits(rate)}/s" if rate >= 1 else f"{_three_digits(1 / rate)} s each"
        if event.total is None:
            return [unit]
        return [unit, f"{_duration((event.total - event.position) / rate)} left"]

    # ── Lines ─────────────────────────────────────────────────────────────────────────────────────

    def _tell(self, state: Any, event: Event) -> None:
        self._start()
        now, kind, step = time.monotonic(), event.kind, event.step
        values = _written(state, event.metrics)
        if kind == "fit_start":
            self._began = self._epoch_began = now
            if step:
                self._print([f"going on after step {step}, in epoch {event.epoch}"])
        elif kind == "epoch_start":
            self._epoch_began = now
        elif kind == "validation":
            self._print([f"step {step}", *values])
        elif kind == "epoch_end":
            took = _duration(now - self._epoch_began)
            self._print([f"epoch {event.epoch}", f"step {step}", took, *values])
            self._epoch_began = now
        else:
            verb = "stopped by a reducer" if bool(state.stop) else "finished"
            verb = "interrupted" if kind == "interrupt" else verb
            ending = f"{verb} after step {step}, {_duration(now - self._began)}"
            if self._shown is not None:
                self._show_in_cell(ending)  # in the place of the bar
                self._shown = None
            else:
                self._remove_bar()
                self._print([ending])
        self._samples.clear()  # a rate over a validation would be none

    def _print(self, parts: list[str]) -> None:
        # A program that reads the lines wants each in one piece; a terminal would cut it anywhere.
        text = folded(parts, self._console.width) if self._bar else "  ".join(parts)
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _remove_bar(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._shown = None

    def _start(self) -> None:
        if self._console is None:
            from rich.console import Console

            self._notebook = self._file is None and Console().is_jupyter
            # Rich would show each line in a notebook as a block of HTML.
            self._console = console = Console(file=self._file, force_jupyter=False)
            # FORCE_COLOR makes Rich take a file for a terminal; that has no cursor all the same.
            terminal = console.is_terminal and console.file.isatty()
            self._bar = self._notebook or (terminal and not console.is_dumb_terminal)


def folded(parts: Sequence[str], width: int, separator: str = "  ") -> str:
    """Parts one after the other, on several lines where they are wider than a terminal.

    >>> print(folded(["epoch 0", "train/loss 0.5", "train/accuracy 0.9"], 30))
    epoch 0  train/loss 0.5
      train/accuracy 0.9
    """
    mark = separator.rstrip()  # a comma stays at the end of its line
    lines = [parts[0]] if parts else []
    for part in parts[1:]:
        if len(lines[-1]) + len(separator) + len(part) + len(mark) > width:
            lines[-1] += mark
            lines.append(f"  {part}")
        else:
            lines[-1] += separator + part
    return "\n".join(lines)


def _bar_line(
    event: Event, pace: list[str], values: list[str], console: Any, *, colored: bool
) -> Any:
    """One line that fits the terminal: what is left of it goes to the bar."""
    from rich.text import Text

    parts = [f"epoch {event.epoch}", _count(event), *pace]
    room = console.width - 1 - sum(len(part) + 2 for part in parts)
    if event.total is not None:
        room -= _SMALLEST_BAR
    shown = []
    for value in values:
        name, _, number = value.rpartition(" ")
        value = f"{name} {number:6}"  # so that the bar keeps its width
        if len(value) + 2 > room:
            break
        shown.append(value)
        room -= len(value) + 2
    line = Text(f"{parts[0]}  ", no_wrap=True, overflow="crop")
    if event.total is not None:
        width = min(_SMALLEST_BAR + max(room, 0), _LARGEST_BAR)
        done = width * event.position // max(event.total, 1)
        colored = colored and console.color_system is not None and not console.no_color
        full, rest = ("━", "━") if colored else ("━", "─")
        if console.options.ascii_only:
            full, rest = "#", "-"
        line.append(full * done, "green").append(rest * (width - done), "bright_black")
        line.append("  ")
    line.append("  ".join(parts[1:]))
    return line.append("".join(f"  {value}" for value in shown), "cyan")


def _count(event: Event) -> str:
    if event.total is None:
        return f"{event.position} batches"
    return f"{event.position:{len(str(event.total))}}/{event.total}"


def _chosen(metrics: Mapping[str, Any], names: list[str] | None) -> Mapping[str, Any]:
    return metrics if names is None else {name: metrics[name] for name in names if name in metrics}


def _written(state: Any, metrics: Mapping[str, Any]) -> list[str]:
    found = compute_all(metrics)
    members = {name for name, x in found.items() if x.shape == (state.members,)}
    one = scalars({name: value for name, value in found.items() if name not in members})
    written = []
    for name, metric in found.items():
        if name in members:
            mean, deviation, bad = spread(metric)
            written.append(f"{name} {mean:.4g}±{deviation:.2g}" + (f"!{bad}" if bad else ""))
        elif name in one:
            value = one[name]
            shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            written.append(f"{name} {shown}")
    return written


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f}{unit}"
        value /= 1000
    return f"{value:.0f}G"


def _duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any.

    >>> _duration(7), _duration(3671)
    ('0:07', '1:01:11')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
