"""Optimizers, gradient transformations and schedules.

An *optimizer* is a pair of pure functions, ``init(params) -> state`` and ``update(grads, state,
params) -> (params, state)``. What it remembers is in its state, a tree of tensors.

- Descent: :func:`sgd`.
- Divided by the size of past gradients: :func:`adam`, :func:`adamw`, :func:`nadam`, :func:`radam`,
  :func:`adamax`, :func:`lamb`; :func:`rmsprop`, :func:`adagrad`, :func:`adadelta`.
- By direction only: :func:`lion`, and for matrices :func:`muon`.
- Any other of ``torch.optim``'s interface: :func:`from_torch`.

A *gradient transformation* is the same with new gradients in the place of new parameters:
:func:`clip_by_global_norm`, :func:`clip_by_value`, :func:`add_decayed_weights`, :func:`scale`,
:func:`freeze`.

They are put together by :func:`chain` (one after the other), :func:`masked` and
:func:`multi_transform` (groups of parameters, by patterns of their paths), :func:`apply_every`
(every k-th time), :func:`lookahead` (follow another one slowly) and :func:`inject_hyperparams`
(hyper-parameters in the state, for sweeps and to
change them; see :func:`get_hyperparams`, :func:`set_hyperparams`).

A *schedule* is a function of the number of updates; it may stand for a learning rate:
:func:`constant`, :func:`linear`, :func:`cosine`, :func:`cosine_restarts`, :func:`warmup_cosine`,
:func:`step`, :func:`multi_step`, :func:`exponential`, :func:`polynomial`, :func:`one_cycle`,
:func:`piecewise`; :func:`join` and :func:`warmup` make them out of others.

Each optimizer has one formula, written in its documentation. On plain tensors torch's own kernel
computes it, so that the bits are torch's, donated or not. Inside of a transform of ``torch.func``
or ``torch.compile`` the formula is used as it is written, in float32 at least, and agrees with the
kernel up to the rounding of single operations. A hyper-parameter may be a tensor of shape ``()``;
outside of transforms its value is used as a Python number.
"""

from puretrain.optim.adadelta import AdadeltaState, adadelta
from puretrain.optim.adagrad import AdagradState, adagrad
from puretrain.optim.adam import (
    AdamaxState,
    AdamState,
    NAdamState,
    adam,
    adamax,
    adamw,
    nadam,
    radam,
)
from puretrain.optim.base import GradientTransformation, Optimizer, Schedule, schedule_value
from puretrain.optim.from_torch import TorchOptimizerState, from_torch
from puretrain.optim.hyperparams import (
    InjectedState,
    get_hyperparams,
    inject_hyperparams,
    set_hyperparams,
)
from puretrain.optim.lamb import LambState, lamb
from puretrain.optim.lion import LionState, lion
from puretrain.optim.lookahead import LookaheadState, lookahead
from puretrain.optim.muon import MuonState, muon
from puretrain.optim.rmsprop import RMSpropState, rmsprop
from puretrain.optim.schedules import (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    join,
    linear,
    multi_step,
    one_cycle,
    piecewise,
    polynomial,
    step,
    warmup,
    warmup_cosine,
)
from puretrain.optim.sgd import SGDState, sgd
from puretrain.optim.transforms import (
    AccumulationState,
    CountState,
    Mask,
    add_decayed_weights,
    apply_every,
    chain,
    clip_by_global_norm,
    clip_by_value,
    freeze,
    global_norm,
    masked,
    multi_transform,
    scale,
)

__all__ = [
    "AccumulationState",
    "AdadeltaState",
    "AdagradState",
    "AdamState",
    "AdamaxState",
    "CountState",
    "GradientTransformation",
    "InjectedState",
    "LambState",
    "LionState",
    "LookaheadState",
    "Mask",
    "MuonState",
    "NAdamState",
    "Optimizer",
    "RMSpropState",
    "SGDState",
    "Schedule",
    "TorchOptimizerState",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "add_decayed_weights",
    "apply_every",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "cosine_restarts",
    "exponential",
    "freeze",
    "from_torch",
    "get_hyperparams",
    "global_norm",
    "inject_hyperparams",
    "join",
    "lamb",
    "linear",
    "lion",
    "lookahead",
    "masked",
    "multi_step",
    "multi_transform",
    "muon",
    "nadam",
    "one_cycle",
    "piecewise",
    "polynomial",
    "radam",
    "rmsprop",
    "scale",
    "schedule_value",
    "set_hyperparams",
    "sgd",
    "step",
    "warmup",
    "warmup_cosine",
]
