"""The compiled step: forward, backward, optimizer and metrics in one graph of ``torch.compile``."""

from __future__ import annotations

import functools
import re
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from puretrain import random
from puretrain.errors import ConfigurationError, TransformError
from puretrain.gradients import is_watched
from puretrain.state import TrainState, accept, claim, give_up, unreserve
from puretrain.step import Step
from puretrain.tree import (
    FrozenDict,
    Record,
    frozen_dict,
    tree_leaves,
    tree_map,
    under_transform,
)

__all__ = ["CompilationReport", "CompiledStep", "Graph", "compiled"]

S = TypeVar("S", bound=TrainState)

_OVERWRITTEN = ("params", "opt_state", "accumulator")
_OPEN = ("metrics", "epoch_metrics", "reducers")  # whose structure may change


class Graph(NamedTuple):
    """One graph that a compiled step was made into."""

    operations: int
    """How many operations the step has, before the compiler puts them together."""
    inputs: int
    """How many tensors it is given."""
    seconds: float
    """How long it took to trace and to compile."""
    reason: str | None
    """Why those before did not fit the call; None for the first."""


class CompilationReport(NamedTuple):
    """What ``step.report()`` of a compiled step returns; ``print`` shows it as a table."""

    calls: int
    """How often the step was called."""
    graphs: tuple[Graph, ...]
    """The graphs, in the order in which they were made."""
    breaks: int
    """Graph breaks: always 0, since a step that does not fit into one graph raises instead."""
    eager: int
    """Calls that :func:`puretrain.explain` had taken step by step, to look into them."""

    @property
    def recompiles(self) -> tuple[Graph, ...]:
        """The graphs but the first."""
        return self.graphs[1:]

    def __str__(self) -> str:
        counts = f"{self.calls} calls, {len(self.graphs)} graphs, {self.breaks} breaks"
        lines = [f"{counts}, {len(self.recompiles)} recompiles"]
        for number, graph in enumerate(self.graphs):
            lines.append(
                f"graph {number}: {graph.operations} operations, {graph.inputs} inputs, "
                f"{graph.seconds:.1f} s"
            )
            if graph.reason is not None:
                lines.append(f"  because {graph.reason}")
        return "\n".join(lines)


class CompiledStep(Protocol):
    """A step that was compiled; see :func:`compiled`."""

    def __call__(self, state: S, batch: Any, /, *, donate: bool = False) -> S:
        """Take one step."""
        ...

    def report(self) -> CompilationReport:
        """What was compiled so far, and why."""
        ...


