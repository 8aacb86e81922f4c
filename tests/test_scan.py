"""Derivatives through steps, against those by hand, of plain torch, and finite differences."""

import itertools
import pathlib
import runpy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import puretrain as pt
from puretrain.errors import ConfigurationError, OptimizerError, StructureError, TransformError
from puretrain.tree import tree_digest, tree_equal, tree_leaves, tree_map

# The counter of the benchmark; its folder on the path would hide packages behind its files' names.
LiveMemory = runpy.run_path(
    str(pathlib.Path(__file__).parents[1] / "benchmarks" / "live_memory.py")
)["LiveMemory"]

REMATS = [False, True, 1, 3, 100]


def task(make=None, *, dropout=0.0, steps=10, **options):
    """(step, first state, batches) of a small network in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)).double()
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        x, y = batch
        return ((apply(params, buffers, x)[0] - y) ** 2).mean()

    optimizer = make or pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1, momentum=0.9)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    x, y = torch.randn(steps, 5, 3).double(), torch.randn(steps, 5, 1).double()
    return pt.train_step(loss, optimizer, **options), state, list(zip(x, y, strict=True))


def with_rate(state, lr):
    return state.replace(opt_state=pt.optim.set_hyperparams(state.opt_state, lr=lr))


def square(state):
    return sum((leaf**2).sum() for leaf in tree_leaves(state.params))


RATE = torch.tensor(0.05, dtype=torch.float64)


# ── The value ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("remat", REMATS)
def test_it_is_the_loop_to_the_bit(remat):
    step, state, batches = task(dropout=0.3)
    before, expected = tree_digest(state), state
    for batch in batches:
        expected = step(expected, batch)
    assert tree_equal(pt.scan(step, state, batches, remat=remat), expected)
    assert tree_digest(state) == before


def test_no_batch_is_no_step():
    step, state, _ = task()
    assert tree_equal(pt.scan(step, state, []), state)
    assert tree_equal(pt.scan(step, state, iter([]), remat=True), state)


@pytest.mark.parametrize("remat", REMATS)
def test_it_collects_from_each_new_state(remat):
    step, state, batches = task()
    losses, expected = [], state
    for batch in batches:
        expected = step(expected, batch)
        losses.append(expected.metrics["loss"])
    last, collected = pt.scan(
        step, state, batches, remat=remat, collect=lambda s: {"loss": s.metrics["loss"]}
    )
    assert torch.equal(collected["loss"], torch.stack(losses))
    assert tree_equal(last, expected)


# ── The derivative ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("remat", REMATS)
def test_the_second_order_gradient_of_linear_regression_by_hand(remat):
    """w' = w - a H (w - w*) at each step, so the derivative of the last by the first is the product
    of I - a H, and that by the rate a is the sum of -H (w - w*) carried through the later ones."""
    rng = np.random.default_rng(0)
    xs, ys, w = rng.normal(size=(6, 4, 3)), rng.normal(size=(6, 4)), rng.normal(size=3)
    rate = 0.07
    by_w, by_rate, now = np.eye(3), np.zeros(3), w
    for x, y in zip(xs, ys, strict=True):
        gradient, hessian = 2 / 4 * x.T @ (x @ now - y), 2 / 4 * x.T @ x
        by_rate = by_rate - rate * hessian @ by_rate - gradient
        by_w = (np.eye(3) - rate * hessian) @ by_w
        now = now - rate * gradient
    # the outer loss |w|^2
    expected_w, expected_rate = by_w.T @ (2 * now), 2 * now @ by_rate

    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=rate)
    step = pt.train_step(lambda p, b, xy, key: ((xy[0] @ p["w"] - xy[1]) ** 2).mean(), optimizer)
    state = pt.TrainState.create({"w": torch.from_numpy(w)}, None, optimizer, key=pt.random.key(0))
    batches = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(xs, ys, strict=True)]

    def outer(w, lr):
        start = with_rate(state.replace(params={"w": w}), lr)
        return square(pt.scan(step, start, batches, remat=remat))

    got = torch.func.grad(outer, argnums=(0, 1))(
        torch.from_numpy(w), torch.tensor(rate, dtype=torch.float64)
    )
    np.testing.assert_allclose(got[0].numpy(), expected_w, rtol=1e-12)
    np.testing.assert_allclose(got[1].numpy(), expected_rate, rtol=1e-12)


@pytest.mark.parametrize("remat", [False, True])
def test_it_is_the_gradient_of_a_loop_of_plain_torch(remat):
    step, state, batches = task(pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.05), draws=False)
    got = torch.func.grad(lambda p: square(pt.scan(step, state.replace(params=p), batches)))(
        state.params
    )
    first = {name: leaf.clone().requires_grad_() for name, leaf in state.params.items()}
    now = first
    for x, y in batches:
        hidden = torch.tanh(x @ now["0.weight"].T + now["0.bias"])
        loss = ((hidden @ now["3.weight"].T + now["3.bias"] - y) ** 2).mean()
        grads = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        now = {n: p - 0.05 * g for (n, p), g in zip(now.items(), grads, strict=True)}
    outer = sum((leaf**2).sum() for leaf in now.values())
    for leaf, grad in zip(
        got.values(), torch.autograd.grad(outer, list(first.values())), strict=True
    ):
        torch.testing.assert_close(leaf, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("remat", [True, 1, 4, 10])
def test_remat_changes_no_bit_of_the_gradient(remat, dropout):
    step, state, batches = task(dropout=dropout)

    def outer(lr, params, xs, remat):
        start = with_rate(state.replace(params=params), lr)
        batches_now = [(x, y) for x, (_, y) in zip(xs, batches, strict=True)]
        return square(pt.scan(step, start, batches_now, remat=remat))

    arguments = RATE, state.params, [x for x, _ in batches]
    gradient = torch.func.grad(outer, argnums=(0, 1, 2))
    assert tree_equal(gradient(*arguments, False), gradient(*arguments, remat))


@settings(max_examples=15)
@given(steps=st.integers(1, 9), remat=st.integers(0, 10), accumulate=st.integers(1, 3))
def test_any_segments_give_the_same_derivative(steps, remat, accumulate):
    step, state, batches = task(steps=steps, accumulate=accumulate, draws=False)

    def outer(lr, remat):
        return square(pt.scan(step, with_rate(state, lr), batches, remat=remat))

    assert torch.equal(*(torch.func.grad(outer)(RATE, r) for r in (False, remat)))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.05, momentum=0.9),
        lambda: pt.optim.inject_hyperparams(pt.optim.adamw)(
            lr=0.05, betas=(0.8, 0.95), weight_decay=0.1
        ),
        lambda: pt.optim.inject_hyperparams(pt.optim.rmsprop)(lr=0.05),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_hyper_gradients_are_finite_differences(make, remat):
    step, state, batches = task(make(), steps=4, draws=False)

    def outer(*values):
        names = state.opt_state.hyperparams.keys()
        opt_state = pt.optim.set_hyperparams(
            state.opt_state, **dict(zip(names, values, strict=True))
        )
        return square(pt.scan(step, state.replace(opt_state=opt_state), batches, remat=remat))

    values = tuple(state.opt_state.hyperparams.values())
    gradient = torch.func.grad(outer, argnums=tuple(range(len(values))))(*values)
    for i, value in enumerate(values):
        sides = [outer(*values[:i], value + by, *values[i + 1 :]).item() for by in (1e-6, -1e-6)]
        torch.testing.assert_close(
            gradient[i].item(), (sides[0] - sides[1]) / 2e-6, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_derivatives_compose_with_transforms_and_remat(dropout):
    step, state, batches = task(dropout=dropout)

    def outer(lr, remat):
        return square(pt.scan(step, with_rate(state, lr), batches, remat=remat))

    def second(remat):
        return torch.func.grad(torch.func.grad(lambda lr: outer(lr, remat)))(RATE)

    def mapped(remat):
        gradient = torch.func.grad(lambda lr: outer(lr, remat))
        return torch.func.vmap(gradient, randomness="same")(torch.stack([RATE, RATE / 2]))

    def inside(remat):
        both = torch.func.vmap(lambda lr: outer(lr, remat), randomness="same")
        return torch.func.grad(lambda lr: both(lr * torch.ones(2).double()).sum())(RATE)

    for function in (second, mapped, inside):
        torch.testing.assert_close(function(False), function(True), rtol=1e-12, atol=0)
    one = torch.func.grad(lambda lr: outer(lr, True))(RATE)
    torch.testing.assert_close(mapped(True)[0], one, rtol=1e-10, atol=0)
    torch.testing.assert_close(inside(True), 2 * one, rtol=1e-10, atol=0)


@pytest.mark.parametrize("remat", [False, True])
def test_plain_autograd_differentiates_as_well_and_twice(remat):
    step, state, batches = task()
    lr = RATE.clone().requires_grad_()
    params = tree_map(lambda leaf: leaf.clone().requires_grad_(), state.params)
    end = pt.scan(step, with_rate(state.replace(params=params), lr), batches, remat=remat)
    first = torch.autograd.grad(square(end), [lr, *params.values()], create_graph=True)

    def outer(lr, params):
        return square(pt.scan(step, with_rate(state.replace(params=params), lr), batches))

    expected = torch.func.grad(outer, argnums=(0, 1))(RATE, state.params)
    for got, want in zip(first, tree_leaves(expected), strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-14)
    second = torch.func.grad(torch.func.grad(outer))(RATE, state.params)
    torch.testing.assert_close(torch.autograd.grad(first[0], lr)[0], second, rtol=1e-10, atol=0)


def test_without_grad_it_is_the_loop_even_if_a_leaf_requires_grad():
    step, state, batches = task()
    params = tree_map(lambda leaf: leaf.clone().requires_grad_(), state.params)
    with torch.no_grad():
        end = pt.scan(step, state.replace(params=params), batches)
    assert tree_equal(end.params, pt.scan(step, state, batches).params)


def test_maml_adapts_to_its_task():
    """The derivative by first parameters that several tasks share, as one vmap over the tasks."""
    optimizer = pt.optim.sgd(0.5)
    step = pt.train_step(lambda p, b, target, key: (p["w"] - target) ** 2, optimizer, draws=False)
    targets = torch.tensor([[1.0], [-2.0], [4.0]])  # one batch for each of three tasks

    def outer(w):
        def adapted(batches):
            state = pt.TrainState.create({"w": w}, None, optimizer, key=pt.random.key(0))
            return pt.scan(step, state, batches, remat=True).params["w"]

        return (torch.func.vmap(adapted)(targets) - 10.0).square().sum()

    # One step of rate 0.5 leads to the target, wherever it begins: there is nothing to learn.
    assert torch.func.grad(outer)(torch.tensor(3.0)).item() == 0.0


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────


def peak(count, remat, order=1):
    step, state, batches = task(steps=1, draws=False)

    def outer(lr):
        return square(pt.scan(step, with_rate(state, lr), batches * count, remat=remat))

    derivative = outer
    for _ in range(order):
        derivative = torch.func.grad(derivative)
    with LiveMemory() as memory:
        derivative(RATE)
    return memory.peak


def test_memory_grows_with_the_root_of_the_number_of_steps():
    plain = [peak(k, False) for k in (9, 36, 144)]
    rematerialised = [peak(k, True) for k in (9, 36, 144)]
    for few, many in itertools.pairwise(plain):  # four times the steps
        assert 3.7 < many / few < 4.3
    for few, many in itertools.pairwise(rematerialised):
        assert 1.6 < many / few < 2.2
    assert rematerialised[-1] < plain[-1] / 6


def test_memory_of_a_second_derivative_grows_so_too():
    assert peak(36, True, order=2) / peak(9, True, order=2) < 2.4
    assert peak(36, False, order=2) / peak(9, False, order=2) > 3.5


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────


def holding(lr, remat, params=None):
    """The parameters at the end, with a learning rate that the step holds."""
    optimizer = pt.optim.sgd(lr)
    step = pt.train_step(lambda p, b, x, key: (p["w"] * x).square(), optimizer, draws=False)
    state = pt.TrainState.create(
        params or {"w": torch.tensor(1.0)}, None, optimizer, key=pt.random.key(0)
    )
    return pt.scan(step, state, torch.ones(4), remat=remat).params["w"]


def test_a_derivative_by_what_the_step_holds():
    lr = torch.tensor(0.25)
    # (1 - 2 lr)^4
    assert torch.func.grad(lambda lr: holding(lr, False))(lr).item() == -1.0


@pytest.mark.parametrize(
    "around",
    [
        torch.func.grad,
        lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(x.expand(2)),
        lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x.expand(2)).sum()),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum()),
        torch.func.jacrev,
    ],
    ids=["grad", "vmap of grad", "grad of vmap", "grad of grad", "jacrev"],
)
def test_remat_refuses_to_lose_such_a_derivative(around):
    with pytest.raises(TransformError, match="inject_hyperparams"):
        around(lambda lr: holding(lr, True))(torch.tensor(0.25))


def test_remat_leaves_what_is_no_variable_alone():
    rates = torch.tensor([0.25, 0.125])
    gradient = torch.func.grad(lambda w, lr, remat: holding(lr, remat, {"w": w}))
    got = [
        torch.func.vmap(lambda lr, r=r: gradient(torch.tensor(1.0), lr, r))(rates)
        for r in (False, True)
    ]
    assert got[0].tolist() == [0.0625, 0.75**4]
    assert torch.equal(*got)


def test_forward_mode_keeps_nothing_anyway():
    step, state, batches = task(draws=False)

    def outer(lr, remat):
        return square(pt.scan(step, with_rate(state, lr), batches, remat=remat))

    _, tangent = torch.func.jvp(lambda lr: outer(lr, False), (RATE,), (torch.ones_like(RATE),))
    torch.testing.assert_close(tangent, torch.func.grad(lambda lr: outer(lr, True))(RATE))
    with pytest.raises(TransformError, match="remat=False"):
        torch.func.jvp(lambda lr: outer(lr, True), (RATE,), (torch.ones_like(RATE),))


def test_what_can_not_work_is_said():
    step, state, batches = task()
    with pytest.raises(ConfigurationError, match="remat"):
        pt.scan(step, state, batches, remat=-1)
    with pytest.raises(ConfigurationError, match="remat"):
        pt.scan(step, state, batches, remat="sqrt")
    with pytest.raises(ConfigurationError, match="collect"):
        pt.scan(step, state, [], collect=lambda s: s.step)
    with pytest.raises(StructureError, match="int"):
        torch.func.grad(
            lambda lr: pt.scan(
                step, with_rate(state, lr), batches, remat=True, collect=lambda s: 1
            )[1].sum()
        )(RATE)
    with pytest.raises(OptimizerError, match="requires grad"):
        holding(torch.tensor(0.1, requires_grad=True), True)
