"""Per-example gradients against a loop over examples; privacy against opacus and closed forms."""

import math
import warnings

import forking
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn

import puretrain as pt
from puretrain import per_example
from puretrain.errors import ConfigurationError, DataError, LossError, TransformError
from puretrain.tree import tree_equal, tree_index, tree_leaves, tree_map, tree_stack

BATCH = 12


def network(*, dropout=0.0, norm_layer=nn.Identity):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), norm_layer(), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)
    )


def task(module=None, optimizer=None):
    module = module or network()
    apply, params, buffers = pt.functional(module)

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, buffers = apply(params, buffers, x)
        accuracy = (logits.argmax(1) == y).float().mean()
        return F.cross_entropy(logits, y), pt.Aux(buffers, {"accuracy": accuracy})

    optimizer = optimizer or pt.optim.sgd(1.0)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(3))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 4, generator=generator) * torch.linspace(0.1, 4, BATCH)[:, None]
    y = torch.randint(0, 3, (BATCH,), generator=generator)
    return loss, optimizer, state, (x, y)


def by_loop(loss, state, batch):
    """The gradients of one example after the other, by plain autograd."""
    rows = []
    for i in range(len(batch[1])):
        params = tree_map(lambda leaf: leaf.clone().requires_grad_(), state.params)
        value, _ = loss(params, state.buffers, tree_map(lambda x: x[i : i + 1], batch), None)  # noqa: B023
        grads = torch.autograd.grad(value, list(params.values()))
        rows.append(dict(zip(params, grads, strict=True)))
    return tree_stack(rows)


