"""What a step gives back in the versions that had objects for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from puretrain.lightning.utilities.unavailable import unavailable

__all__ = ["EvalResult", "Result", "TrainResult"]

_INSTEAD = "return the loss, or a dictionary with it, and log with self.log"


class Result(dict[str, Any]):
    """A dictionary with attributes, in which a step may give its outputs.

    >>> import torch
    >>> Result(minimize=torch.tensor(2.0)).minimize
    tensor(2.)
    """

    def __init__(self, minimize: Tensor | None = None) -> None:
        """Begin with a loss, or with nothing.

        Args:
            minimize: the loss.
        """
        super().__init__()
        if minimize is not None:
            self["minimize"] = minimize

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def detach(self) -> Result:
        """The same values, cut from their graphs."""
        detached = Result()
        for key, value in self.items():
            detached[key] = value.detach() if isinstance(value, Tensor) else value
        return detached


TrainResult = unavailable("TrainResult", __name__, _INSTEAD)
EvalResult = unavailable("EvalResult", __name__, _INSTEAD)
