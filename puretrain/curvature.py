"""The shape of a loss around a state: its Hessian, its Fisher information, and slices through it.

Everything here is a function of ``(loss, state, batch)`` with the loss that a step is made of. The
Hessian of n parameters has n² elements and is never made: :func:`hvp` multiplies it with a vector
for the price of a few gradients, and from such products come its largest eigenvalues (:func:`eigh`)
and its :func:`trace`.

The loss is a fixed function here: what it draws is drawn from the key of the state's next step, the
same at each call, and buffers stay as they are in the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from puretrain import random
from puretrain.errors import (
    ConfigurationError,
    LossError,
    StructureError,
    check_choice,
    check_whole,
)
from puretrain.gradients import Loss
from puretrain.per_example import gradients
from puretrain.state import TrainState
from puretrain.tree import (
    check_same_structure,
    freeze,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
    under_transform,
)

__all__ = [
    "Eigenpairs",
    "Line",
    "Plane",
    "Trace",
    "eigh",
    "filter_normalized",
    "fisher_diagonal",
    "hvp",
    "line",
    "plane",
    "random_direction",
    "trace",
]

T = TypeVar("T")
Which = Literal["largest", "smallest", "magnitude"]


# ── The Hessian ───────────────────────────────────────────────────────────────────────────────────


def hvp(loss: Loss, state: TrainState, batch: Any, vector: T) -> T:
    """The Hessian of the loss by the parameters, times a vector.

    Args:
        loss: as for :func:`puretrain.train_step`; differentiable twice.
        state: where.
        batch: what the loss is computed of.
        vector: a tree like the parameters.

    Returns:
        A tree like the parameters.

    Raises:
        LossError: the loss is no scalar.
        StructureError: the vector does not fit the parameters.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return params["w"][0] ** 2 * params["w"][1]
        >>> state = pt.TrainState.create({"w": torch.tensor([1.0, 3.0])}, key=pt.random.key(0))
        >>> hvp(loss, state, None, {"w": torch.tensor([1.0, 0.0])})["w"]  # [[6, 2], [2, 0]] [1, 0]
        tensor([6., 2.])
    """
    frozen = freeze(vector)
    check_same_structure(state.params, frozen, "the parameters", "the vector", leaves=True)
    product = _hessian(loss, state, batch)(tree_leaves(frozen))
    return tree_unflatten(tree_structure(state.params), product)  # type: ignore[no-any-return]


def _loss_of(loss: Loss, state: TrainState, batch: Any) -> Callable[[Any], Tensor]:
    """The loss as a function of the parameters alone."""
    key = random.fold_in(state.key, state.step if under_transform() else int(state.step))

    def value(params: Any) -> Tensor:
        with random.scope(key):
            returned = loss(params, state.buffers, batch, key)
        found = returned[0] if isinstance(returned, tuple) and len(returned) == 2 else returned
        if not isinstance(found, Tensor) or found.dim() or not found.is_floating_point():
            kind = type(found).__name__
            if isinstance(found, Tensor):
                kind = f"{found.dtype} tensor of shape {tuple(found.shape)}"
            raise LossError(
                "curvature: the loss function returns the loss, a floating-point tensor of shape "
                f"(), or (loss, Aux(…)); the loss of this one is a {kind}"
            )
        return found

    return value


def _hessian(loss: Loss, state: TrainState, batch: Any) -> Callable[[Sequence[Tensor]], Any]:
    """A function that multiplies with the Hessian; the gradient is computed once, here."""
    leaves, structure = tree_flatten(state.params)
    value = _loss_of(loss, state, batch)

    def gradient(*leaves: Tensor) -> Any:
        return torch.func.grad(lambda now: value(tree_unflatten(structure, now)))(list(leaves))

    # Backwards through the gradient: the Hessian is its own transpose, and each operation that
    # trains has such a derivative, where many have none in forward mode.
    pull = torch.func.vjp(gradient, *leaves)[1]
    return lambda vector: pull(list(vector))


class _Space:
    """The parameters as one vector."""

    def __init__(self, params: Any) -> None:
        leaves, self.structure = tree_flatten(params)
        self.shapes = [leaf.shape for leaf in leaves]
        self.sizes = [leaf.numel() for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.devices = [leaf.device for leaf in leaves]
        self.size = sum(self.sizes)
        if not self.size:
            raise StructureError(
                "curvature: the state has no parameters to differentiate by; make "
                "it with TrainState.create(params, …)"
            )
        self.dtype, self.device = torch.float32, leaves[0].device
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def flat(self, leaves: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.detach().reshape(-1).to(self.device, self.dtype) for x in leaves])

    def leaves(self, vector: Tensor) -> list[Tensor]:
        facts = zip(
            torch.split(vector, self.sizes), self.shapes, self.devices, self.dtypes, strict=True
        )
        return [part.reshape(shape).to(device, dtype) for part, shape, device, dtype in facts]


class Eigenpairs(NamedTuple):
    """What :func:`eigh` finds."""

    values: Tensor
    """The eigenvalues, float64 of shape ``(k,)``, those wanted most first."""
    vectors: Any
    """The eigenvectors, of length 1: a tree like the parameters with a first dimension of k."""
    residuals: Tensor
    """``‖H v - λ v‖`` as Lanczos estimates it, float64 of shape ``(k,)``: within so much of each
    value there is an eigenvalue."""
    products: int
    """How many Hessian-vector products it took."""


def eigh(
    loss: Loss,
    state: TrainState,
    batch: Any,
    k: int = 1,
    *,
    which: Which = "largest",
    tolerance: float = 1e-4,
    most: int = 100,
    key: Tensor | None = None,
) -> Eigenpairs:
    """Some eigenvalues and eigenvectors of the Hessian, by Lanczos' method.

    Each product with the Hessian makes the Krylov space larger by a dimension; its vectors are made
    orthogonal to all before them (twice, in full), without which found eigenvalues would come
    again. Ends when all k are found, or the space is the whole (Golub and Van Loan, "Matrix
    computations", section 10.3). Memory: as many vectors as products.

    Args:
        loss: as for :func:`puretrain.train_step`; differentiable twice.
        state: where.
        batch: what the loss is computed of.
        k: how many.
        which: ``'largest'``, ``'smallest'`` (the most negative), or of the largest ``'magnitude'``.
        tolerance: found is an eigenvalue whose residual is at most so many times the largest
            magnitude of all.
        most: end after so many products in any case; compare the residuals then.
        key: decides the vector to begin with; the state's own by default.

    Raises:
        ConfigurationError: an argument is out of its range.
        LossError: the loss is no scalar, or its second derivative is not finite.

    Example:
        >>> import puretrain as pt
        >>> scales = torch.tensor([1.0, 5.0, -3.0, 2.0])
        >>> def loss(params, buffers, batch, key):
        ...     return (scales * params["w"] ** 2).sum() / 2
        >>> state = pt.TrainState.create({"w": torch.ones(4)}, key=pt.random.key(0))
        >>> [round(value, 4) for value in eigh(loss, state, None, 2).values.tolist()]
        [5.0, 2.0]
        >>> round(eigh(loss, state, None, which="smallest").values.item(), 4)
        -3.0
    """
    check_choice("which", which, ("largest", "smallest", "magnitude"))
    space = _Space(state.params)
    if not isinstance(k, int) or not 1 <= k <= space.size:
        raise ConfigurationError(f"k is from 1 to the {space.size} parameters, not {k!r}")
    most = check_whole("most", most, k)
    if not 0 < tolerance < 1:
        raise ConfigurationError(f"tolerance is between 0 and 1, not {tolerance!r}")
    multiply = _hessian(loss, state, batch)
    stream = random.stream(state.key if key is None else key, "lanczos")
    generator = random.generator(stream)

    def drawn() -> Tensor:
        return torch.randn(space.size, generator=generator, dtype=torch.float64).to(
            space.device, space.dtype
        )

    none = torch.empty(0, space.size, dtype=space.dtype, device=space.device)
    basis = _orthogonal(drawn(), none)[0][None]
    diagonal: list[float] = []
    beside: list[float] = []
    scale, alone = 0.0, False
    while True:
        image = space.flat(multiply(space.leaves(basis[-1])))
        diagonal.append(float(image.double() @ basis[-1].double()))
        if not math.isfinite(diagonal[-1]):
            raise LossError(
                "curvature: the second derivative of the loss is not finite at "
                "this state and batch; look for what has none, such as a square "
                "root or a norm at 0"
            )
        rest, length = _orthogonal(image, basis)
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        scale = max(scale, float(values.abs().max()))
        order = _order(values, which)[:k]
        residuals = length * vectors[-1, order].abs()
        if len(diagonal) >= min(most, space.size):
            break
        # A space that the Hessian maps into itself says nothing of what is outside: the further
        # vectors of equal eigenvalues, and those that had no part in the first vector.
        closed = length <= 100 * torch.finfo(space.dtype).eps * scale
        if len(diagonal) > k and not closed and bool((residuals <= tolerance * scale).all()):
            break
        if closed:
            # Outside, a vector that is mapped to a multiple of itself at once stands for all that
            # is left: a random one has a part in each eigenvector.
            least = torch.stack([values[order[-1]], torch.tensor(diagonal[-1], dtype=values.dtype)])
            if alone and len(diagonal) >= k and int(_order(least, which)[0]) == 0:
                break
            rest, length = _orthogonal(drawn(), basis)[0], 0.0
        alone = closed
        beside.append(length)
        basis = torch.cat([basis, rest[None]])
    found = vectors[:, order].T.to(basis) @ basis
    found = found / torch.linalg.vector_norm(found, dim=1, keepdim=True)
    trees = [space.leaves(vector) for vector in found]
    stacked = [torch.stack(column) for column in zip(*trees, strict=True)]
    return Eigenpairs(
        values[order], tree_unflatten(space.structure, stacked), residuals, len(diagonal)
    )


def _orthogonal(vector: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """The part of a vector orthogonal to the rows of a basis, of length 1, and its length before.

    Twice, since once leaves a rounding error that is as large as what was cancelled.
    """
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    if not length:
        return vector, length
    unit = vector / length
    unit = unit - basis.T @ (basis @ unit)  # what is left of a short one is mostly rounding
    return unit / torch.linalg.vector_norm(unit), length


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside, dtype=torch.float64)
    return matrix + torch.diag(off, 1) + torch.diag(off, -1)


def _order(values: Tensor, which: str) -> Tensor:
    by = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]
    return by.argsort(descending=True, stable=True)


class Trace(NamedTuple):
    """What :func:`trace` finds."""

    value: float
    """The estimate: the mean over the samples."""
    error: float
    """Its standard error; NaN with one sample."""


def trace(
    loss: Loss, state: TrainState, batch: Any, *, samples: int = 32, key: Tensor | None = None
) -> Trace:
    r"""Estimate the trace of the Hessian: the sum of its eigenvalues.

    .. math:: \operatorname{tr} H = \mathbb E \, z^\top H z, \qquad z_i = \pm 1

    (Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.)

    Args:
        loss: as for :func:`puretrain.train_step`; differentiable twice.
        state: where.
        batch: what the loss is computed of.
        samples: how many z to draw; the error falls with the root of it.
        key: decides the draws; the state's own by default.

    Raises:
        ConfigurationError: ``samples`` is no whole number from 1.
        LossError: the loss is no scalar.

    >>> import puretrain as pt
    >>> def loss(params, buffers, batch, key):
    ...     return (torch.tensor([1.0, 5.0, -3.0]) * params["w"] ** 2).sum() / 2
    >>> state = pt.TrainState.create({"w": torch.ones(3)}, key=pt.random.key(0))
    >>> trace(loss, state, None)  # of a diagonal matrix, each sample is exact
    Trace(value=3.0, error=0.0)
    """
    samples = check_whole("samples", samples)
    space = _Space(state.params)
    multiply = _hessian(loss, state, batch)
    generator = random.generator(random.stream(state.key if key is None else key, "hutchinson"))
    found = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (space.size,), generator=generator).mul_(2).sub_(1)
        vector = signs.to(space.device, space.dtype)
        found.append(space.flat(multiply(space.leaves(vector))).double() @ vector.double())
    values = torch.stack(found)
    error = float(values.std() / samples**0.5) if samples > 1 else math.nan
    return Trace(float(values.mean()), error)


def fisher_diagonal(
    loss: Loss, state: TrainState, batch: Any, *, chunk_size: int | None = None
) -> Any:
    r"""The diagonal of the empirical Fisher information: the mean square of per-example gradients.

    .. math:: F_{jj} = \frac{1}{n} \sum_i \left( \frac{\partial \ell_i}{\partial \theta_j} \right)^2

    It says how much the examples of a batch determine each parameter. With the labels of the data
    it is the *empirical* one; for the Fisher information itself, whose labels are those that the
    model expects, draw the batch's labels from the model's own predictions (Kunstner et al.,
    `Limitations of the empirical Fisher approximation <https://arxiv.org/abs/1905.12558>`_,
    NeurIPS 2019).

    Args:
        loss: a log-likelihood with a minus, such as ``cross_entropy``; called with batches of one
            example.
        state: where.
        batch: a tree of tensors of shape ``(n, …)``.
        chunk_size: how many examples to compute together; all by default.

    Returns:
        A tree like the parameters.

    Raises:
        DataError: the leaves of the batch have no common first dimension.
        LossError: the loss is no scalar, or it changes the buffers.

    >>> import puretrain as pt
    >>> def loss(params, buffers, batch, key):
    ...     return (params["w"] * batch).sum(1).mean()
    >>> state = pt.TrainState.create({"w": torch.zeros(2)}, key=pt.random.key(0))
    >>> fisher_diagonal(loss, state, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))["w"]
    tensor([5., 2.])
    """
    grads = gradients(loss, state, batch, chunk_size=chunk_size)
    return tree_map(lambda leaf: leaf.square().mean(0), grads)


# ── Slices ────────────────────────────────────────────────────────────────────────────────────────


class Line(NamedTuple):
    """The loss along a line, see :func:`line`."""

    at: Tensor
    """The places: 0 is the first state and 1 the second; float64 of shape ``(points,)``."""
    loss: Tensor
    """The loss there, float64 of shape ``(points,)``."""

    @property
    def barrier(self) -> float:
        """How far the loss rises above the straight line between its values at 0 and 1."""
        inside = (self.at >= 0) & (self.at <= 1)
        at, loss = self.at[inside], self.loss[inside]
        return float((loss - (loss[0] + (loss[-1] - loss[0]) * at)).max())


def line(
    loss: Loss,
    first: TrainState,
    second: TrainState,
    batch: Any,
    *,
    points: int = 21,
    beyond: float = 0.0,
) -> Line:
    """The loss on the straight line between two states, such as two checkpoints.

    Parameters and floating-point buffers are interpolated, ``(1 - t) first + t second``
    (Goodfellow et al., "Qualitatively characterizing neural network optimization problems", ICLR
    2015); other buffers and the key are those of the first state.

    Args:
        loss: as for :func:`puretrain.train_step`.
        first: the state at 0.
        second: the state at 1, of the same model.
        batch: what the loss is computed of.
        points: how many places, from 2.
        beyond: how far to go on at both sides: 0.5 for places from -0.5 to 1.5.

    Raises:
        ConfigurationError: an argument is out of its range.
        LossError: the loss is no scalar.
        StructureError: the states do not fit each other.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] ** 2 - 1) ** 2
        >>> left, right = (
        ...     pt.TrainState.create({"w": torch.tensor(w)}, key=pt.random.key(0))
        ...     for w in (-1.0, 1.0))
        >>> between = line(loss, left, right, None, points=5)
        >>> between.loss, between.barrier
        (tensor([0.0000, 0.5625, 1.0000, 0.5625, 0.0000], dtype=torch.float64), 1.0)
    """
    points = check_whole("points", points, 2)
    if not 0 <= beyond < math.inf:
        raise ConfigurationError(f"beyond is 0 or more, not {beyond!r}")
    ends = [(state.params, state.buffers) for state in (first, second)]
    check_same_structure(ends[0], ends[1], "the first state", "the second", leaves=True)
    at = torch.linspace(-beyond, 1 + beyond, points, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for t in at.tolist():
            params, buffers = tree_map(lambda a, b: _between(a, b, t), *ends)  # noqa: B023
            state = first.replace(params=params, buffers=buffers)
            found.append(_loss_of(loss, state, batch)(params).double().cpu())
    return Line(at, torch.stack(found))


def _between(a: Any, b: Any, t: float) -> Any:
    if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
        return a
    return (1 - t) * a + t * b


class Plane(NamedTuple):
    """The loss on a plane, see :func:`plane`."""

    x: Tensor
    """The places along the first direction, float64 of shape ``(points,)``."""
    y: Tensor
    """The places along the second direction, float64 of shape ``(points,)``."""
    loss: Tensor
    """The loss there, float64 of shape ``(points, points)``; ``loss[i, j]`` at ``y[i], x[j]``."""


def plane(
    loss: Loss,
    state: TrainState,
    batch: Any,
    directions: tuple[Any, Any] | None = None,
    *,
    radius: float = 1.0,
    points: int = 21,
) -> Plane:
    """The loss on a plane through a state.

    Args:
        loss: as for :func:`puretrain.train_step`.
        state: the middle of the plane.
        batch: what the loss is computed of.
        directions: two trees like the parameters, see :func:`random_direction` and
            :func:`filter_normalized`; by default two random ones, normalized by filter, which
            makes the pictures of two networks comparable.
        radius: how far to go from the middle, in lengths of the directions.
        points: how many places along each direction, from 2; odd, to have the middle itself.

    Raises:
        ConfigurationError: an argument is out of its range.
        LossError: the loss is no scalar.
        StructureError: a direction does not fit the parameters.

    Example:
        >>> import puretrain as pt
        >>> def loss(params, buffers, batch, key):
        ...     return (params["w"] * torch.tensor([1.0, 10.0])).square().sum()
        >>> state = pt.TrainState.create({"w": torch.zeros(2)}, key=pt.random.key(0))
        >>> axes = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
        >>> plane(loss, state, None, axes, points=3).loss
        tensor([[101., 100., 101.],
                [  1.,   0.,   1.],
                [101., 100., 101.]], dtype=torch.float64)
    """
    points = check_whole("points", points, 2)
    if not 0 < radius < math.inf:
        raise ConfigurationError(f"radius is above 0, not {radius!r}")
    if directions is None:
        keys = random.split(random.stream(state.key, "plane"))
        drawn = [random_direction(state.params, key) for key in keys]
        directions = (
            filter_normalized(drawn[0], state.params),
            filter_normalized(drawn[1], state.params),
        )
    first, second = map(freeze, directions)
    for number, direction in enumerate((first, second)):
        check_same_structure(
            state.params, direction, "the parameters", f"direction {number}", leaves=True
        )
    at = torch.linspace(-radius, radius, points, dtype=torch.float64)
    value = _loss_of(loss, state, batch)
    rows = []
    with torch.no_grad():
        for y in at.tolist():
            row = []
            for x in at.tolist():
                params = tree_map(
                    lambda p, a, b: p + x * a + y * b,  # noqa: B023
                    state.params,
                    first,
                    second,
                )
                row.append(value(params).double().cpu())
            rows.append(torch.stack(row))
    return Plane(at, at.clone(), torch.stack(rows))


def random_direction(params: T, key: Tensor) -> T:
    """Draw a direction in the space of the parameters: a tree like them, of normal numbers.

    >>> import puretrain as pt
    >>> random_direction({"w": torch.zeros(2, 3)}, pt.random.key(0))["w"].shape
    torch.Size([2, 3])
    """
    generator = random.generator(key)
    return tree_map(
        lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf),
        params,
    )


def filter_normalized(direction: T, params: T) -> T:
    r"""Scale each filter of a direction to the length of that filter of the parameters.

    .. math:: d_i \leftarrow \frac{d_i}{\lVert d_i \rVert} \, \lVert \theta_i \rVert

    A filter is a slice of the first dimension: the weights of one output. Biases and the scales of
    normalization layers, which have one dimension at most, stay where they are (Li et al.,
    `Visualizing the loss landscape of neural nets <https://arxiv.org/abs/1712.09913>`_, NeurIPS
    2018). A network whose weights are twice as large is twice as wide then, so that the picture is
    not narrower only because of the scale.

    Args:
        direction: a tree like the parameters.
        params: the parameters.

    Raises:
        StructureError: the direction does not fit the parameters.

    >>> params = {"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "b": torch.tensor([7.0, 7.0])}
    >>> direction = {"w": torch.tensor([[1.0, 0.0], [2.0, 0.0]]), "b": torch.tensor([1.0, 1.0])}
    >>> filter_normalized(direction, params)
    {'w': tensor([[5., 0.],
            [1., 0.]]), 'b': tensor([0., 0.])}
    """
    check_same_structure(params, direction, "the parameters", "the direction", leaves=True)

    def normalized(d: Tensor, p: Tensor) -> Tensor:
        if p.dim() < 2:
            return torch.zeros_like(d)
        rows, filters = d.reshape(d.shape[0], -1), p.reshape(p.shape[0], -1)
        length = rows.norm(dim=1, keepdim=True)
        scale = filters.norm(dim=1, keepdim=True) / length.clamp_min(torch.finfo(d.dtype).tiny)
        return torch.mul(rows, scale).reshape(d.shape)

    return tree_map(normalized, direction, params)
