"""Reducers: callbacks that are pure functions of the state and an event.

What a reducer remembers is in ``state.reducers`` under its name, so it is saved with the state, and
a resumed run goes on exactly. Each function here makes a :class:`~puretrain.loop.Reducer`; give
them to :func:`puretrain.fit`. To use one in a loop of your own, call :func:`puretrain.prepare` on
the state once, and ``state = reducer.reduce(state, event)`` after each event.

A *monitor* is the name of a metric as the events carry it: ``"val/loss"`` comes with every
validation, ``"train/loss"`` (the mean over an epoch) at the end of every epoch, and ``"loss"`` with
every step. Such a reducer looks whenever an event carries the metric, and counts those events.

Where the pieces are:
    - ``averages``: of the parameters.
    - ``stopping``: when a run ends.
    - ``hyperparams``: what is changed and watched of the optimizer.
    - ``best``: which states are worth keeping.
    - ``monitoring``: what these share.
"""

from puretrain.reducers.averages import Average, averaged, ema, swa
from puretrain.reducers.best import Best, best_k
from puretrain.reducers.hyperparams import Plateau, lr_monitor, reduce_on_plateau
from puretrain.reducers.stopping import REASONS, Stopping, early_stopping, nan_guard

__all__ = [
    "REASONS",
    "Average",
    "Best",
    "Plateau",
    "Stopping",
    "averaged",
    "best_k",
    "early_stopping",
    "ema",
    "lr_monitor",
    "nan_guard",
    "reduce_on_plateau",
    "swa",
]
