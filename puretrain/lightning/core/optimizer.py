"""The optimizer that a module sees: torch's own, with a ``step`` that runs the trainer's hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

__all__ = ["LightningOptimizer", "is_lightning_optimizer"]


def is_lightning_optimizer(optimizer: Any) -> bool:
    """Whether an optimizer is wrapped."""
    return isinstance(optimizer, LightningOptimizer)


class LightningOptimizer:
    """Stands for a torch optimizer: an instance of its class, sharing all that it has."""

    def __init__(self, optimizer: Optimizer, *unused: Any) -> None:
        """Wrap an optimizer."""
        # an instance of the optimizer's class as well, for schedulers and users who ask
        self.__class__ = type(
            "Lightning" + type(optimizer).__name__, (LightningOptimizer, type(optimizer)), {}
        )
        self.__dict__["_optimizer"] = optimizer
        self.__dict__["_trainer"] = None
        self.__dict__["_optimizer_idx"] = 0

    @classmethod
    def _to_lightning_optimizer(
        cls, optimizer: Any, trainer: Any, optimizer_idx: int = 0
    ) -> LightningOptimizer:
        wrapped = optimizer if isinstance(optimizer, cls) else cls(optimizer)
        wrapped._on_trainer(trainer, optimizer_idx)
        return wrapped

    def _on_trainer(self, trainer: Any, number: int) -> None:
        self.__dict__["_trainer"], self.__dict__["_optimizer_idx"] = trainer, number

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that does the work."""
        return self.__dict__["_optimizer"]

    @property
    def state(self) -> Any:
        """What it remembers."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Its parameters and hyper-parameters."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The hyper-parameters of new groups."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Set all gradients to none."""
        self.optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer has to remember."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` has given."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters."""
        self.optimizer.add_param_group(group)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Any:
        """Let only this optimizer's parameters have gradients inside the block."""
        module = self._trainer._module
        module.toggle_optimizer(self, self._optimizer_idx)
        try:
            yield
        finally:
            module.untoggle_optimizer(self._optimizer_idx)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Make a step; with a closure, compute the gradients by it first."""
        if closure is not None and not callable(closure):
            from puretrain.lightning.utilities.exceptions import MisconfigurationException

            raise MisconfigurationException("When closure is provided, it should be a function")
        kwargs.pop("make_optimizer_step", None)
        trainer = self._trainer
        if trainer is not None:
            from puretrain.lightning.trainer import steps  # which needs this class

            if not trainer._module.automatic_optimization:
                return steps.manual_step(trainer, self, closure, kwargs)
            return steps.step_optimizer(trainer, self.optimizer, closure, **kwargs)
        if closure is None:
            return self.optimizer.step(**kwargs)
        return self.optimizer.step(closure, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __reduce__(self) -> Any:
        return LightningOptimizer, (self.optimizer,)

    __hash__ = object.__hash__
    __eq__ = object.__eq__