def assert_close(tree, other, **tolerance):
    for a, b in zip(tree_leaves(tree), tree_leaves(other), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ── Gradients ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_gradients_are_those_of_a_loop(chunk_size):
    loss, _, state, batch = task()
    grads = per_example.gradients(loss, state, batch, chunk_size=chunk_size)
    expected = by_loop(loss, state, batch)
    assert list(grads) == list(state.params)
    assert_close(list(grads.values()), [expected[name] for name in grads])
    lengths = torch.stack(
        [torch.cat([expected[n][i].flatten() for n in state.params]).norm() for i in range(BATCH)]
    )
    torch.testing.assert_close(per_example.norms(grads), lengths)
    flat = torch.cat([grads[n].reshape(BATCH, -1) for n in grads], 1)
    torch.testing.assert_close(per_example.products(grads, grads), flat @ flat.T)


def test_their_mean_is_the_gradient_of_the_batch():
    loss, optimizer, state, batch = task()
    mean = tree_map(lambda leaf: leaf.mean(0), per_example.gradients(loss, state, batch))
    after = pt.train_step(loss, optimizer)(state, batch)
    assert_close(tree_map(torch.sub, state.params, after.params), mean)


def test_each_example_draws_its_own_dropout_reproducibly_and_leaves_torch_alone():
    loss, _, state, (x, y) = task(network(dropout=0.5))
    same = (x[:1].expand(64, -1), y[:1].expand(64))
    before = torch.get_rng_state()
    grads = per_example.gradients(loss, state, same)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(torch.unique(per_example.norms(grads))) > 5
    assert tree_equal(grads, per_example.gradients(loss, state, same))


def test_a_layer_that_mixes_examples_is_refused():
    loss, _, state, batch = task(network(norm_layer=lambda: nn.GroupNorm(2, 6)))
    per_example.gradients(loss, state, batch)

    def counting(params, buffers, batch, key):
        return (params["w"] * batch).mean(), pt.Aux(buffers={"mean": buffers["mean"] + 1.0})

    state = pt.TrainState.create(
        {"w": torch.ones(2)}, {"mean": torch.zeros(2)}, key=pt.random.key(0)
    )
    with pytest.raises(LossError, match="buffers/mean"):
        per_example.gradients(counting, state, torch.ones(3, 2))


def test_batch_norm_in_evaluation_may_stay():
    module = network(norm_layer=lambda: nn.BatchNorm1d(6)).eval()
    loss, _, state, batch = task(module)
    assert_close(
        list(per_example.gradients(loss, state, batch).values()),
        list(by_loop(loss, state, batch).values()),
    )


def test_what_is_no_batch_is_said():
    loss, _, state, (x, y) = task()
    for batch in ((x, y[:3]), (x, torch.tensor(1)), ()):
        with pytest.raises(DataError, match="one row for each example"):
            per_example.gradients(loss, state, batch)
    with pytest.raises(LossError, match="shape"):
        per_example.gradients(lambda p, b, xy, key: p["0.weight"], state, (x, y))


# ── Private training ──────────────────────────────────────────────────────────────────────────────


def private_gradient(loss, state, batch, **options):
    """The gradient that a private step of plain descent with the rate 1 has used."""
    step = pt.train_step(per_example.private(loss, **options), pt.optim.sgd(1.0))
    after = step(state, batch)
    return tree_map(torch.sub, state.params, after.params), after


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
def test_clipping_is_that_of_a_loop(max_norm):
    loss, _, state, batch = task()
    total = tree_map(torch.zeros_like, state.params)
    clipped = 0
    for row in (tree_index(by_loop(loss, state, batch), i) for i in range(BATCH)):
        length = torch.cat([leaf.flatten() for leaf in row.values()]).norm().item()
        clipped += length > max_norm
        total = tree_map(
            lambda t, r: t + r * min(1.0, max_norm / length),  # noqa: B023
            total,
            pt.FrozenDict({name: row[name] for name in total}),
        )
    got, after = private_gradient(
        loss, state, batch, max_norm=max_norm, noise_multiplier=0.0, batch_size=10
    )
    assert_close(got, tree_map(lambda leaf: leaf / 10, total), rtol=1e-4, atol=1e-6)
    assert after.metrics["clipped"].item() == pytest.approx(clipped / BATCH)
    plain = pt.train_step(loss, pt.optim.sgd(1.0))(state, batch)
    torch.testing.assert_close(after.metrics["loss"], plain.metrics["loss"])
    torch.testing.assert_close(after.metrics["accuracy"], plain.metrics["accuracy"])


def test_clipping_is_that_of_opacus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        loss, _, state, (x, y) = task()
        module = GradSampleModule(network())
        descent = torch.optim.SGD(module.parameters(), lr=1.0)
        optimizer = DPOptimizer(
            descent, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=BATCH
        )
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    _, after = private_gradient(
        loss, state, (x, y), max_norm=0.7, noise_multiplier=0.0, batch_size=BATCH
    )
    for ours, theirs in zip(after.params.values(), module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)


def test_noise_has_its_size_and_is_a_function_of_the_key():
    def loss(params, buffers, batch, key):
        return (params["w"][:1] * batch).mean()

    state = pt.TrainState.create(
        {"w": torch.zeros(20_001)}, None, pt.optim.sgd(1.0), key=pt.random.key(0)
    )
    options = {"max_norm": 0.5, "noise_multiplier": 3.0, "batch_size": 4}
    got, _ = private_gradient(loss, state, torch.ones(4, 1), **options)
    again, _ = private_gradient(loss, state, torch.ones(4, 1), **options)
    other, _ = private_gradient(
        loss, state.replace(key=pt.random.key(1)), torch.ones(4, 1), **options
    )
    assert tree_equal(got, again)
    assert not torch.equal(got["w"], other["w"])
    noise = got["w"][1:] * 4  # of the sum
    # 20,000 draws: the mean is within 5 standard errors, and so is the standard deviation
    assert abs(noise.mean()) < 5 * 1.5 / 20_000**0.5
    assert abs(noise.std() / 1.5 - 1) < 5 / 40_000**0.5
    assert abs((noise.abs() < 1.5).float().mean() - 0.6827) < 0.02


def test_no_example_can_move_the_sum_further_than_allowed():
    loss, _, state, (x, y) = task()
    options = {"max_norm": 0.2, "noise_multiplier": 0.0, "batch_size": 1}
    without, _ = private_gradient(loss, state, (x[1:], y[1:]), **options)
    for scale in (1e-3, 1.0, 1e4, math.inf, math.nan):
        outlier = torch.cat([x[:1] * scale, x[1:]])
        with_it, _ = private_gradient(loss, state, (outlier, y), **options)
        moved = torch.cat([(a - b).flatten() for a, b in zip(
            with_it.values(), without.values(), strict=True)])  # fmt: skip
        assert moved.norm() <= 0.2 * (1 + 1e-4)


def test_an_empty_batch_is_noise_alone():
    loss, _, state, (x, y) = task()
    options = {"max_norm": 1.0, "batch_size": 2}
    silent, after = private_gradient(loss, state, (x[:0], y[:0]), noise_multiplier=0.0, **options)
    assert all(bool((leaf == 0).all()) for leaf in silent.values())
    assert after.metrics["loss"].item() == 0
    noisy, _ = private_gradient(loss, state, (x[:0], y[:0]), noise_multiplier=1.0, **options)
    assert all(bool((leaf != 0).all()) for leaf in noisy.values())


def test_a_private_step_is_a_step_like_any_other():
    loss, _, _, (x, y) = task()
    optimizer = pt.optim.adamw(0.05)
    _, _, state, _ = task(optimizer=optimizer)
    private = per_example.private(loss, max_norm=1.0, noise_multiplier=0.5, batch_size=4)
    step = pt.train_step(private, optimizer, accumulate=2)
    data = per_example.PoissonSampled((x, y), 4, steps=9, key=pt.random.key(5))
    straight = pt.fit(state, step, data, epochs=1)
    stopped = pt.fit(pt.fit(state, step, data, epochs=1, steps=4), step, data, epochs=1)
    assert int(straight.step) == 9
    assert tree_equal(straight, stopped)
    members = tree_stack([state.replace(key=key) for key in pt.random.split(state.key, 3)])
    both = torch.func.vmap(pt.train_step(private, optimizer), (0, None), randomness="different")(
        members, (x, y)
    )
    weights = both.params["0.weight"]
    assert weights.shape == (3, 6, 4)
    assert not torch.equal(weights[0], weights[1])  # noise of its own for each


def test_private_says_what_it_can_not():
    loss, optimizer, state, batch = task()
    good = {"max_norm": 1.0, "noise_multiplier": 1.0, "batch_size": 4}
    for name, bad in (("max_norm", 0.0), ("noise_multiplier", -1.0), ("batch_size", 0)):
        with pytest.raises(ConfigurationError, match=name):
            per_example.private(loss, **good | {name: bad})
    private = per_example.private(loss, **good)
    with pytest.raises(ConfigurationError, match="draws=True"):
        pt.train_step(private, optimizer, draws=False)(state, batch)
    step = pt.train_step(private, optimizer)

    def outer(scale):
        x, y = batch
        return pt.scan(step, state, [(x * scale, y)]).params["0.weight"].sum()

    with pytest.raises(TransformError, match="no derivative"):
        torch.func.grad(outer)(torch.tensor(1.0))


def test_poisson_samples_have_the_rate_and_are_functions_of_the_index():
    data = per_example.PoissonSampled({"i": torch.arange(50)}, 5, steps=2000, key=pt.random.key(0))
    drawn = torch.zeros(50)
    for batch in data:
        drawn[batch["i"]] += 1
    # each is binomial: 2000 draws with the chance 0.1
    assert data.sample_rate == 0.1
    assert (drawn - 200).abs().max() < 5 * (2000 * 0.1 * 0.9) ** 0.5
    sizes = torch.tensor([len(batch["i"]) for batch in data]).float()
    assert sizes.var().item() == pytest.approx(50 * 0.1 * 0.9, rel=0.15)
    assert torch.equal(data[7]["i"], data[7]["i"])
    with pytest.raises(IndexError):
        data[2000]
    for options in ({"batch_size": 51, "steps": 1}, {"batch_size": 5, "steps": 0}):
        with pytest.raises(ConfigurationError):
            per_example.PoissonSampled(data.data, key=pt.random.key(0), **options)


def exact_epsilon(noise, steps, delta):
    """Without sampling, k Gaussian mechanisms are one (Balle and Wang, 2018)."""
    mu = steps**0.5 / noise

    def spent(epsilon):
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return norm.cdf(a) - math.exp(epsilon) * norm.cdf(b) - delta

    return brentq(spent, 0, 500)


# Opacus takes logarithms of probabilities of zero, and would like to be asked for more orders.
of_opacus = pytest.mark.filterwarnings(
    "ignore:divide by zero encountered in log", "ignore:Optimal order is the largest alpha"
)


@of_opacus
@pytest.mark.parametrize(("noise", "steps"), [(5.0, 1), (20.0, 40), (10.0, 100)])
def test_epsilon_is_the_closed_form_where_there_is_one(noise, steps):
    facts = {"noise_multiplier": noise, "sample_rate": 1.0, "steps": steps, "delta": 1e-5}
    exact = exact_epsilon(noise, steps, 1e-5)
    assert exact <= per_example.epsilon(**facts) <= 1.25 * exact
    assert per_example.epsilon(**facts, accountant="prv") == pytest.approx(exact, abs=0.03)


@of_opacus
def test_the_noise_for_an_epsilon_is_its_inverse():
    facts = {"sample_rate": 0.02, "steps": 300, "delta": 1e-5}
    for wanted in (0.3, 3.0, 30.0):
        noise = per_example.noise_multiplier(epsilon=wanted, **facts)
        spent = per_example.epsilon(noise_multiplier=noise, **facts)
        assert spent <= wanted
        assert per_example.epsilon(noise_multiplier=noise * 0.995, **facts) > wanted


def test_accounting_says_what_it_can_not():
    good = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3, "delta": 1e-5}
    bad = {"noise_multiplier": 0.0, "sample_rate": 1.5, "steps": 0, "delta": 1.0, "accountant": "x"}
    for name, value in bad.items():
        with pytest.raises(ConfigurationError, match=name):
            per_example.epsilon(**good | {name: value})
    with pytest.raises(ConfigurationError, match="epsilon"):
        per_example.noise_multiplier(epsilon=-1.0, sample_rate=0.1, steps=3, delta=1e-5)


