"""A fit as a fold: the trainer's module, optimizers and data as a state, a step and reducers.

The state's tensors are the module's own: nothing is copied, and the step changes them in place by
plain autograd, since users call ``backward`` and optimizers themselves. What Lightning does around
a batch or an epoch happens at the events of :func:`puretrain.loop.fit`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from puretrain import loop, random
from puretrain.lightning.trainer import loaders, splitting
from puretrain.lightning.trainer.calls import (
    call,
    call_module,
    call_the_rest,
    hooks_of,
    implements,
    keys_of,
    takes,
)
from puretrain.lightning.trainer.distributed import equal_number
from puretrain.lightning.trainer.evaluation import run_evaluation
from puretrain.lightning.trainer.loaders import Item, LoaderSource
from puretrain.lightning.trainer.optimization import step_schedulers
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import WarningCache
from puretrain.loop import Event, Reducer
from puretrain.state import TrainState
from puretrain.tree import FrozenDict

__all__ = ["bound_state", "run_fit", "step_optimizer"]

_warnings = WarningCache()
_OFF = nullcontext()

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
        with trainer._profile("run_training_batch"):
            train_batch(trainer, item)
        return state.replace(step=state.step + 1)

    def reduce(state: TrainState, event: Event) -> TrainState:
        trainer._fold = state
        return _HANDLERS[event.kind](trainer, state, event)

    kinds = ("fit_start", "epoch_start", "step", "epoch_end", "fit_end")
    return loop.fit(
        start,
        step,
        source,
        epochs=sys.maxsize,
        reducers=[Reducer(reduce, on=kinds)],
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
    trainer._agree()
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
    if trainer._loaders_are_due("train"):
        prepare_training_loader(trainer)
    if trainer._profiles:
        trainer._epoch_measured.enter_context(trainer.profiler.profile("run_training_epoch"))
    call(trainer, "on_epoch_start")
    call(trainer, "on_train_epoch_start")
    return state


def _step(trainer: Any, state: TrainState, event: Event) -> TrainState:
    _after_batch(trainer, BATCH_ENDED)
    if trainer._signals:
        trainer._interrupt()
    return state


def _epoch_end(trainer: Any, state: TrainState, event: Event) -> TrainState:
    _end_epoch(trainer, EPOCH_ENDED)
    trainer._epoch_measured.close()
    trainer._epoch_over = False
    trainer._agree()
    if trainer._signals:
        trainer._interrupt()
    done = _is_done(trainer, int(state.cursor.epoch)) or trainer._epoch_cut
    if done:
        return state.replace(stop=torch.tensor(True))
    trainer._epoch_cut = False
    return state


def _fit_end(trainer: Any, state: TrainState, event: Event) -> TrainState:
    return state


_HANDLERS = {
    "fit_start": _fit_start,
    "epoch_start": _epoch_start,
    "step": _step,
    "epoch_end": _epoch_end,
    "fit_end": _fit_end,
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
        return not trainer._more_steps_needed()
    if trainer.num_training_batches == 0 or trainer._out_of_time():
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
        trainer._agree()
        _log_step(trainer)
        if trainer.should_stop and _may_stop(trainer, trainer.current_epoch + 1):
            trainer._epoch_over = True
            trainer._epoch_cut = not trainer._item_is_last
        if not trainer._accumulating and _limit_reached(trainer):
            trainer._epoch_over = True
            trainer._epoch_cut = not trainer._item_is_last
        if trainer._out_of_time():
            trainer._epoch_over, trainer._epoch_cut = True, not trainer._item_is_last
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
    trainer._keep_metrics()
    stage, results = trainer._stage, trainer._results
    over = results.batches_are_over
    run_evaluation(trainer, "val", on_end=lambda: setattr(trainer, "_due", after))
    trainer._agree()
    trainer._stage, trainer._results = stage, results
    results.batches_are_over = over
    trainer._module.train() if not trainer._module.training else None


def _train_batch_end(trainer: Any) -> None:
    outputs = trainer._batch_outputs
    item = trainer._item
    if item is None:
        return
    if hooks_of(trainer, "on_train_batch_end") is not None:
        call(trainer, "on_train_batch_end", outputs, trainer._batch, trainer.batch_idx, 0)
    if hooks_of(trainer, "on_batch_end") is not None:
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
        trainer._log_metrics(metrics)


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
            trainer._keep_metrics()  # of the last step
        results.batches_are_over = True
        results.begin_batch(None)
        results.synchronize()
        if not resumed:
            _training_epoch_end(trainer, outputs)
        trainer._validation_follows = _validation_is_due_at_end(trainer)
        call_the_rest(trainer, "on_train_epoch_end", _arranged(trainer, outputs))
        call(trainer, "on_epoch_end")
        trainer._keep_metrics()
        trainer._log_metrics(results.collect()["log"])
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
        trainer._log_metrics(fresh["log"])
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


# ── One batch ─────────────────────────────────────────────────────────────────────────────────────


def prepare_training_loader(trainer: Any) -> None:
    """Ask for the training loader and count its batches."""
    trainer._train_loader = loaders.training_loader(trainer)
    trainer._loaded_at["train"] = trainer.current_epoch
    length = loaders.length_of(trainer._train_loader)
    if trainer.overfit_batches > 0:
        total = loaders.limited(length, trainer.overfit_batches, "overfit_batches")
    else:
        total = loaders.limited(length, trainer.limit_train_batches, "limit_train_batches")
    total = equal_number(trainer, total)
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


def prepare_step(trainer: Any) -> None:
    """Look once at what each step would otherwise have to find out."""
    module = trainer._module
    parameters = _names(module.training_step)
    trainer._step_takes_index = takes(module.training_step) >= 2
    trainer._step_takes_optimizer = "optimizer_idx" in parameters
    trainer._step_takes_hiddens = "hiddens" in parameters
    several = len(trainer.optimizers) > 1
    if module.automatic_optimization and several and not trainer._step_takes_optimizer:
        if not _takes_anything(module.training_step):
            raise MisconfigurationException(
                f"Your LightningModule defines {len(trainer.optimizers)} optimizers but "
                'training_step is missing the "optimizer_idx" argument.'
            )
        trainer._step_takes_optimizer = True
    own = ("optimizer_step", "optimizer_zero_grad", "backward", "training_step_end")
    trainer._own = {name: getattr(module, name) for name in own if implements(module, name)}
    trainer._own_clipping = implements(module, "configure_gradient_clipping")
    trainer._lr_scheduler_step = None
    if implements(module, "lr_scheduler_step"):
        trainer._lr_scheduler_step = (module.lr_scheduler_step, takes(module.lr_scheduler_step))
    found = {"step": False, "epoch": False}
    unmonitored = {"step": False, "epoch": False}
    for config in trainer.lr_schedulers:
        (found if config["reduce_on_plateau"] else unmonitored)[config["interval"]] = True
    trainer._monitored, trainer._unmonitored = found, unmonitored
    keep = implements(module, "training_epoch_end")
    hooks = hooks_of(trainer, "on_train_epoch_end")
    if hooks is not None and not keep:
        methods = [*hooks.callbacks, *hooks.last, *([hooks.module] if hooks.module else [])]
        keep = any(0 < count < 1 << 10 for _, count in methods)
    trainer._keeps_outputs = keep


def _names(function: Any) -> set[str]:
    import inspect

    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _takes_anything(function: Any) -> bool:
    return takes(function) >= 1 << 10


def train_batch(trainer: Any, item: Item) -> None:
    """Train on one batch: hooks, loss, gradients, optimizers, and the schedulers of steps."""
    module, index = trainer._module, item.index
    trainer.batch_idx, trainer._item, trainer._item_is_last = index, item, item.last
    trainer._total_batches += 1
    every = trainer.accumulate_grad_batches
    trainer._accumulating = bool(
        every != 1 and module.automatic_optimization and (index + 1) % every and not item.last
    )
    batch = trainer._moved(item.batch, 0)
    trainer._batch = batch
    results = trainer._train_results
    results.begin_batch(batch)
    trainer._batch_outputs = {}
    if batch is None:
        _warnings.warn("train_dataloader yielded None. If this was on purpose, ignore this warning")
        return
    skip = None
    if hooks_of(trainer, "on_batch_start") is not None:
        skip = call(trainer, "on_batch_start")
    if skip != -1 and hooks_of(trainer, "on_train_batch_start") is not None:
        skip = call(trainer, "on_train_batch_start", batch, index, 0)
    if skip == -1:
        trainer._epoch_over = True
        trainer._item, trainer._item_is_last = None, True
        if trainer._unmonitored["epoch"]:
            step_schedulers(trainer, "epoch", plateau=False)
        return
    if module.automatic_optimization:
        outputs: Any = _automatic(trainer, batch, index)
    else:
        outputs = _manual(trainer, batch, index)
    if trainer._keeps_outputs:
        trainer._epoch_outputs.append(outputs)
    several = len(trainer.optimizers) > 1 and module.automatic_optimization
    if several:
        trainer._batch_outputs = [output for _, output in outputs]
        if trainer.optimizer_frequencies:
            trainer._batch_outputs = trainer._batch_outputs[0]
    else:
        trainer._batch_outputs = outputs
    if not trainer._accumulating:
        trainer._steps_done += 1
        if trainer._unmonitored["step"] and module.automatic_optimization:
            step_schedulers(trainer, "step", plateau=False)
    if item.last and trainer._unmonitored["epoch"] and module.automatic_optimization:
        step_schedulers(trainer, "epoch", plateau=False)


def _automatic(trainer: Any, batch: Any, index: int) -> Any:
    length = trainer._module.truncated_bptt_steps or trainer.truncated_bptt_steps or 0
    if not length:
        return _on_batch(trainer, batch, index)
    trainer._hiddens = None
    before, trainer._fx = trainer._fx, "tbptt_split_batch"
    pieces = trainer._module.tbptt_split_batch(batch, length)
    trainer._fx = before
    outputs = [_on_batch(trainer, piece, index) for piece in pieces]
    trainer._hiddens = None
    if len(trainer.optimizers) > 1:
        return [pair for output in outputs for pair in output]
    return outputs


def _on_batch(trainer: Any, batch: Any, index: int) -> Any:
    optimizers = trainer.optimizers
    if len(optimizers) == 1:
        return _optimize(trainer, batch, index, 0)
    outputs = []
    for number in _active(trainer):
        trainer._module.toggle_optimizer(optimizers[number], number)
        try:
            outputs.append((number, _optimize(trainer, batch, index, number)))
        finally:
            trainer._module.untoggle_optimizer(number)
    return outputs


def _active(trainer: Any) -> Any:
    """The numbers of the optimizers whose turn it is."""
    frequencies = trainer.optimizer_frequencies
    if not frequencies:
        return range(len(trainer.optimizers))
    place = (trainer._total_batches - 1) % sum(frequencies)
    for number, frequency in enumerate(frequencies):
        if place < frequency:
            return (number,)
        place -= frequency
    return ()


def _optimize(trainer: Any, batch: Any, index: int, number: int) -> dict[str, Any]:
    """One step of one optimizer, or one more batch towards it."""
    optimizer = trainer.optimizers[number]
    outputs: dict[str, Any] = {}

    def closure() -> Any:
        nonlocal outputs
        with trainer._profile("training_step_and_backward"):
            loss, outputs = _loss_of(trainer, batch, index, number)
            every = trainer.accumulate_grad_batches
            if every == 1 or index % every == 0:
                _zero_grad(trainer, index, optimizer, number)
            if loss is not None:
                if every != 1:
                    loss = loss / every
                _backward(trainer, loss, optimizer, number)
        return loss

    if trainer._accumulating:
        closure()
        return outputs

    def closure_for_step() -> Any:
        loss = closure()
        if trainer._scaler is not None and loss is not None:
            trainer._scaler.unscale_(optimizer)
        _before_step(trainer, optimizer, number)
        if isinstance(optimizer, torch.optim.LBFGS):  # it decides by the loss how to go on
            return trainer._processes.reduce(loss)
        return loss

    own = trainer._own.get("optimizer_step")
    with trainer._profile(f"optimizer_step_and_closure_{number}") if trainer._profiles else _OFF:
        _make_step(trainer, own, index, number, closure_for_step)
    trainer._updates += 1
    if trainer.terminate_on_nan:
        _check_finite(trainer)
    return outputs


def _make_step(trainer: Any, own: Any, index: int, number: int, closure_for_step: Any) -> None:
    """A step of an optimizer, or what the module does instead."""
    optimizer = trainer.optimizers[number]
    if own is None:
        step_optimizer(trainer, optimizer, closure_for_step)
    else:
        before, trainer._fx = trainer._fx, "optimizer_step"
        wrapped = trainer._wrapped_optimizers()[number]
        epoch = trainer.current_epoch
        if _is_new_style(own):
            own(epoch, index, wrapped, closure_for_step)
        else:
            lbfgs = isinstance(optimizer, torch.optim.LBFGS)
            arguments = (epoch, index, wrapped, number, closure_for_step, False, False, lbfgs)
            own(*arguments[: takes(own)])
        trainer._fx = before


def step_optimizer(trainer: Any, optimizer: Any, closure: Any, **options: Any) -> Any:
    """Make a step, with the loss scale of precision 16 if there is one.

    Args:
        trainer: the trainer.
        optimizer: torch's own.
        closure: what computes the gradients; None: they are there.
        **options: further arguments of the optimizer.
    """
    scaler = trainer._scaler
    if scaler is None:
        return optimizer.step(**options) if closure is None else optimizer.step(closure, **options)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            "LBFGS computes its loss several times a step, which has no place for the loss scale "
            "of precision=16; use precision='bf16' or 32"
        )
    loss = None
    if closure is not None:
        loss = closure()
        if loss is None and trainer._module.automatic_optimization:
            return None  # the batch was skipped: there are no gradients
    scaler.step(optimizer, **options)  # unless a gradient is infinite
    scaler.update()
    return loss


def _is_new_style(method: Any) -> bool:
    import inspect

    names = list(inspect.signature(method).parameters)
    return len(names) >= 4 and "closure" in names[3]


def _loss_of(
    trainer: Any, batch: Any, index: int, number: int
) -> tuple[Tensor | None, dict[str, Any]]:
    module = trainer._module
    returned = _training_step(trainer, batch, index, number)
    if returned is None:
        if trainer._processes.connected:
            raise MisconfigurationException(
                "Skipping the `training_step` by returning None in distributed training is not "
                "supported: the other processes wait for the gradients of this one. Return a loss "
                "of zero that depends on the parameters"
            )
        _warnings.warn(
            "`training_step` returned `None`. If this was on purpose, ignore this warning..."
        )
        return None, {}
    if isinstance(returned, Tensor):
        loss, outputs = returned, {"loss": returned.detach()}
    elif isinstance(returned, Mapping):
        if "loss" not in returned:
            raise MisconfigurationException(
                "In automatic_optimization, when `training_step` returns a dict, the 'loss' key "
                "needs to be present"
            )
        loss = returned["loss"]
        if loss is None:
            return None, {}
        outputs = {"loss": loss.detach()}
        for key, value in returned.items():
            if key == "hiddens":
                trainer._hiddens = _detached(value)
            elif key != "loss":
                outputs[key] = _detached(value)
    else:
        raise MisconfigurationException(
            "In automatic optimization, `training_step` must return a Tensor, a dict, or None "
            f"(where the step will be skipped), not a {type(returned).__name__}"
        )
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"`training_step` of {type(module).__name__} returned a loss that is a "
            f"{type(loss).__name__}; it must be a tensor"
        )
    if trainer.terminate_on_nan and not bool(torch.isfinite(loss).all()):
        raise ValueError("The loss returned in `training_step` is nan or inf.")
    trainer._losses.append(outputs["loss"])
    if loss.dim():
        loss = loss.mean()
    return loss, outputs


def _training_step(trainer: Any, batch: Any, index: int, number: int) -> Any:
    arguments = [batch]
    if trainer._step_takes_index:
        arguments.append(index)
    named: dict[str, Any] = {}
    if trainer._step_takes_optimizer and len(trainer.optimizers) > 1:
        named["optimizer_idx"] = number
    if trainer._step_takes_hiddens:
        named["hiddens"] = trainer._hiddens
    casting = trainer._casting
    trainer._fx = "training_step"
    automatic = trainer._module.automatic_optimization
    trainer._processes.before_step(trainer._accumulating, automatic)
    with (
        trainer._profile("model_forward"),
        trainer._profile("training_step"),
        _OFF if casting is None else casting(),
    ):
        if trainer._splits:
            returned = splitting.call_parts(trainer, "training_step", arguments, named)
        else:
            returned = trainer._module.training_step(*arguments, **named)
        if "training_step_end" in trainer._own:
            trainer._fx = "training_step_end"
            ended = trainer._own["training_step_end"](returned)
            returned = returned if ended is None else ended
    trainer._fx = None
    return returned


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_detached(item) for item in value])
    return value


def _zero_grad(trainer: Any, index: int, optimizer: Any, number: int) -> None:
    if hooks_of(trainer, "on_before_zero_grad") is not None:
        call(trainer, "on_before_zero_grad", optimizer)
    own = trainer._own.get("optimizer_zero_grad")
    if own is None:
        optimizer.zero_grad()
        return
    trainer._fx = "optimizer_zero_grad"
    own(*(trainer.current_epoch, index, optimizer, number)[: takes(own)])
    trainer._fx = None


def _backward(trainer: Any, loss: Tensor, optimizer: Any, number: int) -> None:
    if hooks_of(trainer, "on_before_backward") is not None:
        call(trainer, "on_before_backward", loss)
    own = trainer._own.get("backward")
    if trainer._scaler is not None:
        loss = trainer._scaler.scale(loss)
    if trainer._profiles:
        with trainer.profiler.profile("model_backward"), trainer.profiler.profile("backward"):
            loss.backward() if own is None else own(*(loss, optimizer, number)[: takes(own)])
    elif own is None:
        loss.backward()
    else:
        trainer._fx = "backward"
        own(*(loss, optimizer, number)[: takes(own)])
        trainer._fx = None
    if hooks_of(trainer, "on_after_backward") is not None:
        call(trainer, "on_after_backward")


def _before_step(trainer: Any, optimizer: Any, number: int) -> None:
    """What is done between the gradients and the step."""
    if hooks_of(trainer, "on_before_optimizer_step") is not None:
        call(trainer, "on_before_optimizer_step", optimizer, number)
    if trainer._tracks_norms:
        every = trainer.log_every_n_steps
        due = every and (trainer._steps_done + 1) % every == 0
        trainer._grad_norms = _norms(trainer) if due else {}
    if trainer._own_clipping:
        method = trainer._module.configure_gradient_clipping
        values = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        named = _names(method)
        trainer._fx = "configure_gradient_clipping"
        if "optimizer_idx" in named:
            method(optimizer, number, *values)
        else:
            method(optimizer, *values)
        trainer._fx = None
    elif trainer.gradient_clip_val:
        clip(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)


def clip(optimizer: Any, value: Any, algorithm: str | None) -> None:
    """Clip the gradients of an optimizer's parameters, by norm unless told ``value``."""
    if not value or float(value) <= 0:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, clip_value=value)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, value)


