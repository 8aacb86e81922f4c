"""Muon: momentum, made orthogonal, for the matrices inside of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim._muon import muon as _torch_muon

from puretrain.errors import OptimizerError, check_choice, check_whole
from puretrain.optim.base import Optimizer, Schedule, check_number, check_rate
from puretrain.optim.leafwise import Column, Values, leafwise, zeros
from puretrain.tree import Record

__all__ = ["MuonState", "muon"]


class MuonState(Record):
    """The state of :func:`muon`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    momentum_buffer: Any
    """The running mean of the gradients, a tree like the parameters."""


def muon(
    lr: float | Tensor | Schedule = 1e-3,
    weight_decay: float | Tensor = 0.1,
    momentum: float | Tensor = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: float | Tensor = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
) -> Optimizer:
    r"""Replace the singular values of the momentum by ones, roughly.

    .. math::
        b_t &= \mu b_{t-1} + (1 - \mu) g_t, \qquad
        d_t = \begin{cases}
            \mu b_t + (1 - \mu) g_t & \text{with Nesterov} \\
            b_t & \text{otherwise}
        \end{cases} \\
        x_0 &= d_t / \max(\|d_t\|_F, \epsilon), \qquad
        x_{k+1} = a x_k + \left(b \, x_k x_k^\top + c \, (x_k x_k^\top)^2\right) x_k \\
        \theta_t &= (1 - \gamma \lambda) \, \theta_{t-1} - \gamma \, r \, x_K

    with the iteration on the transpose if there are more rows than columns, and in bfloat16. For a
    matrix of shape :math:`(m, n)` the factor is :math:`r = \sqrt{\max(1, m/n)}`, or with
    ``adjust_lr_fn="match_rms_adamw"`` :math:`r = 0.2 \sqrt{\max(m, n)}`. (Jordan et al., `Muon
    <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al., `Muon is scalable for LLM
    training <https://arxiv.org/abs/2502.16982>`_, 2025.) The bits are those of
    ``torch.optim.Muon()``, except that without Nesterov torch spoils the momentum of bfloat16
    parameters. Under transforms the Newton–Schulz iteration may round otherwise, to the
    precision of bfloat16.

    It is for matrices only, and not for embeddings and the last layer. Give those, and biases, to
    another optimizer::

        multi_transform({"layers.**.weight": muon(2e-2), "**": adamw(1e-3)})

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        weight_decay: λ, 0 or more.
        momentum: μ, from 0 to 1.
        nesterov: look ahead.
        ns_coefficients: the polynomial's a, b and c, which are plain numbers.
        eps: ε, 0 or more.
        ns_steps: K, the steps of the iteration, from 0 and below 100.
        adjust_lr_fn: the factor r; None is ``"original"``.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is no matrix of floating-point numbers, or the gradients or the state do not fit the
            parameters.

    Example:
        >>> optimizer = muon(lr=0.1, weight_decay=0.0)
        >>> params = {"w": torch.zeros(2, 2)}
        >>> state = optimizer.init(params)
        >>> grads = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
        >>> params, state = optimizer.update(grads, state, params)
        >>> bool((params["w"].diagonal() + 0.1).abs().max() < 0.04)
        True
    """
    check_rate("muon", "lr", lr)
    check_number("muon", "weight_decay", weight_decay)
    check_number("muon", "momentum", momentum, most=1.0)
    check_number("muon", "eps", eps)
    if not isinstance(ns_coefficients, (tuple, list)) or len(ns_coefficients) != 3:
        raise OptimizerError(f"muon: ns_coefficients are three numbers, not {ns_coefficients!r}")
    for i, coefficient in enumerate(ns_coefficients):
        if isinstance(coefficient, Tensor):
            raise OptimizerError(
                f"muon: ns_coefficients[{i}] is a plain number, not a tensor; with "
                'inject_hyperparams give static=("ns_coefficients",)'
            )
        check_number("muon", f"ns_coefficients[{i}]", coefficient, least=-math.inf)
    ns_steps = check_whole("muon: ns_steps", ns_steps, 0, 99, OptimizerError)
    ways = (None, "original", "match_rms_adamw")
    check_choice("muon: adjust_lr_fn", adjust_lr_fn, ways, OptimizerError)
    a, b, c = map(float, ns_coefficients)

    def check(paths: list[str], leaves: Column) -> None:
        others = [
            f"{path} of shape {tuple(leaf.shape)}"
            for path, leaf in zip(paths, leaves, strict=True)
            if leaf.dim() != 2
        ]
        if others:
            raise OptimizerError(
                "muon: it is for matrices only, but there are "
                f"{', '.join(others[:4])}{', …' if len(others) > 4 else ''}; give these to another "
                'optimizer, as in multi_transform({"layers.**.weight": muon(2e-2), "**": adamw()})'
            )

    def orthogonal(matrix: Tensor, eps: Any) -> Tensor:
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.bfloat16().mT if tall else matrix.bfloat16()
        x = x / torch.linalg.matrix_norm(x).clamp(min=eps).to(x.dtype)
        for _ in range(ns_steps):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x

    def ratio(shape: torch.Size) -> float:
        rows, columns = shape
        if adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns))

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        mean = h.momentum * slots[0] + (1 - h.momentum) * grad
        ahead = h.momentum * mean + (1 - h.momentum) * grad if nesterov else mean
        direction = orthogonal(ahead, h.eps).to(param.dtype)
        param = param - h.lr * h.weight_decay * param
        return param - h.lr * ratio(param.shape) * direction, mean

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        (means,) = slots
        held = means
        if not nesterov:  # torch then normalizes a mean in bfloat16 itself, where it needs a copy
            held = [mean.clone() if mean.dtype == torch.bfloat16 else mean for mean in means]
        _torch_muon(
            params,
            grads,
            held,
            nesterov=nesterov,
            ns_coefficients=(a, b, c),
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            has_complex=False,
            **h,
        )
        for mean, copy, grad in zip(means, held, grads, strict=True):
            if copy is not mean:
                mean.lerp_(grad, 1 - h.momentum)

    return leafwise(
        "muon",
        MuonState,
        formula,
        {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps": eps},
        slots={"momentum_buffer": zeros},
        kernel=kernel,
        check=check,
        reads="leaf",
    )
