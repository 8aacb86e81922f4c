"""The Trainer: its arguments, and what its methods do in order."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import signal
import threading
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.core.memory import get_memory_profile
from puretrain.lightning.core.optimizer import LightningOptimizer
from puretrain.lightning.trainer import (
    checkpointing,
    distributed,
    evaluation,
    launching,
    loaders,
    training,
)
from puretrain.lightning.trainer import devices as devices_of
from puretrain.lightning.trainer.calls import call, implements, takes
from puretrain.lightning.trainer.distributed import Processes
from puretrain.lightning.trainer.foreign import adopt
from puretrain.lightning.trainer.optimization import configure
from puretrain.lightning.trainer.results import Results
from puretrain.lightning.trainer.states import RunningStage, StateView, TrainerFn, TrainerState
from puretrain.lightning.trainer.supporters import PredictionCollection
from puretrain.lightning.utilities import argparse as arguments
from puretrain.lightning.utilities.apply_func import apply_to_collection
from puretrain.lightning.utilities.distributed import rank_zero_info, rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.seed import isolate_rng
from puretrain.lightning.utilities.warnings import WarningCache

__all__ = ["Trainer"]

_warnings = WarningCache()
_DEFAULT: Any = ...  # not given; None says something else
_NOTHING = contextlib.nullcontext()


class Trainer:
    """Fits, validates and tests a LightningModule."""

    @arguments.overwrite_by_env_vars
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
        self._arguments = {k: v for k, v in locals().items() if k != "self"}
        self._speaks_2 = _has_arguments_of_2(self._arguments)
        self._module: Any = None
        self.datamodule: Any = None
        self.callbacks: list[Any] = []
        self._hooks: dict[str, Any] = {}
        self._fx: str | None = None
        self._results: Results | None = None
        self._state = TrainerState.INITIALIZING
        self._fn: TrainerFn | None = None
        self._stage: Any = None
        self._begin()
        given = (
            [callbacks]
            if callbacks is not None and not isinstance(callbacks, (list, tuple))
            else list(callbacks or [])
        )
        for callback in given:
            if hasattr(callback, "on_init_start"):
                callback.on_init_start(self)
        if barebones:
            logger, enable_checkpointing, enable_progress_bar = False, False, False
            enable_model_summary, num_sanity_val_steps = False, 0

        self.default_root_dir = os.fspath(default_root_dir or os.getcwd())
        self._weights_save_path = weights_save_path
        self.max_steps, self.min_steps = max_steps, min_steps
        endless = max_steps in (None, -1)
        self.max_epochs = max_epochs
        if max_epochs is None and endless and max_time is None:
            self.max_epochs = 1000
        self._epochs_are_given = max_epochs is not None
        self.min_epochs = 1 if min_epochs is None and min_steps is None else min_epochs
        for name, value in (("max_epochs", max_epochs), ("max_steps", max_steps)):
            if value is not None and value < -1:
                raise MisconfigurationException(
                    f"`{name}` must be a non-negative integer or -1, not {value}"
                )
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = str(gradient_clip_algorithm or "norm").lower()
        if self.gradient_clip_algorithm not in {"norm", "value"}:
            raise MisconfigurationException(
                f"`gradient_clip_algorithm` {gradient_clip_algorithm} is invalid. "
                "Allowed algorithms: ['value', 'norm']."
            )
        if gradient_clip_val is not None and not isinstance(gradient_clip_val, (int, float)):
            raise TypeError(
                f"`gradient_clip_val` should be an int or a float. Got {gradient_clip_val}."
            )
        if not isinstance(track_grad_norm, (int, float)) and track_grad_norm != "inf":
            raise MisconfigurationException(
                "`track_grad_norm` must be a positive number or 'inf' (infinity norm). "
                f"Got {track_grad_norm}."
            )
        self.track_grad_norm = track_grad_norm
        self._tracks_norms = track_grad_norm == "inf" or float(track_grad_norm) > 0
        self.check_val_every_n_epoch = check_val_every_n_epoch
        self.val_check_interval = val_check_interval
        self.val_check_batch: float = 1
        if isinstance(val_check_interval, (str, timedelta, dict)):
            raise MisconfigurationException("`val_check_interval` as a time is not supported")
        self._check_limits(
            overfit_batches,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            val_check_interval=val_check_interval,
        )
        self.overfit_batches = overfit_batches
        self.limit_train_batches = _limit(limit_train_batches)
        self.limit_val_batches = _limit(limit_val_batches)
        self.limit_test_batches = _limit(limit_test_batches)
        self.limit_predict_batches = _limit(limit_predict_batches)
        if num_sanity_val_steps is None:
            num_sanity_val_steps = 2
        self.num_sanity_val_steps = math.inf if num_sanity_val_steps == -1 else num_sanity_val_steps
        self.log_every_n_steps = log_every_n_steps
        self.flush_logs_every_n_steps = flush_logs_every_n_steps
        self.fast_dev_run: Any = fast_dev_run
        if not isinstance(fast_dev_run, (bool, int)) or fast_dev_run < 0:
            raise MisconfigurationException(
                f"fast_dev_run={fast_dev_run} is not a valid configuration. It should be either a "
                "bool or an int >= 0"
            )
        if fast_dev_run:
            count = int(fast_dev_run)
            self.limit_train_batches = self.limit_val_batches = count
            self.limit_test_batches = self.limit_predict_batches = count
            self.max_steps, self.max_epochs, self.num_sanity_val_steps = count, 1, 0
            self.val_check_interval, self.check_val_every_n_epoch = 1.0, 1
            logger, self._epochs_are_given = False, True
            rank_zero_info(
                "Running in fast_dev_run mode: will run a full train, val and test loop using "
                f"{count} batch(es)."
            )
        self.truncated_bptt_steps = truncated_bptt_steps
        self.resume_from_checkpoint = resume_from_checkpoint
        self.terminate_on_nan = terminate_on_nan
        self._detect_anomaly = detect_anomaly
        self.reload_dataloaders_every_epoch = reload_dataloaders_every_epoch
        self._reload_every = (
            1 if reload_dataloaders_every_epoch else (reload_dataloaders_every_n_epochs)
        )
        self.multiple_trainloader_mode = multiple_trainloader_mode
        self.weights_summary = weights_summary
        if weights_summary not in (None, "top", "full", "default"):
            raise MisconfigurationException(
                f"`weights_summary` can be None, top, full, got {weights_summary}"
            )
        if enable_model_summary is False:
            self.weights_summary = None
        self.prepare_data_per_node = prepare_data_per_node
        self.auto_lr_find, self.auto_scale_batch_size = auto_lr_find, auto_scale_batch_size
        self.deterministic, self.benchmark = deterministic, benchmark
        self.log_gpu_memory, self.process_position = log_gpu_memory, process_position
        self.automatic_optimization = automatic_optimization
        self.move_metrics_to_cpu, self.replace_sampler_ddp = (
            move_metrics_to_cpu,
            replace_sampler_ddp and use_distributed_sampler,
        )
        self.sync_batchnorm = sync_batchnorm
        self._deadline: float | None = None
        self._max_time = max_time
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        if benchmark:
            torch.backends.cudnn.benchmark = True
        if str(amp_backend).lower() not in {"native", "apex"}:
            raise MisconfigurationException(f"amp_backend is 'native', not {amp_backend!r}")
        if str(amp_backend).lower() == "apex" and str(precision) == "16":
            raise MisconfigurationException(
                "Apex is not used here; leave amp_backend='native', which is torch's autocast"
            )
        strategy, precision = devices_of.read_plugins(plugins, strategy, precision)
        if auto_select_gpus and isinstance(gpus, int) and gpus:
            from puretrain.lightning.tuner.auto_gpu_select import pick_multiple_gpus

            gpus = pick_multiple_gpus(gpus)
        accelerator = accelerator or distributed_backend
        self.accelerator_name, self.strategy_name = accelerator, strategy
        self._set_device(
            devices_of.plan_of(
                accelerator, strategy, devices, num_nodes, num_processes, gpus, tpu_cores
            )
        )
        devices_of.check_logging_of_memory(log_gpu_memory, self.on_gpu)
        self._set_precision(precision)
        self.accumulate_grad_batches: int = 1
        self._set_profiler(profiler)
        self._set_logger(logger)
        self._set_callbacks(
            given,
            checkpoint_callback if enable_checkpointing is None else enable_checkpointing,
            progress_bar_refresh_rate,
            enable_progress_bar,
            accumulate_grad_batches,
            stochastic_weight_avg,
        )
        self._call_each("on_init_end")

    # ── Arguments ─────────────────────────────────────────────────────────────────────────────────

    def _check_limits(self, overfit: Any, **limits: Any) -> None:
        for name, value in {**limits, "overfit_batches": overfit}.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise MisconfigurationException(
                    f"You have passed invalid value {value} for {name}, it has to be in "
                    "[0.0, 1.0] or an int."
                )
            if isinstance(value, float) and value > 1.0:
                raise MisconfigurationException(
                    f"You have passed invalid value {value} for {name}, it has to be in "
                    "[0.0, 1.0] or an int."
                )

    def _set_device(self, plan: devices_of.Plan) -> None:
        self._processes = Processes(plan, plan.devices[0])
        self._splits = plan.parts > 1
        self._train_results.processes = self._processes
        self.num_nodes = plan.nodes
        self.num_processes = plan.per_node
        gpus = [device.index for device in plan.devices if device.type == "cuda"]
        self.data_parallel_device_ids = gpus or None
        self.num_gpus = len(gpus)
        self._take_ranks()

    def _take_ranks(self) -> None:
        """Find out which of the processes this is, and its device."""
        plan = self._processes.plan
        vars(self).update(distributed.assign_ranks(plan))
        self._predictions = PredictionCollection(self.global_rank, self.world_size)
        self._device = plan.devices[self.local_rank if plan.kind == "ddp" else 0]
        self._processes.root_device = self._device

    def _set_precision(self, precision: Any) -> None:
        words = {
            "32": "32", "32-true": "32", "64": "64", "64-true": "64", "16": "16",
            "16-mixed": "16", "bf16": "bf16", "bf16-mixed": "bf16", "16-true": "16-true",
            "bf16-true": "bf16-true",
        }  # fmt: skip
        kind = words.get(str(precision if precision is not None else 32))
        if kind is None:
            raise MisconfigurationException(
                f"precision={precision!r} is not one of 32, 64, 16, 'bf16', and their spellings "
                "'32-true', '64-true', 'bf16-mixed', 'bf16-true'"
            )
        if kind == "16" and self._device.type == "cpu":
            if precision != "16-mixed":
                raise MisconfigurationException(
                    "You have asked for native AMP on CPU, but AMP is only available on GPU: "
                    "precision=16 needs a GPU; on the CPU use precision='bf16'"
                )
            rank_zero_warn(
                "You passed `Trainer(accelerator='cpu', precision='16-mixed')` but AMP with fp16 "
                "is not supported on CPU. Using `precision='bf16-mixed'` instead."
            )
            kind, precision = "bf16", "bf16-mixed"
        self.precision = precision
        self._double = kind == "64"
        self._half = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(kind)
        self._casting: Any = None
        self._scaler: Any = None
        if kind == "16":
            self._cast_to_half(self._device.type)
        elif kind == "bf16":
            self._casting = partial(torch.autocast, self._device.type, dtype=torch.bfloat16)
        elif self._double or self._half is not None:
            self._casting = partial(_default_dtype, torch.float64 if self._double else self._half)

    def _cast_to_half(self, device: str) -> None:
        """Compute in float16 where that is good enough, with a loss scale."""
        self._casting = partial(torch.autocast, device, dtype=torch.float16)
        self._scaler = torch.amp.GradScaler(device)

    @property
    def scaler(self) -> Any:
        """The loss scale of precision 16; None otherwise."""
        return self._scaler

    def _set_profiler(self, profiler: Any) -> None:
        from puretrain.lightning.profiler import PassThroughProfiler

        self.profiler: Any = PassThroughProfiler()
        self._profiles = profiler not in (None, False)
        if not self._profiles:
            return
        if isinstance(profiler, str):
            from puretrain.lightning import profiler as rooms

            names = {
                "simple": "SimpleProfiler",
                "advanced": "AdvancedProfiler",
                "pytorch": "PyTorchProfiler",
            }
            if profiler.lower() not in names:
                raise ValueError(
                    "When passing string value for the `profiler` parameter of `Trainer`, it can "
                    f"only be one of {list(names)}"
                )
            profiler = getattr(rooms, names[profiler.lower()])()
        elif profiler is True:
            from puretrain.lightning import profiler as rooms

            profiler = rooms.SimpleProfiler()
        self.profiler = profiler
        self._profiles = not isinstance(profiler, PassThroughProfiler)

    def _set_logger(self, logger: Any) -> None:
        if logger is True:
            from puretrain.lightning.loggers import TensorBoardLogger

            logger = TensorBoardLogger(
                save_dir=self.default_root_dir, version=None, name="lightning_logs"
            )
        if isinstance(logger, (list, tuple)):
            if len(logger) == 1:
                logger = logger[0]
            elif logger:
                from puretrain.lightning.loggers import LoggerCollection

                logger = LoggerCollection(logger)
        self._logger = logger or None

    def _set_callbacks(
        self,
        given: list[Any],
        checkpointing_wanted: Any,
        refresh_rate: int | None,
        enable_progress_bar: bool | None,
        accumulate: Any,
        averaging: bool,
    ) -> None:
        from puretrain.lightning.callbacks import (
            GradientAccumulationScheduler,
            ModelCheckpoint,
            ProgressBar,
            ProgressBarBase,
            StochasticWeightAveraging,
            Timer,
        )

        found = list(given)
        if not isinstance(checkpointing_wanted, bool) and checkpointing_wanted is not None:
            if not isinstance(checkpointing_wanted, ModelCheckpoint):
                raise MisconfigurationException(
                    "Invalid type provided for checkpoint_callback: Expected bool but received "
                    f"{type(checkpointing_wanted)}."
                )
            found.append(checkpointing_wanted)
        has_checkpoint = any(isinstance(c, ModelCheckpoint) for c in found)
        if has_checkpoint and checkpointing_wanted is False:
            raise MisconfigurationException(
                "Trainer was configured with checkpoint_callback=False but found ModelCheckpoint "
                "in callbacks list."
            )
        if not has_checkpoint and checkpointing_wanted is True and not self.fast_dev_run:
            found.append(ModelCheckpoint())
        bars = [c for c in found if isinstance(c, ProgressBarBase)]
        if len(bars) > 1:
            raise MisconfigurationException(
                "You added multiple progress bar callbacks to the Trainer, but currently only one "
                "progress bar is supported."
            )
        if refresh_rate is None:
            refresh_rate = 1
        self.progress_bar_callback: Any = bars[0] if bars else None
        if bars and enable_progress_bar is False:
            raise MisconfigurationException(
                "Trainer was configured with `enable_progress_bar=False` but found a progress bar "
                "in callbacks list."
            )
        if not bars and enable_progress_bar is not False and refresh_rate > 0:
            self.progress_bar_callback = ProgressBar(
                refresh_rate=refresh_rate, process_position=self.process_position
            )
            found.append(self.progress_bar_callback)
        if isinstance(accumulate, dict):
            self._check_one(found, GradientAccumulationScheduler, "accumulate_grad_batches")
            found.append(GradientAccumulationScheduler(accumulate))
        elif isinstance(accumulate, int) and not isinstance(accumulate, bool) and accumulate >= 1:
            self.accumulate_grad_batches = accumulate
        else:
            raise MisconfigurationException(
                f"Gradient accumulation supports only int >= 1 and dict types, not {accumulate!r}"
            )
        if averaging and not any(isinstance(c, StochasticWeightAveraging) for c in found):
            found.insert(0, StochasticWeightAveraging())
        if self._max_time is not None and not any(isinstance(c, Timer) for c in found):
            found.append(Timer(self._max_time))
        self.callbacks = _checkpoints_last(found)

    def _check_one(self, found: list[Any], kind: type, argument: str) -> None:
        if any(isinstance(callback, kind) for callback in found):
            raise MisconfigurationException(
                f"give either {argument} or a {kind.__name__}, not both"
            )

    # ── The state of a run ────────────────────────────────────────────────────────────────────────

    def _begin(self) -> None:
        """Set all that one run remembers to what it is before the first batch."""
        self.current_epoch = 0
        self.global_step = 0
        self.batch_idx = 0
        self.eval_batch_idx = 0
        self.optimizers: list[Any] = []
        self.lr_schedulers: list[dict[str, Any]] = []
        self.optimizer_frequencies: list[int] = []
        self.num_training_batches: float = 0
        self.should_stop = False
        self.interrupted = False
        self._fold: Any = None
        self._train_results = Results(training=True, processes=vars(self).get("_processes"))
        self._callback_metrics: dict[str, Any] = {}
        self._logged_metrics: dict[str, Any] = {}
        self._bar_metrics: dict[str, Any] = {}
        self._losses: deque[Tensor] = deque(maxlen=20)
        self._given_loaders: dict[str, Any] = {}
        self._eval_loaders: dict[str, list[Any]] = {}
        self._eval_counts: dict[str, list[float]] = {}
        self._eval_seen: dict[str, int] = {}
        self._eval_place: tuple[int, float] = (0, 0)
        self._train_loader: Any = None
        self._loaded_at: dict[str, int] = {}
        self._steps_done = self._updates = self._updates_of_batch = 0
        self._total_batches = self._batches_of_epoch = 0
        self._due = training.NOTHING_DUE
        self._epoch_over = self._epoch_cut = False
        self._item: Any = None
        self._item_is_last = self._accumulating = False
        self._batch: Any = None
        self._batch_outputs: Any = {}
        self._epoch_outputs: list[Any] = []
        self._hiddens: Any = None
        self._grad_norms: dict[str, Any] = {}
        self._signals: list[int] = []
        self._wrapped: list[Any] = []
        self._validates = self._validation_follows = self._late_follows = False
        self._postponed: list[Any] = []
        self._called: list[str] = []
        self._epoch_measured = contextlib.ExitStack()
        self._generators_to_restore: Tensor | None = None
        self._predictions = PredictionCollection(self.global_rank, self.world_size)
        self.predict_loop = evaluation.Prediction(0)
        self._lr_scheduler_step: Any = None
        self._own: dict[str, Any] = {}
        self._monitored = {"step": False, "epoch": False}
        self._unmonitored = {"step": False, "epoch": False}

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
    def logger_connector(self) -> _Metrics:
        """Where 1.x keeps the logged values."""
        return _Metrics(self)

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

    # ── Metrics ───────────────────────────────────────────────────────────────────────────────────

    def _keep_metrics(self) -> None:
        """Take what the results know now into the metrics that stay."""
        if self._results is None or self.sanity_checking:
            return
        found = self._results.collect()
        if self.move_metrics_to_cpu:
            found = {kind: _on_cpu(metrics) for kind, metrics in found.items()}
        self._callback_metrics.update(found["callback"])
        self._logged_metrics.update(found["log"])
        self._bar_metrics.update(found["bar"])

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """All logged values by name, as callbacks see them; tensors."""
        self._keep_metrics()
        return self._callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The values that went, or are to go, to the loggers."""
        self._keep_metrics()
        return self._logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The values for the progress bar; numbers."""
        self._keep_metrics()
        return {k: v.item() if isinstance(v, Tensor) else v for k, v in self._bar_metrics.items()}

    @property
    def progress_bar_dict(self) -> dict[str, Any]:
        """All that the progress bar shows."""
        return {**self._module.get_progress_bar_dict(), **self.progress_bar_metrics}

    def _mean_loss(self) -> float | None:
        if not self._losses:
            return None
        return float(torch.stack([loss.float().mean() for loss in self._losses]).mean())

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Give values to the logger, as numbers."""
        if not metrics or self.sanity_checking:
            return
        if self.log_gpu_memory and self.on_gpu:
            mode = "all" if self.log_gpu_memory is True else self.log_gpu_memory
            metrics = {**metrics, **get_memory_profile(mode)}
        self._logged_metrics.update(metrics)
        scalars = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        if step is None:
            given = scalars.pop("step", None)
            if given is None:
                scalars.setdefault("epoch", self.current_epoch)
                self._logged_metrics["epoch"] = self.current_epoch
                step = max(self._steps_done - 1, 0)
            else:
                step = int(given)
        if self._logger is None or not self.is_global_zero:
            return
        aggregate = getattr(self._logger, "agg_and_log_metrics", None)
        (aggregate or self._logger.log_metrics)(scalars, step=step)
        save = getattr(self._logger, "save", None)
        if save is not None and (step + 1) % self.flush_logs_every_n_steps == 0:
            save()

    # ── What a run needs ──────────────────────────────────────────────────────────────────────────

    def _call_each(self, name: str) -> None:
        for callback in self.callbacks:
            if implements(callback, name):
                getattr(callback, name)(self)

    def _wrapped_optimizers(self) -> list[Any]:
        if len(self._wrapped) != len(self.optimizers) or any(
            w.optimizer is not o for w, o in zip(self._wrapped, self.optimizers, strict=True)
        ):
            self._wrapped = [
                LightningOptimizer._to_lightning_optimizer(optimizer, self, number)
                for number, optimizer in enumerate(self.optimizers)
            ]
        return self._wrapped

    def _manual_step(self, wrapped: Any, closure: Any, kwargs: dict[str, Any]) -> Any:
        number = wrapped._optimizer_idx
        if training.hooks_of(self, "on_before_optimizer_step") is not None:
            before = self._fx
            call(self, "on_before_optimizer_step", wrapped.optimizer, number)
            self._fx = before
        returned = training.step_optimizer(self, wrapped.optimizer, closure, **kwargs)
        self._updates += 1
        self._updates_of_batch += 1
        return returned

    def _manual_backward(self, loss: Tensor, args: Any, kwargs: Any) -> None:
        before = self._fx
        if training.hooks_of(self, "on_before_backward") is not None:
            call(self, "on_before_backward", loss)
        own = self._own.get("backward")
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        if own is None:
            loss.backward(*args, **kwargs)
        else:
            count = takes(own)
            given = (loss, *args) if args else (loss, None, None)
            own(*given[: max(count, 1)], **kwargs)
        if training.hooks_of(self, "on_after_backward") is not None:
            call(self, "on_after_backward")
        self._fx = before

    def _clip(self, optimizer: Any, value: Any, algorithm: Any) -> None:
        value = self.gradient_clip_val if value is None else value
        training.clip(optimizer, value, str(algorithm or self.gradient_clip_algorithm).lower())

    def _moved(self, batch: Any, number: int) -> Any:
        """A batch where and as the module wants it."""
        if batch is None:
            return None
        transfer = self._transfer
        if transfer is None:
            return batch
        if self._double or self._half is not None:
            dtype = torch.float64 if self._double else self._half
            batch = apply_to_collection(
                batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t
            )
        before, method, after = transfer
        if before is not None:
            batch = before(*(batch, number)[: takes(before)])
        if method is not None:
            batch = method(*(batch, self._device, number)[: takes(method)])
        if after is not None:
            batch = after(*(batch, number)[: takes(after)])
        return batch

    def _find_transfer(self) -> None:
        found = []
        names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        for name in names:
            owners = [
                owner
                for owner in (self.datamodule, self._module)
                if owner is not None and implements(owner, name)
            ]
            found.append(getattr(owners[0], name) if owners else None)
        if self._device.type != "cpu" and found[1] is None:
            found[1] = self._module.transfer_batch_to_device
        needed = any(found) or self._double or self._half is not None
        self._transfer: Any = tuple(found) if needed else None

    def _may_warn_of_workers(self, loader: Any) -> bool:
        return (
            (os.cpu_count() or 1) > 2 and not self.fast_dev_run and len(loader.dataset) > 10_000
            if hasattr(loader.dataset, "__len__")
            else False
        )

    def _loaders_are_due(self, kind: str) -> bool:
        """Whether the loaders must be asked for again."""
        every = self._reload_every
        if not every or self.sanity_checking:
            return False
        before = self._loaded_at.get(kind)
        return before is not None and (self.current_epoch - before) >= every

    def _out_of_time(self) -> bool:
        return False

    def _more_steps_needed(self) -> bool:
        return bool(
            self.min_steps and self._steps_done < self.min_steps and not self._epochs_are_given
        )

    def _interrupt(self) -> None:
        number = self._signals.pop(0)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    @contextlib.contextmanager
    def _watching_signals(self) -> Iterator[None]:
        """Let Ctrl-C wait for the end of the batch; a second one does not wait."""
        self._signals = []
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self._signals:
                self._processes.disconnect()  # the others may be anywhere
                raise KeyboardInterrupt
            self._signals.append(number)

        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

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
        given = {"model": model, "train_dataloader": train, "val_dataloaders": val_dataloaders}
        options = {"datamodule": datamodule, "ckpt_path": ckpt_path}
        done, returned = launching.launch(self, "fit", given | options)
        if done:
            return int(returned)
        again = self._fold is not None and model is self._module
        self._attach(model, TrainerState.FITTING, TrainerFn.FITTING, datamodule, train,
                     train=train, val=val_dataloaders, keep=again)  # fmt: skip
        path = ckpt_path or self.resume_from_checkpoint
        if path is not None and os.fspath(path) in {"last", "best"}:
            path = self._checkpoint_path(os.fspath(path))
        with self._running("fit"):
            self._fit(path, again)
        return 1

    def _check_fit(self) -> None:
        module = self._module
        if not implements(module, "training_step"):
            raise MisconfigurationException(
                "No `training_step()` method defined. Lightning `Trainer` expects as minimum "
                "`training_step()`, `train_dataloader()` and `configure_optimizers()` to be "
                "defined."
            )
        if not loaders.has_loaders(self, "train"):
            raise MisconfigurationException(
                "No `train_dataloader()` method defined. Lightning `Trainer` expects as minimum "
                "`training_step()`, `train_dataloader()` and `configure_optimizers()` to be "
                "defined."
            )
        if not implements(module, "configure_optimizers"):
            raise MisconfigurationException(
                "No `configure_optimizers()` method defined. Lightning `Trainer` expects "
                "as minimum `training_step()`, `train_dataloader()` and `configure_optimizers()` "
                "to be defined."
            )
        has_step, has_val = implements(module, "validation_step"), loaders.has_loaders(self, "val")
        if has_val and not has_step:
            _warnings.warn(
                "you passed in a val_dataloader but have no validation_step. Skipping val loop"
            )
        if has_step and not has_val:
            _warnings.warn(
                "you defined a validation_step but have no val_dataloader. Skipping val loop"
            )
        enough = self.limit_val_batches > 0
        overfit = self.overfit_batches > 0
        self._validates = bool(has_step and (has_val or overfit) and enough)
        manual = not module.automatic_optimization
        if manual and (self.gradient_clip_val or 0) > 0:
            raise MisconfigurationException(
                "Automatic gradient clipping is not supported for manual optimization. Remove "
                f"`Trainer(gradient_clip_val={self.gradient_clip_val})` or switch to automatic "
                "optimization."
            )
        if manual and self.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "Automatic gradient accumulation is not supported for manual optimization. Remove "
                f"`Trainer(accumulate_grad_batches={self.accumulate_grad_batches})` or switch to "
                "automatic optimization."
            )

    def _fit(self, path: Any, again: bool) -> None:
        module = self._module
        if self.automatic_optimization is not None:
            module.automatic_optimization = self.automatic_optimization
        self._check_fit()
        self._prepare_data()
        call(self, "on_before_accelerator_backend_setup")
        self._setup("fit")
        self._to_device()
        self._configure_optimizers()
        call(self, "on_fit_start")
        self._log_hyperparameters()
        call(self, "on_pretrain_routine_start")
        if self.weights_summary is not None and not self.testing:
            self._print_summary()
        call(self, "on_pretrain_routine_end")
        state = self._fold if again else training.bound_state(self, None)
        if again:
            self.should_stop, self._epoch_cut, self._epoch_over = False, False, False
            state = state.replace(stop=torch.tensor(False))
        if path is not None:
            state = checkpointing.restore_fit(self, path, state)
            self._resume_accumulation(int(state.cursor.epoch))
        self._sanity_check()
        self._stage = RunningStage.TRAINING
        self._results = self._train_results
        module.train()
        if self.max_epochs == 0 or self.max_steps == 0 or self.limit_train_batches == 0:
            call(self, "on_fit_end")
            return
        training.prepare_training_loader(self)
        self._loaded_at["train"] = int(state.cursor.epoch)
        if self._generators_to_restore is not None:
            loaders.put_back(self._generators_to_restore)
            self._generators_to_restore = None
        self._fold = state
        try:
            with self._watching_signals(), self._detecting_anomaly():
                try:
                    self._fold = training.run_fit(self, state)
                finally:
                    self._epoch_measured.close()
        except KeyboardInterrupt:
            rank_zero_warn("Detected KeyboardInterrupt, attempting graceful shutdown...")
            self.interrupted, self._state = True, TrainerState.INTERRUPTED
            self._fx = None
            call(self, "on_keyboard_interrupt")
        self._stage = RunningStage.TRAINING
        call(self, "on_train_end")
        self._results = None
        self._finish_loggers("success")
        call(self, "on_fit_end")
        if self._profiles and hasattr(self.profiler, "describe"):
            self.profiler.describe()

    def _detecting_anomaly(self) -> Any:
        return torch.autograd.set_detect_anomaly(True) if self._detect_anomaly else _NOTHING

    def _profile(self, action: str) -> Any:
        """Measure what happens in a block, if there is a profiler."""
        return self.profiler.profile(action) if self._profiles else _NOTHING

    def _resume_accumulation(self, epoch: int) -> None:
        from puretrain.lightning.callbacks import GradientAccumulationScheduler

        for callback in self.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                self.accumulate_grad_batches = callback.get_accumulate_grad_batches(epoch)

    def _sanity_check(self) -> None:
        if not self._validates or not self.num_sanity_val_steps:
            return
        with isolate_rng():
            self._stage = RunningStage.SANITY_CHECKING
            evaluation.prepare_loaders(self, "val")
            if not sum(self._eval_counts["val"]):
                return
            call(self, "on_sanity_check_start")
            evaluation.run_evaluation(self, "val", most=self.num_sanity_val_steps)
            call(self, "on_sanity_check_end")
        self._results = None
        # loaders that were read for this check must begin anew
        self._eval_loaders.pop("val", None)

    def validate(
        self,
        model: Any = None,
        val_dataloaders: Any = None,
        ckpt_path: Any = _DEFAULT,
        verbose: bool = True,
        datamodule: Any = None,
        *,
        dataloaders: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run over the validation loaders; returns the logged values, for each loader."""
        given = dataloaders if dataloaders is not None else val_dataloaders
        return self._evaluate("val", model, given, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: Any = None,
        test_dataloaders: Any = None,
        ckpt_path: Any = _DEFAULT,
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
        return self._evaluate("test", model, given, ckpt_path, verbose, datamodule)

    def _evaluate(
        self, kind: str, model: Any, given: Any, path: Any, verbose: bool, datamodule: Any
    ) -> list[dict[str, float]]:
        given_all = {"kind": kind, "model": model, "given": given, "path": path}
        options = {"verbose": verbose, "datamodule": datamodule}
        done, returned = launching.launch(self, "_evaluate", given_all | options)
        if done:
            return list(returned)
        fit_module = self._module
        module = model if model is not None else fit_module
        if module is None:
            raise MisconfigurationException(
                f"give a model to `{'validate' if kind == 'val' else 'test'}`, as none was fitted"
            )
        state, fn, stage = {
            "val": (TrainerState.VALIDATING, TrainerFn.VALIDATING, "validate"),
            "test": (TrainerState.TESTING, TrainerFn.TESTING, "test"),
        }[kind]
        self._attach(module, state, fn, datamodule, given, keep=True, **{kind: given})
        if not implements(module, f"{evaluation._WORDS[kind]}_step"):
            raise MisconfigurationException(
                f"No `{evaluation._WORDS[kind]}_step()` method defined to run `Trainer.{stage}`."
            )
        if not loaders.has_loaders(self, kind) and not self.overfit_batches > 0:
            raise MisconfigurationException(
                f"No `{kind}_dataloader()` method defined to run `Trainer.{stage}`."
            )
        chosen = self._path_to_evaluate(path, model)
        with self._running(stage):
            self._prepare_data()
            self._stage = evaluation._STAGES[kind]
            call(self, "on_before_accelerator_backend_setup")
            self._setup(stage)
            self._to_device()
            call(self, "on_fit_start")
            if chosen is not None:
                checkpointing.restore_weights(self, chosen)
            self._eval_loaders.pop(kind, None)
            with self._watching_signals():
                found = evaluation.run_evaluation(self, kind)
                self._agree()
                if self._signals and self._processes.connected:
                    self._interrupt()
            self._predictions.to_disk()
            self._predictions = PredictionCollection(self.global_rank, self.world_size)
            if verbose and self.is_global_zero:
                self._print_results(stage, found)
            self._finish_loggers("success")
            call(self, "on_fit_end")
        if kind == "test":  # as in 1.2, once for the run and once for the test
            self._teardown_callbacks(stage)
        return found

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
        given = {"model": model, "dataloaders": dataloaders, "datamodule": datamodule}
        options = {"return_predictions": return_predictions, "ckpt_path": ckpt_path}
        done, returned = launching.launch(self, "predict", given | options)
        if done:
            return returned
        module = model if model is not None else self._module
        if module is None:
            raise MisconfigurationException("give a model to `predict`, as none was fitted")
        self._attach(module, TrainerState.PREDICTING, TrainerFn.PREDICTING, datamodule, dataloaders,
                     keep=True, predict=dataloaders)  # fmt: skip
        chosen = self._path_to_evaluate(ckpt_path, model)
        with self._running("predict"):
            self._prepare_data()
            self._setup("predict")
            self._to_device()
            if chosen is not None:
                checkpointing.restore_weights(self, chosen)
            with self._watching_signals():
                return evaluation.run_prediction(self, keep=return_predictions is not False)

    def _path_to_evaluate(self, path: Any, model: Any) -> Any:
        if path is _DEFAULT:
            if model is not None or self.fast_dev_run or self.checkpoint_callback is None:
                return None
            if not self.checkpoint_callback.best_model_path:
                return None
            path = "best"
        if path is None:
            return None
        return (
            self._checkpoint_path(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else path
        )

    def _checkpoint_path(self, path: str) -> str:
        callback = self.checkpoint_callback
        if path not in {"best", "last"}:
            return path
        if callback is None:
            raise MisconfigurationException(
                f'ckpt_path="{path}" needs a ModelCheckpoint, and this trainer has none'
            )
        found = callback.best_model_path if path == "best" else callback.last_model_path
        if not found:
            if self.fast_dev_run:
                raise MisconfigurationException(
                    f'You cannot use ckpt_path="{path}" with `fast_dev_run`, which saves nothing; '
                    "pass an exact checkpoint path"
                )
            raise MisconfigurationException(
                f'ckpt_path="{path}" is set but ModelCheckpoint is not configured to save the '
                f"{path} model."
            )
        return str(found)

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

    # ── Around a run ──────────────────────────────────────────────────────────────────────────────

    def _attach(
        self,
        model: Any,
        state: TrainerState,
        fn: TrainerFn,
        datamodule: Any,
        first: Any,
        *,
        keep: bool,
        **given: Any,
    ) -> None:
        """Take a module and its data for a run."""
        if (
            first is not None
            and not isinstance(first, (list, tuple, dict))
            and callable(getattr(first, "prepare_data", None))
        ):
            datamodule = first  # a data module where a loader is expected
            given = {kind: value for kind, value in given.items() if value is not first}
        any_given = any(value is not None for value in given.values())
        if datamodule is not None and any_given:
            raise MisconfigurationException(
                "You cannot pass both a loader and a datamodule to one method of the trainer"
            )
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"`model` must be a `LightningModule`, got `{type(model).__qualname__}`"
            )
        if not keep:
            self._begin()
        self._state, self._fn = state, fn
        self._module = model
        adopt(model)
        model.trainer = self
        if datamodule is None and (fn is not TrainerFn.FITTING or not any_given):
            datamodule = getattr(model, "datamodule", None)  # of the model's last run
        self.datamodule = datamodule
        if datamodule is not None:
            self.datamodule.trainer = self
            model.datamodule = self.datamodule
        self._given_loaders = {k: v for k, v in given.items() if v is not None} | (
            {"train": self._given_loaders["train"]}
            if keep and "train" in self._given_loaders and fn is not TrainerFn.FITTING
            else {}
        )
        self._hooks = {}
        self._fx = None
        model.precision = self.precision
        self._add_module_callbacks()
        self._find_transfer()

    def _add_module_callbacks(self) -> None:
        method = getattr(self._module, "configure_callbacks", None)
        if method is None or not implements(self._module, "configure_callbacks"):
            return
        found = method()
        found = [found] if found is not None and not isinstance(found, (list, tuple)) else found
        if not found:
            return
        kinds = {type(callback) for callback in found}
        kept = [callback for callback in self.callbacks if type(callback) not in kinds]
        self.callbacks = _checkpoints_last([*kept, *found])

    @contextlib.contextmanager
    def _running(self, stage: str) -> Iterator[None]:
        try:
            self._processes.connect(self)
            yield
        except BaseException as error:
            self._processes.disconnect()
            launching.end_children()
            self._fx = None
            self._state = TrainerState.INTERRUPTED
            self._results = None
            call(self, "on_exception", error)
            raise
        self._processes.release()
        self._teardown(stage)
        if not self.interrupted:
            self._state = TrainerState.FINISHED
        self._stage = None
        self._fx = None

    def _prepare_data(self) -> None:
        for owner in (self.datamodule, self._module):
            if owner is not None and implements(owner, "prepare_data"):
                done = owner is self.datamodule and self._was_done(owner, "has_prepared_data")
                if not done and distributed.prepares_data(self, owner):
                    owner.prepare_data()
                self._processes.barrier()  # also where it was done: not all know of that

    def _was_done(self, data: Any, flag: str) -> bool:
        """Whether a data module has done this already: 1.x asks, 2.x calls it for each run."""
        return not self._speaks_2 and getattr(data, flag, False) is True

    def _setup(self, stage: str) -> None:
        if self._profiles and hasattr(self.profiler, "setup"):
            rank = self.local_rank if self.world_size > 1 else None
            self.profiler.setup(stage=stage, local_rank=rank, log_dir=self.log_dir)
        data, flag = self.datamodule, f"has_setup_{stage}"
        if callable(getattr(data, "setup", None)) and not self._was_done(data, flag):
            method = data.setup
            method(*(stage,)[: takes(method)])
        for callback in self.callbacks:
            if implements(callback, "setup"):
                method = callback.setup
                method(*(self, self._module, stage)[: takes(method)])
        for name in ("configure_sharded_model", "configure_model"):
            if implements(self._module, name):
                getattr(self._module, name)()
        if implements(self._module, "setup"):
            method = self._module.setup
            method(*(stage,)[: takes(method)])

    def _teardown(self, stage: str) -> None:
        if self.datamodule is not None and callable(getattr(self.datamodule, "teardown", None)):
            method = self.datamodule.teardown
            method(*(stage,)[: takes(method)])
        self._teardown_callbacks(stage)
        if implements(self._module, "teardown"):
            method = self._module.teardown
            method(*(stage,)[: takes(method)])

    def _teardown_callbacks(self, stage: str) -> None:
        for callback in self.callbacks:
            if implements(callback, "teardown"):
                method = callback.teardown
                method(*(self, self._module, stage)[: takes(method)])

    def _to_device(self) -> None:
        if self._double:
            self._module.double()
        elif self._half is not None:
            self._module.to(self._half)
        if self._device.type != "cpu":
            self._module.to(self._device)
        if self.sync_batchnorm and self._fn is TrainerFn.FITTING:
            self._processes.synchronize_norms(self._module)
        self._processes.begin(self._module, training=self._fn is TrainerFn.FITTING)

    def _configure_optimizers(self) -> None:
        if self.optimizers and self._fold is not None:
            return
        before, self._fx = self._fx, "configure_optimizers"
        found = configure(self._module.configure_optimizers())
        self._fx = before
        self.optimizers = [
            o.optimizer if isinstance(o, LightningOptimizer) else o for o in found.optimizers
        ]
        self.lr_schedulers = found.schedulers
        self.optimizer_frequencies = found.frequencies
        self._wrapped = []
        if self._module.automatic_optimization and any(
            config["interval"] == "step" and config["reduce_on_plateau"]
            for config in self.lr_schedulers
        ):
            _warnings.info("a ReduceLROnPlateau with interval 'step' looks at its metric each step")

    def _log_hyperparameters(self) -> None:
        logger = self._logger
        if logger is None or not self.is_global_zero:
            return
        module = self._module
        found: dict[str, Any] = {}
        for owner in (self.datamodule, module):
            if owner is not None and owner.__dict__.get("_log_hyperparams", True):
                hparams = owner.__dict__.get("_hparams_initial") or owner.__dict__.get("_hparams")
                if hparams:
                    found.update(hparams)
        logger.log_hyperparams(found)
        if hasattr(logger, "log_graph"):
            logger.log_graph(module)
        if hasattr(logger, "save"):
            logger.save()

    def _finish_loggers(self, status: str) -> None:
        if self._logger is None or not self.is_global_zero:
            return
        if hasattr(self._logger, "save"):  # what waits to be joined with values of the same step
            self._logger.save()
        if hasattr(self._logger, "finalize"):
            self._logger.finalize(status)

    def _print_summary(self) -> None:
        self._module.summarize(mode="top" if self.weights_summary == "default" else
                               self.weights_summary)  # fmt: skip

    def _print_results(self, stage: str, found: list[dict[str, Any]]) -> None:
        for number, metrics in enumerate(found):
            print("-" * 80)
            print(f"DATALOADER:{number} {stage.upper()} RESULTS")
            print(_formatted(metrics))
        if found:
            print("-" * 80)

    def __getstate__(self) -> dict[str, Any]:
        """For the processes that a run starts: where it stands is begun anew there."""
        return {**vars(self), "_fold": None, "_hooks": {}, "_item": None, "_transfer": None}

    def _agree(self) -> None:
        """Let all processes stop, or note a signal, after the same step."""
        if not self._processes.connected:
            return
        stop, number = self._processes.largest(
            int(bool(self.should_stop)), max(self._signals, default=0)
        )
        self.should_stop = bool(stop)
        if number and not self._signals:
            self._signals.append(number)

    # ── From a command line ───────────────────────────────────────────────────────────────────────

    @classmethod
    def add_argparse_args(cls, parent_parser: Any, **kwargs: Any) -> ArgumentParser:
        """Add the trainer's arguments to a parser."""
        return arguments.add_argparse_args(cls, parent_parser, **kwargs)

    @classmethod
    def parse_argparser(cls, arg_parser: Any) -> Namespace:
        """Read the command line, or take what was read."""
        return arguments.parse_argparser(cls, arg_parser)

    @classmethod
    def from_argparse_args(cls, args: Any, **kwargs: Any) -> Trainer:
        """Make a trainer of the arguments that a parser has read."""
        return arguments.from_argparse_args(cls, args, **kwargs)

    @classmethod
    def parse_env_variables(cls) -> Namespace:
        """The arguments that environment variables such as ``PL_TRAINER_MAX_EPOCHS`` give."""
        return arguments.parse_env_variables(cls)

    @classmethod
    def get_init_arguments_and_types(cls) -> list[tuple[str, tuple[Any, ...], Any]]:
        """The trainer's arguments: names, types and defaults."""
        return arguments.get_init_arguments_and_types(cls)

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


class _Metrics:
    """The metrics of a trainer under the name of an object of 1.x; they can be set, too."""

    def __init__(self, trainer: Trainer) -> None:
        object.__setattr__(self, "_trainer", trainer)

    def __getattr__(self, name: str) -> Any:
        if name not in _METRICS:
            raise AttributeError(f"the trainer's logger_connector has no attribute {name!r}")
        return getattr(self._trainer, name)

    def __setattr__(self, name: str, values: Any) -> None:
        setattr(self._trainer, _METRICS[name], dict(values))


_METRICS = {
    "callback_metrics": "_callback_metrics",
    "logged_metrics": "_logged_metrics",
    "progress_bar_metrics": "_bar_metrics",
}


def _on_cpu(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in metrics.items()}


def _limit(limit: Any) -> Any:
    return 1.0 if limit is None else limit


def _has_arguments_of_2(given: dict[str, Any]) -> bool:
    """Whether a trainer is made with arguments, or values of them, that 1.x has not."""
    parameters = inspect.signature(Trainer.__init__).parameters.values()
    later = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return (
        any(given[p.name] != p.default for p in later)
        or given["accelerator"] in ("auto", "cpu", "gpu", "cuda")
        or str(given["precision"]).endswith(("-mixed", "-true"))
    )


def _checkpoints_last(callbacks: list[Any]) -> list[Any]:
    from puretrain.lightning.callbacks import ModelCheckpoint

    saving = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
    return [c for c in callbacks if not isinstance(c, ModelCheckpoint)] + saving


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _formatted(metrics: dict[str, Any]) -> str:
    rows = (f"{name!r}: {value!r}" for name, value in sorted(metrics.items()))
    return "{" + ",\n ".join(rows) + "}"
