"""Living a run again: to compare it bit for bit, or to go to the state of any of its steps."""

from __future__ import annotations

import functools
import os
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch.distributed as dist

from puretrain.checkpoint import load, save
from puretrain.data import Parts
from puretrain.errors import (
    CheckpointError,
    ConfigurationError,
    JournalError,
    PatternError,
)
from puretrain.loop import Event, fit, prepare
from puretrain.metrics import compute_all
from puretrain.observers.scalars import step_metrics
from puretrain.replay.digests import Digests, batch_digest, leaf_digests
from puretrain.replay.environment import (
    FactDifference,
    code_facts,
    compare_facts,
    environment_facts,
    settings,
)
from puretrain.replay.journal import Journal, Segment, StepRecord, read_journal
from puretrain.replay.program import Program, make_run
from puretrain.run import Run
from puretrain.state import TrainState
from puretrain.tree import LeafDifference, tree_diff

__all__ = [
    "ChangedLeaf",
    "Difference",
    "Recorded",
    "Replayed",
    "StoredCheckpoint",
    "StoredDifference",
    "open_run",
]

# In the order in which a step makes them of what it is given.
_FLOW = (
    "key",
    "cursor",
    "buffers",
    "accumulator",
    "loss_scale",
    "opt_state",
    "params",
    "step",
    "updates",
    "skipped",
)
_CONSEQUENCES = ("validated", "stop", "reducers", "metrics", "epoch_metrics")


class StoredCheckpoint(NamedTuple):
    """A checkpoint of a run."""

    step: int
    path: Path


class ChangedLeaf(NamedTuple):
    """A leaf of the state whose digest is another one."""

    path: str
    recorded: str
    """What it was (``float32[3,4]``), or ``nothing``."""
    now: str
    """What it is."""


class StoredDifference(NamedTuple):
    """How a replayed state differs from the one that a checkpoint holds."""

    checkpoint: StoredCheckpoint
    leaves: tuple[LeafDifference, ...]
    """First those that a step makes first."""


class Difference(NamedTuple):
    """Where a replay left the journal."""

    step: int
    """The first journalled step that differs."""
    since: int
    """The last step before it at which the whole state was the same; the step that the replay began
    with, if none was compared."""
    batch: bool
    """Whether the batch of the step is another one."""
    metrics: tuple[tuple[str, float, float], ...]
    """The metrics that differ: name, recorded, now."""
    leaves: tuple[ChangedLeaf, ...]
    """The leaves of the state that differ, those first that a step makes first; empty if the
    journal has no digests of the state at this step."""
    stored: StoredDifference | None
    """The size of the difference, at the next checkpoint that there is."""


class Replayed(NamedTuple):
    """What a replay found."""

    begin: int
    """The step of the state that it began with."""
    end: int
    """The last step that it took."""
    checkpoint: StoredCheckpoint | None
    """Where that state came from; None: from the start of the run."""
    compared: int
    """How many steps it compared with the journal and found the same."""
    states: int
    """At how many of them the whole state was compared."""
    difference: Difference | None
    """Where it left the journal; None: nowhere."""
    facts: tuple[FactDifference, ...]
    """Facts that are others now than when the run was made."""


