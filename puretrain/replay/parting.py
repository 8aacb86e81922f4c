"""Where two runs part: from their journals, and then by living both again in between."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any, NamedTuple

from puretrain.checkpoint import load
from puretrain.errors import ConfigurationError, JournalError
from puretrain.loop import Event, prepare
from puretrain.replay.digests import BatchDigest, Digests, batch_digest, leaf_digests
from puretrain.replay.environment import FactDifference, compare_facts, settings
from puretrain.replay.journal import StepRecord
from puretrain.replay.playback import (
    ChangedLeaf,
    Enough,
    Recorded,
    changed_leaves,
    compare_step,
    flow,
)
from puretrain.tree import LeafDifference, tree_diff

__all__ = ["Parting", "bisect"]


class Parting(NamedTuple):
    """Where and how two runs part."""

    common: int
    """How many steps the two journals have in common."""
    step: int | None
    """The first step that differs; 0: they begin with different states; None: none was found."""
    since: int
    """The last step after which both had the same state, as far as it is known."""
    exact: bool
    """Whether ``step`` is the very first; otherwise it is somewhere after ``since`` up to it."""
    what: str
    """What parted first: ``batch``, ``key``, ``params``, ``buffers``, ``opt_state``, … or, if no
    more is known, ``metrics``; empty if nothing did."""
    changed: tuple[ChangedLeaf, ...]
    """The leaves that differ at that step, as far as they are known, in the order of a step."""
    leaves: tuple[LeafDifference, ...]
    """By how much they differ; empty if the states could not be made again."""
    facts: tuple[FactDifference, ...]
    """Facts of the two runs that differ: of the first as ``recorded``, of the second as ``now``."""
    notes: tuple[str, ...]
    """What could not be done, and why."""


_SAME_HERE = (
    "replayed here, the two runs are the same up to this step: what parted them is in the facts "
    "that differ, or a journal is of another program than its file is now"
)


def bisect(a: Recorded, b: Recorded) -> Parting:
    """Find the first step at which two runs differ, and the leaf in which they do.

    The journals say between which steps it must be: by the batches and metrics of every step, and
    by the digests of the states. If they leave a gap, both runs are replayed from a common
    checkpoint before it, or from their beginnings, and compared at every step.

    Raises:
        JournalError: the journals have no step in common.
    """
    steps_a, steps_b = a.journal.steps(), b.journal.steps()
    common = sorted(steps_a.keys() & steps_b.keys())
    if not common:
        raise JournalError(
            f"{a.directory} and {b.directory} have no step in common that could "
            "be compared; let both journals begin at one step, with the same "
            "every="
        )
    facts = _facts(a, b, common[-1])
    begin = _beginnings(a, b)
    if begin:
        leaves = _differences(a, b, 0)
        return Parting(len(common), 0, 0, True, _what(False, begin), begin, leaves, facts, ())
    since, first = 0, None
    for step in common:
        one, other = steps_a[step], steps_b[step]
        if a.division(step) != b.division(step):  # what the first processes had of the batches
            one, other = one._replace(batch=None), other._replace(batch=None)
        if _differ(one, other):
            first = step
            break
        if one.state is not None and other.state is not None:
            since = step
    if first is None:
        return Parting(len(common), None, since, True, "", (), (), facts, ())
    notes: tuple[str, ...] = ()
    try:
        found = _replay_both(a, b, first)
    except (ConfigurationError, JournalError) as error:
        notes = (f"the runs can't be replayed to look closer: {error}",)
        found = None
    else:
        if found is None:
            notes = (_SAME_HERE,)
    if found is not None:
        same, step, batch, changed = found
        leaves = _differences(a, b, step)
        what = _what(batch, changed)
        return Parting(len(common), step, same, True, what, changed, leaves, facts, notes)
    changed = ()
    if one.state is not None and other.state is not None:
        changed = changed_leaves(one.state, other.state)
    batch = _batches_differ(one.batch, other.batch)
    what = _what(batch, changed) or "metrics"
    exact = since == first - 1 or batch
    return Parting(len(common), first, since, exact, what, changed, (), facts, notes)


def _facts(a: Recorded, b: Recorded, step: int) -> tuple[FactDifference, ...]:
    one, other = (run.journal.segment_of(step).facts for run in (a, b))
    return tuple(compare_facts(one, other))


def _beginnings(a: Recorded, b: Recorded) -> tuple[ChangedLeaf, ...]:
    """The leaves in which the very first states differ, if the journals have them."""
    found = []
    for run in (a, b):
        events = run.journal.segments[0].events
        if not events or events[0].state is None or events[0].step != 0:
            return ()
        found.append(events[0].state)
    return changed_leaves(*found)


def _differ(one: StepRecord, other: StepRecord) -> bool:
    if _batches_differ(one.batch, other.batch):
        return True
    if (one.epoch, one.offset) != (other.epoch, other.offset):
        return True
    for name in one.metrics.keys() & other.metrics.keys():
        if struct.pack("<d", one.metrics[name]) != struct.pack("<d", other.metrics[name]):
            return True
    if one.state is None or other.state is None:
        return False
    return one.state != other.state and bool(changed_leaves(one.state, other.state))


def _batches_differ(one: BatchDigest | None, other: BatchDigest | None) -> bool:
    if one is None or other is None or one.kind != other.kind:
        return False  # not known
    return bool(one.value != other.value)


def _what(batch: bool, changed: tuple[ChangedLeaf, ...]) -> str:
    if batch:
        return "batch"
    return changed[0].path.partition("/")[0] if changed else ""


# ── Replaying both ────────────────────────────────────────────────────────────────────────────────


class _Taken(NamedTuple):
    """What is kept of a step of the first run, to compare the second with it."""

    batch: BatchDigest | None
    state: Digests


def _replay_both(
    a: Recorded, b: Recorded, last: int
) -> tuple[int, int, bool, tuple[ChangedLeaf, ...]] | None:
    """The last equal step, the first that differs, whether its batches do, and its leaves."""
    for begin in _common_starts(a, b, last):
        state_a, state_b = (_state(run, begin) for run in (a, b))
        if changed_leaves(_read(state_a), _read(state_b)):
            continue  # they have parted before this one
        taken: dict[int, _Taken] = {}

        def keep(state: Any, event: Event, taken: dict[int, _Taken] = taken) -> None:
            if event.kind == "step":
                taken[event.step] = _Taken(batch_digest(event.batch, "host"), _read(state))

        _fold(a, state_a, last, keep)
        result: list[tuple[int, int, bool, tuple[ChangedLeaf, ...]]] = []

        def compare(
            state: Any, event: Event, taken: dict[int, _Taken] = taken, result: list[Any] = result
        ) -> None:
            if event.kind != "step" or event.step not in taken:
                return
            mine = taken[event.step]
            batch = _batches_differ(mine.batch, batch_digest(event.batch, "host"))
            changed = changed_leaves(mine.state, _read(state))
            if batch or changed:
                result.append((event.step - 1, event.step, batch, changed))
                raise Enough(state)

        _fold(b, state_b, last, compare)
        return result[0] if result else None
    return None


def _common_starts(a: Recorded, b: Recorded, last: int) -> list[int]:
    """The steps before ``last`` of which both runs have a state, the latest first, and 0."""
    held = [{found.step for found in run.checkpoints()} for run in (a, b)]
    return [*sorted((step for step in held[0] & held[1] if 0 < step < last), reverse=True), 0]


def _state(run: Recorded, step: int) -> Any:
    made = run.make()
    fresh = prepare(made.state, made.reducers)
    if step == 0:
        return fresh
    path = next(found.path for found in run.checkpoints() if found.step == step)
    return load(path, like=fresh)


def _fold(run: Recorded, state: Any, last: int, watch: Any) -> None:
    """Take steps of a run as it did; an error if that does not lead to what its journal says."""
    steps = run.journal.steps()

    def check(state: Any, event: Event) -> None:
        if event.kind == "step" and event.step in steps:
            record = steps[event.step]
            batch, metrics = compare_step(record, state, event, run.division(event.step))
            if batch or metrics or (record.state and changed_leaves(record.state, _read(state))):
                raise JournalError(
                    f"{run.directory} does not replay as it was: step {event.step} is another one "
                    "here; `puretrain replay` says more"
                )
        watch(state, event)
        if event.kind == "step" and event.step >= last:
            raise Enough(state)

    with settings(run.journal.segment_of(last).facts.get("settings", {})):
        run.fold(run.make(), state, last, check)


def _read(state: Any) -> Digests:
    digests = leaf_digests(state)
    return digests._replace(values=digests.read())


def _differences(a: Recorded, b: Recorded, step: int) -> tuple[LeafDifference, ...]:
    """By how much the states after a step differ; nothing if they can't be had."""
    with suppress(ConfigurationError, JournalError):
        found = tree_diff(a.state_at(step), b.state_at(step))
        return tuple(sorted(found, key=lambda leaf: flow(leaf.path)))
    return ()
