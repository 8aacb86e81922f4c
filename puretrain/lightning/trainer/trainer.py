"""The Trainer: its arguments, its methods, and what it lets others see.

What the arguments mean is in :mod:`~puretrain.lightning.trainer.arguments`, what the methods do in
:mod:`~puretrain.lightning.trainer.stages`.
"""

from __future__ import annotations

import inspect
import math
import os
from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from puretrain.lightning.trainer import (
    arguments,
    checkpointing,
    connecting,
    distributed,
    reporting,
    running,
    stages,
    training,
)
from puretrain.lightning.trainer import devices as devices_of
from puretrain.lightning.trainer.calls import call
from puretrain.lightning.trainer.precision import set_precision
from puretrain.lightning.trainer.states import RunningStage, StateView, TrainerFn, TrainerState
from puretrain.lightning.utilities import argparse as command_line

__all__ = ["Trainer"]


class Trainer:
    """Fits, validates and tests a LightningModule."""

    @command_line.overwrite_by_env_vars
    def __init__(
        self,
        logger: Any = True,
        checkpoint_callback: Any = True,
        callbacks: Any = None,
        default_root_dir: Any = None,
        gradient_clip_val: float | None = 0,
        process_position: int = 0,
        num_nodes: int = 1,
        num_processes: int = 1,
        gpus: Any = None,
        auto_select_gpus: bool = False,
        tpu_cores: Any = None,
        log_gpu_memory: str | None = None,
        progress_bar_refresh_rate: int | None = None,
        overfit_batches: float = 0.0,
        track_grad_norm: Any = -1,
        check_val_every_n_epoch: int | None = 1,
        fast_dev_run: Any = False,
        accumulate_grad_batches: Any = 1,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int | None = None,
        min_steps: int | None = None,
        limit_train_batches: Any = 1.0,
        limit_val_batches: Any = 1.0,
        limit_test_batches: Any = 1.0,
        limit_predict_batches: Any = 1.0,
        val_check_interval: Any = 1.0,
        flush_logs_every_n_steps: int = 100,
        log_every_n_steps: int = 50,
        accelerator: Any = None,
        sync_batchnorm: bool = False,
        precision: Any = 32,
        weights_summary: str | None = "top",
        weights_save_path: Any = None,
        num_sanity_val_steps: int | None = 2,
        truncated_bptt_steps: int | None = None,
        resume_from_checkpoint: Any = None,
        profiler: Any = None,
        benchmark: bool | None = False,
        deterministic: Any = False,
        reload_dataloaders_every_epoch: bool = False,
        auto_lr_find: Any = False,
        replace_sampler_ddp: bool = True,
        terminate_on_nan: bool = False,
        auto_scale_batch_size: Any = False,
        prepare_data_per_node: bool = True,
        plugins: Any = None,
        amp_backend: str = "native",
        amp_level: str = "O2",
        distributed_backend: str | None = None,
        automatic_optimization: bool | None = None,
        move_metrics_to_cpu: bool = False,
        enable_pl_optimizer: bool | None = None,
        multiple_trainloader_mode: str = "max_size_cycle",
        stochastic_weight_avg: bool = False,
        gradient_clip_algorithm: str | None = None,
        max_time: Any = None,
        *,
        devices: Any = "auto",
        strategy: Any = "auto",
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        barebones: bool = False,
        detect_anomaly: bool = False,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        reload_dataloaders_every_n_epochs: int = 0,
        model_registry: Any = None,
        enable_autolog_hparams: bool = True,
    ) -> None:
        """Take the arguments of Lightning 1.1 to 1.3 and of 2.x; docs/lightning.md has a table."""
        given = {name: value for name, value in locals().items() if name != "self"}
        self._speaks_2 = arguments.are_of_2(given, inspect.signature(Trainer.__init__).parameters)
        self._module: Any = None
        self.datamodule: Any = None
        self.callbacks: list[Any] = []
        self._hooks: dict[str, Any] = {}
        self._fx: str | None = None
        self._results: Any = None
        self._state = TrainerState.INITIALIZING
        self._fn: TrainerFn | None = None
        self._stage: Any = None
        running.begin(self)
        callbacks = connecting.listed(callbacks)
        connecting.call_each(self, callbacks, "on_init_start")
        vars(self).update(arguments.settings(given))
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        if benchmark:
            torch.backends.cudnn.benchmark = True
        strategy, precision = devices_of.read_plugins(plugins, strategy, precision)
        if auto_select_gpus and isinstance(gpus, int) and gpus:
            from puretrain.lightning.tuner.auto_gpu_select import pick_multiple_gpus

            gpus = pick_multiple_gpus(gpus)
        self.strategy_name = strategy
        plan = devices_of.plan_of(
            self.accelerator_name, strategy, devices, num_nodes, num_processes, gpus, tpu_cores
        )
        distributed.take_plan(self, plan)
        devices_of.check_logging_of_memory(log_gpu_memory, self.on_gpu)
        set_precision(self, precision)
        self.profiler = connecting.profiler_of(profiler)
        self._profiles = connecting.measures(self.profiler)
        self._logger = None
        if not fast_dev_run and not barebones:
            self._logger = connecting.logger_of(logger, self.default_root_dir)
        if barebones:
            enable_checkpointing = enable_progress_bar = False
        wanted = checkpoint_callback if enable_checkpointing is None else enable_checkpointing
        self.callbacks = connecting.callbacks_of(
            callbacks,
            checkpoints=wanted,
            progress_bar=enable_progress_bar,
            refresh_rate=progress_bar_refresh_rate,
            process_position=process_position,
            accumulate=accumulate_grad_batches,
            averaging=stochastic_weight_avg,
            max_time=max_time,
            fast_dev_run=fast_dev_run,
        )
        self.progress_bar_callback = connecting.progress_bar_of(self.callbacks)
        whole = isinstance(accumulate_grad_batches, int)
        self.accumulate_grad_batches: int = accumulate_grad_batches if whole else 1
        connecting.call_each(self, self.callbacks, "on_init_end")

    # ── Methods ───────────────────────────────────────────────────────────────────────────────────

    def fit(
        self,
        model: Any,
        train_dataloader: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        train_dataloaders: Any = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> int:
        """Train a module.

        Args:
            model: the module.
            train_dataloader: a loader, or several in a list or dict; or a data module.
            val_dataloaders: one or several loaders.
            datamodule: where the loaders come from instead.
            train_dataloaders: as 1.4 and later call the training loader.
            ckpt_path: a checkpoint to go on from.
            weights_only: kept for its name.

        Returns:
            1.
        """
        train = train_dataloaders if train_dataloaders is not None else train_dataloader
        stages.fit(self, model, train, val_dataloaders, datamodule, ckpt_path)
        return 1

    def validate(
        self,
        model: Any = None,
        val_dataloaders: Any = None,
        ckpt_path: Any = stages.DEFAULT_PATH,
        verbose: bool = True,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run over the validation loaders; returns the logged values, for each loader."""
        given = dataloaders if dataloaders is not None else val_dataloaders
        return stages.evaluate(self, "val", model, given, datamodule, ckpt_path, verbose=verbose)

    def test(
        self,
        model: Any = None,
        test_dataloaders: Any = None,
        ckpt_path: Any = stages.DEFAULT_PATH,
        verbose: bool = True,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run over the test loaders; returns the logged values, for each loader.

        Args:
            model: the module; None: that of the last run, with the best checkpoint.
            test_dataloaders: one or several loaders.
            ckpt_path: a checkpoint, ``best``, ``last``, or None for the parameters as they are.
            verbose: print the results.
            datamodule: where the loaders come from instead.
            dataloaders: as 1.4 and later call the loaders.
            weights_only: kept for its name.
        """
        given = dataloaders if dataloaders is not None else test_dataloaders
        return stages.evaluate(self, "test", model, given, datamodule, ckpt_path, verbose=verbose)

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: Any = None,
        *,
        weights_only: bool | None = None,
    ) -> Any:
        """Run ``predict_step`` over loaders; the outputs come by loader if there are several."""
        return stages.evaluate(
            self, "predict", model, dataloaders, datamodule, ckpt_path,
            keep=return_predictions is not False,
        )  # fmt: skip

    def tune(
        self,
        model: Any,
        train_dataloader: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        **options: Any,
    ) -> Any:
        """Look for the learning rate or batch size, as ``auto_lr_find`` and its like ask."""
        return self.tuner.tune(model, train_dataloader, val_dataloaders, datamodule, **options)

    @property
    def tuner(self) -> Any:
        """What finds learning rates and batch sizes."""
        from puretrain.lightning.tuner import tuning

        return tuning.Tuner(self, update_attr=False)

    def save_checkpoint(
        self, filepath: Any, weights_only: bool = False, storage_options: Any = None
    ) -> None:
        """Write a checkpoint of the run."""
        if self._module is None:
            raise AttributeError(
                "Saving a checkpoint is only possible if a model is attached to the Trainer. Did "
                "you call `Trainer.save_checkpoint()` before calling `Trainer.{fit,validate,test}`?"
            )
        checkpointing.save(self, filepath, weights_only=bool(weights_only), together=self._speaks_2)

    def dump_checkpoint(self, weights_only: bool = False) -> dict[str, Any]:
        """The checkpoint of the run, as a dict."""
        return checkpointing.dump(self, weights_only=weights_only)

    # ── What a run shows ──────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> StateView:
        """What the trainer does, or how that ended."""
        return StateView(self._state, self._fn, self._stage)

    @state.setter
    def state(self, state: TrainerState) -> None:
        self._state = TrainerState(str(state))
        if self._state == TrainerState.FITTING:
            self._fn = TrainerFn.FITTING

    @property
    def logger_connector(self) -> reporting.MetricsView:
        """Where 1.x keeps the logged values."""
        return reporting.MetricsView(self)

    @property
    def strategy(self) -> Any:
        """What callbacks of 2.x ask to reduce a decision and the like."""
        return self._processes

    @property
    def train_state(self) -> Any:
        """The run as a :class:`puretrain.TrainState` whose tensors are the module's own."""
        return training.bound_state(self, self._fold)

    @property
    def model(self) -> Any:
        """The module."""
        return self._module

    @model.setter
    def model(self, model: Any) -> None:
        self._module = model

    @property
    def lightning_module(self) -> Any:
        """The module."""
        return self._module

    def get_model(self) -> Any:
        """The module, as 1.x asks for it."""
        return self._module

    @property
    def training(self) -> bool:
        """Whether training batches are worked on."""
        return self._stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Whether validation batches are worked on."""
        return self._stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether test batches are worked on."""
        return self._stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Whether predictions are made."""
        return self._stage is RunningStage.PREDICTING

    @property
    def tuning(self) -> bool:
        """Whether the trainer looks for hyper-parameters."""
        return self._stage is RunningStage.TUNING

    @property
    def sanity_checking(self) -> bool:
        """Whether this is the short validation before training."""
        return self._stage is RunningStage.SANITY_CHECKING

    running_sanity_check = sanity_checking

    @property
    def evaluating(self) -> bool:
        """Whether batches are looked at without training."""
        return self._stage is not None and self._stage.evaluating

    @property
    def world_size(self) -> int:
        """The number of processes."""
        processes = vars(self).get("_processes")
        return 1 if processes is None else int(processes.plan.world_size)

    @property
    def global_rank(self) -> int:
        """The number of this process among all."""
        return self.__dict__.get("_global_rank", 0)

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return self.__dict__.get("_local_rank", 0)

    @property
    def node_rank(self) -> int:
        """The number of this machine."""
        return self.__dict__.get("_node_rank", 0)

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first process."""
        return self.global_rank == 0

    @property
    def root_device(self) -> torch.device:
        """Where the module is."""
        return self._device

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a GPU."""
        return self._device.type == "cuda"

    root_gpu = property(lambda self: self._device.index)

    @property
    def logger(self) -> Any:
        """The logger; None if there is none."""
        return self._logger

    @logger.setter
    def logger(self, logger: Any) -> None:
        self._logger = logger or None

    @property
    def loggers(self) -> list[Any]:
        """The loggers in a list."""
        if self._logger is None:
            return []
        inner = getattr(self._logger, "_logger_iterable", None)
        return list(inner) if inner is not None else [self._logger]

    @property
    def log_dir(self) -> str | None:
        """The directory of this run's logs."""
        logger = self._logger
        if logger is None:
            return self.default_root_dir
        return getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)

    @property
    def weights_save_path(self) -> str:
        """Where checkpoints go."""
        return os.fspath(self._weights_save_path or self.default_root_dir)

    @property
    def total_batch_idx(self) -> int:
        """The number of the batch in the whole run, from 0."""
        return self._total_batches - 1

    @property
    def train_dataloader(self) -> Any:
        """The training loader."""
        return self._train_loader

    @property
    def val_dataloaders(self) -> Any:
        """The validation loaders."""
        return self._eval_loaders.get("val")

    @property
    def test_dataloaders(self) -> Any:
        """The test loaders."""
        return self._eval_loaders.get("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The loaders for prediction."""
        return self._eval_loaders.get("predict")

    @property
    def num_val_batches(self) -> list[float]:
        """How many batches of each validation loader are read."""
        return self._eval_counts.get("val", [])

    @property
    def num_test_batches(self) -> list[float]:
        """How many batches of each test loader are read."""
        return self._eval_counts.get("test", [])

    @property
    def num_predict_batches(self) -> list[float]:
        """How many batches of each loader are read for prediction."""
        return self._eval_counts.get("predict", [])

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """How many batches of each validation loader are read before training."""
        return [min(self.num_sanity_val_steps, count) for count in self.num_val_batches]

    @property
    def enable_validation(self) -> bool:
        """Whether there is a validation."""
        return self._validates

    disable_validation = property(lambda self: not self._validates)

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The schedulers with their options, as 2.x names them."""
        return [Namespace(**config) for config in self.lr_schedulers]

    @property
    def num_optimizers(self) -> int:
        """The number of optimizers."""
        return len(self.optimizers)

    @property
    def fit_loop(self) -> Any:
        """Stands for 2.x's loop; its limits are the trainer's."""
        return self

    train_loop = fit_loop

    @property
    def is_last_batch(self) -> bool:
        """Whether the training batch is the last of its epoch."""
        return self._item_is_last

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """All ModelCheckpoints."""
        from puretrain.lightning.callbacks import ModelCheckpoint

        return [c for c in self.callbacks if isinstance(c, ModelCheckpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first ModelCheckpoint."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        """All EarlyStoppings."""
        from puretrain.lightning.callbacks import EarlyStopping

        return [c for c in self.callbacks if isinstance(c, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> Any:
        """The first EarlyStopping."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def prediction_writer_callbacks(self) -> list[Any]:
        """All callbacks that write predictions."""
        from puretrain.lightning.callbacks import BasePredictionWriter

        return [c for c in self.callbacks if isinstance(c, BasePredictionWriter)]

    @property
    def estimated_stepping_batches(self) -> float:
        """How many optimizer steps the run will make."""
        if self._train_loader is None:
            training.prepare_training_loader(self)
        steps = math.inf if self.max_steps in (None, -1) else self.max_steps
        epochs = math.inf if self.max_epochs in (None, -1) else self.max_epochs
        per_epoch = self.num_training_batches
        if per_epoch != math.inf:
            per_epoch = math.ceil(per_epoch / self.accumulate_grad_batches)
        return min(steps, per_epoch * epochs) if epochs else 0

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """All logged values by name, as callbacks see them; tensors."""
        reporting.keep_metrics(self)
        return self._callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The values that went, or are to go, to the loggers."""
        reporting.keep_metrics(self)
        return self._logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The values for the progress bar; numbers."""
        reporting.keep_metrics(self)
        return reporting.numbers(self._bar_metrics)

    @property
    def progress_bar_dict(self) -> dict[str, Any]:
        """All that the progress bar shows."""
        return {**self._module.get_progress_bar_dict(), **self.progress_bar_metrics}

    @property
    def scaler(self) -> Any:
        """The loss scale of precision 16; None otherwise."""
        return self._scaler

    def __getstate__(self) -> dict[str, Any]:
        """For the processes that a run starts: where it stands is begun anew there."""
        return {**vars(self), "_fold": None, "_hooks": {}, "_item": None, "_transfer": None}

    # ── From a command line ───────────────────────────────────────────────────────────────────────

    @classmethod
    def add_argparse_args(cls, parent_parser: Any, **kwargs: Any) -> ArgumentParser:
        """Add the trainer's arguments to a parser."""
        return command_line.add_argparse_args(cls, parent_parser, **kwargs)

    @classmethod
    def parse_argparser(cls, arg_parser: Any) -> Namespace:
        """Read the command line, or take what was read."""
        return command_line.parse_argparser(cls, arg_parser)

    @classmethod
    def from_argparse_args(cls, args: Any, **kwargs: Any) -> Trainer:
        """Make a trainer of the arguments that a parser has read."""
        return command_line.from_argparse_args(cls, args, **kwargs)

    @classmethod
    def parse_env_variables(cls) -> Namespace:
        """The arguments that environment variables such as ``PL_TRAINER_MAX_EPOCHS`` give."""
        return command_line.parse_env_variables(cls)

    @classmethod
    def get_init_arguments_and_types(cls) -> list[tuple[str, tuple[Any, ...], Any]]:
        """The trainer's arguments: names, types and defaults."""
        return command_line.get_init_arguments_and_types(cls)

    @classmethod
    def get_deprecated_arg_names(cls) -> list[str]:
        """Kept for its name."""
        return []

    @classmethod
    def default_attributes(cls) -> dict[str, Any]:
        """The arguments and their defaults."""
        parameters = inspect.signature(cls.__init__).parameters
        return {name: p.default for name, p in parameters.items() if name != "self"}

    def call_hook(self, hook_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a hook of the callbacks and the module."""
        return call(self, hook_name, *args, *kwargs.values())

    def __repr__(self) -> str:
        return f"<Trainer {self._state.value.lower()}>"