class Recorded(NamedTuple):
    """A run on the disk: its journal, its checkpoints, and what makes it again."""

    directory: Path
    journal: Journal
    make: Callable[..., Run]
    """Makes the run, with arguments in the place of the recorded ones."""
    own_program: bool = True
    """Whether ``make`` is what the journal says."""

    @property
    def last(self) -> int:
        """The last step in the journal; that of its start if it has none."""
        return max(self.journal.steps(), default=self.journal.segments[0].start)

    def metrics(self, kind: Literal["step", "validation", "epoch_end"] = "step") -> dict[str, Any]:
        """The metrics in the journal, as columns.

        Args:
            kind: those of steps, of validations, or of ends of epochs.

        Returns:
            Numpy arrays of one length, by name; ``step``, ``epoch`` (int64), ``time`` (float64,
            seconds since 1970), and a float64 each for the metrics, NaN where there is none.
        """
        records: list[Any]
        if kind == "step":
            records = [record for _, record in sorted(self.journal.steps().items())]
        else:
            records = [event for event in self.journal.events() if event.kind == kind]
        names = dict.fromkeys(name for record in records for name in record.metrics)
        columns: dict[str, Any] = {
            "step": np.array([record.step for record in records], np.int64),
            "epoch": np.array([record.epoch for record in records], np.int64),
            "time": np.array([record.time for record in records], np.float64),
        }
        for name in names:
            values = [record.metrics.get(name, np.nan) for record in records]
            columns[name] = np.array(values, np.float64)
        return columns

    def environment(self, segment: int = -1) -> Mapping[str, Any]:
        """The facts of the process that a segment of the run ran in; by default of the last."""
        return self.journal.segments[segment].facts

    def division(self, step: int) -> Mapping[str, Any]:
        """How the batches were divided at a step.

        Returns:
            ``processes``, and ``logical_shards`` if :func:`puretrain.sharding.distribute` was given
            that; empty if there was one process that had joined no others.
        """
        found: Mapping[str, Any] = self.journal.segment_of(step).facts.get("division", {})
        return found

    def checkpoints(self) -> list[StoredCheckpoint]:
        """The whole checkpoints in the directory of the run, the earliest first."""
        found = []
        for path in [*self.directory.glob("*.ckpt"), *self.directory.glob("*.ckpt.start")]:
            try:
                found.append(StoredCheckpoint(int(load(path, only="step")["step"]), path))
            except (CheckpointError, PatternError):
                continue  # damaged, or something else than a state: there is nothing to begin from
        return sorted(found)

    def state_at(self, step: int) -> TrainState:
        """The state after a step, to the bit: from the nearest checkpoint before it.

        Where a checkpoint of that very step exists, it is that one, even if it was saved a little
        later, after a validation or at the end of an epoch.

        Raises:
            ConfigurationError: the run has no such step, or can't be made again.
            JournalError: there is nothing to begin from.
        """
        self._check_step("step", step)
        run = self.make()
        state, _ = self._begin(run, step)
        if int(state.step) == step:
            return cast(TrainState, state)

        def watch(state: Any, event: Event) -> None:
            if event.kind == "step" and event.step == step:
                raise Enough(state)

        with settings(self.journal.segment_of(step).facts.get("settings", {})):
            ended = self.fold(run, state, step, watch)
        if int(ended.step) != step:
            raise JournalError(
                f"{self.journal.path}: the run was at step {step} once, but ends at step "
                f"{int(ended.step)} when it is replayed; `puretrain replay` says where they part"
            )
        return cast(TrainState, ended)

    def fork(self, at: int, directory: str | os.PathLike[str]) -> Run:
        """A run like this one that begins with its state after a step, in another directory.

        The state is saved there too, as ``step_….ckpt.start``, so that the fork can be replayed.

        Args:
            at: the step.
            directory: for the new run. The function that makes the run must have a parameter of
                that name, so that logs and checkpoints do not go to the old one.

        Raises:
            ConfigurationError: there is no such step or parameter, or the directory is in use.
        """
        place = Path(directory)
        if place.exists() and any(place.iterdir()):
            raise ConfigurationError(f"{place} is not empty; give the fork a directory of its own")
        state = self.state_at(at)
        run = self.make(directory=os.fspath(directory))
        save(place / f"step_{at:08}.ckpt.start", state)
        return run.replace(state=state, directory=directory)

    def replay(
        self, begin: int = 0, end: int | None = None, *, recorded_settings: bool = True
    ) -> Replayed:
        """Take steps of the run again, without observers, and compare them with the journal.

        Args:
            begin: the step to begin after; from the nearest checkpoint at or before it.
            end: the last step; by default the last in the journal.
            recorded_settings: use the number of threads and the deterministic flags of the run, and
                not those of this process.

        Raises:
            ConfigurationError: the run has no such steps, or can't be made again.
            JournalError: there is nothing to begin from.
        """
        end = self.last if end is None else end
        self._check_step("begin", begin)
        self._check_step("end", end)
        if begin > end:
            raise ConfigurationError(f"a replay goes forward, not from step {begin} to {end}")
        segment = self.journal.segment_of(end)
        use = settings(segment.facts.get("settings", {})) if recorded_settings else nullcontext()
        with use:
            run = self.make()
            state, checkpoint = self._begin(run, begin)
            comparison = _Comparison(self, state, end)
            if not comparison.over:
                last = self.fold(run, state, end, comparison)
                comparison.ended(last)
            facts = self._facts(segment, run.state)
        return Replayed(
            int(state.step),
            comparison.step,
            checkpoint,
            comparison.compared,
            comparison.states,
            comparison.difference(),
            tuple(facts),
        )

    def fold(self, run: Run, state: Any, end: int, watch: Callable[[Any, Event], None]) -> Any:
        """Take steps as the run did, until the watch has enough or the run is over."""
        self._check_division(run, int(state.step), end)
        limits = [s.facts.get("start", {}).get("limit") for s in self.journal.segments]
        limit = limits[self.journal.segments.index(self.journal.segment_of(end))]
        try:
            return fit(
                state,
                run.step,
                run.batches,
                steps=limit,
                epochs=sys.maxsize if limit is None else None,
                reducers=run.reducers,
                observers=[_of_all(run, watch)],
                validation=run.validation,
                handle_signals=False,
            )
        except Enough as enough:
            return enough.state

    def _begin(self, run: Run, step: int) -> tuple[Any, StoredCheckpoint | None]:
        """The latest state at or before a step that is at hand, and the checkpoint it is from."""
        fresh = prepare(run.state, run.reducers)
        before = [found for found in self.checkpoints() if found.step <= step]
        if before and before[-1].step > int(fresh.step):
            return load(before[-1].path, like=fresh), before[-1]
        start = self.journal.segments[0].start
        if int(fresh.step) > step or int(fresh.step) < start:
            raise JournalError(
                f"{self.directory} has no checkpoint at or before step {step}, and the run began "
                f"at step {start} from a state that is not here: give a later step to begin with"
            )
        return fresh, None

    def _check_division(self, run: Run, begin: int, end: int) -> None:
        """Steps that would come out differently are not taken."""
        processes, shards = kind = _kind(self.division(end))
        for step in range(begin + 1, end + 1):
            if _kind(self.division(step)) != kind:
                raise ConfigurationError(
                    f"the batches of {self.directory} were divided in another way up to step "
                    f"{step} than at step {end}: take the stretches one by one, with a checkpoint "
                    "before each"
                )
        here = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        advice = (
            "`puretrain replay` starts them; in Python, start a program with torchrun and give "
            "open_run a function that returns pt.sharding.distribute(run, mesh)"
        )
        if shards is None and processes != here:
            raise ConfigurationError(
                f"{self.directory} is a run of {processes} processes without logical shards, and "
                f"gives the same bits on as many only; here there are {here}: {advice}"
            )
        recipe = getattr(run.step, "recipe", None)
        if run.together is None and (recipe is None or recipe.across is None):
            if shards is not None:
                raise ConfigurationError(
                    f"the batches of {self.directory} were divided into {shards} logical shards: "
                    "give open_run a function that returns "
                    f"pt.sharding.distribute(run, mesh, logical_shards={shards}); `puretrain "
                    "replay` does it by itself"
                )
            if processes > 1:
                raise ConfigurationError(f"{self.directory} was divided: {advice}")

    def _check_step(self, name: str, step: int) -> None:
        first, last = self.journal.segments[0].start, self.last
        if not isinstance(step, int) or not 0 <= step <= last:
            raise ConfigurationError(
                f"{name} is {step!r}, but the journal of {self.directory} has the steps from "
                f"{first} to {last}"
            )

    def _facts(self, segment: Segment, state: Any) -> list[FactDifference]:
        program = segment.program
        code = code_facts(program.file) if program is not None and self.own_program else {}
        recorded = dict(segment.facts)
        if not code:
            recorded.pop("code", None)
        recorded.pop("division", None)  # it is made again, or there was no replay
        return compare_facts(recorded, {**environment_facts(state), "code": code, "division": {}})


