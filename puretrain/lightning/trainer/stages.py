"""What the Trainer's methods do in order: fit, validate, test and predict."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from puretrain.lightning.core.optimizer import LightningOptimizer
from puretrain.lightning.trainer import (
    checkpointing,
    connecting,
    evaluation,
    launching,
    loaders,
    reporting,
    running,
    signals,
    training,
)
from puretrain.lightning.trainer.calls import call, call_module, implements
from puretrain.lightning.trainer.optimization import configure
from puretrain.lightning.trainer.states import RunningStage, TrainerFn, TrainerState
from puretrain.lightning.trainer.supporters import PredictionCollection
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.seed import isolate_rng
from puretrain.lightning.utilities.warnings import WarningCache

__all__ = ["DEFAULT_PATH", "evaluate", "fit", "fit_attached"]

_warnings = WarningCache()
DEFAULT_PATH: Any = ...  # not given; None says something else


# ── Fit ───────────────────────────────────────────────────────────────────────────────────────────


def fit(trainer: Any, model: Any, train: Any, val: Any, datamodule: Any, ckpt_path: Any) -> None:
    """Train a module, in as many processes as the trainer has; see ``Trainer.fit``."""
    given = {"model": model, "train": train, "val": val}
    options = {"datamodule": datamodule, "ckpt_path": ckpt_path}
    if launching.launch(trainer, fit, given | options)[0]:
        return
    again = trainer._fold is not None and model is trainer._module
    running.attach(trainer, model, TrainerState.FITTING, TrainerFn.FITTING, datamodule,
                   keep=again, train=train, val=val)  # fmt: skip
    path = ckpt_path or trainer.resume_from_checkpoint
    if path is not None and os.fspath(path) in {"last", "best"}:
        path = _checkpoint_path(trainer, os.fspath(path))
    with running.under_way(trainer, "fit"):
        fit_attached(trainer, path, again=again)


def fit_attached(trainer: Any, path: Any = None, *, again: bool = False) -> None:
    """Fit the module that is attached, inside of a run.

    Args:
        trainer: the trainer.
        path: of a checkpoint to go on from.
        again: whether to go on where the last fit has ended.
    """
    module = trainer._module
    if trainer.automatic_optimization is not None:
        module.automatic_optimization = trainer.automatic_optimization
    _check_fit(trainer)
    running.prepare_data(trainer)
    call(trainer, "on_before_accelerator_backend_setup")
    running.setup(trainer, "fit")
    running.to_device(trainer)
    _configure_optimizers(trainer)
    call(trainer, "on_fit_start")
    reporting.log_hyperparameters(trainer)
    call(trainer, "on_pretrain_routine_start")
    if trainer.weights_summary is not None:
        mode = trainer.weights_summary
        module.summarize(mode="top" if mode == "default" else mode)
    call(trainer, "on_pretrain_routine_end")
    state = trainer._fold if again else training.bound_state(trainer, None)
    if again:
        trainer.should_stop = trainer._epoch_cut = trainer._epoch_over = False
        state = state.replace(stop=torch.tensor(False))
    if path is not None:
        state = checkpointing.restore_fit(trainer, path, state)
        connecting.resume_accumulation(trainer, int(state.cursor.epoch))
    _sanity_check(trainer)
    trainer._stage = RunningStage.TRAINING
    trainer._results = trainer._train_results
    module.train()
    if trainer.max_epochs == 0 or trainer.max_steps == 0 or trainer.limit_train_batches == 0:
        call(trainer, "on_fit_end")
        return
    training.prepare_training_loader(trainer)
    trainer._loaded_at["train"] = int(state.cursor.epoch)
    if trainer._generators_to_restore is not None:
        loaders.put_back(trainer._generators_to_restore)
        trainer._generators_to_restore = None
    trainer._fold = state
    detecting = trainer._detects_anomaly
    try:
        with (
            signals.noted(trainer),
            torch.autograd.set_detect_anomaly(True) if detecting else contextlib.nullcontext(),
            contextlib.closing(trainer._epoch_measured),
        ):
            trainer._fold = training.run_fit(trainer, state)
    except KeyboardInterrupt:
        rank_zero_warn("Detected KeyboardInterrupt, attempting graceful shutdown...")
        trainer.interrupted, trainer._state = True, TrainerState.INTERRUPTED
        trainer._fx = None
        call(trainer, "on_keyboard_interrupt")
    trainer._stage = RunningStage.TRAINING
    call(trainer, "on_train_end")
    trainer._results = None
    reporting.finish_loggers(trainer)
    call(trainer, "on_fit_end")
    if trainer._profiles and hasattr(trainer.profiler, "describe"):
        trainer.profiler.describe()


def _check_fit(trainer: Any) -> None:
    """Whether all is there that a fit needs; and whether it will validate."""
    module = trainer._module
    needed = {
        "training_step": implements(module, "training_step"),
        "train_dataloader": loaders.has_loaders(trainer, "train"),
        "configure_optimizers": implements(module, "configure_optimizers"),
    }
    for name, there in needed.items():
        if not there:
            raise MisconfigurationException(
                f"No `{name}()` method defined. Lightning `Trainer` expects as minimum "
                "`training_step()`, `train_dataloader()` and `configure_optimizers()` to be "
                "defined."
            )
    has_step = implements(module, "validation_step")
    has_val = loaders.has_loaders(trainer, "val")
    if has_val and not has_step:
        _warnings.warn(
            "you passed in a val_dataloader but have no validation_step. Skipping val loop"
        )
    if has_step and not has_val:
        _warnings.warn(
            "you defined a validation_step but have no val_dataloader. Skipping val loop"
        )
    has_val = has_val or trainer.overfit_batches > 0
    trainer._validates = bool(has_step and has_val and trainer.limit_val_batches > 0)
    if module.automatic_optimization:
        return
    for what, name, used in (
        ("clipping", "gradient_clip_val", (trainer.gradient_clip_val or 0) > 0),
        ("accumulation", "accumulate_grad_batches", trainer.accumulate_grad_batches != 1),
    ):
        if used:
            raise MisconfigurationException(
                f"Automatic gradient {what} is not supported for manual optimization. Remove "
                f"`Trainer({name}={getattr(trainer, name)})` or switch to automatic optimization."
            )


def _configure_optimizers(trainer: Any) -> None:
    if trainer.optimizers and trainer._fold is not None:
        return
    found = configure(call_module(trainer, "configure_optimizers"))
    trainer.optimizers = [
        o.optimizer if isinstance(o, LightningOptimizer) else o for o in found.optimizers
    ]
    trainer.lr_schedulers = found.schedulers
    trainer.optimizer_frequencies = found.frequencies
    trainer._wrapped = []
    if trainer._module.automatic_optimization and any(
        config["interval"] == "step" and config["reduce_on_plateau"]
        for config in trainer.lr_schedulers
    ):
        _warnings.info("a ReduceLROnPlateau with interval 'step' looks at its metric each step")


def _sanity_check(trainer: Any) -> None:
    if not trainer._validates or not trainer.num_sanity_val_steps:
        return
    with isolate_rng():
        trainer._stage = RunningStage.SANITY_CHECKING
        evaluation.prepare_loaders(trainer, "val")
        if not sum(trainer._eval_counts["val"]):
            return
        call(trainer, "on_sanity_check_start")
        evaluation.run_evaluation(trainer, "val", most=trainer.num_sanity_val_steps)
        call(trainer, "on_sanity_check_end")
    trainer._results = None
    # loaders that were read for this check must begin anew
    trainer._eval_loaders.pop("val", None)


# ── Validate, test and predict ────────────────────────────────────────────────────────────────────


_KINDS = {
    "val": (TrainerState.VALIDATING, TrainerFn.VALIDATING),
    "test": (TrainerState.TESTING, TrainerFn.TESTING),
    "predict": (TrainerState.PREDICTING, TrainerFn.PREDICTING),
}


def evaluate(
    trainer: Any,
    kind: str,
    model: Any,
    given: Any,
    datamodule: Any,
    ckpt_path: Any,
    *,
    verbose: bool = True,
    keep: bool = True,
) -> Any:
    """Run a module over loaders without training, in as many processes as the trainer has.

    Args:
        trainer: the trainer.
        kind: ``val``, ``test`` or ``predict``.
        model: the module; None: that of the last run.
        given: the loaders.
        datamodule: where they come from instead.
        ckpt_path: a checkpoint, ``best``, ``last``, None, or ``DEFAULT_PATH``.
        verbose: print the results of a validation or test.
        keep: return the predictions.

    Returns:
        The logged values, for each loader; or the predictions.
    """
    arguments = {"kind": kind, "model": model, "given": given, "datamodule": datamodule}
    options = {"ckpt_path": ckpt_path, "verbose": verbose, "keep": keep}
    done, returned = launching.launch(trainer, evaluate, arguments | options)
    if done:
        return returned
    state, fn = _KINDS[kind]
    method = fn.value
    module = trainer._module if model is None else model
    if module is None:
        raise MisconfigurationException(f"give a model to `{method}`, as none was fitted")
    running.attach(trainer, module, state, fn, datamodule, keep=True, **{kind: given})
    predicts = kind == "predict"
    if not predicts:
        _check_evaluation(trainer, kind, method)
    path = _path_to_evaluate(trainer, ckpt_path, model)
    with running.under_way(trainer, method):
        running.prepare_data(trainer)
        trainer._stage = evaluation.STAGES[kind]
        if not predicts:
            call(trainer, "on_before_accelerator_backend_setup")
        running.setup(trainer, method)
        running.to_device(trainer)
        if not predicts:
            call(trainer, "on_fit_start")
        if path is not None:
            checkpointing.restore_weights(trainer, path)
        with signals.noted(trainer):
            if predicts:
                return evaluation.run_prediction(trainer, keep=keep)
            trainer._eval_loaders.pop(kind, None)
            found = evaluation.run_evaluation(trainer, kind)
            signals.agree(trainer)
            if trainer._signals and trainer._processes.connected:
                signals.interrupt(trainer)
        trainer._predictions.to_disk()
        trainer._predictions = PredictionCollection(trainer.global_rank, trainer.world_size)
        if verbose and trainer.is_global_zero:
            reporting.print_results(method, found)
        reporting.finish_loggers(trainer)
        call(trainer, "on_fit_end")
    if kind == "test":  # as in 1.2, once for the run and once for the test
        running.teardown_callbacks(trainer, method)
    return found


def _check_evaluation(trainer: Any, kind: str, method: str) -> None:
    step = f"{evaluation.WORDS[kind]}_step"
    if not implements(trainer._module, step):
        raise MisconfigurationException(f"No `{step}()` method defined to run `Trainer.{method}`.")
    if not loaders.has_loaders(trainer, kind) and not trainer.overfit_batches > 0:
        raise MisconfigurationException(
            f"No `{kind}_dataloader()` method defined to run `Trainer.{method}`."
        )


def _path_to_evaluate(trainer: Any, path: Any, model: Any) -> Any:
    if path is DEFAULT_PATH:
        saved = trainer.checkpoint_callback
        if model is not None or trainer.fast_dev_run or saved is None or not saved.best_model_path:
            return None
        path = "best"
    named = isinstance(path, (str, os.PathLike))
    return _checkpoint_path(trainer, os.fspath(path)) if named else path


def _checkpoint_path(trainer: Any, path: str) -> str:
    if path not in {"best", "last"}:
        return path
    callback = trainer.checkpoint_callback
    if callback is None:
        raise MisconfigurationException(
            f'ckpt_path="{path}" needs a ModelCheckpoint, and this trainer has none'
        )
    found = callback.best_model_path if path == "best" else callback.last_model_path
    if found:
        return str(found)
    if trainer.fast_dev_run:
        raise MisconfigurationException(
            f'You cannot use ckpt_path="{path}" with `fast_dev_run`, which saves nothing; '
            "pass an exact checkpoint path"
        )
    raise MisconfigurationException(
        f'ckpt_path="{path}" is set but ModelCheckpoint is not configured to save the {path} model.'
    )
