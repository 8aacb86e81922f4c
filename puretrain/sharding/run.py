"""A run of several processes as a function of the run of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from puretrain import errors
from puretrain.data import Batches
from puretrain.errors import ConfigurationError, PuretrainError
from puretrain.loop import Observer, Validation, as_batches
from puretrain.run import Run, Together
from puretrain.sharding.data_parallel import ddp, divide, elastic, eval_across
from puretrain.sharding.processes import agreement, everyone, on_rank_zero
from puretrain.sharding.uneven import Uneven
from puretrain.step import Step
from puretrain.tree import path_string, tree_digest, tree_leaves, tree_paths

__all__ = ["distribute"]

T = TypeVar("T")


def distribute(run: Run, mesh: DeviceMesh, *, logical_shards: int | None = None) -> Run:
    """The same run, on all processes of a mesh; each of them calls this with the same run.

    The step is made again from its recipe with ``across=ddp(mesh)``, or with ``elastic(mesh,
    logical_shards)``; the batches and those of the validation are divided, and the metrics of the
    validation are those of whole batches. Observers are kept in the first process only. All
    processes resume from the checkpoint that the first one finds, and end after the same step when
    a signal comes to one of them. On one process everything works the same.

    What you have divided yourself stays as it is: a step that was made with ``across=``, and
    batches from :func:`divide` or :func:`uneven`.

    Args:
        run: the run, made anew in each process, equal in all.
        mesh: the processes, see :func:`processes`.
        logical_shards: how many parts each batch is divided into, for the same bits on any number
            of processes that divides it; see :func:`elastic`. None: one part for each process.

    Raises:
        ConfigurationError: the step can't be made again, the source can't be divided, or the runs
            of two processes differ, for instance since their models were made with different
            seeds; says in which leaf of the state.

    Example:
        >>> import torch, puretrain as pt
        >>> optimizer = pt.optim.sgd(lr=0.5)
        >>> run = pt.Run(
        ...     state=pt.TrainState.create({"w": torch.zeros(4)}, None, optimizer,
        ...                                key=pt.random.key(0)),
        ...     step=pt.train_step(lambda p, b, x, key: ((x - p["w"]) ** 2).sum(), optimizer),
        ...     batches=pt.batches(torch.ones(8, 4), batch_size=1),
        ...     epochs=1)
        >>> with pt.sharding.processes() as mesh:
        ...     distribute(run, mesh).fit().params["w"]
        tensor([1., 1., 1., 1.])
    """
    if run.together is not None:
        if logical_shards is not None:
            raise ConfigurationError(
                "logical_shards is given, but the run is distributed already: give it there"
            )
        return run
    _check_equal(run, mesh)
    return run.replace(
        step=_step(run.step, mesh, logical_shards),
        batches=_divided(run.batches, mesh, logical_shards),
        validation=run.validation and _validation(run.validation, mesh, logical_shards),
        observers=[_noting(one, logical_shards) for one in on_rank_zero(mesh, run.observers)],
        together=Together(agreement(mesh), _decision(mesh)),
    )


def _noting(observer: Observer, logical_shards: int | None) -> Observer:
    """A journal notes how batches are divided, so that the run can be replayed."""
    divided = getattr(observer, "divided", None)
    return observer if divided is None else cast(Observer, divided(logical_shards))


def _step(step: Step, mesh: DeviceMesh, logical_shards: int | None) -> Step:
    recipe = getattr(step, "recipe", None)
    if recipe is not None and recipe.across is not None:
        if logical_shards is not None:
            raise ConfigurationError(
                "logical_shards is given, but the step was made with across= already: make it with "
                "across=puretrain.sharding.elastic(mesh, logical_shards)"
            )
        return step
    name = getattr(step, "__qualname__", type(step).__name__)
    advice = (
        "make it with train_step(…, across=puretrain.sharding.ddp(mesh)) or elastic(mesh, …) "
        "yourself, where the mesh is at hand; `puretrain fit` gives it to a function with a "
        "parameter `mesh`"
    )
    if recipe is None:
        raise ConfigurationError(
            f"the step {name} was not made by puretrain.train_step, so it is not known how to "
            f"divide its batches: {advice}"
        )
    if hasattr(step, "__wrapped__"):
        raise ConfigurationError(
            f"the step {name} is wrapped, and would lose its wrapper when it is made again for "
            f"several processes: {advice}, and wrap that"
        )
    across = ddp(mesh) if logical_shards is None else elastic(mesh, logical_shards)
    made: Step = recipe.replace(across=across).step()
    return made


def _divided(source: Any, mesh: DeviceMesh, logical_shards: int | None) -> Any:
    source = as_batches(source)
    if _is_divided(source):
        return source
    return divide(source, mesh, logical_shards=logical_shards)


def _is_divided(source: Any) -> bool:
    if isinstance(source, Batches):
        return source.plan.share is not None
    return isinstance(source, Uneven)


def _validation(validation: Validation, mesh: DeviceMesh, logical_shards: int | None) -> Validation:
    source = as_batches(validation.batches)
    if _is_divided(source):
        return validation
    return validation._replace(
        step=eval_across(validation.step, mesh), batches=_divided(source, mesh, logical_shards)
    )


# ── What all processes must have ──────────────────────────────────────────────────────────────────


def _check_equal(run: Run, mesh: DeviceMesh) -> None:
    """Compare the runs of all processes: a difference would show as a hang, or never."""
    facts = {
        "epochs": run.epochs,
        "steps": run.steps,
        "batches": repr(as_batches(run.batches)),
        "validation": run.validation and _facts(run.validation),
        "reducers": [getattr(reducer, "name", "") for reducer in run.reducers],
    }
    for name, values in _by_name(_told(mesh, facts)).items():
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ConfigurationError(
                    f"the processes have different runs: {name} is {values[0]} in the process of "
                    f"rank 0, and {value} in {rank}'s; make the same run in all of them"
                )
    digests = _told(mesh, tree_digest(run.state))
    if digests.count(digests[0]) == len(digests):
        return
    leaves = {
        path_string(path): tree_digest(leaf)
        for path, leaf in zip(tree_paths(run.state), tree_leaves(run.state), strict=True)
    }
    for rank, theirs in enumerate(every := _told(mesh, leaves)):
        for path in [*every[0], *theirs]:
            if every[0].get(path) != theirs.get(path):
                raise ConfigurationError(
                    f"the processes begin with different states: {path} in the process of rank "
                    f"{rank} is not that in rank 0's. Make the same state in all of them, for "
                    "instance by making the model inside of "
                    "`with puretrain.random.scope(puretrain.random.key(0)):`"
                )


def _facts(validation: Validation) -> dict[str, Any]:
    facts: dict[str, Any] = validation._asdict()
    del facts["step"]
    return facts | {"batches": repr(as_batches(validation.batches))}


def _by_name(told: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [facts[name] for facts in told] for name in told[0]}


def _told(mesh: DeviceMesh, value: T) -> list[T]:
    """The plain values of all processes, by rank."""
    group = everyone(mesh)
    values: list[Any] = [value] * dist.get_world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group)
    return values


def _decision(mesh: DeviceMesh) -> Callable[[Callable[[], Any]], Any]:
    group = everyone(mesh)
    first = dist.get_rank(group) == 0

    def decide(function: Callable[[], Any]) -> Any:
        decided: list[Any] = [None]
        error: Exception | None = None
        if first:
            try:
                decided = [("value", function())]
            except Exception as raised:  # noqa: BLE001 - raised below, when the others know of it
                error = raised
                decided = [(type(raised).__name__, str(raised))]
        dist.broadcast_object_list(decided, src=0, group=group)
        if error is not None:
            raise error
        kind, value = decided[0]
        if kind == "value":
            return value
        ours = getattr(errors, kind, PuretrainError)
        raise ours(value if ours is not PuretrainError else f"in rank 0: {kind}: {value}")

    return decide
