"""The learning rate finder: the trainer's own step, with a learning rate that grows."""

from __future__ import annotations

import math
from typing import Any

from puretrain import tuning
from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.tuner.trials import trial
from puretrain.lightning.utilities.distributed import rank_zero_info, rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.parsing import lightning_hasattr, lightning_setattr

__all__ = ["lr_find"]


class _LRFinder:
    """What the finder has found."""

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        """Begin.

        Args:
            mode: ``exponential`` or ``linear``.
            lr_min: the first learning rate.
            lr_max: the last one.
            num_training: how many there are.
        """
        if mode not in {"linear", "exponential"}:
            raise MisconfigurationException("mode should be either `linear` or `exponential`")
        self.mode, self.lr_min, self.lr_max = mode, lr_min, lr_max
        self.num_training = num_training
        self.results: dict[str, list[float]] = {}
        self._total_batch_idx = 0
        self._optimal_idx: int | None = None

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss falls most steeply; None with too few points.

        Args:
            skip_begin: points to leave out at the beginning.
            skip_end: points to leave out at the end.
        """
        self._optimal_idx = tuning.steepest(self.results["loss"], skip_begin, skip_end)
        if self._optimal_idx is None:
            rank_zero_warn(
                "Failed to compute suggestion for `lr`. There might not be enough points."
            )
            return None
        return self.results["lr"][self._optimal_idx]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """Draw the loss over the learning rate; returns the figure.

        Args:
            suggest: mark the suggested learning rate.
            show: show it in a window.
            ax: the axes to draw into.
        """
        suggestion = self.suggestion() if suggest else None
        lr, loss = self.results["lr"], self.results["loss"]
        figure = tuning.draw(lr, loss, self.mode, suggestion, ax)
        if show:
            import matplotlib.pyplot as plt

            plt.show()
        return figure


class _Sweep(Callback):
    """Sets the learning rate of each step, and records the loss."""

    def __init__(self, rates: list[float], threshold: float | None) -> None:
        super().__init__()
        self.rates, self.smoothed = rates, tuning.Smoothed(stop_factor=threshold)
        self.waiting: list[float] = []
        self.batches = 0

    def _set(self, trainer: Any) -> None:
        number = len(self.smoothed.values)
        if number < len(self.rates):
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = self.rates[number]

    def on_fit_start(self, trainer, pl_module):
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"`model.configure_optimizers()` returned {len(trainer.optimizers)} optimizers, "
                "but learning rate finder only works with single optimizer"
            )
        trainer.lr_schedulers = []  # it is this callback that sets the learning rate
        self._set(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches += 1
        self.waiting += [float(loss.float().mean()) for loss in trainer._losses]
        trainer._losses.clear()
        if trainer._accumulating:
            return
        if not self.waiting:  # training_step returned None
            self.smoothed.skip()
        elif self.smoothed.add(sum(self.waiting) / len(self.waiting)):
            trainer.should_stop = True
        self.waiting.clear()
        self._set(trainer)


def attribute_of(model: Any, name: Any) -> str:
    """The name of the attribute that holds the learning rate.

    Raises:
        MisconfigurationException: there is none.
    """
    if isinstance(name, str) and name:
        if lightning_hasattr(model, name):
            return name
        raise MisconfigurationException(
            f"`auto_lr_find` was set to {name}, however could not find this as a field in `model` "
            "or `model.hparams`."
        )
    for usual in ("lr", "learning_rate"):
        if lightning_hasattr(model, usual):
            return usual
    raise MisconfigurationException(
        "When auto_lr_find is set to True, expects that `model` or `model.hparams` either has "
        "field `lr` or `learning_rate` that can overridden"
    )


def lr_find(
    trainer: Any,
    model: Any,
    train_dataloader: Any = None,
    val_dataloaders: Any = None,
    min_lr: float = 1e-8,
    max_lr: float = 1,
    num_training: int = 100,
    mode: str = "exponential",
    early_stop_threshold: float | None = 4.0,
    datamodule: Any = None,
    update_attr: bool = False,
    attr_name: str = "",
) -> _LRFinder | None:
    """Train for a while with a learning rate that grows, and record the loss.

    Afterwards the module, the trainer and the random generators are as they were.

    Args:
        trainer: the trainer.
        model: the module.
        train_dataloader: as for ``trainer.fit``.
        val_dataloaders: not used, there is no validation.
        min_lr: the first learning rate.
        max_lr: the last one.
        num_training: how many there are.
        mode: ``exponential`` or ``linear``.
        early_stop_threshold: end when the smoothed loss is so many times its lowest value.
        datamodule: as for ``trainer.fit``.
        update_attr: set the module's learning rate to what is suggested.
        attr_name: the name of that attribute; by default ``lr`` or ``learning_rate``.

    Returns:
        Results with ``suggestion()`` and ``plot()``; None in a ``fast_dev_run``.

    Raises:
        MisconfigurationException: the module has several optimizers, optimizes by hand, or has no
            attribute for the learning rate.
    """
    if trainer.fast_dev_run:
        rank_zero_warn("Skipping learning rate finder since fast_dev_run is enabled.")
        return None
    if update_attr:
        trainer_of = model.__dict__.get("trainer")
        model.trainer = trainer
        if datamodule is not None:
            trainer.datamodule = datamodule
        attr_name = attribute_of(model, attr_name)
        model.trainer = trainer_of
    finder = _LRFinder(mode, min_lr, max_lr, num_training)
    sweep = _Sweep(
        tuning.learning_rates(min_lr, max_lr, num_training, mode),
        math.inf if early_stop_threshold is None else early_stop_threshold,
    )
    trial(
        trainer,
        model,
        train_dataloader,
        val_dataloaders,
        datamodule,
        [sweep],
        max_steps=num_training,
        limit_val_batches=0,
    )
    losses = sweep.smoothed.values
    if len(losses) < num_training:
        rank_zero_info(f"LR finder stopped early after {len(losses)} steps due to diverging loss.")
    finder.results = {"lr": sweep.rates[: len(losses)], "loss": list(losses)}
    finder._total_batch_idx = sweep.batches
    if update_attr:
        suggestion = finder.suggestion()
        if suggestion is not None:
            lightning_setattr(model, attr_name, suggestion)
            rank_zero_info(f"Learning rate set to {suggestion}")
    return finder
