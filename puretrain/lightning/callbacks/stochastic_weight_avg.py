"""Average the weights of the last epochs (Izmailov et al., arXiv:1803.05407)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.trainer.optimization import scheduler_config
from puretrain.lightning.trainer.transfer import moved
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["StochasticWeightAveraging"]


class StochasticWeightAveraging(Callback):
    """From an epoch on, averages the weights at the beginning of each epoch.

    At the end the module gets the average. The running statistics of batch normalization are then
    computed anew, by one pass over the training data.
    """

    def __init__(
        self,
        swa_epoch_start: float = 0.8,
        swa_lrs: Any = None,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: Callable[..., Tensor] | None = None,
        device: Any = None,
    ) -> None:
        """Say when to begin: an epoch, from 1, or a fraction of all."""
        message = "swa_epoch_start should be a >0 integer or a float between 0 and 1."
        if isinstance(swa_epoch_start, int) and swa_epoch_start < 1:
            raise MisconfigurationException(message)
        if isinstance(swa_epoch_start, float) and not 0 <= swa_epoch_start <= 1:
            raise MisconfigurationException(message)
        if swa_lrs is not None and not isinstance(swa_lrs, (float, list)):
            raise MisconfigurationException(
                "The `swa_lrs` should be a positive float, or a list of positive floats"
            )
        if avg_fn is not None and not callable(avg_fn):
            raise MisconfigurationException("The `avg_fn` should be callable.")
        self._swa_epoch_start, self._swa_lrs = swa_epoch_start, swa_lrs
        self._annealing_epochs, self._annealing_strategy = annealing_epochs, annealing_strategy
        self._avg_fn = avg_fn or self.avg_fn
        self._average: dict[str, Tensor] | None = None
        self._count = 0
        self._latest = -1
        self._max_epochs = 0
        self._scheduler: Any = None
        self._scheduler_state: dict[str, Any] | None = None

    @property
    def swa_start(self) -> int:
        """The first epoch that counts, from 0."""
        return max(int(self._swa_epoch_start) - 1, 0)

    @property
    def swa_end(self) -> int:
        """The last epoch that counts, from 0."""
        return self._max_epochs - 1

    @staticmethod
    def avg_fn(average: Tensor, parameter: Tensor, count: Tensor) -> Tensor:
        """The equal mean."""
        return average + (parameter - average) / (count + 1)

    def on_fit_start(self, trainer, pl_module):
        """Look whether the run can be averaged."""
        if trainer._fn != "fit":
            return
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException("SWA currently works with 1 `optimizer`.")
        if len(trainer.lr_schedulers) > 1:
            raise MisconfigurationException(
                "SWA currently not supported for more than 1 `lr_scheduler`."
            )
        self._max_epochs = trainer.max_epochs
        if isinstance(self._swa_epoch_start, float):
            if trainer.max_epochs in (None, -1):
                raise MisconfigurationException(
                    "SWA with `swa_epoch_start` as a float is not supported when `max_epochs=-1`. "
                    "Please provide `swa_epoch_start` as an integer."
                )
            self._swa_epoch_start = int(trainer.max_epochs * self._swa_epoch_start)

    def _schedule(self, trainer: Any) -> None:
        optimizer = trainer.optimizers[0]
        lrs = self._swa_lrs
        if lrs is None:
            lrs = [group["lr"] for group in optimizer.param_groups]
        elif isinstance(lrs, float):
            lrs = [lrs] * len(optimizer.param_groups)
        for lr, group in zip(lrs, optimizer.param_groups, strict=False):
            group["initial_lr"] = lr
        cosine = self._annealing_strategy == "cos"
        self._scheduler = SWALR(
            optimizer,
            swa_lr=lrs,
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
            last_epoch=trainer.max_epochs if cosine else -1,
        )
        trainer.lr_schedulers[:] = [scheduler_config(self._scheduler)]
        trainer._unmonitored = {"step": False, "epoch": True}
        trainer._monitored = {"step": False, "epoch": False}

    def on_train_start(self, trainer, pl_module):
        """Go on where a checkpoint was written."""
        if self._scheduler_state is not None and self._scheduler is None:
            self._schedule(trainer)
            self._scheduler.load_state_dict(self._scheduler_state)
            for group, lr in zip(
                trainer.optimizers[0].param_groups, self._scheduler.get_last_lr(), strict=False
            ):
                group["lr"] = lr

    def on_train_epoch_start(self, trainer, pl_module):
        """Take the weights into the average."""
        epoch = trainer.current_epoch
        if not self.swa_start <= epoch <= self.swa_end:
            return
        if self._scheduler is None:
            self._schedule(trainer)
        if epoch <= self._latest:
            return
        count = torch.tensor(self._count)
        with torch.no_grad():
            found = {n: p.detach() for n, p in pl_module.named_parameters()}
            if self._average is None or self._count == 0:
                self._average = {n: p.clone() for n, p in found.items()}
            else:
                for name, parameter in found.items():
                    held = self._average[name]
                    held.copy_(self._avg_fn(held, parameter, count))
        self._count += 1
        self._latest = epoch

    def on_train_end(self, trainer, pl_module):
        """Give the module the average."""
        if self._average is None or trainer.current_epoch != self.swa_end or trainer.interrupted:
            return
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                parameter.copy_(self._average[name])
        norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:
            self._update_norms(trainer, pl_module, norms)

    def _update_norms(self, trainer: Any, pl_module: Any, norms: list[Any]) -> None:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        pl_module.train()
        before, trainer._results = trainer._results, type(trainer._train_results)(training=True)
        with torch.no_grad():
            for index, batch in enumerate(trainer._train_loader):
                if index >= trainer.num_training_batches:
                    break
                trainer._fx = "training_step"
                pl_module.training_step(
                    *(moved(trainer, batch, 0), index)[: 2 if trainer._step_takes_index else 1]
                )
        trainer._fx, trainer._results = None, before
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def state_dict(self):
        """The average so far."""
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        if scheduler is not None:
            scheduler = {k: v for k, v in scheduler.items() if not callable(v)}
        return {
            "n_averaged": self._count,
            "latest_update_epoch": self._latest,
            "scheduler_state": scheduler,
            "average_model_state": self._average,
        }

    def load_state_dict(self, state_dict):
        """Take back the average."""
        self._count = state_dict["n_averaged"]
        self._latest = state_dict["latest_update_epoch"]
        self._scheduler_state = state_dict["scheduler_state"]
        self._average = state_dict["average_model_state"]
