"""The gradient of each example by itself: private training, gradient noise, and influence.

A batch's gradient is a mean over its examples, in which they can't be told apart any more. Here
they are computed one by one, all at once with ``vmap``: their :func:`norms`, their
:func:`statistics`, which examples pull which way (:func:`influence`), and training in which no
single one can pull far (:func:`private`).

A loss is used as it is: it gets batches of one example each. It must not change the buffers, as
BatchNorm does, whose statistics mix the examples of a batch (GroupNorm and LayerNorm don't).
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from puretrain import random
from puretrain.errors import (
    ConfigurationError,
    DataError,
    LossError,
    TransformError,
    check_choice,
    check_whole,
)
from puretrain.gradients import Aux, Loss
from puretrain.loop import Event, Reducer
from puretrain.optim import Schedule, schedule_value
from puretrain.reducers.monitoring import memory_of
from puretrain.state import TrainState
from puretrain.tree import (
    FrozenDict,
    Record,
    path_string,
    tree_index,
    tree_leaves,
    tree_map,
    tree_paths,
    under_transform,
)

__all__ = [
    "Influence",
    "NoiseScale",
    "PoissonSampled",
    "Statistics",
    "epsilon",
    "gradients",
    "influence",
    "noise_multiplier",
    "noise_scale",
    "norms",
    "private",
    "products",
    "statistics",
]

S = TypeVar("S", bound=TrainState)
Accountant = Literal["rdp", "prv"]


# ── Gradients ─────────────────────────────────────────────────────────────────────────────────────


def gradients(loss: Loss, state: TrainState, batch: Any, *, chunk_size: int | None = None) -> Any:
    """The gradient of the loss of each example by itself.

    Random numbers are drawn for each example anew, from the key of the state's next step.

    Args:
        loss: as for :func:`puretrain.train_step`; called with batches of one example.
        state: whose parameters, buffers and key to use.
        batch: a tree of tensors of shape ``(n, …)``.
        chunk_size: how many examples to compute together; all by default. Memory grows with it.

    Returns:
        A tree like the parameters, with leaves of shape ``(n, *param.shape)``.

    Raises:
        DataError: the leaves of the batch have no common first dimension.
        LossError: the loss is no scalar, or it changes the buffers.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] * batch).sum(1).mean()
        >>> state = pt.TrainState.create({"w": torch.zeros(2)}, key=pt.random.key(0))
        >>> gradients(loss, state, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))["w"]
        tensor([[1., 2.],
                [3., 4.]])
    """
    key = _next_key(state)
    with random.scope(key):
        return _gradients(loss, state.params, state.buffers, batch, key, chunk_size)[0]


def _next_key(state: TrainState) -> Tensor:
    return random.fold_in(state.key, state.step if under_transform() else int(state.step))


def _gradients(
    loss: Loss, params: Any, buffers: Any, batch: Any, key: Any, chunk_size: int | None
) -> tuple[Any, Tensor, Any]:
    """The gradients, losses and metrics of all examples, each with a first dimension of n."""
    _size(batch)
    own = tree_leaves(buffers)

    def of_one(params: Any, example: Any) -> tuple[Tensor, tuple[Tensor, Any, Any]]:
        alone = tree_map(lambda leaf: leaf.unsqueeze(0), example)
        returned = loss(params, buffers, alone, key)
        pair = isinstance(returned, tuple) and len(returned) == 2
        value, aux = returned if pair else (returned, Aux())
        if not isinstance(value, Tensor) or value.dim() or not isinstance(aux, Aux):
            raise LossError(
                "per_example: the loss function returns the loss, a tensor of shape (), or "
                "(loss, Aux(buffers=…, metrics=…)), also for a batch of one example"
            )
        after = tree_leaves(aux.buffers)
        if after and len(after) != len(own):
            raise LossError(
                "per_example: the loss returned buffers of another structure than "
                "it was given: return those of apply, or leave them out of Aux"
            )
        changed = {i: x for i, x in enumerate(after) if x is not own[i]}
        metrics = {
            name: torch.tensor(float(x)) if isinstance(x, (int, float)) else x
            for name, x in aux.metrics.items()
        }
        return value, (value, changed, metrics)

    each = torch.func.vmap(
        torch.func.grad(of_one, has_aux=True),
        (None, 0),
        randomness="different",
        chunk_size=chunk_size,
    )
    grads, (losses, changed, metrics) = each(params, batch)
    _check_buffers(buffers, changed)
    return grads, losses, metrics


def _size(batch: Any) -> int:
    """The number of examples of a batch."""
    sizes = {
        path_string(path): tuple(leaf.shape)[:1] if isinstance(leaf, Tensor) else None
        for path, leaf in zip(tree_paths(batch), tree_leaves(batch), strict=True)
    }
    if len(set(sizes.values())) != 1 or not next(iter(sizes.values())):
        raise DataError(
            "per_example: every leaf of a batch is a tensor with one row for each example; here "
            f"are (rows by leaf): {sizes or 'no leaves'}"
        )
    return cast("tuple[int, ...]", next(iter(sizes.values())))[0]


def _check_buffers(buffers: Any, changed: dict[int, Tensor]) -> None:
    """Check that new buffers have the bits of the old ones, for all examples."""
    for place, after in changed.items():
        before = tree_leaves(buffers)[place]
        if under_transform() or not torch.equal(before.expand_as(after), after):
            raise LossError(
                f"per_example: the loss changes buffers/{path_string(tree_paths(buffers)[place])}, "
                "which then depends on all examples; use a layer that doesn't (GroupNorm in the "
                "place of BatchNorm), or leave the buffers out of Aux"
            )


def norms(grads: Any) -> Tensor:
    """The norm of each example's gradient, over all parameters together.

    Args:
        grads: what :func:`gradients` returned.

    Returns:
        The norms, of shape ``(n,)``.

    >>> norms({"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "b": torch.tensor([[12.0], [1.0]])})
    tensor([13.,  1.])
    """
    by_leaf = [
        torch.linalg.vector_norm(leaf.reshape(leaf.shape[0], -1), dim=1)
        for leaf in tree_leaves(grads)
    ]
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(by_leaf), dim=0))


def products(grads: Any, others: Any) -> Tensor:
    """The dot products of the gradients of some examples with those of others.

    Positive where a step for the one lowers the loss of the other.

    Args:
        grads: what :func:`gradients` returned for n examples.
        others: the same for m examples.

    Returns:
        The products, of shape ``(n, m)``.

    >>> products({"w": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, {"w": torch.tensor([[3.0, 4.0]])})
    tensor([[11.],
            [ 4.]])
    """
    terms = [
        a.reshape(a.shape[0], -1) @ b.reshape(b.shape[0], -1).T
        for a, b in zip(tree_leaves(grads), tree_leaves(others), strict=True)
    ]
    return torch.stack(terms).sum(0)


# ── Private training ──────────────────────────────────────────────────────────────────────────────


def private(
    loss: Loss,
    *,
    max_norm: float,
    noise_multiplier: float,
    batch_size: int,
    chunk_size: int | None = None,
) -> Loss:
    r"""Make a loss private: clip the gradient of each example, and add noise to their sum (DP-SGD).

    .. math::
        \tilde g = \frac{1}{B} \left( \sum_i g_i \min\left(1, \frac{C}{\lVert g_i \rVert}\right)
            + \mathcal N(0, \sigma^2 C^2 I) \right)

    (Abadi et al., `Deep learning with differential privacy <https://arxiv.org/abs/1607.00133>`_,
    CCS 2016.) The result is a loss like any other, whose value is the mean loss and whose gradient
    is :math:`\tilde g`: give it to :func:`puretrain.train_step` with any optimizer.

    What :func:`epsilon` says of a run holds under these conditions:
        - Batches are Poisson samples, see :class:`PoissonSampled`; B is their expected size, not
          that of the batch at hand. Shuffled batches of one size are not covered.
        - What else you publish of the run is private too: the loss, the metrics and early stopping
          look at the data without noise.
        - Torch's generators are made for speed. Somebody who knows the key of the state, which
          a checkpoint holds, can subtract the noise: don't publish it.

    Args:
        loss: as for :func:`puretrain.train_step`; called with batches of one example.
        max_norm: C, the most that an example's gradient can be; above 0.
        noise_multiplier: σ, 0 or more; see :func:`noise_multiplier`.
        batch_size: B, the expected number of examples in a batch.
        chunk_size: how many examples to compute together; all by default. Memory grows with it.

    Returns:
        A loss for a step that draws. Its metrics are those of ``loss``, as means over the examples
        (tensors only), and ``clipped``: the share of examples whose gradient was clipped. An empty
        batch has the loss 0 and no other metrics.

    Raises:
        ConfigurationError: an argument is out of its range; (the loss) the step draws nothing.
        DataError: (the loss) the batch has no common first dimension.
        LossError: (the loss) as for :func:`gradients`.
        TransformError: (the loss) a second derivative is asked for.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] * batch).sum(1).mean()
        >>> clipped = private(loss, max_norm=1.0, noise_multiplier=0.0, batch_size=2)
        >>> optimizer = pt.optim.sgd(1.0)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.zeros(2)}, None, optimizer, key=pt.random.key(0))
        >>> step = pt.train_step(clipped, optimizer)
        >>> step(state, torch.tensor([[3.0, 4.0], [0.0, 0.5]])).params["w"]  # (0.6, 0.8 + 0.5) / 2
        tensor([-0.3000, -0.6500])
    """
    _check_positive("max_norm", max_norm)
    _check_positive("batch_size", batch_size)
    if not 0 <= noise_multiplier < math.inf:
        raise ConfigurationError(f"noise_multiplier is 0 or more, not {noise_multiplier!r}")

    def private_loss(params: Any, buffers: Any, batch: Any, key: Any, /) -> tuple[Tensor, Aux]:
        if key is None:
            raise ConfigurationError(
                "per_example.private adds random noise: make the step with draws=True"
            )
        _check_first_order()
        fixed = tree_map(torch.Tensor.detach, params)
        metrics: dict[str, Any] = {}
        if _size(batch):
            grads, losses, given = _gradients(loss, fixed, buffers, batch, key, chunk_size)
            length = norms(grads)
            factor = torch.where(length > max_norm, max_norm / length, torch.ones_like(length))
            # One that is NaN or infinite has no direction; it may not spoil the sum either.
            factor = torch.where(length.isfinite(), factor, torch.zeros_like(length))
            total = tree_map(lambda leaf: _weighted_sum(factor, leaf), grads)
            value = losses.detach().mean()
            for name, metric in given.items():
                if not isinstance(metric, Tensor):
                    raise LossError(
                        f"per_example.private: the metric {name!r} of the loss is no "
                        "tensor; make it one with torch.as_tensor"
                    )
                metrics[name] = metric.detach().to(value.dtype).mean(0)
            metrics["clipped"] = (factor < 1).to(value.dtype).mean()
        else:
            total = tree_map(torch.zeros_like, fixed)
            value = torch.zeros(())
        noise = noise_multiplier * max_norm
        gradient = tree_map(
            lambda leaf: (
                (leaf + noise * torch.randn_like(leaf) if noise else leaf) / batch_size
            ).detach(),
            total,
        )
        for leaf, grad in zip(tree_leaves(params), tree_leaves(gradient), strict=True):
            linear = (leaf * grad).sum()  # its gradient is `grad`, and it is taken away again
            value = value + (linear - linear.detach()).to(value.dtype)
        return value, Aux(metrics=FrozenDict(metrics))

    return private_loss


def _weighted_sum(weights: Tensor, leaf: Tensor) -> Tensor:
    rows = leaf.reshape(leaf.shape[0], -1)
    if under_transform() or not bool(weights.all()):
        # An example that is left out must not be able to make the sum NaN: 0 · NaN is NaN.
        rows = torch.where(weights[:, None] > 0, rows, torch.zeros_like(rows))
    return (weights.to(rows.dtype) @ rows).reshape(leaf.shape[1:])


def _check_first_order() -> None:
    levels = torch._C._functorch.get_interpreter_stack() or []
    kinds = [level.key() for level in levels]
    if kinds.count(torch._C._functorch.TransformType.Grad) > 1 or (
        torch._C._functorch.TransformType.Jvp in kinds
    ):
        raise TransformError(
            "per_example.private: the gradient of a private loss is no derivative of anything, so "
            "none flows through such a step; scan and grad are for steps with the loss itself"
        )


def _check_positive(argument: str, value: Any) -> None:
    if not 0 < value < math.inf:
        raise ConfigurationError(f"{argument} is above 0, not {value!r}")


class PoissonSampled:
    """Batches into which each example comes with the same chance, independently of all others.

    The sampling that :func:`epsilon` speaks of. The sizes of the batches vary, and one may be
    empty. Batch i is a function of ``(key, i)``, so a run can be resumed at any of them. Give it to
    :func:`puretrain.fit`, with ``epochs=1``: another epoch would repeat its draws.

    Args:
        data: a tree of tensors with one row for each example.
        batch_size: the expected number of examples in a batch.
        steps: how many batches there are.
        key: decides the draws. Keep it as secret as the key of the run.

    Raises:
        ConfigurationError: ``batch_size`` or ``steps`` is out of its range.
        DataError: the leaves of ``data`` have no common first dimension.

    Example:
        >>> import puretrain as pt
        >>> sampled = PoissonSampled(torch.arange(1000), 10, steps=3, key=pt.random.key(0))
        >>> len(sampled), sampled.sample_rate, [len(batch) for batch in sampled]
        (3, 0.01, [12, 7, 7])
    """

    def __init__(self, data: Any, batch_size: int, *, steps: int, key: Tensor) -> None:
        self.length = _size(data)
        if not 0 < batch_size <= self.length:
            raise ConfigurationError(
                f"batch_size is from 1 to the {self.length} examples, not {batch_size!r}"
            )
        self.steps = check_whole("steps", steps)
        self.data, self.batch_size = data, batch_size
        # a stream of its own, so that the draws have nothing to do with the noise of a run
        self.key = random.stream(key, "poisson")

    @property
    def sample_rate(self) -> float:
        """The chance of each example to be in a batch."""
        return self.batch_size / self.length

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Any:
        """The batch of that index."""
        if not 0 <= index < self.steps:
            raise IndexError(f"there are {self.steps} batches, none with the index {index}")
        generator = random.generator(random.fold_in(self.key, index))
        chosen = torch.rand(self.length, generator=generator, dtype=torch.float64)
        return tree_index(self.data, (chosen < self.sample_rate).nonzero().squeeze(1))


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
) -> float:
    """How private a run was: the ε of its (ε, δ)-differential privacy; smaller is more private.

    For steps with :func:`private` on batches of :class:`PoissonSampled`, where two data sets are
    neighbours if the one has an example more. It is computed by opacus.

    Args:
        noise_multiplier: σ, above 0.
        sample_rate: the chance of an example to be in a batch: its expected size over the number of
            examples.
        steps: how many steps there were.
        delta: δ, well below one over the number of examples.
        accountant: ``'rdp'`` bounds it by Rényi differential privacy (Mironov et al., "Rényi
            differential privacy of the sampled Gaussian mechanism", 2019), ``'prv'`` approximates
            it numerically (Gopi et al., "Numerical composition of differential privacy", NeurIPS
            2021), which is closer and slower.

    Raises:
        ConfigurationError: an argument is out of its range, or opacus is not installed.

    >>> round(epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1000, delta=1e-5), 1)
    2.1
    """
    _check_positive("noise_multiplier", noise_multiplier)
    _check_accounting(sample_rate, steps, delta, accountant)
    return _spent(noise_multiplier, sample_rate, steps, delta, accountant)


def _spent(noise: float, sample_rate: float, steps: int, delta: float, accountant: str) -> float:
    made = _opacus().create_accountant(mechanism=accountant)
    made.history = [(noise, sample_rate, steps)]
    return float(made.get_epsilon(delta=delta))


def noise_multiplier(
    *,
    epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
) -> float:
    """The noise that a run needs to be as private as wanted; the inverse of :func:`epsilon`.

    Args:
        epsilon: ε, above 0.
        sample_rate: as for :func:`epsilon`.
        steps: how many steps there will be.
        delta: as for :func:`epsilon`.
        accountant: as for :func:`epsilon`.

    Returns:
        The smallest σ with at most that ε, to within a thousandth of it, rounded upwards.

    Raises:
        ConfigurationError: an argument is out of its range, no noise is enough, or opacus is not
            installed.

    >>> round(noise_multiplier(epsilon=2.0, sample_rate=0.01, steps=1000, delta=1e-5), 2)
    1.02
    """
    _check_positive("epsilon", epsilon)
    _check_accounting(sample_rate, steps, delta, accountant)

    def spent(noise: float) -> float:
        return _spent(noise, sample_rate, steps, delta, accountant)

    high = 1.0
    while spent(high) > epsilon:
        high *= 2
        if high > 1e6:
            raise ConfigurationError(
                f"no noise makes {steps} steps ({epsilon}, {delta})-private; allow more"
            )
    low = high / 2
    while low > 1e-3 and spent(low) <= epsilon:
        high, low = low, low / 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


def _check_accounting(sample_rate: float, steps: int, delta: float, accountant: str) -> None:
    check_choice("accountant", accountant, ("rdp", "prv"))
    if not 0 < sample_rate <= 1:
        raise ConfigurationError(f"sample_rate is above 0 and at most 1, not {sample_rate!r}")
    check_whole("steps", steps)
    if not 0 < delta < 1:
        raise ConfigurationError(f"delta is between 0 and 1, not {delta!r}")


def _opacus() -> Any:
    try:
        from opacus import accountants
    except ImportError as error:
        raise ConfigurationError(
            "privacy is accounted by opacus, which is not installed: pip install "
            "'puretrain[privacy]'"
        ) from error
    return accountants


# ── Gradient noise ────────────────────────────────────────────────────────────────────────────────


class Statistics(Record):
    """What :func:`statistics` finds; all of shape ``()``."""

    square: Tensor
    """The squared norm of the gradient, without bias: that of the mean over the batch is larger by
    the noise that is left in it. It may come out negative."""
    variance: Tensor
    """The variance of an example's gradient: the trace of their covariance, without bias."""
    noise_scale: Tensor
    """``variance / square``: the batch size at which noise and gradient are of one size."""


