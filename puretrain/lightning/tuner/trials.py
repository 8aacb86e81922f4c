"""A fit on trial: everything is afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from puretrain.lightning.trainer import loaders, running, stages
from puretrain.lightning.trainer.results import metric_states, restore_metric_states
from puretrain.lightning.trainer.states import TrainerFn, TrainerState

__all__ = ["trial"]

_PLAIN = (bool, int, float, str, type(None))


def trial(
    trainer: Any,
    model: Any,
    train: Any,
    val: Any,
    datamodule: Any,
    callbacks: list[Any],
    **changes: Any,
) -> int:
    """Fit a module and take it all back: parameters, generators, and what the trainer remembers.

    Args:
        trainer: the trainer.
        model: the module.
        train: the training loader, or a data module.
        val: the validation loaders.
        datamodule: the data module.
        callbacks: those of the trial, instead of the trainer's.
        **changes: attributes of the trainer for the time of the trial.

    Returns:
        The number of samples of the training data; 0 if that is not known.

    Raises:
        KeyboardInterrupt: the trial was interrupted.
    """
    given = [loader for loader in (train, val) if loader is not None]
    with _restored(trainer, model, given):
        trainer.__dict__.update(
            max_epochs=-1, min_epochs=0, min_steps=None, weights_summary=None, _profiles=False,
            _fold=None, _logger=_quiet(trainer._logger), callbacks=[],
        )  # fmt: skip
        trainer.__dict__.update(changes)
        if trainer._scaler is not None:
            trainer._scaler = type(trainer._scaler)(trainer._scaler._device)
        running.attach(trainer, model, TrainerState.FITTING, TrainerFn.FITTING, datamodule,
                       keep=False, train=train, val=val)  # fmt: skip
        trainer.callbacks, trainer._hooks = callbacks, {}
        with running.under_way(trainer, "fit"):
            stages.fit_attached(trainer)
        interrupted = trainer.interrupted
        datamodule = trainer.datamodule
        samples = _samples(trainer._train_loader)
    if interrupted:
        raise KeyboardInterrupt
    attach(trainer, model, datamodule)
    return samples


def attach(trainer: Any, model: Any, datamodule: Any) -> None:
    """Let a trainer and a module know each other, without a run."""
    if trainer._module is not model:
        running.begin(trainer)
    trainer._module = model
    model.trainer = trainer
    if datamodule is not None:
        trainer.datamodule = datamodule
        datamodule.trainer = trainer
        model.datamodule = datamodule


def _quiet(logger: Any) -> Any:
    from puretrain.lightning.loggers.base import DummyLogger

    return None if logger is None else DummyLogger()


def _samples(loader: Any) -> int:
    found = []
    for each in loaders._single_loaders(loader):
        try:
            found.append(len(each.dataset))
        except (TypeError, AttributeError):
            return 0
    return min(found, default=0)


# ── Putting it all back ───────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _restored(trainer: Any, model: nn.Module, given: list[Any]) -> Iterator[None]:
    attributes = dict(trainer.__dict__)
    parts = [_part(module) for module in model.modules()]
    metrics = {name: dict(states) for name, states in metric_states(model).items()}
    metrics = {name: {k: _copied(v) for k, v in states.items()} for name, states in metrics.items()}
    generators = loaders.capture()
    own = [(generator, generator.get_state()) for generator in _generators(model, given)]
    try:
        yield
    finally:
        trainer.__dict__.clear()
        trainer.__dict__.update(attributes)
        for part in parts:
            _put_back(*part)
        restore_metric_states(model, metrics)
        loaders.put_back(generators)
        for generator, state in own:
            generator.set_state(state)


def _generators(model: nn.Module, given: list[Any]) -> list[torch.Generator]:
    found = [g for g in vars(model).values() if isinstance(g, torch.Generator)]
    for loader in loaders.flatten(given):
        found += loaders._generators(loader)
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(map(_copied, value)) if isinstance(value, list) else value


def _part(module: nn.Module) -> tuple[Any, ...]:
    """What one module holds itself: tensors with their bits, and plain attributes."""
    tensors = [
        (holder, name, tensor, tensor.data, tensor.detach().clone(), _grad(tensor),
         tensor.requires_grad)
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    ]  # fmt: skip
    plain = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)}
    return module, tensors, plain


def _grad(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    return None if tensor.grad is None else (tensor.grad, tensor.grad.clone())


def _put_back(module: nn.Module, tensors: list[Any], plain: dict[str, Any]) -> None:
    for holder, name, tensor, data, content, grad, wanted in tensors:
        data.copy_(content)
        tensor.grad = None
        tensor.data = data  # where the trial has moved or converted it
        tensor.requires_grad_(wanted)
        if grad is not None:
            grad[0].copy_(grad[1])
            tensor.grad = grad[0]
        holder[name] = tensor
    vars(module).update(plain)
