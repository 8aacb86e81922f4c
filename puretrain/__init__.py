"""Training in PyTorch as a pure function of one immutable state.

A run is a fold, ``state' = step(state, batch)``; :class:`TrainState` holds all that decides what
happens next.
"""

from puretrain import random, tree
from puretrain.functional import functional, load_into
from puretrain.tree import FrozenDict, Record, field

__version__ = "0.1.0"