def statistics(grads: Any) -> Statistics:
    r"""How much the gradients of examples differ, against how much they have in common.

    .. math::
        \operatorname{tr} \Sigma = \frac{1}{n - 1} \sum_i \lVert g_i - \bar g \rVert^2, \qquad
        |G|^2 = \lVert \bar g \rVert^2 - \frac{\operatorname{tr} \Sigma}{n}, \qquad
        B = \frac{\operatorname{tr} \Sigma}{|G|^2}

    Batches much smaller than the gradient noise scale B are dominated by noise, much larger ones
    waste examples (McCandlish et al., `An empirical model of large-batch training
    <https://arxiv.org/abs/1812.06162>`_, 2018).

    Args:
        grads: what :func:`gradients` returned, for two examples at least.

    Raises:
        ConfigurationError: there are fewer than two examples.

    >>> statistics({"w": torch.tensor([[1.0, 0.0], [3.0, 0.0]])})
    Statistics(square=f32 3.0, variance=f32 2.0, noise_scale=f32 0.6666666865348816)
    """
    leaves = tree_leaves(grads)
    count = leaves[0].shape[0]
    if count < 2:
        raise ConfigurationError(f"a variance needs two examples at least, not {count}")
    means = [leaf.mean(0) for leaf in leaves]
    scattered = [(leaf - mean).square().sum() for leaf, mean in zip(leaves, means, strict=True)]
    variance = torch.stack(scattered).sum() / (count - 1)
    square = torch.stack([mean.square().sum() for mean in means]).sum() - variance / count
    return Statistics(square, variance, variance / square)