def open_run(
    directory: str | os.PathLike[str],
    /,
    program: Run | Callable[..., Run] | None = None,
    **arguments: Any,
) -> Recorded:
    """Open a run that keeps a journal, to read it and to go back in time.

    Args:
        directory: of the run.
        program: the run, or the function that makes it. By default the Python file and function
            that the journal names.
        **arguments: for that function, in the place of those that the journal has.

    Raises:
        JournalError: there is no journal, or nothing in it.

    Example:
        >>> import tempfile, torch
        >>> import puretrain as pt
        >>> def make(directory):
        ...     optimizer = pt.optim.sgd(lr=1.0)
        ...     return pt.Run(
        ...         state=pt.TrainState.create(
        ...             {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0)),
        ...         step=pt.train_step(lambda p, b, x, key: p["w"] * x, optimizer),
        ...         batches=[torch.tensor(-1.0)] * 5, epochs=2, directory=directory,
        ...         observers=[pt.journal(directory, every=2), pt.checkpoints(directory, every=4)])
        >>> directory = tempfile.mkdtemp()
        >>> _ = make(directory).fit()
        >>> run = open_run(directory, make, directory=directory)
        >>> run.state_at(7).params["w"], run.metrics()["loss"][:3]
        (tensor(7.), array([-0., -1., -2.]))
        >>> run.replay().compared
        10
    """
    found = read_journal(directory)
    place = found.path.parent
    if not found.segments:
        raise JournalError(f"{found.path} has no record yet; it gets its first when the run begins")
    if isinstance(program, Run):
        make: Callable[..., Run] = functools.partial(_given_run, program)
    elif program is not None:
        make = functools.partial(program, **arguments)
    else:
        known = [segment.program for segment in found.segments if segment.program is not None]
        recorded = known[-1] if known else None
        make = functools.partial(_recorded_run, found.path, recorded, arguments)
    return Recorded(place, found, _remembered(make), program is None)


