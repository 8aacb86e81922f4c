"""Optimizers, gradient transformations and schedules."""

from puretrain.optim.adam import *
from puretrain.optim.base import *
from puretrain.optim.from_torch import TorchOptimizerState, from_torch
from puretrain.optim.hyperparams import *
from puretrain.optim.schedules import *
from puretrain.optim.sgd import *
from puretrain.optim.transforms import *
