"""Adam and its relatives: a running mean of gradients over the root of one of their squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as _torch_adam
from torch.optim.adamax import adamax as _torch_adamax
from torch.optim.nadam import nadam as _torch_nadam
from torch.optim.radam import radam as _torch_radam

from puretrain.optim.base import Optimizer, Schedule, check_betas, check_number, check_rate
from puretrain.optim.leafwise import (
    Column,
    Values,
    counts_before,
    decayed,
    each,
    leafwise,
    power,
    square_root,
    zeros,
)
from puretrain.tree import Record

__all__ = [
    "AdamState",
    "AdamaxState",
    "NAdamState",
    "adam",
    "adamax",
    "adamw",
    "nadam",
    "radam",
]


class AdamState(Record):
    """The state of :func:`adam`, :func:`adamw` and :func:`radam`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    step: Tensor
    """Updates of each leaf, in the order of the leaves; float32 of shape ``(leaves,)``."""
    exp_avg: Any
    """The running mean of the gradients, a tree like the parameters."""
    exp_avg_sq: Any
    """The running mean of their squares, a tree like the parameters."""
    max_exp_avg_sq: Any
    """The largest of those so far, with ``amsgrad``; otherwise None."""


class AdamaxState(Record):
    """The state of :func:`adamax`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    step: Tensor
    """Updates of each leaf, in the order of the leaves; float32 of shape ``(leaves,)``."""
    exp_avg: Any
    """The running mean of the gradients, a tree like the parameters."""
    exp_inf: Any
    """The largest of their magnitudes, which fades; a tree like the parameters."""


class NAdamState(Record):
    """The state of :func:`nadam`."""

    count: Tensor
    """Updates done, int64 of shape ``()``."""
    step: Tensor
    """Updates of each leaf, in the order of the leaves; float32 of shape ``(leaves,)``."""
    mu_product: Tensor
    """The product of the momentum coefficients so far, for each leaf; float32, ``(leaves,)``."""
    exp_avg: Any
    """The running mean of the gradients, a tree like the parameters."""
    exp_avg_sq: Any
    """The running mean of their squares, a tree like the parameters."""


def adam(
    lr: float | Tensor | Schedule = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    fused: bool | None = None,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    r"""Adam: the running mean of the gradients, divided by the root of that of their squares.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1}
            - \gamma \, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    (Kingma & Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, ICLR 2015.) The bits are those of
    ``torch.optim.Adam(fused=True)``, or with ``fused=False`` those of ``torch.optim.Adam()``.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        betas: β₁ and β₂, from 0 and below 1.
        eps: ε, 0 or more; keeps the quotient finite.
        weight_decay: λ, 0 or more. For weight decay proper see :func:`adamw`.
        amsgrad: divide by the root of the largest :math:`v` so far (Reddi et al.,
            `On the convergence of Adam and beyond <https://arxiv.org/abs/1904.09237>`_, ICLR 2018).
        maximize: climb instead of descending.
        fused: use torch's fused kernel: None where there is one, True always, False never.
        decoupled_weight_decay: decay as :func:`adamw` does.

    Raises:
        OptimizerError: an argument is out of its range. From ``init`` and ``update``: a parameter
            is complex or no floating-point tensor, the gradients or the state do not fit the
            parameters, or ``fused=True`` where torch has no such kernel.

    Example:
        >>> optimizer = adam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"], state.exp_avg["w"]
        (tensor([0.9000, 2.1000]), tensor([ 0.3000, -0.4000]))
    """
    return _adam(
        "adam", lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay, maximize, fused
    )


def adamw(
    lr: float | Tensor | Schedule = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    r"""Adam whose weight decay does not pass through its averages.

    .. math::
        \theta_t &\leftarrow (1 - \gamma \lambda) \, \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &\leftarrow \theta_t
            - \gamma \, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    (Loshchilov & Hutter, `Decoupled weight decay regularization
    <https://arxiv.org/abs/1711.05101>`_, ICLR 2019.) The bits are those of
    ``torch.optim.AdamW(fused=True)``, or with ``fused=False`` those of ``torch.optim.AdamW()``.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        betas: β₁ and β₂, from 0 and below 1.
        eps: ε, 0 or more; keeps the quotient finite.
        weight_decay: λ, 0 or more.
        amsgrad: as for :func:`adam`.
        maximize: climb instead of descending; the decay stays one.
        fused: use torch's fused kernel: None where there is one, True always, False never.

    Raises:
        OptimizerError: as for :func:`adam`.

    Example:
        >>> optimizer = adamw(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"]
        tensor([0.8500, 2.0000])
    """
    return _adam("adamw", lr, betas, eps, weight_decay, amsgrad, True, maximize, fused)


def _adam(
    name: str,
    lr: float | Tensor | Schedule,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float | Tensor,
    weight_decay: float | Tensor,
    amsgrad: bool,
    decoupled: bool,
    maximize: bool,
    fused: bool | None,
) -> Optimizer:
    check_rate(name, "lr", lr)
    check_betas(name, betas)
    check_number(name, "eps", eps)
    check_number(name, "weight_decay", weight_decay)

    def scalars(h: Values, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = vectors["step"]
        return {"correction1": 1 - power(h.beta1, step), "correction2": 1 - power(h.beta2, step)}

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        mean, square, *largest = slots
        if decoupled:
            param = param - h.lr * h.weight_decay * param
        else:
            grad = decayed(param, grad, h)
        mean = h.beta1 * mean + (1 - h.beta1) * grad
        square = h.beta2 * square + (1 - h.beta2) * grad * grad
        largest = [torch.maximum(old, square) for old in largest]
        root = square_root((*largest, square)[0]) / h.correction2**0.5
        param = param - h.lr / h.correction1 * mean / (root + h.eps)
        return param, mean, square, *largest

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        mean, square, *more = slots
        _torch_adam(
            params,
            grads,
            mean,
            square,
            more[0] if more else [],
            counts_before(vectors["step"]),
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled,
            **h,
        )

    def fused_kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        mean, square, *more = slots
        run = torch._fused_adamw_ if decoupled else torch._fused_adam_
        run(
            params,
            grads,
            mean,
            square,
            more[0] if more else [],
            each(vectors["step"]),
            amsgrad=amsgrad,
            maximize=maximize,
            **h,
        )

    slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    return leafwise(
        name,
        AdamState,
        formula,
        {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay},
        slots=dict.fromkeys(slots, zeros),
        vectors={"step": 0.0},
        scalars=scalars,
        kernel=kernel,
        fused_kernel=fused_kernel,
        fused=fused,
        beside_leaves=True,
        maximize=maximize,
    )


def adamax(
    lr: float | Tensor | Schedule = 2e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adam with the largest magnitude, slowly forgotten, in the place of the root of squares.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        u_t = \max(\beta_2 u_{t-1}, |g_t| + \epsilon) \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t} \, \frac{m_t}{u_t}

    (Kingma & Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, ICLR 2015, section 7.1.) The bits are
    those of ``torch.optim.Adamax()``.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        betas: β₁ and β₂, from 0 and below 1.
        eps: ε, 0 or more; keeps the quotient finite.
        weight_decay: λ, 0 or more.
        maximize: climb instead of descending.

    Raises:
        OptimizerError: as for :func:`adam`.

    Example:
        >>> optimizer = adamax(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"], state.exp_inf["w"]
        (tensor([0.9000, 2.1000]), tensor([3., 4.]))
    """
    check_rate("adamax", "lr", lr)
    check_betas("adamax", betas)
    check_number("adamax", "eps", eps)
    check_number("adamax", "weight_decay", weight_decay)

    def scalars(h: Values, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"correction": 1 - power(h.beta1, vectors["step"])}

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        mean, largest = slots
        grad = decayed(param, grad, h)
        mean = h.beta1 * mean + (1 - h.beta1) * grad
        largest = torch.maximum(h.beta2 * largest, grad.abs() + h.eps)
        return param - h.lr / h.correction * mean / largest, mean, largest

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        mean, largest = slots
        steps = counts_before(vectors["step"])
        _torch_adamax(params, grads, mean, largest, steps, maximize=maximize, **h)

    return leafwise(
        "adamax",
        AdamaxState,
        formula,
        {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay},
        slots={"exp_avg": zeros, "exp_inf": zeros},
        vectors={"step": 0.0},
        scalars=scalars,
        kernel=kernel,
        maximize=maximize,
    )


def nadam(
    lr: float | Tensor | Schedule = 2e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    momentum_decay: float | Tensor = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adam with Nesterov momentum, which looks one step ahead.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1}, \qquad
        \mu_t = \beta_1 \left(1 - \tfrac{1}{2} \, 0.96^{\, t \psi}\right) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i}
            + \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^{t} \mu_i} \\
        \theta_t &= \theta_{t-1}
            - \gamma \, \frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    (Dozat, `Incorporating Nesterov momentum into Adam
    <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, ICLR workshop 2016.) The bits are
    those of ``torch.optim.NAdam()``.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        betas: β₁ and β₂, from 0 and below 1.
        eps: ε, 0 or more; keeps the quotient finite.
        weight_decay: λ, 0 or more.
        momentum_decay: ψ, 0 or more: how fast the momentum grows from β₁/2 to β₁.
        decoupled_weight_decay: decay as :func:`adamw` does.
        maximize: climb instead of descending.

    Raises:
        OptimizerError: as for :func:`adam`.

    Example:
        >>> optimizer = nadam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"], state.mu_product
        (tensor([0.8944, 2.1056]), tensor([0.4501]))
    """
    check_rate("nadam", "lr", lr)
    check_betas("nadam", betas)
    check_number("nadam", "eps", eps)
    check_number("nadam", "weight_decay", weight_decay)
    check_number("nadam", "momentum_decay", momentum_decay)

    def scalars(h: Values, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = vectors["step"]
        now = h.beta1 * (1 - 0.5 * 0.96 ** (step * h.momentum_decay))
        ahead = h.beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * h.momentum_decay))
        product = (vectors["mu_product"].float() * now.float()).double()  # as it is kept
        return {
            "mu_product": product,
            "grad_share": (1 - now) / (1 - product),
            "mean_share": ahead / (1 - product * ahead),
            "correction2": 1 - power(h.beta2, step),
        }

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        mean, square = slots
        if decoupled_weight_decay:
            param = param - h.lr * h.weight_decay * param
        else:
            grad = decayed(param, grad, h)
        mean = h.beta1 * mean + (1 - h.beta1) * grad
        square = h.beta2 * square + (1 - h.beta2) * grad * grad
        root = square_root(square / h.correction2) + h.eps
        return param - h.lr * (h.grad_share * grad + h.mean_share * mean) / root, mean, square

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        mean, square = slots
        _torch_nadam(
            params,
            grads,
            mean,
            square,
            list(vectors["mu_product"].unbind()),  # views: the kernel changes the vector itself
            counts_before(vectors["step"]),
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            **h,
        )

    return leafwise(
        "nadam",
        NAdamState,
        formula,
        {
            "lr": lr,
            "beta1": betas[0],
            "beta2": betas[1],
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
        },
        slots={"exp_avg": zeros, "exp_avg_sq": zeros},
        vectors={"step": 0.0, "mu_product": 1.0},
        scalars=scalars,
        kernel=kernel,
        maximize=maximize,
    )


def radam(
    lr: float | Tensor | Schedule = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adam that divides by the root of the mean square only once that is well estimated.

    .. math::
        g_t &\leftarrow \nabla f(\theta_{t-1}) + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        a_t &= \begin{cases}
            \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}} \,
            \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v_t} + \epsilon} & \rho_t > 5 \\
            1 & \text{otherwise}
        \end{cases} \\
        \theta_t &= \theta_{t-1} - \gamma \, \frac{m_t}{1 - \beta_1^t} \, a_t

    (Liu et al., `On the variance of the adaptive learning rate and beyond
    <https://arxiv.org/abs/1908.03265>`_, ICLR 2020.) The bits are those of
    ``torch.optim.RAdam()``.

    Args:
        lr: the learning rate γ, 0 or more; may be a schedule.
        betas: β₁ and β₂, from 0 and below 1.
        eps: ε, 0 or more; keeps the quotient finite.
        weight_decay: λ, 0 or more.
        decoupled_weight_decay: decay as :func:`adamw` does.
        maximize: climb instead of descending.

    Raises:
        OptimizerError: as for :func:`adam`.

    Example:
        >>> optimizer = radam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = optimizer.init(params)
        >>> params, state = optimizer.update({"w": torch.tensor([3.0, -4.0])}, state, params)
        >>> params["w"]
        tensor([0.7000, 2.4000])
    """
    check_rate("radam", "lr", lr)
    check_betas("radam", betas)
    check_number("radam", "eps", eps)
    check_number("radam", "weight_decay", weight_decay)

    def scalars(h: Values, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = vectors["step"]
        correction2 = 1 - power(h.beta2, step)
        limit = 2 / (1 - h.beta2) - 1 + 0 * step
        length = limit - 2 * step * power(h.beta2, step) / correction2
        known = length > 5
        # What is not chosen below must be finite too, or its derivative would be NaN.
        length, limit = torch.where(known, length, 6.0), torch.where(known, limit, 6.0)
        square = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        return {
            "known": known,
            "rectified": (square * correction2) ** 0.5,
            "correction1": 1 - power(h.beta1, step),
        }

    def formula(param: Tensor, grad: Tensor, /, *slots: Tensor, h: Values) -> tuple[Tensor, ...]:
        mean, square = slots
        if decoupled_weight_decay:
            param = param - h.lr * h.weight_decay * param
        else:
            grad = decayed(param, grad, h)
        mean = h.beta1 * mean + (1 - h.beta1) * grad
        square = h.beta2 * square + (1 - h.beta2) * grad * grad
        adaptive = h.rectified / (square_root(square) + h.eps)
        adaptive = torch.where(h.known.bool(), adaptive, 1.0)
        return param - h.lr / h.correction1 * mean * adaptive, mean, square

    def kernel(
        params: Column,
        grads: Column,
        slots: Sequence[Column],
        vectors: Mapping[str, Tensor],
        h: Values,
    ) -> None:
        mean, square = slots
        _torch_radam(
            params,
            grads,
            mean,
            square,
            counts_before(vectors["step"]),
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            **h,
        )

    return leafwise(
        "radam",
        AdamState,
        formula,
        {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay},
        slots={"exp_avg": zeros, "exp_avg_sq": zeros},
        vectors={"step": 0.0},
        scalars=scalars,
        kernel=kernel,
        maximize=maximize,
    )