class NoiseScale(Record):
    """What :func:`noise_scale` remembers; all of shape ``()``."""

    square: Tensor
    """The running mean of the squared norm of the gradient, float64."""
    variance: Tensor
    """The running mean of the variance of an example's gradient, float64."""
    count: Tensor
    """How many batches were looked at, int64."""


def noise_scale(
    loss: Loss,
    *,
    every: int = 50,
    decay: float = 0.9,
    chunk_size: int | None = None,
    name: str = "noise_scale",
) -> Reducer:
    """Watch the gradient noise scale of a run, see :func:`statistics`.

    Looks at the batch of a step, with the parameters after it. The two parts of the quotient are
    averaged over time before they are divided, since a single one is very noisy. The metrics of
    the step get ``noise_scale`` and ``gradient_variance``, where observers find them.

    Args:
        loss: the loss of the step.
        every: look after every so many steps.
        decay: how much of the running means stays each time, from 0 up to 1; they are corrected
            for their beginning at zero.
        chunk_size: as for :func:`gradients`.
        name: the key of the memory in ``state.reducers``, and of the metric.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return ((params["w"] - batch) ** 2).mean()
        >>> optimizer = pt.optim.sgd(lr=0.0)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> state = pt.fit(
        ...     state, pt.train_step(loss, optimizer), [torch.tensor([1.0, 3.0])], epochs=1,
        ...     reducers=[noise_scale(loss, every=1)])
        >>> state.metrics["gradient_variance"]  # the gradients are -2 and -6
        tensor(8.0000, dtype=torch.float64)
    """
    every = check_whole("noise_scale: every", every)
    if not 0 <= decay < 1:
        raise ConfigurationError(f"the decay of noise_scale is from 0 up to 1, not {decay!r}")

    def reduce(state: S, event: Event) -> S:
        if event.step % every or event.size < 2:
            return state
        found = statistics(gradients(loss, state, event.batch, chunk_size=chunk_size))
        memory: NoiseScale = memory_of(state, name)
        square = decay * memory.square + (1 - decay) * found.square.double().cpu()
        variance = decay * memory.variance + (1 - decay) * found.variance.double().cpu()
        count = memory.count + 1
        known = 1 - decay**count
        metrics = state.metrics | {name: variance / square, "gradient_variance": variance / known}
        after = NoiseScale(square, variance, count)
        return state.replace(metrics=metrics, reducers=state.reducers | {name: after})

    def init(state: TrainState) -> NoiseScale:
        zero = torch.zeros((), dtype=torch.float64)
        return NoiseScale(zero, zero.clone(), torch.zeros((), dtype=torch.int64))

    return Reducer(reduce, name, init, on=("step",))


