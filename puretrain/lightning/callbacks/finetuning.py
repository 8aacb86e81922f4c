"""Freeze layers, and train them from some epoch on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["BackboneFinetuning", "BaseFinetuning", "multiplicative"]


def multiplicative(epoch: int) -> float:
    """Double the learning rate each epoch."""
    return 2.0


class BaseFinetuning(Callback):
    """Override ``freeze_before_training`` and ``finetune_function``."""

    def __init__(self) -> None:
        """Make a callback."""
        self._internal_optimizer_metadata: dict[int, list[dict[str, Any]]] = {}
        self._unfrozen: list[str] = []

    @staticmethod
    def flatten_modules(modules: Any) -> list[nn.Module]:
        """The modules in modules that have parameters of their own."""
        if isinstance(modules, (list, tuple)) or (
            isinstance(modules, Iterable) and not isinstance(modules, nn.Module)
        ):
            return [leaf for module in modules for leaf in BaseFinetuning.flatten_modules(module)]
        return [
            module
            for module in modules.modules()
            if not list(module.children()) or module._parameters
        ]

    @staticmethod
    def filter_params(
        modules: Any, train_bn: bool = True, requires_grad: bool = True
    ) -> Iterator[nn.Parameter]:
        """The parameters that require gradients, or do not."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and not train_bn:
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad == requires_grad:
                    yield parameter

    @staticmethod
    def make_trainable(modules: Any) -> None:
        """Let parameters require gradients."""
        for module in BaseFinetuning.flatten_modules(modules):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True

    @staticmethod
    def freeze(modules: Any, train_bn: bool = True) -> None:
        """Let parameters not require gradients; batch normalization goes on if ``train_bn``."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and train_bn:
                BaseFinetuning.make_trainable(module)
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad = False

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Any]) -> list[Any]:
        """Those parameters that an optimizer does not have yet."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        fresh, known = [], []
        for parameter in params:
            (known if id(parameter) in held else fresh).append(parameter)
        if known:
            rank_zero_warn(
                "The provided params to be frozen already exist within another group of this "
                "optimizer. Those parameters will be skipped."
            )
        return fresh

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Any,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Train modules from now on, as one more group of the optimizer."""
        BaseFinetuning.make_trainable(modules)
        base = optimizer.param_groups[0]["lr"] if lr is None else float(lr)
        denominator = initial_denom_lr if lr is None else 1.0
        found = BaseFinetuning.filter_params(modules, train_bn=train_bn, requires_grad=True)
        fresh = BaseFinetuning.filter_on_optimizer(optimizer, found)
        if fresh:
            optimizer.add_param_group({"params": fresh, "lr": base / denominator})

    def setup(self, trainer, pl_module, stage=None):
        """Freeze, before the optimizers are made."""
        self.freeze_before_training(pl_module)

    def on_before_accelerator_backend_setup(self, trainer, pl_module):
        """Freeze, before the optimizers are made."""
        self.freeze_before_training(pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        """Unfreeze what is due."""
        for number, optimizer in enumerate(trainer.optimizers):
            self.finetune_function(pl_module, trainer.current_epoch, optimizer, number)

    def finetune_function(
        self, pl_module: Any, epoch: int, optimizer: Optimizer, opt_idx: int
    ) -> None:
        """Unfreeze layers in an epoch of your choice."""
        raise NotImplementedError

    def freeze_before_training(self, pl_module: Any) -> None:
        """Freeze layers."""
        raise NotImplementedError


class BackboneFinetuning(BaseFinetuning):
    """Trains ``pl_module.backbone`` from an epoch on, with a learning rate of its own."""

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        """Say when, and how the learning rate grows."""
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align, self.initial_denom_lr = should_align, initial_denom_lr
        self.train_bn, self.verbose, self.round = train_bn, verbose, rounding
        self.previous_backbone_lr: float | None = None

    def state_dict(self):
        """The learning rate of the backbone."""
        return {"previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict):
        """Take back the learning rate of the backbone."""
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]

    def on_fit_start(self, trainer, pl_module):
        """Look for the backbone."""
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise MisconfigurationException(
                "The LightningModule should have a nn.Module `backbone` attribute"
            )

    def freeze_before_training(self, pl_module):
        """Freeze the backbone."""
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module, epoch, optimizer, opt_idx):
        """Unfreeze the backbone, then raise its learning rate to that of the head."""
        if epoch == self.unfreeze_backbone_at_epoch:
            current = optimizer.param_groups[0]["lr"]
            initial = self.backbone_initial_lr
            if initial is None:
                initial = current * self.backbone_initial_ratio_lr
            self.previous_backbone_lr = initial
            self.unfreeze_and_add_param_group(
                pl_module.backbone,
                optimizer,
                initial,
                train_bn=self.train_bn,
                initial_denom_lr=self.initial_denom_lr,
            )
        elif epoch > self.unfreeze_backbone_at_epoch and self.previous_backbone_lr is not None:
            current = optimizer.param_groups[0]["lr"]
            following = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align and following > current:
                following = current
            optimizer.param_groups[-1]["lr"] = following
            self.previous_backbone_lr = following
