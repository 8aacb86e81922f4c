"""LightningModule: a model together with how it is trained, validated and tested."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puretrain.lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from puretrain.lightning.trainer import reporting, steps
from puretrain.lightning.trainer.results import is_metric
from puretrain.lightning.utilities import parsing
from puretrain.lightning.utilities.apply_func import apply_to_collection, move_data_to_device
from puretrain.lightning.utilities.distributed import rank_zero_info, rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["LightningModule"]

_ON_STEP = {  # hooks whose values belong to a step unless told otherwise: (on_step, on_epoch)
    "training_step": (True, False),
    "training_step_end": (True, False),
    "on_batch_start": (True, False),
    "on_batch_end": (True, False),
    "on_train_batch_start": (True, False),
    "on_train_batch_end": (True, False),
    "on_before_zero_grad": (True, False),
    "on_before_backward": (True, False),
    "on_after_backward": (True, False),
    "on_before_optimizer_step": (True, False),
    "optimizer_step": (True, False),
    "optimizer_zero_grad": (True, False),
    "configure_gradient_clipping": (True, False),
}
_NOT_IN = {
    "on_init_start",
    "on_init_end",
    "setup",
    "teardown",
    "prepare_data",
    "configure_optimizers",
    "on_before_accelerator_backend_setup",
    "on_fit_start",
    "on_fit_end",
    "on_pretrain_routine_start",
    "on_pretrain_routine_end",
    "on_train_end",
    "on_validation_end",
    "on_test_end",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_keyboard_interrupt",
    "on_predict_start",
    "on_predict_end",
    "on_predict_epoch_start",
    "on_predict_epoch_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
    "predict_step",
}
_ONLY_ON_EPOCH = {
    "on_train_start",
    "on_epoch_start",
    "on_epoch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_start",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "training_epoch_end",
    "validation_epoch_end",
    "test_epoch_end",
}


class LightningModule(ModelHooks, DataHooks, CheckpointHooks, nn.Module):
    """A model with its training step, optimizers and data; a Trainer runs it."""

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a module; its own arguments are those of the subclass."""
        super().__init__(*args, **kwargs)
        self._trainer: Any = None
        self._automatic_optimization = True
        self._example_input_array: Any = None
        self._truncated_bptt_steps: int | None = None
        self._datamodule: Any = None
        self._requires_grad_before: dict[Any, bool] = {}
        self._precision: Any = 32
        self._logger_override: Any = None

    # ── What it knows of its trainer ──────────────────────────────────────────────────────────────

    @property
    def trainer(self) -> Any:
        """The trainer that runs the module, None before the first run."""
        return self.__dict__.get("_trainer")

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        object.__setattr__(self, "_trainer", trainer)

    @property
    def datamodule(self) -> Any:
        """The data module of the run, if there is one."""
        return self.__dict__.get("_datamodule")

    @datamodule.setter
    def datamodule(self, datamodule: Any) -> None:
        object.__setattr__(self, "_datamodule", datamodule)

    @property
    def example_input_array(self) -> Any:
        """An input of ``forward``, for the summary and the graph."""
        return self.__dict__.get("_example_input_array")

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        object.__setattr__(self, "_example_input_array", example)

    @property
    def automatic_optimization(self) -> bool:
        """Whether the trainer calls backward and the optimizers; if not, ``training_step`` does."""
        return self.__dict__.get("_automatic_optimization", True)

    @automatic_optimization.setter
    def automatic_optimization(self, automatic: bool) -> None:
        self._automatic_optimization = automatic

    @property
    def truncated_bptt_steps(self) -> int:
        """After how many time steps to backpropagate; 0: through the whole sequence."""
        return self.__dict__.get("_truncated_bptt_steps") or 0

    @truncated_bptt_steps.setter
    def truncated_bptt_steps(self, steps: int) -> None:
        self._truncated_bptt_steps = steps

    @property
    def current_epoch(self) -> int:
        """The number of the epoch, from 0."""
        return self.trainer.current_epoch if self.trainer is not None else 0

    @property
    def global_step(self) -> int:
        """How many optimizer steps were made in the whole run."""
        return self.trainer.global_step if self.trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """The number of this process among all."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return self.trainer.local_rank if self.trainer is not None else 0

    @property
    def logger(self) -> Any:
        """The trainer's logger."""
        return self.trainer.logger if self.trainer is not None else None

    @property
    def loggers(self) -> list[Any]:
        """The trainer's loggers."""
        return self.trainer.loggers if self.trainer is not None else []

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        if "_replica_device" in self.__dict__:
            return self.__dict__["_replica_device"]
        for tensor in self.parameters():
            return tensor.device
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the parameters."""
        for tensor in self.parameters():
            return tensor.dtype
        return torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """Whether the parameters are on a GPU."""
        return self.device.type == "cuda"

    @property
    def precision(self) -> Any:
        """The precision of the run."""
        return self.__dict__.get("_precision", 32)

    @precision.setter
    def precision(self, precision: Any) -> None:
        self._precision = precision

    hparams = property(parsing.hyperparameters, parsing.assign_hyperparameters)
    hparams_initial = property(parsing.initial_hyperparameters)

    def save_hyperparameters(
        self, *args: Any, ignore: Any = None, frame: Any = None, logger: bool = True
    ) -> None:
        """Keep arguments of ``__init__`` as ``self.hparams``; they go into checkpoints and logs.

        Args:
            *args: all arguments by default; or some names; or one dict or Namespace.
            ignore: names to leave out.
            frame: of the ``__init__``; by default the caller's.
            logger: whether loggers get them, too.
        """
        import inspect

        if frame is None:
            frame = inspect.currentframe().f_back
        object.__setattr__(self, "_log_hyperparams", logger)
        parsing.save_hyperparameters(self, *args, ignore=ignore, frame=frame)

    # ── Steps ─────────────────────────────────────────────────────────────────────────────────────

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute an output."""
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch: a tensor, a dict with ``loss``, or None to skip it."""
        rank_zero_warn("`training_step` must be implemented to be used with the Lightning Trainer")

    def training_step_end(self, *args: Any, **kwargs: Any) -> Any:
        """Take what ``training_step`` returned, and return it again, changed or not."""

    def training_epoch_end(self, outputs: Any) -> None:
        """Look at what all training steps of an epoch returned."""

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Look at a batch of validation data."""

    def validation_step_end(self, *args: Any, **kwargs: Any) -> Any:
        """Take what ``validation_step`` returned, and return it again, changed or not."""

    def validation_epoch_end(self, outputs: Any) -> None:
        """Look at what all validation steps returned."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Look at a batch of test data."""

    def test_step_end(self, *args: Any, **kwargs: Any) -> Any:
        """Take what ``test_step`` returned, and return it again, changed or not."""

    def test_epoch_end(self, outputs: Any) -> None:
        """Look at what all test steps returned."""

    def predict_step(
        self, batch: Any, batch_idx: int = 0, dataloader_idx: int | None = None
    ) -> Any:
        """Compute the output for a batch."""
        return self(batch)

    def predict(self, batch: Any, batch_idx: int = 0, dataloader_idx: int | None = None) -> Any:
        """The name that ``predict_step`` had in 1.2."""
        return self(batch)

    def configure_callbacks(self) -> Any:
        """Give callbacks that belong to the module."""
        return []

    def configure_optimizers(self) -> Any:
        """Give the optimizers, and learning-rate schedulers if there are any."""
        rank_zero_warn(
            "`configure_optimizers` must be implemented to be used with the Lightning Trainer"
        )

    # ── Logging ───────────────────────────────────────────────────────────────────────────────────

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = torch.mean,
        tbptt_reduce_fx: Any = None,
        tbptt_pad_token: Any = None,
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_op: Any = None,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value by name.

        Args:
            name: the name.
            value: a number, a tensor of one element, or a metric.
            prog_bar: show it in the progress bar.
            logger: give it to the loggers; True by default.
            on_step: show each step's value; by default in the hooks of a training step.
            on_epoch: show the epoch's; by default everywhere else.
            reduce_fx: how an epoch's value comes from those of its steps: mean, min, max, sum, or
                a function of a tensor of all values.
            tbptt_reduce_fx: kept for its name.
            tbptt_pad_token: kept for its name.
            enable_graph: keep the graph of the value.
            sync_dist: reduce over processes.
            sync_dist_op: how to reduce.
            sync_dist_group: over which processes.
            add_dataloader_idx: with several loaders, append ``/dataloader_idx_N`` to the name.
            batch_size: the weight of the value in an epoch's mean; found in the batch by default.
            metric_attribute: kept for its name.
            rank_zero_only: only the first process logs it.

        Raises:
            MisconfigurationException: it is logged where no value can be, or with arguments that
                do not fit an earlier call.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            rank_zero_warn(
                "You are trying to `self.log()` but the `self.trainer` reference is not registered "
                "on the model yet. This is most likely because the model hasn't been passed to the "
                "`Trainer`"
            )
            return
        fx, results = trainer._fx, trainer._results
        if results is None or fx is None or fx in _NOT_IN:
            where = f"inside `{fx}`" if fx else "here"
            raise MisconfigurationException(
                f"You can't `self.log({name!r}, ...)` {where}: values are logged in the hooks of "
                "training, validation and test"
            )
        if on_step is None or on_epoch is None:
            step, epoch = _ON_STEP.get(fx, (False, True))
            on_step = step if on_step is None else on_step
            on_epoch = epoch if on_epoch is None else on_epoch
        if fx in _ONLY_ON_EPOCH and on_step:
            raise MisconfigurationException(
                f"You can't `self.log({name!r}, ..., on_step=True)` inside `{fx}`: it belongs to "
                "no step"
            )
        if not on_step and not on_epoch:
            raise MisconfigurationException(
                f"`self.log({name!r}, ..., on_step=False, on_epoch=False)` is not useful."
            )
        if "/dataloader_idx_" in name:
            raise MisconfigurationException(
                f"You called `self.log` with the key `{name}` but it should not contain "
                "information like `dataloader_idx`"
            )
        options = (on_step, on_epoch, prog_bar, logger is not False, reduce_fx, add_dataloader_idx)
        sync = None
        if sync_dist and not rank_zero_only:
            at_once = sync_dist_op not in (None, "mean", "avg")
            sync = (sync_dist_op if at_once else None, sync_dist_group)
        results.log(fx, name, value, options, batch_size, enable_graph, sync)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log several values by name; arguments as for :meth:`log`."""
        if is_metric(dictionary) and not isinstance(dictionary, Mapping):
            dictionary = dict(dictionary.items())
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, in one process only, and without disturbing the progress bar."""
        trainer = self.trainer
        if trainer is None:
            print(*args, **kwargs)
        elif trainer.is_global_zero:
            bar = trainer.progress_bar_callback
            if bar is not None and bar.is_enabled and hasattr(bar, "print"):
                bar.print(*args, **kwargs)
            else:
                print(*args, **kwargs)

    def get_progress_bar_dict(self) -> dict[str, Any]:
        """What the progress bar shows besides logged values: the loss, and the logger's version."""
        found: dict[str, Any] = {}
        trainer = self.trainer
        loss = reporting.mean_loss(trainer)
        if loss is not None:
            found["loss"] = f"{loss:.3g}"
        version = getattr(trainer.logger, "version", None) if trainer.logger is not None else None
        if version is not None:
            found["v_num"] = str(version)[-4:] if isinstance(version, str) else version
        return found

    def write_prediction(self, name: str, value: Any, filename: str = "predictions.pt") -> None:
        """Collect a prediction of a test, to be written to a file at its end."""
        self.trainer._predictions.add({filename: {name: value}})

    def write_prediction_dict(
        self, predictions_dict: dict[str, Any], filename: str = "predictions.pt"
    ) -> None:
        """Collect predictions of a test, to be written to a file at its end."""
        for name, value in predictions_dict.items():
            self.write_prediction(name, value, filename)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather tensors of all processes; with one process each gets a first dimension of 1."""
        from puretrain.lightning.utilities.distributed import all_gather_ddp_if_available

        return apply_to_collection(
            data, Tensor, all_gather_ddp_if_available, group=group, sync_grads=sync_grads
        )

    # ── Optimization ──────────────────────────────────────────────────────────────────────────────

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizers: one, or a list of several."""
        trainer = self.trainer
        found = steps.wrapped_optimizers(trainer) if use_pl_optimizer else trainer.optimizers
        if len(found) == 1:
            return found[0]
        return list(found)

    def lr_schedulers(self) -> Any:
        """The schedulers: None, one, or a list of several."""
        found = [config["scheduler"] for config in self.trainer.lr_schedulers]
        if not found:
            return None
        return found[0] if len(found) == 1 else found

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; after the loss come optimizer and number, or autograd's arguments."""
        if args and (args[0] is None or isinstance(args[0], torch.optim.Optimizer)):
            args = args[2:]
        loss.backward(*args, **kwargs)

    def manual_backward(
        self, loss: Tensor, optimizer: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Compute gradients in manual optimization."""
        if self.automatic_optimization:
            raise MisconfigurationException(
                "manual_backward is for manual optimization: set "
                "self.automatic_optimization = False in __init__"
            )
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            args = (optimizer, *args)
        steps.manual_backward(self.trainer, loss, args, kwargs)

    def optimizer_step(
        self,
        epoch: int | None = None,
        batch_idx: int | None = None,
        optimizer: Any = None,
        optimizer_idx: Any = None,
        optimizer_closure: Callable[[], Any] | None = None,
        on_tpu: bool | None = None,
        using_native_amp: bool | None = None,
        using_lbfgs: bool | None = None,
    ) -> None:
        """Make a step of an optimizer; the closure computes the loss and its gradients."""
        if optimizer_closure is None and callable(optimizer_idx):
            optimizer_closure = optimizer_idx  # the order of 2.x
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Set gradients to none; arguments are epoch, batch number, optimizer[, its number]."""
        args[2].zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        optimizer_idx: int | None = None,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip gradients; override it to do so in another way."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradients of an optimizer's parameters by norm or by value."""
        trainer = self.trainer
        value = trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        algorithm = str(gradient_clip_algorithm or trainer.gradient_clip_algorithm)
        steps.clip(optimizer, value, algorithm.lower())

    def lr_scheduler_step(self, scheduler: Any, *args: Any) -> None:
        """Make a step of a scheduler; the last argument is the metric it monitors, or None."""
        metric = args[-1] if args else None
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def toggle_optimizer(self, optimizer: Any, optimizer_idx: int | None = None) -> None:
        """Let only this optimizer's parameters require gradients."""
        before: dict[Any, bool] = {}
        for each in self.trainer.optimizers:
            for group in each.param_groups:
                for parameter in group["params"]:
                    if parameter not in before:
                        before[parameter] = parameter.requires_grad
                        parameter.requires_grad = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad = before[parameter]
        object.__setattr__(self, "_requires_grad_before", before)

    def untoggle_optimizer(self, optimizer_idx: Any = None) -> None:
        """Undo :meth:`toggle_optimizer`."""
        for parameter, required in self._requires_grad_before.items():
            parameter.requires_grad = required
        object.__setattr__(self, "_requires_grad_before", {})

    def tbptt_split_batch(self, batch: Any, split_size: int) -> list[Any]:
        """Cut a batch along time, its second dimension, into pieces of ``split_size``."""
        dims = [len(x[0]) for x in batch if isinstance(x, (Tensor, list, tuple))]
        if not dims or any(length != dims[0] for length in dims):
            raise MisconfigurationException(
                f"the sequences of a batch have the lengths {dims}; they must be equal to be cut"
            )
        splits = []
        for start in range(0, dims[0], split_size):
            piece: list[Any] = []
            for x in batch:
                if isinstance(x, Tensor):
                    piece.append(x[:, start : start + split_size])
                elif isinstance(x, (list, tuple)):
                    piece.append([item[start : start + split_size] for item in x])
                else:
                    piece.append(x)
            splits.append(piece)
        return splits

    # ── The module as a whole ─────────────────────────────────────────────────────────────────────

    def freeze(self) -> None:
        """Let no parameter require gradients, and set the module to evaluate."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.eval()

    def unfreeze(self) -> None:
        """Let all parameters require gradients, and set the module to train."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.train()

    def summarize(self, mode: Any = "top", max_depth: int | None = None) -> Any:
        """Show the layers as a table: ``top``, ``full``, or None."""
        from puretrain.lightning.core.memory import ModelSummary

        if mode is None and max_depth is None:
            return None
        summary = ModelSummary(self, mode=mode, max_depth=max_depth)
        rank_zero_info("\n" + str(summary))
        return summary

    def _apply_batch_transfer_handler(
        self, batch: Any, device: Any = None, dataloader_idx: int = 0
    ) -> Any:
        return move_data_to_device(batch, device or self.device)

    @property
    def loaded_optimizer_states_dict(self) -> dict[int, Any]:
        """Kept for its name."""
        return {}

    def to_torchscript(
        self,
        file_path: str | Path | None = None,
        method: str = "script",
        example_inputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Turn the module into TorchScript, by ``script`` or ``trace``.

        Raises:
            ValueError: the method is neither, or there are no inputs to trace with.
        """
        training, trainer = self.training, self.trainer
        self.eval()
        object.__setattr__(self, "_trainer", None)
        try:
            with torch.no_grad():
                if method == "script":
                    script = torch.jit.script(_plain_copy(self), **kwargs)
                elif method == "trace":
                    example = self.example_input_array if example_inputs is None else example_inputs
                    if example is None:
                        raise ValueError(
                            "Choosing method=`trace` requires either `example_inputs` or "
                            "`model.example_input_array` to be defined."
                        )
                    example = self._apply_batch_transfer_handler(example)
                    script = torch.jit.trace(func=self, example_inputs=example, **kwargs)
                else:
                    raise ValueError(
                        "The 'method' parameter only supports 'script' or 'trace', but value given "
                        f"was: {method}"
                    )
        finally:
            self.train(training)
            object.__setattr__(self, "_trainer", trainer)
        if file_path is not None:
            torch.jit.save(script, str(file_path))
        return script

    def to_onnx(self, file_path: Any, input_sample: Any = None, **kwargs: Any) -> None:
        """Write the module as ONNX; needs ``puretrain[onnx]``.

        Raises:
            ValueError: there is no input to run the module with.
            MisconfigurationException: the packages are missing.
        """
        example = self.example_input_array if input_sample is None else input_sample
        if example is None:
            raise ValueError(
                "Could not export to ONNX since neither `input_sample` nor "
                "`model.example_input_array` attribute is set."
            )
        missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
        if missing:
            raise MisconfigurationException(
                f"to_onnx needs the package {' and '.join(missing)}: pip install 'puretrain[onnx]'"
            )
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                example = self._apply_batch_transfer_handler(example)
                inputs = example if isinstance(example, tuple) else (example,)
                torch.onnx.export(self, inputs, file_path, **kwargs)
        finally:
            self.train(training)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a module and load its parameters from a checkpoint.

        Args:
            checkpoint_path: a path, a URL or an open file.
            map_location: where to put the tensors.
            hparams_file: a yaml or csv file with arguments of ``__init__``, in place of those in
                the checkpoint.
            strict: whether the names of the parameters must agree exactly.
            weights_only: False unpickles hyper-parameters that are no plain values, which runs
                code that the file names: only for files that you trust.
            **kwargs: arguments of ``__init__``, which count before all others.
        """
        from puretrain.lightning.trainer.checkpointing import load_module

        return load_module(
            cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs
        )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_trainer"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            if name in {"_trainer", "_datamodule"}:
                new.__dict__[name] = value
            else:
                new.__dict__[name] = copy.deepcopy(value, memo)
        return new


def _plain_copy(module: Any) -> Any:
    """A module for TorchScript: its properties and base methods are no part of the script."""
    ignored = [
        name for name, value in LightningModule.__dict__.items() if isinstance(value, property)
    ]
    type(module).__jit_unused_properties__ = ignored
    return module