# ── Influence ─────────────────────────────────────────────────────────────────────────────────────


class Influence(Record):
    """What :func:`influence` remembers."""

    scores: Tensor
    """Float64 of shape ``(n, m)``: by how much steps for example i have lowered the loss of target
    j so far, to first order."""
    count: Tensor
    """How often it was looked, int64 of shape ``()``."""


def influence(
    loss: Loss,
    examples: Any,
    targets: Any,
    *,
    lr: float | Schedule = 1.0,
    every: int = 50,
    chunk_size: int | None = None,
    name: str = "influence",
) -> Reducer:
    r"""Find out which examples teach what: the influence of each of them on each target.

    .. math::
        s_{ij} = \sum_t \gamma_t \, \nabla \ell_i(\theta_t) \cdot \nabla \ell_j(\theta_t)

    summed over some points of the run (Pruthi et al., `Estimating training data influence by
    tracing gradient descent <https://arxiv.org/abs/2002.08484>`_, NeurIPS 2020). An example with a
    negative score has raised the target's loss. With the examples themselves for targets, those of
    the highest self-influence on the diagonal are rare ones or have a wrong label.

    Args:
        loss: the loss of the step.
        examples: a tree of tensors with one row for each of n examples.
        targets: the same, of m examples.
        lr: γ, the learning rate: a number, or the schedule that the optimizer follows.
        every: look after every so many steps.
        chunk_size: as for :func:`gradients`.
        name: the key of the memory in ``state.reducers``.

    Raises:
        ConfigurationError: ``every`` is out of its range.
        DataError: the examples or targets have no common first dimension.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return ((params["w"] - batch) ** 2).mean()
        >>> optimizer = pt.optim.sgd(lr=0.0)
        >>> state = pt.TrainState.create(
        ...     {"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
        >>> examples, targets = torch.tensor([1.0, -1.0]), torch.tensor([3.0])
        >>> state = pt.fit(state, pt.train_step(loss, optimizer), [examples], epochs=1,
        ...                reducers=[influence(loss, examples, targets, every=1)])
        >>> state.reducers["influence"].scores  # 2 · 6 and -2 · 6
        tensor([[ 12.],
                [-12.]], dtype=torch.float64)
    """
    every = check_whole("influence: every", every)
    shape = (_size(examples), _size(targets))

    def reduce(state: S, event: Event) -> S:
        if event.step % every:
            return state
        memory: Influence = memory_of(state, name)
        one, other = (
            gradients(loss, state, batch, chunk_size=chunk_size) for batch in (examples, targets)
        )
        rate = schedule_value(lr, state.updates - 1)
        scores = memory.scores + rate * products(one, other).double().cpu()
        after = Influence(scores, memory.count + 1)
        return state.replace(reducers=state.reducers | {name: after})

    def init(state: TrainState) -> Influence:
        scores = torch.zeros(shape, dtype=torch.float64)
        return Influence(scores, torch.zeros((), dtype=torch.int64))

    return Reducer(reduce, name, init, on=("step",))
