"""A fit as a fold: the trainer's module, optimizers and data as a state, a step and reducers.

The state's tensors are the module's own: nothing is copied, and the step changes them in place by
plain autograd, since users call ``backward`` and optimizers themselves. What Lightning does around
a batch or an epoch happens at the events of :func:`puretrain.loop.fit`.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from puretrain import loop, random
from puretrain.lightning.trainer import loaders
from puretrain.lightning.trainer.calls import (
    call,
    call_module,
    call_the_rest,
    hooks_of,
    implements,
    keys_of,
    profiled,
)
from puretrain.lightning.trainer.distributed import equal_number
from puretrain.lightning.trainer.evaluation import run_evaluation
from puretrain.lightning.trainer.loaders import Item, LoaderSource
from puretrain.lightning.trainer.optimization import step_schedulers
from puretrain.lightning.trainer.reporting import keep_metrics, log_metrics
from puretrain.lightning.trainer.signals import agree, interrupt
from puretrain.lightning.trainer.steps import prepare_step, train_batch
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import WarningCache
from puretrain.loop import Event, Reducer
from puretrain.state import TrainState
from puretrain.tree import FrozenDict

__all__ = ["bound_state", "prepare_training_loader", "run_fit"]

_warnings = WarningCache()

# What has been done after a batch, or at the end of an epoch: a checkpoint says which, so that a
# resumed run does the rest and nothing twice.
NOTHING_DUE = 0
BATCH_ENDED = 1  # on_train_batch_end is being called
VALIDATING = 2
VALIDATED = 3
EPOCH_ENDED = 10  # on_train_epoch_end is being called
EPOCH_VALIDATING = 11
EPOCH_VALIDATED = 12
EPOCH_ENDED_LATE = 13  # on_train_epoch_end is being called of those that expect it here, as in 2.x


def bound_state(trainer: Any, state: TrainState | None) -> TrainState:
    """The state of a trainer's run. Its leaves are the tensors that are being trained.

    Args:
        trainer: whose run.
        state: where the run stands; None: at its beginning.
    """
    module = trainer._module
    params = FrozenDict({name: p.detach() for name, p in module.named_parameters()})
    buffers = FrozenDict({name: b.detach() for name, b in module.named_buffers()})
    if state is None:
        return TrainState.create(params, buffers, key=random.key(0))
    memories = tuple(
        FrozenDict(
            {
                str(number): FrozenDict({k: v for k, v in memory.items() if isinstance(v, Tensor)})
                for number, memory in optimizer.state_dict().get("state", {}).items()
            }
        )
        for optimizer in trainer.optimizers
    )
    updates = torch.tensor(trainer._steps_done)
    return state.replace(params=params, buffers=buffers, opt_state=memories, updates=updates)


def run_fit(trainer: Any, start: TrainState) -> TrainState:
    """Fold the training step over the batches, from a state on."""
    prepare_step(trainer)
    source = LoaderSource(trainer)

    def step(state: TrainState, item: Item, *, donate: bool = False) -> TrainState:
        with profiled(trainer, "run_training_batch"):
            train_batch(trainer, item)
        return state.replace(step=state.step + 1)

    def reduce(state: TrainState, event: Event) -> TrainState:
        trainer._fold = state
        return _HANDLERS[event.kind](trainer, state, event)

    return loop.fit(
        start,
        step,
        source,
        epochs=sys.maxsize,
        reducers=[Reducer(reduce, on=tuple(_HANDLERS))],
        donate=True,
        handle_signals=False,
    )


# ── Events ────────────────────────────────────────────────────────────────────────────────────────


def _fit_start(trainer: Any, state: TrainState, event: Event) -> TrainState:
    trainer.current_epoch = int(state.cursor.epoch)
    trainer._epoch_over = trainer._epoch_cut = False
    due, trainer._due = trainer._due, NOTHING_DUE
    call(trainer, "on_train_start")
    trainer._module.train()
    agree(trainer)
    if due:
        _finish(trainer, state, due)
    done = _is_done(trainer, int(state.cursor.epoch))
    if not done or due < EPOCH_ENDED:  # a run that ends keeps the number of its last epoch
        trainer.current_epoch = int(state.cursor.epoch)
    return state.replace(stop=torch.tensor(done))


def _finish(trainer: Any, state: TrainState, due: int) -> None:
    """Do what was left to do when a checkpoint was written in the middle of an event."""
    if due < EPOCH_ENDED:
        trainer.batch_idx = int(state.cursor.offset) - 1
        _after_batch(trainer, due)
        return
    trainer.current_epoch = int(state.cursor.epoch) - 1
    trainer.batch_idx = trainer._batches_of_epoch - 1
    _end_epoch(trainer, due, resumed=True)


def _epoch_start(trainer: Any, state: TrainState, event: Event) -> TrainState:
    trainer.current_epoch = int(state.cursor.epoch)
    trainer._hooks = {}
    trainer._results = trainer._train_results
    trainer._processes.watch(trainer._module)
    if loaders.are_due(trainer, "train"):
        prepare_training_loader(trainer)
    if trainer._profiles:
        trainer._epoch_measured.enter_context(trainer.profiler.profile("run_training_epoch"))
    call(trainer, "on_epoch_start")
    call(trainer, "on_train_epoch_start")
    return state


def _step(trainer: Any, state: TrainState, event: Event) -> TrainState:
    _after_batch(trainer, BATCH_ENDED)
    if trainer._signals:
        interrupt(trainer)
    return state


def _epoch_end(trainer: Any, state: TrainState, event: Event) -> TrainState:
    _end_epoch(trainer, EPOCH_ENDED)
    trainer._epoch_measured.close()
    trainer._epoch_over = False
    agree(trainer)
    if trainer._signals:
        interrupt(trainer)
    done = _is_done(trainer, int(state.cursor.epoch)) or trainer._epoch_cut
    if done:
        return state.replace(stop=torch.tensor(True))
    trainer._epoch_cut = False
    return state


_HANDLERS = {
    "fit_start": _fit_start,
    "epoch_start": _epoch_start,
    "step": _step,
    "epoch_end": _epoch_end,
}


def _limit_reached(trainer: Any) -> bool:
    steps = trainer.max_steps
    return steps is not None and steps >= 0 and trainer._steps_done >= steps


def _may_stop(trainer: Any, epochs_done: int) -> bool:
    """Whether a request to stop may be met: the minimal epochs and steps have been reached."""
    enough_epochs = not trainer.min_epochs or epochs_done >= trainer.min_epochs
    enough_steps = not trainer.min_steps or trainer._steps_done >= trainer.min_steps
    return bool(enough_epochs and enough_steps)


def _is_done(trainer: Any, epochs_done: int) -> bool:
    if _limit_reached(trainer):
        return True
    limit = trainer.max_epochs
    if limit is not None and limit >= 0 and epochs_done >= limit:
        few = trainer.min_steps and trainer._steps_done < trainer.min_steps
        return not few or trainer._epochs_are_given
    if trainer.num_training_batches == 0:
        return True
    if trainer.should_stop:
        if _may_stop(trainer, epochs_done):
            return True
        _warnings.info(
            "Trainer was signaled to stop but required minimum epochs "
            f"({trainer.min_epochs}) or minimum steps ({trainer.min_steps}) has not been met. "
            "Training will continue..."
        )
        trainer.should_stop = False
    return False


# ── After a batch, and at the end of an epoch ─────────────────────────────────────────────────────


def _after_batch(trainer: Any, due: int) -> None:
    if due <= BATCH_ENDED:
        trainer._due = BATCH_ENDED
        _train_batch_end(trainer)
        agree(trainer)
        _log_step(trainer)
        asked = trainer.should_stop and _may_stop(trainer, trainer.current_epoch + 1)
        if asked or (not trainer._accumulating and _limit_reached(trainer)):
            trainer._epoch_over = True
            trainer._epoch_cut = not trainer._item_is_last
    if due <= VALIDATING and _validation_is_due(trainer):
        _validate(trainer, VALIDATING, VALIDATED)
    if trainer._monitored["step"] and not trainer._accumulating:
        step_schedulers(trainer, "step", plateau=True)
    if not trainer._accumulating:
        trainer.global_step = trainer._steps_done
    trainer._due = NOTHING_DUE


def _validation_is_due(trainer: Any) -> bool:
    """Whether to validate in the middle of an epoch."""
    if not trainer._validates or trainer._item_is_last or trainer._epoch_over:
        return False
    every = trainer.val_check_batch
    if every == math.inf:
        return False
    if trainer.check_val_every_n_epoch is None:
        return (trainer._total_batches % every) == 0
    if (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
        return False
    return (trainer.batch_idx + 1) % every == 0


def _validation_is_due_at_end(trainer: Any) -> bool:
    if not trainer._validates:
        return False
    if trainer._epoch_cut:
        return trainer.should_stop and not _limit_reached(trainer)
    if trainer.check_val_every_n_epoch is None:
        return (trainer._total_batches % trainer.val_check_batch) == 0
    if (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
        return False
    if math.inf in (trainer.num_training_batches, trainer.val_check_batch):
        return True
    return trainer.should_stop or (trainer.batch_idx + 1) % trainer.val_check_batch == 0


def _validate(trainer: Any, during: int, after: int) -> None:
    trainer._due = during
    # a validation that was interrupted begins anew, and must draw the same
    trainer._generators_of_validation = loaders.capture()
    keep_metrics(trainer)
    stage, results = trainer._stage, trainer._results
    over = results.batches_are_over
    run_evaluation(trainer, "val", on_end=lambda: setattr(trainer, "_due", after))
    agree(trainer)
    trainer._stage, trainer._results = stage, results
    results.batches_are_over = over
    trainer._module.train() if not trainer._module.training else None


def _train_batch_end(trainer: Any) -> None:
    outputs = trainer._batch_outputs
    item = trainer._item
    if item is None:
        return
    call(trainer, "on_train_batch_end", outputs, trainer._batch, trainer.batch_idx, 0)
    call(trainer, "on_batch_end")
    trainer._batch = trainer._item = None


def _log_step(trainer: Any) -> None:
    if trainer._accumulating:
        return
    every = trainer.log_every_n_steps
    number = trainer._steps_done
    if (every and number % every == 0) or trainer.should_stop or trainer.fast_dev_run:
        metrics = trainer._train_results.collect()["log"]
        if trainer._grad_norms:
            metrics = {**trainer._grad_norms, **metrics}
        log_metrics(trainer, metrics)


def _end_epoch(trainer: Any, due: int, *, resumed: bool = False) -> None:
    results = trainer._train_results
    trainer._results = results
    cut = trainer._epoch_cut
    late = hooks_of(trainer, "on_train_epoch_end:late") is not None
    trainer._late_follows, trainer._postponed = late, []
    if not resumed:
        trainer._called = []
    elif late:  # who was to look at the metrics later has to be asked again
        over = due >= EPOCH_VALIDATED and _validation_is_due_at_end(trainer)
        for callback in trainer.callbacks:
            if getattr(callback, "_looks_at_metrics", False):
                trainer._postponed.append(callback.on_train_epoch_end)
                trainer._postponed += [callback.on_validation_end] if over else []
    if due <= EPOCH_ENDED:
        trainer._due = EPOCH_ENDED if not cut else NOTHING_DUE
        outputs = trainer._epoch_outputs
        if not resumed:
            trainer._batches_of_epoch = trainer.batch_idx + 1
            keep_metrics(trainer)  # of the last step
        results.batches_are_over = True
        results.begin_batch(None)
        results.synchronize()
        if not resumed:
            _training_epoch_end(trainer, outputs)
        trainer._validation_follows = _validation_is_due_at_end(trainer)
        call_the_rest(trainer, "on_train_epoch_end", _arranged(trainer, outputs))
        call(trainer, "on_epoch_end")
        keep_metrics(trainer)
        log_metrics(trainer, results.collect()["log"])
        if not cut:
            trainer._epoch_outputs = []
            results.reset()
        results.batches_are_over = True
        trainer._called = []
    if due <= EPOCH_VALIDATING and _validation_is_due_at_end(trainer):
        if cut:
            _validate(trainer, NOTHING_DUE, NOTHING_DUE)
        else:
            _validate(trainer, EPOCH_VALIDATING, EPOCH_VALIDATED)
    if late:
        _end_epoch_late(trainer, results)
    if trainer._monitored["epoch"] and not cut:
        step_schedulers(trainer, "epoch", plateau=True)
    trainer._validation_follows = False
    results.batches_are_over = False
    trainer._due = NOTHING_DUE


def _training_epoch_end(trainer: Any, outputs: list[Any]) -> None:
    if implements(trainer._module, "training_epoch_end"):
        returned = call_module(trainer, "training_epoch_end", _arranged(trainer, outputs))
        if returned is not None:
            raise MisconfigurationException(
                "training_epoch_end expects a return of None. HINT: remove the return "
                "statement in training_epoch_end"
            )


def _end_epoch_late(trainer: Any, results: Any) -> None:
    """``on_train_epoch_end`` of those who expect validation to be over, and what they log."""
    trainer._late_follows, results.batches_are_over = False, True
    if not trainer._epoch_cut:
        trainer._due = EPOCH_ENDED_LATE
    before = set(results.entries)
    call_the_rest(trainer, "on_train_epoch_end:late")
    fresh = results.collect(only=set(results.entries) - before)
    if fresh["callback"]:
        trainer._callback_metrics.update(fresh["callback"])
        trainer._bar_metrics.update(fresh["bar"])
        log_metrics(trainer, fresh["log"])
    for key in set(results.entries) - before:
        del results.entries[key]
    methods = trainer._postponed
    for key, method in zip(keys_of(methods), methods, strict=True):
        if key not in trainer._called:
            trainer._called.append(key)
            method(trainer, trainer._module)
    trainer._called = []


def _arranged(trainer: Any, outputs: list[Any]) -> Any:
    """The outputs of an epoch as ``training_epoch_end`` gets them."""
    count = len(trainer.optimizers)
    if count <= 1 or not trainer._module.automatic_optimization:
        return [output for output in outputs if output or not isinstance(output, (dict, list))]
    by_optimizer: list[list[Any]] = [[] for _ in range(count)]
    for batch in outputs:
        for number, output in batch:
            if output:
                by_optimizer[number].append(output)
    return by_optimizer


# ── The loader ────────────────────────────────────────────────────────────────────────────────────


def prepare_training_loader(trainer: Any) -> None:
    """Ask for the training loader and count its batches."""
    trainer._train_loader = loaders.training_loader(trainer)
    trainer._loaded_at["train"] = trainer.current_epoch
    length = loaders.length_of(trainer._train_loader)
    limit = "overfit_batches" if trainer.overfit_batches > 0 else "limit_train_batches"
    total = equal_number(trainer, loaders.limited(length, getattr(trainer, limit), limit))
    trainer.num_training_batches = total
    interval = trainer.val_check_interval
    if isinstance(interval, int) and not isinstance(interval, bool):
        trainer.val_check_batch = interval
        by_epoch = trainer.check_val_every_n_epoch is not None
        if interval > total and by_epoch and total and trainer._validates:
            raise ValueError(
                f"`val_check_interval` ({interval}) must be less than or equal to the number of "
                f"the training batches ({total}). If you want to disable validation set "
                "`limit_val_batches` to 0.0 instead."
            )
    elif total == math.inf:
        if interval != 1.0:
            raise MisconfigurationException(
                "When using an IterableDataset for `train_dataloader`, "
                "`Trainer(val_check_interval)` must be `1.0` or an int. An int k specifies "
                "checking validation every k training batches."
            )
        trainer.val_check_batch = math.inf
    else:
        trainer.val_check_batch = max(1, int(total * interval)) if total else 1
    if trainer.logger is not None and 0 < total < trainer.log_every_n_steps:
        _warnings.warn(
            f"The number of training samples ({total}) is smaller than the logging interval "
            f"Trainer(log_every_n_steps={trainer.log_every_n_steps}). Set a lower value for "
            "log_every_n_steps if you want to see logs for the training epoch."
        )
