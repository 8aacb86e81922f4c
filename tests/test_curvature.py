"""Curvature against the explicit Hessian of tiny models, whose eigenvalues numpy computes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import puretrain as pt
from puretrain import curvature
from puretrain.errors import ConfigurationError, DataError, LossError, StructureError
from puretrain.tree import tree_equal, tree_index, tree_leaves, tree_map


def task(dtype=torch.float64, *, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).to(
        dtype
    )
    apply, params, buffers = pt.functional(module)

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, buffers = apply(params, buffers, x)
        return F.cross_entropy(logits, y), pt.Aux(buffers)

    state = pt.TrainState.create(params, buffers, pt.optim.sgd(0.1), key=pt.random.key(seed))
    return loss, state, (torch.randn(10, 3, dtype=dtype), torch.randint(0, 3, (10,)))


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(tree)])


def explicit_hessian(loss, state, batch):
    """All second derivatives, row by row, by plain autograd."""
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(state.params)]
    params = pt.FrozenDict(zip(state.params, leaves, strict=True))
    key = pt.random.fold_in(state.key, int(state.step))
    with pt.random.scope(key):
        value = loss(params, state.buffers, batch, key)
    value = value[0] if isinstance(value, tuple) else value
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(value, leaves, create_graph=True)]
    )
    rows = [
        torch.cat([
            g.reshape(-1)
            for g in torch.autograd.grad(
                element, leaves, retain_graph=True, materialize_grads=True, allow_unused=True
            )
        ])
        for element in gradient
    ]  # fmt: skip
    return torch.stack(rows).numpy()


def quadratic(matrix):
    """A loss whose Hessian is the matrix."""
    matrix = torch.as_tensor(matrix)
    state = pt.TrainState.create(
        {"w": torch.zeros(len(matrix), dtype=matrix.dtype)}, key=pt.random.key(0)
    )
    return lambda p, b, batch, key: p["w"] @ matrix @ p["w"] / 2, state


def symmetric(eigenvalues, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return basis @ np.diag(eigenvalues) @ basis.T


# ── Products ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_product_is_that_with_the_explicit_hessian(dropout):
    loss, state, batch = task(dropout=dropout)
    hessian = explicit_hessian(loss, state, batch)
    before = torch.get_rng_state()
    for seed in range(3):
        vector = curvature.random_direction(state.params, pt.random.key(seed))
        got = curvature.hvp(loss, state, batch, vector)
        assert list(got) == list(state.params)
        np.testing.assert_allclose(
            flat(got).numpy(), hessian @ flat(vector).numpy(), rtol=1e-9, atol=1e-12
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_a_product_composes_with_transforms():
    loss, state, batch = task()
    vectors = pt.tree.tree_stack(
        [curvature.random_direction(state.params, pt.random.key(i)) for i in range(3)]
    )
    together = torch.func.vmap(lambda v: curvature.hvp(loss, state, batch, v), randomness="same")(
        vectors
    )
    alone = curvature.hvp(loss, state, batch, tree_index(vectors, 1))
    for a, b in zip(tree_leaves(tree_index(together, 1)), tree_leaves(alone), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_said():
    loss, state, batch = task()
    with pytest.raises(StructureError, match=r"0\.weight"):
        curvature.hvp(loss, state, batch, {"w": torch.ones(1)})
    vector = curvature.random_direction(state.params, pt.random.key(0))
    with pytest.raises(LossError, match="shape"):
        curvature.hvp(lambda p, b, xy, key: p["0.weight"], state, batch, vector)
    empty = pt.TrainState.create({}, key=pt.random.key(0))
    with pytest.raises(StructureError, match="no parameters"):
        curvature.trace(loss, empty, batch)


# ── Eigenvalues ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("k", [1, 4])
def test_eigenvalues_are_those_of_the_explicit_hessian(which, k):
    loss, state, batch = task()
    hessian = explicit_hessian(loss, state, batch)
    values = np.linalg.eigvalsh(hessian)
    order = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    found = curvature.eigh(loss, state, batch, k, which=which, tolerance=1e-9)
    np.testing.assert_allclose(
        found.values.numpy(), values[np.argsort(order)[:k]], rtol=1e-8, atol=1e-10
    )
    for i in range(k):
        vector = flat(tree_index(found.vectors, i)).numpy()
        assert np.linalg.norm(vector) == pytest.approx(1)
        residual = hessian @ vector - found.values[i].item() * vector
        assert np.linalg.norm(residual) <= found.residuals[i].item() + 1e-12
    assert found.products <= 38  # parameters


def test_the_whole_spectrum():
    loss, state, batch = task()
    values = np.linalg.eigvalsh(explicit_hessian(loss, state, batch))
    found = curvature.eigh(loss, state, batch, 38)
    np.testing.assert_allclose(found.values.numpy()[::-1], values, rtol=1e-8, atol=1e-10)
    vectors = torch.stack([flat(tree_index(found.vectors, i)) for i in range(38)])
    torch.testing.assert_close(
        vectors @ vectors.T, torch.eye(38, dtype=torch.float64), rtol=0, atol=1e-9
    )


@settings(max_examples=30)
@given(
    eigenvalues=st.lists(st.integers(-4, 4), min_size=1, max_size=8),
    data=st.data(),
    which=st.sampled_from(["largest", "smallest", "magnitude"]),
)
def test_equal_and_vanishing_eigenvalues_are_all_found(eigenvalues, data, which):
    """Where Lanczos by itself finds each value once."""
    k = data.draw(st.integers(1, len(eigenvalues)))
    loss, state = quadratic(symmetric([float(x) for x in eigenvalues]))
    found = curvature.eigh(loss, state, None, k, which=which, tolerance=1e-10)
    values = np.array(eigenvalues, dtype=float)
    key = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    np.testing.assert_allclose(
        found.values.abs() if which == "magnitude" else found.values,
        np.abs(values[np.argsort(key)[:k]])
        if which == "magnitude"
        else values[np.argsort(key)[:k]],
        atol=1e-8,
    )


def test_orthogonality_holds_over_many_products_in_float32():
    """A spectrum that makes Lanczos without reorthogonalisation find the largest value again."""
    eigenvalues = np.concatenate([np.linspace(0, 1, 295), [10, 20, 30, 40, 1000.0]])
    loss, state = quadratic(symmetric(eigenvalues).astype(np.float32))
    found = curvature.eigh(loss, state, None, 5, tolerance=1e-7, most=120)
    np.testing.assert_allclose(found.values.numpy(), [1000, 40, 30, 20, 10], rtol=1e-4)
    vectors = found.vectors["w"]
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(5), rtol=0, atol=1e-5)


def test_few_products_are_enough_for_few_values():
    loss, state = quadratic(symmetric([*np.linspace(0, 1, 199), 50.0]))
    found = curvature.eigh(loss, state, None)
    assert found.values.item() == pytest.approx(50)
    assert found.products < 12
    low = torch.zeros(3000)
    low[:2] = torch.tensor([3.0, 2.0])
    loss = lambda p, b, batch, key: (low * p["w"] ** 2).sum() / 2  # noqa: E731
    state = pt.TrainState.create({"w": torch.ones(3000)}, key=pt.random.key(0))
    found = curvature.eigh(loss, state, None, 4)
    np.testing.assert_allclose(found.values.numpy(), [3, 2, 0, 0], atol=1e-5)
    assert found.products < 12


def test_eigenvalues_are_functions_of_the_keys():
    loss, state, batch = task(torch.float32, dropout=0.3)
    first, again = (curvature.eigh(loss, state, batch, 2) for _ in range(2))
    assert tree_equal(tuple(first), tuple(again))


def test_an_unfinished_search_says_how_far_it_is_off():
    loss, state = quadratic(symmetric(np.linspace(0.0, 1.0, 200)))
    found = curvature.eigh(loss, state, None, most=5)
    assert found.products == 5
    assert found.residuals.item() > 1e-4
    assert found.values.item() == pytest.approx(1.0, abs=1.5 * found.residuals.item())


def test_eigh_says_what_it_can_not():
    loss, state, batch = task()
    for options in ({"k": 0}, {"k": 39}, {"which": "all"}, {"most": 0}, {"tolerance": 0.0}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            curvature.eigh(loss, state, batch, **options)
    with pytest.raises(LossError, match="not finite"):
        curvature.eigh(
            lambda p, b, xy, key: p["0.weight"].sub(p["0.weight"].detach()).abs().sqrt().sum(),
            state,
            batch,
        )


# ── Trace and Fisher ──────────────────────────────────────────────────────────────────────────────


def test_the_trace_is_within_its_error():
    loss, state, batch = task()
    exact = np.trace(explicit_hessian(loss, state, batch))
    found = curvature.trace(loss, state, batch, samples=400)
    assert abs(found.value - exact) < 4 * found.error
    assert found.error < 0.1 * exact
    assert found == curvature.trace(loss, state, batch, samples=400)
    assert np.isnan(curvature.trace(loss, state, batch, samples=1).error)
    with pytest.raises(ConfigurationError, match="samples"):
        curvature.trace(loss, state, batch, samples=0)


def test_the_fisher_diagonal_is_a_loop_over_examples():
    loss, state, (x, y) = task()
    total = [torch.zeros_like(leaf) for leaf in tree_leaves(state.params)]
    for i in range(len(y)):
        params = tree_map(lambda leaf: leaf.clone().requires_grad_(), state.params)
        value, _ = loss(params, state.buffers, (x[i : i + 1], y[i : i + 1]), None)
        grads = torch.autograd.grad(value, list(params.values()))
        total = [t + g**2 / len(y) for t, g in zip(total, grads, strict=True)]
    found = curvature.fisher_diagonal(loss, state, (x, y), chunk_size=3)
    for a, b in zip(tree_leaves(found), total, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(DataError):
        curvature.fisher_diagonal(loss, state, (x, y[:2]))


def test_the_fisher_information_of_a_softmax_is_its_hessian():
    """With labels drawn from the model, their expectations are equal for a linear softmax."""
    torch.manual_seed(0)
    w = torch.randn(3, 2, dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64)
    state = pt.TrainState.create({"w": w}, key=pt.random.key(0))

    def loss(params, buffers, batch, key):
        x, y = batch
        return F.cross_entropy(x @ params["w"].T, y)

    probabilities = torch.softmax(x @ w.T, 1)
    expected = torch.zeros_like(w)  # the sum over labels, weighted by their probabilities
    for i in range(5):
        for label in range(3):
            one = (x[i : i + 1], torch.tensor([label]))
            expected += (
                probabilities[i, label] / 5 * curvature.fisher_diagonal(loss, state, one)["w"]
            )
    diagonal = np.diag(explicit_hessian(loss, state, (x, torch.zeros(5, dtype=torch.int64))))
    np.testing.assert_allclose(expected.numpy().reshape(-1), diagonal, rtol=1e-10)


# ── Slices ────────────────────────────────────────────────────────────────────────────────────────


def value_at(loss, state, params, batch):
    with pt.random.scope(pt.random.fold_in(state.key, 0)):
        return loss(params, state.buffers, batch, None)[0].item()


def test_a_line_is_the_loss_between_two_states(tmp_path):
    loss, first, batch = task()
    _, second, _ = task(seed=1)
    pt.save(tmp_path / "second.ckpt", second)
    second = pt.load(tmp_path / "second.ckpt", like=second)
    found = curvature.line(loss, first, second, batch, points=5, beyond=0.5)
    assert found.at.tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5]
    for t, got in zip(found.at.tolist(), found.loss.tolist(), strict=True):
        params = tree_map(lambda a, b: a + t * (b - a), first.params, second.params)  # noqa: B023
        assert got == pytest.approx(value_at(loss, first, params, batch), rel=1e-10)
    middle = found.loss[2] - (found.loss[1] + found.loss[3]) / 2
    assert found.barrier == pytest.approx(max(middle.item(), 0.0), abs=1e-12)


def test_a_line_interpolates_running_statistics_and_keeps_counters():
    module = nn.BatchNorm1d(2).eval()
    apply, params, buffers = pt.functional(module)
    seen = []

    def loss(params, buffers, batch, key):
        seen.append(buffers)
        return apply(params, buffers, batch)[0].square().mean()

    first = pt.TrainState.create(params, buffers, key=pt.random.key(0))
    moved = buffers | {"running_mean": torch.ones(2), "num_batches_tracked": torch.tensor(7)}
    curvature.line(loss, first, first.replace(buffers=moved), torch.ones(3, 2), points=3)
    assert [b["running_mean"][0].item() for b in seen] == [0.0, 0.5, 1.0]
    assert [b["num_batches_tracked"].item() for b in seen] == [0, 0, 0]


def test_a_plane_is_the_loss_around_a_state():
    loss, state, batch = task()
    found = curvature.plane(loss, state, batch, radius=0.5, points=5)
    assert found.loss.shape == (5, 5)
    assert found.loss[2, 2].item() == pytest.approx(
        value_at(loss, state, state.params, batch), rel=1e-12
    )
    a, b = (curvature.random_direction(state.params, pt.random.key(i)) for i in range(2))
    found = curvature.plane(loss, state, batch, (a, b), radius=1.0, points=3)
    params = tree_map(lambda p, x, y: p + x - y, state.params, a, b)
    assert found.loss[0, 2].item() == pytest.approx(
        value_at(loss, state, params, batch), rel=1e-10
    )  # y[0] = -1, x[2] = 1


def test_the_second_difference_along_an_eigenvector_is_its_eigenvalue():
    loss, state, batch = task()
    found = curvature.eigh(loss, state, batch, tolerance=1e-10)
    vector = tree_index(found.vectors, 0)
    slice_ = curvature.plane(loss, state, batch, (vector, vector), radius=1e-3, points=3)
    middle = slice_.loss[1]  # along x, with y = 0
    curve = (middle[0] - 2 * middle[1] + middle[2]) / 1e-6
    assert curve.item() == pytest.approx(found.values.item(), rel=1e-4)


def test_filters_get_the_length_of_those_of_the_parameters():
    torch.manual_seed(0)
    params = {"conv": torch.randn(4, 3, 2, 2), "bias": torch.randn(4), "gain": torch.tensor(2.0)}
    direction = curvature.random_direction(params, pt.random.key(0))
    found = curvature.filter_normalized(direction, params)
    for i in range(4):
        assert found["conv"][i].norm().item() == pytest.approx(params["conv"][i].norm().item())
        cosine = (found["conv"][i] * direction["conv"][i]).sum() / (
            found["conv"][i].norm() * direction["conv"][i].norm()
        )
        assert cosine.item() == pytest.approx(1)
    assert not found["bias"].any()
    assert not found["gain"].any()
    dead = curvature.filter_normalized({"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)})
    assert not dead["w"].any()


def test_slices_say_what_they_can_not():
    loss, state, batch = task()
    other = state.replace(params={"w": torch.ones(1)})
    for call, error in (
        (lambda: curvature.line(loss, state, state, batch, points=1), ConfigurationError),
        (lambda: curvature.line(loss, state, state, batch, beyond=-1.0), ConfigurationError),
        (lambda: curvature.line(loss, state, other, batch), StructureError),
        (lambda: curvature.plane(loss, state, batch, radius=0.0), ConfigurationError),
        (lambda: curvature.plane(loss, state, batch, ({}, {})), StructureError),
    ):
        with pytest.raises(error):
            call()