def _given_run(run: Run, **arguments: Any) -> Run:
    if arguments:
        raise ConfigurationError(
            f"a Run that is made already can't take {', '.join(arguments)}: give open_run the "
            "function that makes it"
        )
    return run


def _recorded_run(
    journal: Path, program: Program | None, given: Mapping[str, Any], **more: Any
) -> Run:
    if program is None:
        raise ConfigurationError(
            f"{journal} does not say what made the run: give its Python file with --file "
            "FILE[:NAME], or to open_run the function that makes it"
        )
    arguments = {**given, **more}
    missing = [name for name in program.left_out if name not in arguments]
    if missing:
        raise ConfigurationError(
            f"{journal}: {program.name}() of {program.file} was called with values for "
            f"{', '.join(missing)} that are not plain, and so not recorded: give --file FILE:NAME "
            "of a function that needs none, or to open_run the function that makes the run"
        )
    path = Path(program.file)
    if not path.is_file():
        raise ConfigurationError(
            f"{path}, which made the run, is not there any more: say where it is with --file "
            "FILE[:NAME]"
        )
    kept = {name: value for name, value in program.arguments.items() if name not in arguments}
    return make_run(path, program.name, arguments, kept)


def _remembered(make: Callable[..., Run]) -> Callable[..., Run]:
    """Make the run as it was only once: that may read data and build a model."""
    plain = functools.cache(make)

    def remembered(**arguments: Any) -> Run:
        return make(**arguments) if arguments else plain()

    return remembered


def _kind(division: Mapping[str, Any]) -> tuple[int, int | None]:
    """What decides bits: the number of processes, or that of logical shards."""
    shards = division.get("logical_shards")
    return (1, shards) if shards is not None else (division.get("processes", 1), None)


def _of_all(run: Run, watch: Callable[[Any, Event], None]) -> Callable[[Any, Event], None]:
    """A watch that looks in the first process, which had the journal, and ends all of them."""
    together = run.together
    if together is None:
        return watch

    def of_all(state: Any, event: Event) -> None:
        def enough() -> bool:
            try:
                watch(state, event)
            except Enough:
                return True
            return False

        if together.decide(enough):
            raise Enough(state)

    return of_all


