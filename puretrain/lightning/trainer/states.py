"""Where a trainer stands: what it does, and how that ended."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Any

__all__ = ["RunningStage", "TrainerFn", "TrainerState", "TrainerStatus"]


class _Word(StrEnum):
    """A name that equals its text in any case, so that old and new spellings compare alike."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum):
            other = other.value
        return isinstance(other, str) and self.value.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.value.lower())

    def __str__(self) -> str:
        return self.value


class TrainerState(_Word):
    """What a trainer is doing or how it ended; ``trainer.state`` compares equal to one of these."""

    INITIALIZING = "INITIALIZING"
    FITTING = "FITTING"
    RUNNING = "RUNNING"
    VALIDATING = "VALIDATING"
    TESTING = "TESTING"
    PREDICTING = "PREDICTING"
    TUNING = "TUNING"
    FINISHED = "FINISHED"
    INTERRUPTED = "INTERRUPTED"

    @property
    def stopped(self) -> bool:
        """Whether a run has ended, in whichever way."""
        return self in (TrainerState.FINISHED, TrainerState.INTERRUPTED)


class TrainerStatus(_Word):
    """How far a run is, in the words of 1.3 and later."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether a run has ended, in whichever way."""
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class TrainerFn(_Word):
    """Which method of the trainer was called."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"
    TUNING = "tune"


class RunningStage(_Word):
    """Which kind of batches is being worked on."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    EVALUATING = "eval"
    PREDICTING = "predict"
    TUNING = "tune"

    @property
    def evaluating(self) -> bool:
        """Whether batches are looked at without training."""
        return self in (
            RunningStage.SANITY_CHECKING,
            RunningStage.VALIDATING,
            RunningStage.TESTING,
            RunningStage.EVALUATING,
        )

    @property
    def dataloader_prefix(self) -> str | None:
        """``train``, ``val``, ``test`` or ``predict``."""
        return _PREFIX.get(self.value)


_PREFIX = {
    "train": "train",
    "sanity_check": "val",
    "validate": "val",
    "test": "test",
    "predict": "predict",
}
_FUNCTION = {
    TrainerState.FITTING: TrainerFn.FITTING,
    TrainerState.VALIDATING: TrainerFn.VALIDATING,
    TrainerState.TESTING: TrainerFn.TESTING,
    TrainerState.PREDICTING: TrainerFn.PREDICTING,
    TrainerState.TUNING: TrainerFn.TUNING,
}


class StateView(str):
    """The value of ``trainer.state``: equal to a :class:`TrainerState`, with 1.3's attributes."""

    __slots__ = ("fn", "stage")

    def __new__(cls, state: TrainerState, fn: TrainerFn | None, stage: Any) -> StateView:
        """Say what a trainer does: its state, the method that was called, and the stage."""
        view = super().__new__(cls, state.value)
        view.fn = _FUNCTION.get(state, fn)
        view.stage = stage
        return view

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (TrainerStatus, TrainerFn)):
            return other in (self.status, self.fn)
        return TrainerState(str(self)) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(str(self).lower())

    @property
    def status(self) -> TrainerStatus:
        """Initializing, running, finished or interrupted."""
        if self.lower() in {"initializing", "finished", "interrupted"}:
            return TrainerStatus(self.lower())
        return TrainerStatus.RUNNING

    @property
    def finished(self) -> bool:
        """Whether the last run ended by itself."""
        return self.status is TrainerStatus.FINISHED

    @property
    def interrupted(self) -> bool:
        """Whether the last run was ended from outside."""
        return self.status is TrainerStatus.INTERRUPTED

    @property
    def stopped(self) -> bool:
        """Whether no run is under way."""
        return self.status.stopped