def test_a_missing_accountant_is_named():
    code = (
        "import sys; sys.modules['opacus'] = None\n"
        "import puretrain as pt\n"
        "pt.per_example.epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=3, delta=1e-5)"
    )
    done = forking.run("-c", code)
    assert done.returncode == 1
    assert "pip install 'puretrain[privacy]'" in done.stderr


# ── Diagnostics ───────────────────────────────────────────────────────────────────────────────────


def test_statistics_are_those_of_the_covariance():
    loss, _, state, batch = task()
    grads = per_example.gradients(loss, state, batch)
    flat = torch.cat([leaf.reshape(BATCH, -1) for leaf in grads.values()], 1).double()
    found = per_example.statistics(grads)
    trace = torch.cov(flat.T).trace()
    square = flat.mean(0).square().sum() - trace / BATCH
    assert found.variance.item() == pytest.approx(trace.item(), rel=1e-5)
    assert found.square.item() == pytest.approx(square.item(), rel=1e-4, abs=1e-6)
    assert found.noise_scale.item() == pytest.approx((trace / square).item(), rel=1e-4)
    with pytest.raises(ConfigurationError, match="two examples"):
        per_example.statistics(tree_index(grads, slice(0, 1)))


def test_statistics_have_no_bias():
    """The mean over all pairs of examples is that of the whole population."""
    generator = torch.Generator().manual_seed(0)
    population = torch.randn(7, 5, generator=generator, dtype=torch.float64) + 1
    pairs = [(i, j) for i in range(7) for j in range(7)]  # with replacement
    found = [per_example.statistics({"w": population[list(pair)]}) for pair in pairs]
    spread = population - population.mean(0)
    torch.testing.assert_close(
        torch.stack([f.variance for f in found]).mean(), spread.square().sum() / 7
    )
    torch.testing.assert_close(
        torch.stack([f.square for f in found]).mean(), population.mean(0).square().sum()
    )