def compiled(
    step: Step,
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = False,
) -> CompiledStep:
    """Compile a whole step with ``torch.compile``, at its first call.

    What comes back is a step like any other, for :func:`puretrain.fit` too. The whole step is one
    graph, or a TransformError says what does not fit into one: nothing runs uncompiled in silence.
    The numbers agree with those of the eager step up to rounding.

    The graph has no random seed in it: torch's generators are seeded around it from the key of the
    step, and put back. So a compiled step may draw (dropout), and what it draws is a function of
    the state, as ever. Inside of the graph a scope of its own (``apply(…, key=key)``) can't be
    seeded; what it draws comes from the generators as they are.

    The graph writes the new parameters and the new optimizer state into the memory of the old
    ones. With ``donate=True`` that is the memory of the state that was given, as for every step;
    without, or under a lease, a copy is made first. So there is one graph for both.

    A learning rate that is a number is a constant of the graph. One that changes belongs into a
    schedule or into a tensor (:func:`puretrain.optim.inject_hyperparams`), which the graph takes
    as it comes; a number that changes from call to call in a batch makes a graph each time.

    Args:
        step: made by :func:`puretrain.train_step`, or composed of such, or transformed by
            ``torch.func.vmap``. Not one of a foreign optimizer (``from_torch``), nor with
            ``nonfinite='raise'``.
        backend: what compiles the graph, as for ``torch.compile``.
        mode: as for ``torch.compile``, of the backend ``'inductor'``: ``'reduce-overhead'``
            replays the step as a CUDA graph, ``'max-autotune'`` looks for the fastest kernels.
        options: as for ``torch.compile``, of the backend ``'inductor'``.
        dynamic: False makes a graph for each shape of a batch; None makes one for changing shapes
            when a second shape comes; True at once.

    Returns:
        The step. ``step.report()`` tells of its graphs, and of what made it compile again.

    Raises:
        ConfigurationError: ``mode`` or ``options`` are given for another backend than inductor.
        DonatedStateError: (the step) the state was donated before.
        TransformError: (the step) it can't be compiled into one graph, it has been compiled so
            often that torch gives up, or it was called inside of another transform.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return ((params["w"] - batch) ** 2).sum()
        >>> optimizer = pt.optim.sgd(0.25)
        >>> params = {"w": torch.zeros(2)}
        >>> state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
        >>> step = pt.compiled(pt.train_step(loss, optimizer), backend="aot_eager")
        >>> step(step(state, torch.ones(2)), torch.ones(2)).params["w"]
        tensor([0.7500, 0.7500])
        >>> report = step.report()
        >>> report.calls, len(report.graphs), report.breaks
        (2, 1, 0)
    """
    if backend != "inductor" and (mode is not None or options is not None):
        raise ConfigurationError(
            f"mode and options are of the backend 'inductor', not of {backend!r}: leave them out"
        )
    graphs: list[Graph] = []
    made: list[torch.fx.GraphModule] = []  # by the call that is running
    counts = {"calls": 0, "eager": 0}
    build = _backend(backend, mode, options)

    def remember(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(graph)
        return build(graph, inputs)

    graph: Any = torch.compile(
        _fresh(_advance),
        fullgraph=True,
        dynamic=dynamic,
        backend=remember,
        options={"guard_filter_fn": _can_change},
    )

    @functools.wraps(step)
    def run(state: S, batch: Any, /, *, donate: bool = False) -> S:
        if under_transform():
            raise TransformError(
                "a compiled step can't be transformed: transform the step first, and compile what "
                "comes out, as in compiled(torch.func.vmap(step, …))"
            )
        counts["calls"] += 1
        if is_watched():
            counts["eager"] += 1
            return step(state, batch, donate=donate)
        donation = accept(state, state) if donate else None
        if donation is None:
            copies = {name: tree_map(torch.clone, getattr(state, name)) for name in _OVERWRITTEN}
            new = computed(state.replace(**copies), batch)
            claim(new, state)
            return new
        try:
            new = computed(donation.state, batch)
        except TransformError:  # nothing has been computed yet
            unreserve(donation.reserved)
            raise
        except BaseException:
            give_up(donation, None)
            raise
        give_up(donation, new)
        return new

    def computed(state: S, batch: Any) -> S:
        bare = Record.replace(state)  # without what is noted beside its fields
        begin = time.perf_counter()
        try:
            with _drawing(state), torch.no_grad():
                new = graph(step, bare, batch)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise TransformError(
                f"the step was compiled {len(graphs)} times, and this call needs another graph; "
                f"that is torch's recompile_limit. The last reason: {graphs[-1].reason}. See "
                "report() for all of them, or compile with dynamic=True"
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise TransformError(_why(error)) from error
        finally:
            if made:
                note(time.perf_counter() - begin)
        # Containers of its own, so that those that were given up can be emptied.
        return cast(
            S, new.replace(**{n: _with_own_containers(getattr(new, n)) for n in _OVERWRITTEN})
        )

    def note(seconds: float) -> None:
        metrics = torch._dynamo.utils.get_compilation_metrics()
        reason = getattr(metrics[-1], "recompile_reason", None) if metrics and graphs else None
        for module in made:
            kinds = [node.op for node in module.graph.nodes]
            operations = sum(kind.startswith("call_") for kind in kinds)
            if not operations:  # of a function that the tracer ran by the way
                continue
            graphs.append(Graph(operations, kinds.count("placeholder"), seconds, reason))
        made.clear()

    def report() -> CompilationReport:
        return CompilationReport(counts["calls"], tuple(graphs), 0, counts["eager"])

    vars(run).pop("recipe", None)  # it would make the step without this
    run.report = report  # type: ignore[attr-defined]
    return cast(CompiledStep, run)


def _advance(step: Any, state: Any, batch: Any) -> Any:  # pragma: no cover - is traced, not run
    """What is compiled: a step, and then the copying of what is new over what is old.

    The compiler lets the operations write there at once, where they can.
    """
    new = random.seeded(step, state, batch)
    changes: dict[str, Any] = {}
    for name in [name for name in state._names if name not in _OVERWRITTEN]:
        old, fresh = getattr(state, name), getattr(new, name)
        if isinstance(fresh, tuple) or fresh is not old:  # torch can't compare tuples so
            # A metric may be a parameter, which is about to change; a buffer that stayed may not.
            before = tree_leaves(old) if name not in _OPEN else []
            changes[name] = tree_map(functools.partial(_apart, before), fresh)
    for name in _OVERWRITTEN:
        old, fresh = getattr(state, name), getattr(new, name)
        if old is not None:
            for target, value in zip(tree_leaves(old), tree_leaves(fresh), strict=True):
                if value is not target:
                    target.copy_(value)
            changes[name] = old
    return new.replace(**changes)


def _apart(before: list[Any], leaf: Any) -> Any:  # pragma: no cover - is traced, not run
    return leaf if any(leaf is other for other in before) else leaf.clone()


def _with_own_containers(tree: Any) -> Any:
    if type(tree) is Tensor:
        return tree
    if isinstance(tree, FrozenDict):
        values = tree.values()
        nested = {*map(type, values)} != {Tensor}
        return frozen_dict(tree.keys(), map(_with_own_containers, values) if nested else values)
    if isinstance(tree, Record):
        children = {name: getattr(tree, name) for name in tree._children}
        own = {name: _with_own_containers(x) for name, x in children.items() if x is not None}
        return tree.replace(**own)
    return tree_map(lambda leaf: leaf, tree)


def _fresh(function: Any) -> Callable[..., Any]:
    """The same function with code of its own, for torch counts recompilations by the code."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


# Before each call torch looks whether what it met while compiling is as it was, which takes longer
# than a small model's step. Most of that are functions, constants and registered types of these
# modules, and the classes of objects that were looked at already.
_CONSTANT = re.compile(
    r"([\w.]+\()*(type\(|__import__\('torch'\)\.utils\._pytree\b|G\['__import_"
    r"(puretrain|optree|torch_dot__functorch|torch_dot_utils_dot__pytree|torch_dot_nn_dot_utils"
    r"|torch_dot__dynamo_dot_polyfills)(_dot_\w+)?'\])"
)


def _can_change(guards: Sequence[Any]) -> list[bool]:
    """Which of the guards to keep."""
    return [not _CONSTANT.match(getattr(guard, "name", "")) for guard in guards]


def _drawing(state: TrainState) -> random.scope:
    """The scope in which a step draws."""
    if state.key.dim() == 1:
        return random.step_scope(state.key, int(state.step))
    return random.scope(random.fold_in(state.key, state.step))  # of several members


def _backend(backend: Any, mode: str | None, options: Mapping[str, Any] | None) -> Any:
    if backend != "inductor":
        return torch._dynamo.lookup_backend(backend)

    def compile_graph(graph: Any, inputs: Any) -> Any:
        import torch._inductor.compile_fx
        from torch._inductor import list_mode_options

        # It would look at the shape of each input once more, which torch has done before the call.
        patches: dict[str, Any] = {"size_asserts": False}
        patches |= {**(list_mode_options(mode) if mode else {}), **(options or {})}
        return torch._inductor.compile_fx.compile_fx(graph, inputs, config_patches=patches)

    return compile_graph


def _why(error: Exception) -> str:
    text = str(error).strip()
    kept = text.split("\n\n from user code")[0].split("Set TORCHDYNAMO_VERBOSE")[0].strip()
    return f"the step can't be compiled into one graph: {kept}"
