"""Observers: callbacks with effects. They look at states and events, and write elsewhere.

An observer is ``observer(state, event) -> None``; a function of your own will do. It must not
change the state. Give observers to :func:`puretrain.fit`; it calls them in order, and their
``close()`` at the end.
"""

from puretrain.observers.checkpoints import checkpoints
from puretrain.observers.profiler import profiler
from puretrain.observers.progress import progress
from puretrain.observers.tables import csv_log, jsonl_log
from puretrain.observers.tensorboard import tensorboard

__all__ = ["checkpoints", "csv_log", "jsonl_log", "profiler", "progress", "tensorboard"]