def _norms(trainer: Any) -> dict[str, Tensor]:
    kind = float(trainer.track_grad_norm)
    label = trainer.track_grad_norm if isinstance(trainer.track_grad_norm, str) else kind
    grads = {n: p.grad for n, p in trainer._module.named_parameters() if p.grad is not None}
    found = {f"grad_{label}_norm_{n}": g.detach().norm(kind) for n, g in grads.items()}
    if found:
        total = torch.stack(list(found.values())).norm(kind)
        found[f"grad_{label}_norm_total"] = total
    return found


def _check_finite(trainer: Any) -> None:
    for name, parameter in trainer._module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"Detected nan and/or inf values in `{name}`. Check your forward pass for "
                "numerically unstable operations."
            )


def _manual(trainer: Any, batch: Any, index: int) -> Any:
    trainer._updates_of_batch = 0
    with trainer._profile("training_step_and_backward"):
        returned = _training_step(trainer, batch, index, 0)
    if returned is None:
        return {}
    if isinstance(returned, Tensor):
        outputs: Any = {"loss": returned.detach()}
    elif isinstance(returned, Mapping):
        outputs = {key: _detached(value) for key, value in returned.items()}
    else:
        raise MisconfigurationException(
            "In manual optimization, `training_step` must either return a Tensor or have no "
            f"return, not a {type(returned).__name__}"
        )
    if isinstance(outputs.get("loss"), Tensor):
        trainer._losses.append(outputs["loss"])
    return outputs