class Enough(Exception):
    """Ends a replay from inside of an observer."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state


# ── Comparing ─────────────────────────────────────────────────────────────────────────────────────


class _Comparison:
    """An observer that compares what it sees with a journal."""

    def __init__(self, recorded: Recorded, state: Any, end: int) -> None:
        self._steps, self._end = recorded.journal.steps(), end
        self._recorded = recorded
        self.step = self._since = int(state.step)
        self.compared = self.states = 0
        self._found: Difference | None = None
        # the one with whose state the replayed one is compared
        self._target: StoredCheckpoint | None = None
        self._stored: Any = None
        self.over = self.step >= end
        self._compare_start(state)

    def __call__(self, state: Any, event: Event) -> None:
        if event.kind == "step":
            self.step = event.step
        if self._found is None:
            if event.kind == "step":
                self._compare(state, event)
            if self._found is None:
                if self.step >= self._end:
                    raise Enough(state)
                return
            self._choose_checkpoint(state)
        if self._target is None:
            raise Enough(state)
        self._compare_with_checkpoint(state, event)

    def ended(self, state: Any) -> None:
        """Note that the run is over, perhaps before it should be."""
        if self._found is None and int(state.step) < self._end:
            self._found = Difference(int(state.step) + 1, self._since, False, (), (), None)

    def difference(self) -> Difference | None:
        return self._found

    def _compare_start(self, state: Any) -> None:
        """The very first state has no step event, but the journal has its digests."""
        events = self._recorded.journal.segments[0].events
        if not events or events[0].state is None or events[0].step != self.step:
            return
        if self.step == 0:
            leaves = changed_leaves(events[0].state, leaf_digests(state))
            if leaves:
                self._found = Difference(0, 0, False, (), leaves, None)
                self.over = True

    def _compare(self, state: Any, event: Event) -> None:
        record = self._steps.get(event.step)
        if record is None:
            return
        division = self._recorded.division(event.step)
        batch, metrics = compare_step(record, state, event, division)
        leaves: tuple[ChangedLeaf, ...] = ()
        if record.state is not None:
            leaves = changed_leaves(record.state, leaf_digests(state))
        if batch or metrics or leaves:
            self._found = Difference(event.step, self._since, batch, metrics, leaves, None)
            return
        self.compared += 1
        if record.state is not None:
            self.states += 1
            self._since = event.step

    def _choose_checkpoint(self, state: Any) -> None:
        later = [found for found in self._recorded.checkpoints() if found.step >= self.step]
        if later:
            self._target = later[0]
            self._stored = load(later[0].path)

    def _compare_with_checkpoint(self, state: Any, event: Event) -> None:
        target, found = self._target, self._found
        if target is None or found is None or event.step < target.step:
            return
        # The same place in the loop: after the step, the validation, or the end of the epoch.
        same = event.step == target.step and all(
            int(mine) == int(theirs)
            for mine, theirs in (
                (state.validated, self._stored["validated"]),
                (state.cursor.epoch, self._stored["cursor"]["epoch"]),
            )
        )
        if same:
            leaves = sorted(tree_diff(self._stored, state), key=lambda leaf: flow(leaf.path))
            self._found = found._replace(stored=StoredDifference(target, tuple(leaves)))
        if same or event.step > target.step or event.kind == "fit_end":
            raise Enough(state)


def compare_step(
    record: StepRecord, state: Any, event: Event, division: Mapping[str, Any]
) -> tuple[bool, tuple[tuple[str, float, float], ...]]:
    """Whether a step has another batch than a journal says, and the metrics that differ."""
    other_batch = False
    if record.batch is not None:
        now = batch_digest(_first_parts(event.batch, division), record.batch.kind)
        other_batch = now is not None and _value(now.value) != record.batch.value
    metrics = compute_all(step_metrics(state, event))
    changed = []
    for name, value in record.metrics.items():
        here = metrics[name].item() if name in metrics else float("nan")
        if struct.pack("<d", here) != struct.pack("<d", value):
            changed.append((name, value, here))
    return other_batch, tuple(changed)


def _first_parts(batch: Any, division: Mapping[str, Any]) -> Any:
    """Of a divided batch what the first process had, of which there is a digest in the journal."""
    shards = division.get("logical_shards")
    if shards is None or not isinstance(batch, Parts):
        return batch
    count = shards // division["processes"]
    return Parts(batch.parts[:count], batch.sizes[:count], batch.total)


def _value(digest: Any) -> int:
    return int(digest) & ((1 << 64) - 1)


def changed_leaves(recorded: Digests, now: Digests) -> tuple[ChangedLeaf, ...]:
    """The leaves whose digests differ, those first that a step makes first."""
    old, new = (
        {path: (kind, value) for (path, kind), value in zip(d.leaves, d.read(), strict=True)}
        for d in (recorded, now)
    )
    nothing = ("nothing", -1)
    changed = [
        ChangedLeaf(path, old.get(path, nothing)[0], new.get(path, nothing)[0])
        for path in {**old, **new}
        if old.get(path) != new.get(path)
    ]
    return tuple(sorted(changed, key=lambda leaf: flow(leaf.path)))


def flow(path: str) -> tuple[int, str]:
    """A key that sorts paths of a state by when a step makes what is there."""
    first = path.partition("/")[0]
    if first in _FLOW:
        return _FLOW.index(first), path
    if first in _CONSEQUENCES:
        return 100 + _CONSEQUENCES.index(first), path
    return 50, path  # the fields of a record of the user's own
