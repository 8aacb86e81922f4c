"""Modules of the real Lightning in our trainer: their talk with a trainer goes to ours."""

from __future__ import annotations

import functools
import types
from typing import Any

from puretrain.lightning.trainer.calls import implements, is_of_lightning

__all__ = ["adopt"]

# What asks the trainer for something, or what only 1.x has. The rest of a module of 2.x works as
# it is, since it finds our trainer behind ``self.trainer``.
_METHODS = (
    "log",
    "log_dict",
    "print",
    "get_progress_bar_dict",
    "write_prediction",
    "write_prediction_dict",
    "all_gather",
    "optimizers",
    "lr_schedulers",
    "manual_backward",
    "clip_gradients",
    "toggle_optimizer",
    "untoggle_optimizer",
    "tbptt_split_batch",
    "summarize",
    "_apply_batch_transfer_handler",
)


def adopt(module: Any) -> None:
    """Let a module of the real Lightning, and those inside it, speak with our trainer.

    Its methods that need the trainer's inner parts are replaced by ours, on this instance alone.
    What its own class overrides stays; the method that this may call with ``super()`` is from then
    on ours in our trainer, and Lightning's own in Lightning's.

    Args:
        module: any module; nothing happens to one of ours, or to a plain torch module.
    """
    from puretrain.lightning.core.lightning import LightningModule  # it needs the trainer's parts

    for each in module.modules():
        if isinstance(each, LightningModule) or not is_of_lightning(type(each), "LightningModule"):
            continue
        for name in _METHODS:
            if implements(each, name):
                _share(type(each), name)
            elif name not in each.__dict__:
                method = types.MethodType(getattr(LightningModule, name), each)
                object.__setattr__(each, name, method)
        each.__dict__.setdefault("_requires_grad_before", {})
        each.__dict__.setdefault("truncated_bptt_steps", 0)


def _share(cls: type, name: str) -> None:
    """Let a method of the real LightningModule find out whose trainer it speaks with."""
    from puretrain.lightning.core.lightning import LightningModule
    from puretrain.lightning.trainer.trainer import Trainer

    (base,) = [b for b in cls.__mro__ if b.__name__ == "LightningModule"]
    theirs, ours = base.__dict__.get(name), getattr(LightningModule, name)
    if theirs is None or hasattr(theirs, "_is_shared"):
        return

    @functools.wraps(theirs)
    def shared(self: Any, *arguments: Any, **named: Any) -> Any:
        method = ours if isinstance(self.__dict__.get("_trainer"), Trainer) else theirs
        return method(self, *arguments, **named)

    shared._is_shared = True  # type: ignore[attr-defined]
    setattr(base, name, shared)
