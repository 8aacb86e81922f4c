"""Callbacks."""

# Modules are attributes, whether or not a program imports them.
from puretrain.lightning.callbacks import callback, checkpoint, rich_model_summary  # noqa: F401
from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.callbacks.device_stats_monitor import DeviceStatsMonitor
from puretrain.lightning.callbacks.early_stopping import EarlyStopping
from puretrain.lightning.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
from puretrain.lightning.callbacks.gpu_stats_monitor import GPUStatsMonitor
from puretrain.lightning.callbacks.gradient_accumulation_scheduler import (
    GradientAccumulationScheduler,
)
from puretrain.lightning.callbacks.lambda_function import LambdaCallback
from puretrain.lightning.callbacks.lr_monitor import LearningRateMonitor
from puretrain.lightning.callbacks.model_checkpoint import ModelCheckpoint
from puretrain.lightning.callbacks.model_summary import ModelSummary, RichModelSummary
from puretrain.lightning.callbacks.prediction_writer import BasePredictionWriter
from puretrain.lightning.callbacks.progress import (
    ProgressBar,
    ProgressBarBase,
    RichProgressBar,
    TQDMProgressBar,
)
from puretrain.lightning.callbacks.pruning import ModelPruning
from puretrain.lightning.callbacks.quantization import QuantizationAwareTraining
from puretrain.lightning.callbacks.stochastic_weight_avg import StochasticWeightAveraging
from puretrain.lightning.callbacks.timer import Timer

Checkpoint = ModelCheckpoint

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "GPUStatsMonitor",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "ProgressBar",
    "ProgressBarBase",
    "QuantizationAwareTraining",
    "RichModelSummary",
    "RichProgressBar",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "Timer",
]
