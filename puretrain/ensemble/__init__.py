"""Ensembles and sweeps: many members trained at once, in one state, by one step.

An :class:`EnsembleState` is one state of one run. What differs between members (parameters,
buffers, optimizer, key) has a leading axis in it; what they share (the step, the place in the data)
has none. So ``fit``, observers, checkpoints and replay take it like any other state, and metrics
have one value for each member. Each member is what its own separate run would have made of it.

Where the pieces are:
    - ``members``: the state, and members of it.
    - ``vectorized``: a function of one member as a function of all.
    - ``step``: how all of them are trained at once.
    - ``evaluation``: what each of them says, and all together.
    - ``reducers``: for each by itself, and for them as a population.
"""

from puretrain.ensemble.evaluation import ensemble_eval_step, mean_probabilities
from puretrain.ensemble.members import (
    EnsembleState,
    PerMember,
    Population,
    ensemble,
    member,
    ranking,
    select_members,
)
from puretrain.ensemble.reducers import per_member, population
from puretrain.ensemble.step import ensemble_step

__all__ = [
    "EnsembleState",
    "PerMember",
    "Population",
    "ensemble",
    "ensemble_eval_step",
    "ensemble_step",
    "mean_probabilities",
    "member",
    "per_member",
    "population",
    "ranking",
    "select_members",
]