def test_the_noise_scale_is_watched_as_by_hand_and_resumes():
    loss, optimizer, state, (x, y) = task(optimizer=pt.optim.sgd(0.1))
    step, data = pt.train_step(loss, optimizer), pt.batches((x, y), 4)
    reducer = per_example.noise_scale(loss, every=2, decay=0.5)
    last = pt.fit(state, step, data, epochs=2, reducers=[reducer])
    square = variance = 0.0
    now = state
    for count, batch in enumerate([*data, *data], start=1):
        now = step(now, batch)
        if count % 2 == 0:
            rows = by_loop(loss, now, batch)
            flat = torch.cat([leaf.reshape(4, -1) for leaf in rows.values()], 1).double()
            trace = torch.cov(flat.T).trace().item()
            square = 0.5 * square + 0.5 * (flat.mean(0).square().sum().item() - trace / 4)
            variance = 0.5 * variance + 0.5 * trace
    assert last.metrics["noise_scale"].item() == pytest.approx(variance / square, rel=1e-3)
    assert last.metrics["gradient_variance"].item() == pytest.approx(
        variance / (1 - 0.5**3), rel=1e-4
    )
    half = pt.fit(state, step, data, steps=3, reducers=[reducer])
    assert tree_equal(pt.fit(half, step, data, epochs=2, reducers=[reducer]), last)
    assert tree_equal(last.params, pt.fit(state, step, data, epochs=2).params)


