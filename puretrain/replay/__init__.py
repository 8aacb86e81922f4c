"""The journal of a run, and living it again: replay, bisection, time travel, the report.

A run is a fold, so any step of it can be taken again. :func:`journal` notes what happened at each
step; :func:`open_run` opens a run that has a journal, and goes to any of its states.
"""

from puretrain.replay.digests import BatchDigest, Digests, batch_digest, leaf_digests, tensor_digest
from puretrain.replay.environment import FactDifference
from puretrain.replay.journal import (
    EventRecord,
    Journal,
    Segment,
    StepRecord,
    journal,
    read_journal,
)
from puretrain.replay.parting import Parting, bisect
from puretrain.replay.playback import (
    ChangedLeaf,
    Difference,
    Recorded,
    Replayed,
    StoredCheckpoint,
    StoredDifference,
    open_run,
)
from puretrain.replay.report import write_report

__all__ = [
    "BatchDigest",
    "ChangedLeaf",
    "Difference",
    "Digests",
    "EventRecord",
    "FactDifference",
    "Journal",
    "Parting",
    "Recorded",
    "Replayed",
    "Segment",
    "StepRecord",
    "StoredCheckpoint",
    "StoredDifference",
    "batch_digest",
    "bisect",
    "journal",
    "leaf_digests",
    "open_run",
    "read_journal",
    "tensor_digest",
    "write_report",
]
