"""Where a run writes its metrics: files for TensorBoard, tables, and services."""

from puretrain.lightning.loggers.base import (
    DummyLogger,
    LightningLoggerBase,
    LoggerCollection,
)
from puretrain.lightning.loggers.comet import CometLogger
from puretrain.lightning.loggers.csv_logs import CSVLogger
from puretrain.lightning.loggers.logger import Logger
from puretrain.lightning.loggers.mlflow import MLFlowLogger
from puretrain.lightning.loggers.neptune import NeptuneLogger
from puretrain.lightning.loggers.tensorboard import TensorBoardLogger
from puretrain.lightning.loggers.test_tube import TestTubeLogger
from puretrain.lightning.loggers.wandb import WandbLogger

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyLogger",
    "LightningLoggerBase",
    "Logger",
    "LoggerCollection",
    "MLFlowLogger",
    "NeptuneLogger",
    "TensorBoardLogger",
    "TestTubeLogger",
    "WandbLogger",
]