def test_influence_sums_products_of_gradients_along_the_run():
    loss, _, state, (x, y) = task()
    schedule = pt.optim.linear(0.2, 0.0, 6)
    optimizer = pt.optim.sgd(schedule)
    state = state.replace(opt_state=optimizer.init(state.params))
    step, data = pt.train_step(loss, optimizer), pt.batches((x, y), 4)
    targets = (x[:2] + 0.1, y[:2])
    reducer = per_example.influence(loss, (x, y), targets, lr=schedule, every=2)
    last = pt.fit(state, step, data, epochs=2, reducers=[reducer])
    expected, now = torch.zeros(BATCH, 2, dtype=torch.float64), state
    for count, batch in enumerate([*data, *data], start=1):
        now = step(now, batch)
        if count % 2 == 0:
            one, other = (
                torch.cat([g.reshape(len(g), -1) for g in by_loop(loss, now, b).values()], 1)
                for b in ((x, y), targets)
            )
            expected += schedule(count - 1) * (one @ other.T).double()
    torch.testing.assert_close(last.reducers["influence"].scores, expected, rtol=1e-4, atol=1e-6)


def test_influence_tells_by_how_much_a_step_lowers_a_loss():
    loss, _, state, (x, y) = task()
    rate = 1e-3
    step = pt.train_step(loss, pt.optim.sgd(rate))
    target = (x[:1], y[:1])
    reducer = per_example.influence(loss, (x, y), target, lr=rate, every=1)
    scores = (
        reducer.reduce(
            pt.prepare(state, [reducer]).replace(updates=torch.tensor(1)),
            pt.loop.Event("step", 0, 1),
        )
        .reducers["influence"]
        .scores
    )
    for i in range(BATCH):
        after = step(state, (x[i : i + 1], y[i : i + 1]))
        fell = (
            loss(state.params, state.buffers, target, None)[0]
            - loss(after.params, state.buffers, target, None)[0]
        )
        assert scores[i, 0].item() == pytest.approx(fell.item(), rel=0.1, abs=2e-5)


def test_reducers_say_what_they_can_not():
    loss, _, _, (x, y) = task()
    for make in (
        lambda: per_example.noise_scale(loss, every=0),
        lambda: per_example.noise_scale(loss, decay=1.0),
        lambda: per_example.influence(loss, (x, y), (x, y), every=0),
    ):
        with pytest.raises(ConfigurationError):
            make()
    with pytest.raises(DataError):
        per_example.influence(loss, (x, y[:2]), (x, y))
