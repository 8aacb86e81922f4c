"""What a run looked like inside, every n steps: written, read and drawn."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from puretrain.errors import ConfigurationError
from puretrain.explain.explanation import Explanation, explain
from puretrain.loop import Event, Observer
from puretrain.observers import jsonl_log
from puretrain.step import Step
from puretrain.tree import FrozenDict

__all__ = ["draw_explanations", "explanations", "read_explanations"]


def explanations(path: str | os.PathLike[str], step: Step, *, every: int = 100) -> Observer:
    """Make an observer that explains the run every so many steps and writes it to a file.

    It takes one step more from the state that the run has reached, on the batch that it had last,
    and throws the new state away: see :func:`explain`. That costs somewhat more than a step.

    The file has a JSON object in each line, as :func:`puretrain.observers.jsonl_log` writes it:
    ``parameter/…``, ``gradient/…``, ``update/…`` and ``ratio/…`` by the path of the leaf, and
    ``dead/…``, the share of dead units, by the name of the module. A resumed run goes on with it.

    Args:
        path: the file; its directory is made if needed.
        step: the step of the run.
        every: explain after every so many steps.

    Raises:
        ConfigurationError: ``every`` is less than 1; (in the loop) the file is not such a log.

    Example:
        >>> import tempfile
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return ((params["w"] - batch) ** 2).sum()
        >>> optimizer = pt.optim.sgd(0.25)
        >>> params = {"w": torch.zeros(2)}
        >>> state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
        >>> step = pt.train_step(loss, optimizer)
        >>> path = f"{tempfile.mkdtemp()}/explained.jsonl"
        >>> _ = pt.fit(state, step, [torch.ones(2)] * 4, epochs=1,
        ...            observers=[explanations(path, step, every=2)])
        >>> read_explanations(path)["step"], read_explanations(path)["parameter/w"]
        ([2, 4], [1.0606601717798212, 1.3258252147247767])
    """
    return _Explanations(path, step, every)


class _Explanations:
    def __init__(self, path: str | os.PathLike[str], step: Step, every: int) -> None:
        self._log, self._step, self._every = jsonl_log(path, every=every), step, every

    def __call__(self, state: Any, event: Event) -> None:
        if event.kind == "step" and not event.step % self._every:
            explained = _as_metrics(explain(self._step, state, event.batch))
            self._log(state.replace(metrics=explained), event)
        elif event.kind == "fit_start":
            self._log(state, event)

    def close(self) -> None:
        self._log.close()  # type: ignore[attr-defined]


def _as_metrics(explanation: Explanation) -> FrozenDict[Any]:
    numbers = {"loss": explanation.loss}
    for kind in ("parameter", "gradient", "update"):
        numbers[kind] = getattr(explanation, kind)
    for leaf in explanation.leaves:
        for kind in ("parameter", "gradient", "update", "ratio"):
            numbers[f"{kind}/{leaf.path}"] = getattr(leaf, kind)
    for seen in explanation.activations:
        if seen.dead is not None:
            numbers[f"dead/{seen.name}"] = seen.dead / max(seen.units, 1)
    return FrozenDict(
        {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in numbers.items()
            if value is not None
        }
    )


def read_explanations(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read what :func:`explanations` has written, as columns.

    Returns:
        ``"step"``, ``"epoch"`` and the columns by their names, all of one length; NaN where a row
        has no such number.

    Raises:
        ConfigurationError: there is no such file, or it holds something else.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{os.fspath(path)} can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"step", "epoch", "parameter"} <= row.keys():
            raise ConfigurationError(
                f"{os.fspath(path)}, line {number}: this was not written by "
                "puretrain.explain.explanations"
            )
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row if name != "event")
    columns: dict[str, list[Any]] = {"step": [], "epoch": []}
    for name in names:
        columns[name] = [
            row[name] if name in ("step", "epoch") else float(row.get(name, math.nan))
            for row in rows
        ]
    return columns


def draw_explanations(
    columns: dict[str, list[Any]], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw the history of a run: update-to-parameter ratios, gradients, dead units.

    Args:
        columns: from :func:`read_explanations`.
        path: the picture; its ending says of what kind (``.svg``, ``.png``, ``.pdf``).
        title: what to write above it.

    Raises:
        ConfigurationError: matplotlib is not installed, there is nothing to draw, or the file can't
            be written.
    """
    mpl = _matplotlib()
    if not columns["step"]:
        raise ConfigurationError(
            "there is nothing to draw: the history has no rows yet; the "
            "observer explanations(every=N) writes one every N steps"
        )
    panels = [
        ("ratio", "update / parameter", True),
        ("gradient", "norm of the gradient", True),
        ("dead", "share of dead units", False),
    ]
    present = [
        panel for panel in panels if any(name.startswith(panel[0] + "/") for name in columns)
    ]
    with mpl.rc_context(_SETTINGS):
        height = 0.6 + sum(_height(columns, kind) for kind, _, _ in present)
        figure = mpl.figure.Figure(figsize=(7.6, height), layout="constrained")
        ratios = [_height(columns, kind) for kind, _, _ in present]
        grid = figure.subplots(len(present), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (kind, label, logarithmic) in zip(grid, present, strict=True):
            _draw_panel(mpl, figure, axes, columns, kind, label, logarithmic)
        grid[-1].set_xlabel("step")
        if title:
            figure.suptitle(title)
        try:
            figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{os.fspath(path)} can't be written: {error}") from error


def _height(columns: dict[str, list[Any]], kind: str) -> float:
    return 0.75 + 0.2 * sum(name.startswith(kind + "/") for name in columns)


def _draw_panel(
    mpl: Any,
    figure: Any,
    axes: Any,
    columns: dict[str, list[Any]],
    kind: str,
    label: str,
    logarithmic: bool,
) -> None:
    """One row for each leaf or module, from left to right the steps, its number as a colour."""
    names = [name for name in columns if name.startswith(kind + "/")]
    values = [[_shown(value, logarithmic) for value in columns[name]] for name in names]
    if kind == "ratio":  # infinite for a parameter of zero, which is no mistake
        most = max((x for row in values for x in row if math.isfinite(x)), default=1.0)
        values = [
            [most if shown == math.inf else x for x, shown in zip(row, columns[name], strict=True)]
            for row, name in zip(values, names, strict=True)
        ]
    steps = columns["step"]
    palette = mpl.colormaps["viridis" if logarithmic else "Greys"].with_extremes(bad="#d62728")
    norm = None
    finite = [value for row in values for value in row if math.isfinite(value)]
    if logarithmic and finite:
        norm = mpl.colors.LogNorm(min(finite), max(*finite, min(finite) * 1.0001))
    elif not logarithmic:
        norm = mpl.colors.Normalize(0.0, 1.0)
    mesh = axes.pcolormesh(
        _edges(steps), range(len(names) + 1), values, cmap=palette, norm=norm, rasterized=False
    )
    axes.set_yticks([i + 0.5 for i in range(len(names))], [n.partition("/")[2] for n in names])
    axes.invert_yaxis()
    axes.set_title(label, loc="left", fontsize=9)
    figure.colorbar(mesh, ax=axes, pad=0.01)


def _shown(value: float, logarithmic: bool) -> float:
    if not math.isfinite(value):
        return math.nan  # drawn red
    return max(value, 1e-12) if logarithmic else value


def _edges(steps: Sequence[int]) -> list[float]:
    """The borders between the columns of the picture."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "puretrain",  # the same run gives the same bytes
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
        import matplotlib.colors
        import matplotlib.figure
    except ImportError as error:
        raise ConfigurationError(
            "the history is drawn with matplotlib, which is not installed: "
            "pip install 'puretrain[report]'"
        ) from error
    return mpl
