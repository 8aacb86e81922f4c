"""Finding a learning rate: train for a little while it grows, and see where the loss falls fastest.

The state is a value, so the test trains on from it and leaves it as it is; there is nothing to put
back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch

from puretrain.errors import ConfigurationError, OptimizerError, check_choice, check_whole
from puretrain.loop import Event, Reducer, fit
from puretrain.optim import get_hyperparams, set_hyperparams
from puretrain.state import TrainState
from puretrain.step import Step

__all__ = ["RangeTest", "Smoothed", "draw", "learning_rates", "lr_find", "steepest"]

S = TypeVar("S", bound=TrainState)
Mode = Literal["exponential", "linear"]

# Batches in a row that a step may skip (a loss scale that is being found) before the test ends.
_MOST_SKIPPED = 100
# The point from which on the mean is good enough to say whether it diverges.
_UNJUDGED = 10


class RangeTest(NamedTuple):
    """What :func:`lr_find` has found: the loss at each learning rate."""

    lr: tuple[float, ...]
    """The learning rates, one for each update, growing."""
    loss: tuple[float, ...]
    """The smoothed loss of the batches of that update."""
    raw: tuple[float, ...]
    """The loss itself."""
    mode: Mode
    """How the learning rates grow."""
    diverged: bool
    """Whether the test ended early, since the loss had grown too far."""

    @property
    def results(self) -> dict[str, list[float]]:
        """The points as lists: ``{"lr": …, "loss": …}``."""
        return {"lr": list(self.lr), "loss": list(self.loss)}

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss falls most steeply.

        Args:
            skip_begin: points to leave out at the beginning, where the smoothed loss jumps.
            skip_end: points to leave out at the end, where it diverges.

        Returns:
            None if fewer than two finite points are left.

        >>> losses = 4.0, 3.9, 2.0, 1.9, 1.9
        >>> RangeTest((0.1, 0.2, 0.3, 0.4, 0.5), losses, (), "linear", False).suggestion(0)
        0.2
        """
        place = steepest(self.loss, skip_begin, skip_end)
        return None if place is None else self.lr[place]

    def plot(self, suggest: bool = False, ax: Any = None) -> Any:
        """Draw the loss over the learning rate.

        Args:
            suggest: mark the suggested learning rate.
            ax: the axes of matplotlib to draw into; None: a new figure.

        Returns:
            The figure.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        return draw(self.lr, self.loss, self.mode, self.suggestion() if suggest else None, ax)

    def chart(self, width: int = 80, height: int = 16) -> str:
        """Draw the loss over the learning rate in plain text.

        Points beyond what the first loss and the lowest one span are left out at the top, or the
        divergence would flatten all that comes before.

        Args:
            width: columns in all.
            height: lines in all, 4 at least.

        >>> print(RangeTest((1e-3, 1e-2, 1e-1), (3.0, 2.0, 1.0), (), "exponential", False).chart(
        ...     width=32, height=5))
               3 │•
               2 │          •
               1 │                     •
                 └──────────────────────
                  0.001              0.1
        """
        return _chart(self, width, height)


def lr_find(
    state: S,
    step: Step,
    batches: Any,
    *,
    min_lr: float = 1e-8,
    max_lr: float = 1.0,
    updates: int = 100,
    mode: Mode = "exponential",
    stop_factor: float | None = 4.0,
    smoothing: float = 0.98,
    hyperparameter: str = "lr",
) -> RangeTest:
    """Train from a state while the learning rate grows, and record the loss.

    The learning rate range test (Smith, "Cyclical learning rates for training neural networks",
    WACV 2017). The state stays as it is, and what the test trains is dropped: no parameter, random
    key or place in the data has moved afterwards.

    Args:
        state: where to begin; its optimizer is made with :func:`puretrain.optim.inject_hyperparams`
            so that the learning rate is a part of the state.
        step: ``step(state, batch) -> state``, made by :func:`puretrain.train_step`. Its metric
            ``loss`` is what is recorded. If it accumulates gradients, the learning rate grows with
            each update, and the mean loss of its batches is recorded.
        batches: as for :func:`puretrain.fit`; they begin again as often as needed.
        min_lr: the first learning rate.
        max_lr: the last one.
        updates: how many learning rates to try.
        mode: ``'exponential'``: each is a fixed multiple of the one before; ``'linear'``: equal
            steps.
        stop_factor: end early when the smoothed loss is so many times the lowest that it has been
            from the tenth update on; None: go on. A loss that is NaN or infinite always ends
            the test.
        smoothing: how much of the running mean of the loss stays at each update, in [0, 1); the
            mean is corrected for its beginning at zero.
        hyperparameter: its name, as :func:`puretrain.optim.get_hyperparams` calls it.

    Raises:
        ConfigurationError: an argument has no such value, or there is no metric ``loss``.
        OptimizerError: the optimizer's state holds no such hyper-parameter, or it follows a
            schedule.

    Example:
        >>> import puretrain as pt
        >>> optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=1.0)
        >>> def loss(params, buffers, batch, key):
        ...     return ((batch - params["w"]) ** 2).mean()
        >>> state = pt.TrainState.create(
        ...     {"w": torch.zeros(4)}, None, optimizer, key=pt.random.key(0))
        >>> step = pt.train_step(loss, optimizer)
        >>> test = lr_find(state, step, pt.batches(torch.ones(8, 4), 2), min_lr=1e-3, max_lr=10.0)
        >>> len(test.lr), test.diverged, state.params["w"].sum()
        (100, False, tensor(0.))
        >>> round(test.suggestion(), 2)
        0.22
    """
    rates = learning_rates(min_lr, max_lr, updates, mode)
    _check_options(stop_factor, smoothing)
    paths = get_hyperparams(state.opt_state).keys()
    if hyperparameter not in paths | {path.rpartition("/")[2] for path in paths}:
        raise OptimizerError(
            f"lr_find: the optimizer's state holds no hyper-parameter {hyperparameter!r}; make the "
            "optimizer with inject_hyperparams, as in inject_hyperparams(adamw)(lr=1e-3), so that "
            "the learning rate is a part of the state"
        )
    smoothed = Smoothed(smoothing, stop_factor)
    raw: list[float] = []
    waiting: list[float] = []  # losses of the batches of the update that is to come
    seen = {"updates": int(state.updates), "skipped": int(state.skipped)}

    def with_rate(state: S, number: int) -> S:
        return state.replace(
            opt_state=set_hyperparams(state.opt_state, **{hyperparameter: rates[number]})
        )

    def look(state: S, event: Event) -> S:
        if event.kind == "step":
            waiting.append(_loss_of(event))
            if not math.isfinite(waiting[-1]):
                raw.append(waiting[-1])
                smoothed.add(waiting[-1])
                return state.replace(stop=torch.ones_like(state.stop))
        updates_done, skipped = int(state.updates), int(state.skipped)
        if updates_done == seen["updates"]:
            hopeless = skipped - seen["skipped"] > _MOST_SKIPPED
            return state.replace(stop=torch.ones_like(state.stop)) if hopeless else state
        seen.update(updates=updates_done, skipped=skipped)
        raw.append(sum(waiting) / len(waiting))
        waiting.clear()
        over = smoothed.add(raw[-1])
        if over or len(raw) == len(rates):
            return state.replace(stop=torch.ones_like(state.stop))
        return with_rate(state, len(raw))

    start = with_rate(state.replace(stop=torch.zeros_like(state.stop)), 0)
    fit(
        start,
        step,
        batches,
        epochs=sys.maxsize,
        reducers=[Reducer(look, on=("step", "epoch_end"))],
    )
    count = len(raw)
    return RangeTest(
        tuple(rates[:count]), tuple(smoothed.values), tuple(raw), mode, smoothed.diverged
    )


def learning_rates(min_lr: float, max_lr: float, count: int, mode: str) -> list[float]:
    """The learning rates of a test, from the first to the last.

    >>> [round(lr, 4) for lr in learning_rates(0.001, 1.0, 4, "exponential")]
    [0.001, 0.01, 0.1, 1.0]
    """
    check_choice("mode", mode, get_args(Mode))
    count = check_whole("updates", count, 2)
    if not 0 < min_lr < max_lr < math.inf:
        raise ConfigurationError(
            f"the learning rates grow from above 0: min_lr={min_lr}, max_lr={max_lr}"
        )
    if mode == "linear":
        return [min_lr + (max_lr - min_lr) * i / (count - 1) for i in range(count)]
    return [min_lr * (max_lr / min_lr) ** (i / (count - 1)) for i in range(count)]


class Smoothed:
    """The running mean of a loss, corrected for its beginning at zero, and its lowest value."""

    def __init__(self, smoothing: float = 0.98, stop_factor: float | None = 4.0) -> None:
        """Begin.

        Args:
            smoothing: how much of the mean stays at each value.
            stop_factor: see :func:`lr_find`.
        """
        self.smoothing, self.stop_factor = smoothing, stop_factor
        self.values: list[float] = []
        self.diverged = False
        self._mean = 0.0
        self._count = 0
        self._best = math.inf

    def add(self, loss: float) -> bool:
        """Take a loss; returns whether it has diverged."""
        self._count += 1
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * loss
        value = self._mean / (1 - self.smoothing**self._count)
        self.values.append(value)
        # A loss below zero (a log density) can't be judged by a multiple of it.
        if not math.isfinite(value) or (
            self.stop_factor is not None
            and 0 < self._best < math.inf
            and value > self.stop_factor * self._best
        ):
            self.diverged = True
        if self._count >= _UNJUDGED:
            self._best = min(self._best, value)
        return self.diverged

    def skip(self) -> None:
        """Leave a gap where there was no loss; the mean stays."""
        self.values.append(math.nan)


def steepest(losses: Sequence[float], skip_begin: int, skip_end: int) -> int | None:
    """The place where a series falls most steeply, counted from the beginning of the series.

    Args:
        losses: the series.
        skip_begin: points to leave out at the beginning.
        skip_end: points to leave out at the end.

    Returns:
        None if fewer than two finite points are left.
    """
    last = len(losses) - skip_end
    places = [i for i in range(skip_begin, last) if math.isfinite(losses[i])]
    if len(places) < 2:
        return None
    return places[int(np.gradient(np.array([losses[i] for i in places])).argmin())]


def draw(
    lr: Sequence[float], loss: Sequence[float], mode: str, suggestion: float | None, ax: Any
) -> Any:
    """Draw losses over learning rates with matplotlib; see :meth:`RangeTest.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigurationError(
            "plot() draws with matplotlib, which is not installed: pip install 'puretrain[report]'"
        ) from error
    if ax is None:
        _, ax = plt.subplots()
    ax.plot(lr, loss)
    if mode == "exponential":
        ax.set_xscale("log")
    ax.set_xlabel("Learning rate")
    ax.set_ylabel("Loss")
    if suggestion is not None:
        place = list(lr).index(suggestion)
        ax.plot(lr[place], loss[place], markersize=10, marker="o", color="red")
    return ax.figure


def _check_options(stop_factor: float | None, smoothing: float) -> None:
    if stop_factor is not None and not stop_factor > 1:
        raise ConfigurationError(f"stop_factor is greater than 1, or None, not {stop_factor!r}")
    if not 0 <= smoothing < 1:
        raise ConfigurationError(f"smoothing is in [0, 1), not {smoothing!r}")


def _loss_of(event: Event) -> float:
    if "loss" not in event.metrics:
        raise ConfigurationError(
            "lr_find records the metric 'loss' of the step, which gave: "
            f"{', '.join(event.metrics) or 'none'}"
        )
    return float(event.metrics["loss"])


def _chart(test: RangeTest, width: int, height: int) -> str:
    points = [(lr, y) for lr, y in zip(test.lr, test.loss, strict=True) if math.isfinite(y)]
    if len(points) < 2:
        return "(fewer than two finite losses: nothing to draw)"
    lowest = min(y for _, y in points)
    top = max(y for _, y in points[: 1 + min(range(len(points)), key=lambda i: points[i][1])])
    if top == lowest:
        top = max(y for _, y in points)
    margin, rows = 8, max(height, 4) - 2
    columns = max(width - margin - 2, 10)
    scale = math.log if test.mode == "exponential" else float
    left, right = scale(test.lr[0]), scale(points[-1][0])
    chosen = test.suggestion()
    grid = [[" "] * columns for _ in range(rows)]
    for lr, y in points:
        if y > top + (top - lowest) * 0.05:
            continue
        part = (top - min(y, top)) / (top - lowest) if top > lowest else 0.0
        row, column = round(part * (rows - 1)), round((scale(lr) - left) / (right - left) *
                                                      (columns - 1))  # fmt: skip
        if grid[row][column] != "◆":
            grid[row][column] = "◆" if lr == chosen else "•"
    lines = []
    for number, cells in enumerate(grid):
        label = ""
        if number in (0, (rows - 1) / 2, rows - 1):
            label = f"{top - (top - lowest) * number / (rows - 1):.3g}"
        lines.append(f"{label:>{margin}} │{''.join(cells)}".rstrip())
    lines.append(" " * (margin + 1) + "└" + "─" * columns)
    first, last = f"{test.lr[0]:.3g}", f"{points[-1][0]:.3g}"
    lines.append(" " * (margin + 2) + first + last.rjust(columns - len(first)))
    return "\n".join(lines)
