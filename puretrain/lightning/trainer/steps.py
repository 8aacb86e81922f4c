"""One training batch: its loss, the gradients, and the steps of the optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from puretrain.lightning.core.optimizer import LightningOptimizer
from puretrain.lightning.trainer import splitting
from puretrain.lightning.trainer.calls import (
    ANY_NUMBER,
    call,
    call_module,
    counts_of,
    implements,
    profiled,
    takes,
)
from puretrain.lightning.trainer.loaders import Item
from puretrain.lightning.trainer.optimization import step_schedulers
from puretrain.lightning.trainer.transfer import moved
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import WarningCache

__all__ = [
    "clip",
    "manual_backward",
    "manual_step",
    "prepare_step",
    "step_optimizer",
    "train_batch",
    "wrapped_optimizers",
]

_warnings = WarningCache()
_OFF = nullcontext()


def prepare_step(trainer: Any) -> None:
    """Look once at what each step would otherwise have to find out."""
    module = trainer._module
    parameters = _names(module.training_step)
    trainer._step_takes_index = takes(module.training_step) >= 2
    trainer._step_takes_optimizer = "optimizer_idx" in parameters
    trainer._step_takes_hiddens = "hiddens" in parameters
    several = len(trainer.optimizers) > 1
    if module.automatic_optimization and several and not trainer._step_takes_optimizer:
        if takes(module.training_step) < ANY_NUMBER:
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
    taken = counts_of(trainer, "on_train_epoch_end")
    trainer._keeps_outputs = implements(module, "training_epoch_end") or any(
        0 < count < ANY_NUMBER for count in taken
    )


def _names(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def train_batch(trainer: Any, item: Item) -> None:
    """Train on one batch: hooks, loss, gradients, optimizers, and the schedulers of steps."""
    module, index = trainer._module, item.index
    trainer.batch_idx, trainer._item, trainer._item_is_last = index, item, item.last
    trainer._total_batches += 1
    every = trainer.accumulate_grad_batches
    trainer._accumulating = bool(
        every != 1 and module.automatic_optimization and (index + 1) % every and not item.last
    )
    batch = moved(trainer, item.batch, 0)
    trainer._batch = batch
    results = trainer._train_results
    results.begin_batch(batch)
    trainer._batch_outputs = {}
    if batch is None:
        _warnings.warn("train_dataloader yielded None. If this was on purpose, ignore this warning")
        return
    if (
        call(trainer, "on_batch_start") == -1
        or call(trainer, "on_train_batch_start", batch, index, 0) == -1
    ):
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
    pieces = call_module(trainer, "tbptt_split_batch", batch, length)
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
        with profiled(trainer, "training_step_and_backward"):
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
    with profiled(trainer, f"optimizer_step_and_closure_{number}") if trainer._profiles else _OFF:
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
        wrapped = wrapped_optimizers(trainer)[number]
        epoch = trainer.current_epoch
        if any("closure" in name for name in _names(own)[3:4]):  # the order of 2.x
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
        profiled(trainer, "model_forward"),
        profiled(trainer, "training_step"),
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
    call(trainer, "on_before_zero_grad", optimizer)
    own = trainer._own.get("optimizer_zero_grad")
    if own is None:
        optimizer.zero_grad()
        return
    trainer._fx = "optimizer_zero_grad"
    own(*(trainer.current_epoch, index, optimizer, number)[: takes(own)])
    trainer._fx = None


def _backward(trainer: Any, loss: Tensor, optimizer: Any, number: int) -> None:
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
    call(trainer, "on_after_backward")


def _before_step(trainer: Any, optimizer: Any, number: int) -> None:
    """What is done between the gradients and the step."""
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


# ── Manual optimization ───────────────────────────────────────────────────────────────────────────


def _manual(trainer: Any, batch: Any, index: int) -> Any:
    with profiled(trainer, "training_step_and_backward"):
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


def wrapped_optimizers(trainer: Any) -> list[Any]:
    """The optimizers as a module sees them."""
    wrapped, optimizers = trainer._wrapped, trainer.optimizers
    if len(wrapped) != len(optimizers) or any(
        w.optimizer is not o for w, o in zip(wrapped, optimizers, strict=True)
    ):
        trainer._wrapped = [
            LightningOptimizer._to_lightning_optimizer(optimizer, trainer, number)
            for number, optimizer in enumerate(optimizers)
        ]
    return trainer._wrapped


def manual_step(trainer: Any, wrapped: Any, closure: Any, options: Mapping[str, Any]) -> Any:
    """A step that ``training_step`` itself makes."""
    call(trainer, "on_before_optimizer_step", wrapped.optimizer, wrapped._optimizer_idx)
    returned = step_optimizer(trainer, wrapped.optimizer, closure, **options)
    trainer._updates += 1
    return returned


def manual_backward(trainer: Any, loss: Tensor, args: Any, kwargs: Any) -> None:
    """The gradients that ``training_step`` itself asks for."""
    call(trainer, "on_before_backward", loss)
    own = trainer._own.get("backward")
    if trainer._scaler is not None:
        loss = trainer._scaler.scale(loss)
    if own is None:
        loss.backward(*args, **kwargs)
    else:
        given = (loss, *args) if args else (loss, None, None)
        own(*given[: max(takes(own), 1)], **kwargs)
    call(trainer, "on_after_backward")
