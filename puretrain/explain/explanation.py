"""One step, looked into."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from puretrain.errors import NonFiniteError, StructureError
from puretrain.gradients import Gradients, watched
from puretrain.state import TrainState
from puretrain.step import Step
from puretrain.tree import path_string, tree_leaves, tree_paths, under_transform

__all__ = ["ActivationNorms", "Explanation", "LeafNorms", "explain"]

_CUT_OFF = (nn.ReLU, nn.ReLU6, nn.Threshold)  # what they put out is exactly zero at times


class LeafNorms(NamedTuple):
    """What a step did to one leaf of the parameters; the norms are Euclidean."""

    path: str
    """Where it is, such as ``encoder.0.weight``."""
    shape: tuple[int, ...]
    """Its shape."""
    parameter: float
    """The norm before the step."""
    gradient: float | None
    """The norm of the gradient; None if it has none, or if no gradient was seen."""
    update: float | None
    """The norm of the difference that the step made; None if the step was not completed."""

    @property
    def ratio(self) -> float | None:
        """The update in relation to the parameter; about 0.001 is usual."""
        if self.update is None:
            return None
        if not self.parameter:
            return math.inf if self.update else 0.0
        return self.update / self.parameter


class ActivationNorms(NamedTuple):
    """What one module without submodules put out."""

    name: str
    """The name of the module within the outermost one that was called, and its type."""
    rms: float
    """The root of the mean square of the output, the last time that it was called."""
    units: int
    """How many units it has: the size of dimension 1 of the output, or of its only one."""
    dead: int | None
    """How many of them were zero for the whole batch at each call; None unless it is a ReLU."""


class Explanation(NamedTuple):
    """What :func:`explain` saw; ``print`` shows it as a table."""

    step: int
    """Batches consumed before this step."""
    loss: float | None
    """The loss; None if none was seen."""
    leaves: tuple[LeafNorms, ...]
    """The leaves of the parameters, in order."""
    activations: tuple[ActivationNorms, ...]
    """The modules without submodules, in the order in which they were called."""
    nonfinite: str | None
    """The path of the first value that is NaN or infinite, in the order in which a step comes to
    them: ``params``, ``buffers``, ``opt_state``, ``batch``, ``activations``, ``loss``,
    ``gradients``, and what comes ``after`` the step; None if all are finite."""
    notes: tuple[str, ...]
    """What could not be seen, and why."""

    @property
    def gradient(self) -> float | None:
        """The norm of all gradients together."""
        return _together([leaf.gradient for leaf in self.leaves])

    @property
    def parameter(self) -> float | None:
        """The norm of all parameters together."""
        return _together([leaf.parameter for leaf in self.leaves])

    @property
    def update(self) -> float | None:
        """The norm of all updates together."""
        return _together([leaf.update for leaf in self.leaves])

    def columns(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The header and the rows of the table of leaves, as text."""
        rows = [
            (
                leaf.path,
                "×".join(map(str, leaf.shape)) or "()",
                *map(_number, (leaf.parameter, leaf.gradient, leaf.update, leaf.ratio)),
            )
            for leaf in self.leaves
        ]
        return ("leaf", "shape", "parameter", "gradient", "update", "ratio"), rows

    def activation_columns(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The header and the rows of the table of activations, as text."""
        rows: list[tuple[str, ...]] = [
            (seen.name, _number(seen.rms), "" if seen.dead is None else f"{seen.dead}/{seen.units}")
            for seen in self.activations
        ]
        return ("module", "rms", "dead units"), rows

    def summary(self) -> list[str]:
        """Everything but the tables, in lines."""
        numbers = {
            "loss": self.loss,
            "gradient": self.gradient,
            "parameters": self.parameter,
            "update": self.update,
        }
        shown = [f"{name} {_number(value)}" for name, value in numbers.items() if value is not None]
        lines = [f"step {self.step}: {', '.join(shown)}"]
        lines.append(f"first value that is not finite: {self.nonfinite or 'none'}")
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        tables = [self.columns(), self.activation_columns()]
        return "\n".join([*self.summary(), *(_table(*table) for table in tables if table[1])])


def explain(step: Step, state: TrainState, batch: Any) -> Explanation:
    """Take one step, and say what went on in it. Nothing changes: the new state is thrown away.

    The loss and the gradients are those that :func:`puretrain.train_step` computes inside of the
    step, however it is wrapped: they are shown to this function when they are there. So a step that
    is not made by ``train_step``, or that runs inside of a transform such as ``vmap``, shows none;
    ``notes`` says so. Of a step that is composed of several, the last is shown. A compiled step is
    taken uncompiled, since nobody can look into a graph.

    Activations are what the submodules of any ``nn.Module`` put out that is called in the meantime.
    A function that is not a module (``torch.relu``) is not seen, and its dead units are not either.

    Args:
        step: the step.
        state: the state before it; may hold what is not finite.
        batch: the batch.

    Returns:
        The explanation. A step that raises a NonFiniteError (``nonfinite='raise'``) is explained
        too, up to there.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] * batch).log().sum()
        >>> optimizer = pt.optim.sgd(0.1)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.ones(4)}, None, optimizer, key=pt.random.key(0))
        >>> print(explain(pt.train_step(loss, optimizer), state, torch.ones(4)))
        step 0: loss 0, gradient 2, parameters 2, update 0.2
        first value that is not finite: none
        leaf  shape  parameter  gradient  update  ratio
        w     4      2          2         0.2     0.1
        >>> explain(pt.train_step(loss, optimizer), state, torch.zeros(4)).nonfinite
        'loss'
    """
    if not isinstance(state, TrainState):
        raise StructureError(f"explain takes a step, a TrainState and a batch, not {state!r}")
    seen: list[Gradients] = []
    outputs: dict[str, _Output] = {}
    notes = []
    after: TrainState | None = None
    with watched(lambda _, gradients: seen.append(gradients)), _hooks(outputs):
        try:
            after = step(state, batch)
        except NonFiniteError as error:
            notes.append(f"the step raised: {error}")
    if not seen:
        notes.append(
            "no gradients were seen: the step is not made by train_step, or runs inside of a "
            "transform"
        )
    elif len(seen) > 1:
        notes.append(f"the step evaluates {len(seen)} losses; shown is the last")
    result = seen[-1] if seen else None
    found = _first_nonfinite(state, batch, outputs, result, after)
    if state.params is not None and result is not None:
        fits = len(result.grads) == len(tree_leaves(state.params))
        if not fits:
            notes.append("the loss has other parameters than the state; gradients are left out")
            result = result._replace(grads=())
    return Explanation(
        int(state.step.reshape(-1)[0]),
        None if result is None else float(result.loss),
        _leaves(state, result, after),
        tuple(output.norms(name) for name, output in outputs.items()),
        found,
        tuple(notes),
    )


def _leaves(
    state: TrainState, result: Gradients | None, after: TrainState | None
) -> tuple[LeafNorms, ...]:
    before = tree_leaves(state.params)
    grads: Sequence[Tensor | None] = [None] * len(before)
    if result is not None and result.grads:
        grads = result.grads
    new = [None] * len(before) if after is None else tree_leaves(after.params)
    return tuple(
        LeafNorms(
            path_string(path),
            tuple(leaf.shape),
            _norm(leaf),
            None if grad is None else _norm(grad),
            None if end is None else _norm(end.detach() - leaf.detach()),
        )
        for path, leaf, grad, end in zip(tree_paths(state.params), before, grads, new, strict=True)
    )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def _together(norms: Sequence[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known else None


# ── What is not finite ────────────────────────────────────────────────────────────────────────────


def _first_nonfinite(
    state: TrainState,
    batch: Any,
    outputs: dict[str, _Output],
    result: Gradients | None,
    after: TrainState | None,
) -> str | None:
    for name, tree in (
        ("params", state.params),
        ("buffers", state.buffers),
        ("opt_state", state.opt_state),
        ("batch", batch),
    ):
        if (found := _bad_leaf(name, tree)) is not None:
            return found
    bad = [name for name, output in outputs.items() if not output.finite]
    if bad:  # a container ends after what it contains, so the first to end is the innermost
        return f"activations/{bad[0]}"
    if result is not None:
        if not bool(result.loss.isfinite().all()):
            return "loss"
        for path, grad in zip(tree_paths(state.params), result.grads, strict=False):
            if grad is not None and not bool(grad.isfinite().all()):
                return f"gradients/{path_string(path)}"
    if after is not None:
        for name in ("params", "opt_state", "buffers"):
            if (found := _bad_leaf(f"after/{name}", getattr(after, name))) is not None:
                return found
    return None


def _bad_leaf(name: str, tree: Any) -> str | None:
    for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
            return path_string((name, *path))
    return None


# ── Activations ───────────────────────────────────────────────────────────────────────────────────


class _Output:
    """What is known of the outputs of one module, over its calls."""

    def __init__(self) -> None:
        self.finite = True
        self._rms = math.nan
        self._alive: Tensor | None = None
        self._units = 0

    def add(self, output: Tensor, cut_off: bool) -> None:
        output = output.detach()
        self.finite = self.finite and bool(output.isfinite().all())
        self._rms = float(output.double().square().mean().sqrt()) if output.numel() else math.nan
        units = output.movedim(1 if output.dim() > 1 else 0, 0) if output.dim() else output[None]
        self._units = units.shape[0]
        if cut_off:
            alive = (units != 0).reshape(self._units, -1).any(dim=1)
            same = self._alive is not None and self._alive.shape == alive.shape
            self._alive = alive | self._alive if same and self._alive is not None else alive

    def norms(self, name: str) -> ActivationNorms:
        dead = None if self._alive is None else int((~self._alive).sum())
        return ActivationNorms(name, self._rms, self._units, dead)


@contextmanager
def _hooks(outputs: dict[str, _Output]) -> Iterator[None]:
    """Look at what all modules put out that this thread calls."""
    thread = threading.get_ident()
    names: dict[int, str] = {}
    depth = [0]

    def enter(module: nn.Module, arguments: Any) -> None:
        if threading.get_ident() == thread:
            if not depth[0]:
                names.update((id(part), name) for name, part in module.named_modules())
            depth[0] += 1

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        depth[0] = max(depth[0] - 1, 0)
        if under_transform() or next(module.children(), None) is not None:
            return
        if isinstance(output, Tensor) and output.is_floating_point():
            name = f"{names.get(id(module)) or '.'} ({type(module).__name__})"
            outputs.setdefault(name, _Output()).add(output, isinstance(module, _CUT_OFF))

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    )
