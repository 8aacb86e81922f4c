"""The norms of gradients."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["grad_norm"]


def grad_norm(
    module: nn.Module, norm_type: float | int | str, group_separator: str = "/"
) -> dict[str, float]:
    """The norm of each parameter's gradient, and of all of them together.

    Args:
        module: whose gradients; those that are not there are left out.
        norm_type: p, or ``"inf"``.
        group_separator: what stands between the prefix and the parameter.

    Returns:
        ``grad_2.0_norm/NAME`` for each, and ``grad_2.0_norm_total``.

    >>> layer = nn.Linear(1, 1)
    >>> layer.weight.grad, layer.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    >>> grad_norm(layer, 2)["grad_2.0_norm_total"]
    5.0
    """
    p = float(norm_type)
    if p <= 0:
        raise ValueError(f"`norm_type` must be a positive number or 'inf' (infinity norm). Got {p}")
    norms = {
        f"grad_{p}_norm{group_separator}{name}": parameter.grad.detach().norm(p).item()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        norms[f"grad_{p}_norm_total"] = torch.tensor(list(norms.values())).norm(p).item()
    return norms
