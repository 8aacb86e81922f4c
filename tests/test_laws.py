"""The laws of the package, each with what would catch its breach; the sixth is in test_imports."""

import copy
import random as python_random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import puretrain as pt
from puretrain.errors import TransformError
from puretrain.tree import (
    FrozenDict,
    tree_digest,
    tree_equal,
    tree_flatten,
    tree_index,
    tree_leaves,
    tree_map,
    tree_stack,
)

MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]()


def batch_of(n, size=6, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + n)
    return (
        torch.randn(size, 3, generator=generator),
        torch.randint(0, 2, (size,), generator=generator),
    )


def module_loss(apply):
    def loss(params, buffers, batch, key):
        x, y = batch
        output, buffers = apply(params, buffers, x)
        value = F.cross_entropy(output, y)
        return value, pt.Aux(buffers=buffers, metrics={"mean": output.mean()})

    return loss


def start(name, optimizer, *, seed=0, key=0, **options):
    apply, params, buffers = pt.functional(build(name, seed))
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(key))
    return state, pt.train_step(module_loss(apply), optimizer, **options)


def global_generators():
    return (
        torch.get_rng_state().clone(),
        python_random.getstate(),
        [np.copy(part) for part in np.random.get_state()[1:]],  # noqa: NPY002 - the global one
    )


def assert_generators_are(before):
    after = global_generators()
    assert torch.equal(after[0], before[0])
    assert after[1] == before[1]
    assert all(np.array_equal(x, y) for x, y in zip(after[2], before[2], strict=True))


def clone(tree):
    return tree_map(torch.clone, tree)


# ── 1 Purity ──────────────────────────────────────────────────────────────────────────────────────

OPTIONS = st.fixed_dictionaries(
    {
        "accumulate": st.sampled_from([1, 1, 3]),
        "precision": st.sampled_from(["32", "bf16", "16"]),
        "nonfinite": st.sampled_from(["propagate", "raise", "skip"]),
    }
)


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(MODELS)),
    options=OPTIONS,
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(0, 4),
    noise=st.integers(0, 2**31),
)
def test_a_step_is_a_function_of_its_arguments_alone(name, options, seed, steps, noise):
    optimizer = pt.optim.chain(pt.optim.clip_by_global_norm(1.0), pt.optim.adamw(1e-2))
    state, step = start(name, optimizer, key=seed, **options)
    for n in range(steps):
        state = step(state, batch_of(n))
    batch = batch_of(steps)
    before, batch_before = tree_digest(state), tree_digest(batch)
    first = step(state, batch)

    # Whatever else runs: draws, other steps, other precisions, also on the same model.
    torch.manual_seed(noise)
    python_random.seed(noise)
    torch.rand(noise % 7)
    other, other_step = start("dropout", pt.optim.sgd(0.1), key=noise)
    other_step(other_step(other, batch_of(0)), batch_of(1), donate=True)
    step(state, batch_of(noise))

    generators = global_generators()
    second = step(state, batch)
    assert_generators_are(generators)
    assert tree_equal(second, first)
    assert tree_digest(state) == before
    assert tree_digest(batch) == batch_before
    donated = step(clone(state), batch, donate=True)
    again = step(step(clone(state), batch), batch, donate=True)
    assert tree_equal(donated, first)
    assert tree_equal(again, step(first, batch))
    assert tree_digest(first) == tree_digest(second)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_leaves_the_module_as_it_was(name):
    model = build(name)
    before = copy.deepcopy(model)
    apply, params, buffers = pt.functional(model)
    optimizer = pt.optim.adamw(0.1)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = pt.train_step(module_loss(apply), optimizer)
    for n in range(3):
        state = step(state, batch_of(n), donate=True)
    assert tree_equal(dict(model.state_dict()), dict(before.state_dict()))
    assert [p.requires_grad for p in model.parameters()] == [True] * len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("when", ["in the loss", "in the backward pass"])
def test_an_exception_leaves_everything_as_it_was(when, donate):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    model = build("batch norm")
    before_module = copy.deepcopy(model.state_dict())
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        torch.rand(3)
        output, buffers = apply(params, buffers, batch[0])
        if when == "in the loss":
            raise ZeroDivisionError
        return Fails.apply(output).sum(), pt.Aux(buffers=buffers)

    optimizer = pt.optim.adamw(0.1)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    state = pt.train_step(module_loss(apply), optimizer)(state, batch_of(0))
    before = tree_digest(state)
    generators = global_generators()
    with pytest.raises(ZeroDivisionError):
        pt.train_step(loss, optimizer)(state, batch_of(1), donate=donate)
    assert_generators_are(generators)
    assert tree_digest(state) == before
    assert tree_equal(dict(model.state_dict()), dict(before_module))


def test_evaluation_is_pure():
    apply, params, buffers = pt.functional(build("dropout"))
    state = pt.TrainState.create(params, buffers, key=pt.random.key(0))
    step = pt.eval_step(lambda p, b, batch, key: {"mean": apply(p, b, batch[0])[0].mean()})
    before, generators = tree_digest(state), global_generators()
    first = step(state, batch_of(0))
    torch.rand(5)
    python_random.random()
    generators = global_generators()
    assert tree_equal(step(state, batch_of(0)), first)
    assert_generators_are(generators)
    assert tree_digest(state) == before


def test_fit_leaves_the_state_that_it_was_given():
    state, step = start("dropout", pt.optim.adamw(0.01), accumulate=2)
    state = step(state, batch_of(0))
    before, generators = tree_digest(state), global_generators()
    ends = [
        tree_digest(pt.fit(state, step, [batch_of(n) for n in range(1, 6)], epochs=1))
        for _ in range(2)
    ]
    assert ends[0] == ends[1] != before
    assert tree_digest(state) == before
    assert_generators_are(generators)


# ── 2 Completeness ────────────────────────────────────────────────────────────────────────────────

DATA = (
    torch.randn(23, 3, generator=torch.Generator().manual_seed(4)),
    torch.arange(23) % 2,
)


@settings(max_examples=25)
@given(
    name=st.sampled_from(["batch norm", "dropout"]),
    stop=st.integers(1, 13),
    accumulate=st.sampled_from([1, 2, 3, 5]),
    precision=st.sampled_from(["32", "16"]),
    batch_size=st.sampled_from([4, 7]),
)
def test_a_run_that_is_saved_and_loaded_anywhere_continues_bit_for_bit(
    tmp_path_factory, name, stop, accumulate, precision, batch_size
):
    optimizer = pt.optim.chain(
        pt.optim.clip_by_global_norm(0.5), pt.optim.adamw(pt.optim.cosine(0.05, 20))
    )
    options = {"accumulate": accumulate, "precision": precision}

    def fit(state, step, steps):
        source = pt.batches(DATA, batch_size, shuffle=True, seed=3)
        return pt.fit(
            state,
            step,
            source,
            steps=steps,
            reducers=[pt.ema(0.9), pt.early_stopping("train/loss", patience=50)],
        )

    state, step = start(name, optimizer, **options)
    straight = fit(state, step, 14)
    file = tmp_path_factory.mktemp("state") / "s.ckpt"
    pt.save(file, fit(state, step, stop))
    # A fresh process has the same program: other weights, and no memory of the run.
    fresh, step = start(name, optimizer, seed=8, key=9, **options)
    loaded = pt.load(file, like=fresh)
    resumed = fit(loaded, step, 14)
    assert tree_digest(resumed) == tree_digest(straight)
    assert tree_digest(step.flush(resumed)) == tree_digest(step.flush(straight))


def test_all_that_a_step_changes_is_in_the_state():
    """A step made anew continues like the old one: nothing is remembered in the closure."""
    optimizer = pt.optim.adamw(0.01)
    state, step = start("dropout", optimizer, accumulate=3, precision="16", nonfinite="skip")
    other = clone(state)
    for n in range(8):
        state = step(state, batch_of(n), donate=True)
        _, fresh = start("dropout", optimizer, accumulate=3, precision="16", nonfinite="skip")
        other = fresh(clone(other), batch_of(n))
    assert tree_equal(state, other)


# ── 3 Agreement ───────────────────────────────────────────────────────────────────────────────────

BOTH = {
    "sgd": (pt.optim.sgd(0.1), torch.optim.SGD, {"lr": 0.1}),
    "nesterov": (
        pt.optim.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "adam": (pt.optim.adam(0.01), torch.optim.Adam, {"lr": 0.01}),
    "adamw": (pt.optim.adamw(0.01), torch.optim.AdamW, {"lr": 0.01}),
    "amsgrad": (
        pt.optim.adamw(0.01, amsgrad=True),
        torch.optim.AdamW,
        {"lr": 0.01, "amsgrad": True},
    ),
    "nadam": (pt.optim.nadam(0.01), torch.optim.NAdam, {"lr": 0.01}),
    "radam": (pt.optim.radam(0.01), torch.optim.RAdam, {"lr": 0.01}),
    "rmsprop": (
        pt.optim.rmsprop(0.01, momentum=0.5),
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.5},
    ),
    "adagrad": (pt.optim.adagrad(0.05), torch.optim.Adagrad, {"lr": 0.05}),
    "adadelta": (pt.optim.adadelta(1.0), torch.optim.Adadelta, {"lr": 1.0}),
    "adamax": (pt.optim.adamax(0.01), torch.optim.Adamax, {"lr": 0.01}),
}
HAVE_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("name", ["batch norm", "dropout"])
def test_ours_equals_the_plain_loop_equals_from_torch(name, which):
    ours, optimizer_class, arguments = BOTH[which]
    if optimizer_class in HAVE_FUSED:
        arguments = arguments | {"fused": True}
    model = build(name)
    own = optimizer_class(model.parameters(), **arguments)
    key = pt.random.key(0)
    for n in range(10):
        x, y = batch_of(n)
        with pt.random.scope(pt.random.fold_in(key, n)):
            loss = F.cross_entropy(model(x), y)
        own.zero_grad()
        loss.backward()
        own.step()
    expected = {n: p.detach() for n, p in model.named_parameters()}
    for optimizer in (ours, pt.optim.from_torch(optimizer_class, **arguments)):
        for donate in (False, True):
            state, step = start(name, optimizer)
            for n in range(10):
                state = step(state, batch_of(n), donate=donate)
            assert tree_equal(dict(state.params), expected)
            assert tree_equal(dict(state.buffers), dict(model.named_buffers()))
            assert tree_equal(state.metrics["loss"], loss.detach())


# ── 4 Composability ───────────────────────────────────────────────────────────────────────────────


def close(a, b, tolerance=1e-5):
    """The formulas round otherwise than the fused kernels, by some units in the last place."""
    leaves_a, structure_a = tree_flatten(a)
    leaves_b, structure_b = tree_flatten(b)
    assert structure_a == structure_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance / 10)


TRANSFORMABLE = {
    "adamw": pt.optim.adamw(pt.optim.cosine(0.02, 10)),
    "momentum": pt.optim.sgd(0.1, momentum=0.9),
    "clipped": pt.optim.chain(pt.optim.clip_by_global_norm(0.1), pt.optim.adam(0.01)),
}


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"nonfinite": "skip"}])
@pytest.mark.parametrize("optimizer", TRANSFORMABLE)
@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_an_ensemble_under_vmap_equals_separate_runs(name, optimizer, options):
    members = [start(name, TRANSFORMABLE[optimizer], seed=i, key=i, **options) for i in range(3)]
    step = members[0][1]
    together = tree_stack([state for state, _ in members])
    many = torch.func.vmap(step, (0, None))
    separate = [state for state, _ in members]
    for n in range(4):
        together = many(together, batch_of(n))
        separate = [step(state, batch_of(n)) for state in separate]
    for i, state in enumerate(separate):
        close(tree_index(together, i), state)


def test_a_batch_for_each_member_under_vmap():
    state, step = start("mlp", pt.optim.adamw(0.01))
    batches = tree_stack([batch_of(n) for n in range(3)])
    together = torch.func.vmap(step, (None, 0))(state, batches)
    for i in range(3):
        close(tree_index(together, i), step(state, batch_of(i)))


def test_skipping_under_vmap_is_each_members_own_business():
    optimizer = pt.optim.adamw(0.1)
    state = pt.TrainState.create({"w": torch.ones(2)}, None, optimizer, key=pt.random.key(0))
    step = pt.train_step(
        lambda p, b, x, key: (p["w"] * x).sum(), optimizer, nonfinite="skip", draws=False
    )
    x = torch.tensor([[1.0, 2.0], [float("nan"), 2.0]])
    after = torch.func.vmap(step, (None, 0))(state, x)
    assert after.skipped.tolist() == [0, 1]
    assert after.updates.tolist() == [1, 0]
    assert torch.equal(after.params["w"][1], state.params["w"])
    close(after.params["w"][0], step(state, x[0]).params["w"])


def test_dropout_under_vmap_needs_to_be_told_about_randomness():
    """Torch's own error says how; with it, the draws follow from the keys."""
    state, step = start("dropout", pt.optim.sgd(0.1))
    many = tree_stack([state, state.replace(key=pt.random.key(1))])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(step, (0, None))(many, batch_of(0))

    def run(randomness):
        return torch.func.vmap(step, (0, None), randomness=randomness)(many, batch_of(0))

    generators = global_generators()
    different, same = run("different"), run("same")
    assert_generators_are(generators)
    assert tree_equal(run("different"), different)
    assert not torch.equal(*different.params["0.weight"])
    assert torch.equal(*same.params["0.weight"])
    other = many.replace(key=pt.random.split(pt.random.key(7)))
    again = torch.func.vmap(step, (0, None), randomness="different")(other, batch_of(0))
    assert not torch.equal(again.params["0.weight"], different.params["0.weight"])


def quadratic(params, buffers, batch, key):
    return ((params["w"] @ params["v"] - batch) ** 2).mean()


def after_steps(lr, make, count=4, **options):
    optimizer = make(lr)
    params = {
        "w": torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=torch.float64),
        "v": torch.tensor([0.5, 1.5], dtype=torch.float64),
    }
    state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
    step = pt.train_step(quadratic, optimizer, **options)
    for n in range(count):
        state = step(state, torch.tensor([1.0 + n, -1.0], dtype=torch.float64))
    return quadratic(state.params, None, torch.tensor([2.0, 1.0], dtype=torch.float64), None)


LR = torch.tensor(0.05, dtype=torch.float64)
DIFFERENTIABLE = {
    "sgd": lambda lr: pt.optim.sgd(lr, momentum=0.9, weight_decay=0.01),
    "adamw": pt.optim.adamw,
    "clipped": lambda lr: pt.optim.chain(pt.optim.clip_by_global_norm(0.5), pt.optim.sgd(lr)),
}


def slope(make, **options):
    """The derivative by central differences."""
    d = 1e-5
    above, below = (after_steps(LR + e, make, **options) for e in (d, -d))
    return (above - below) / (2 * d)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"nonfinite": "skip"}])
@pytest.mark.parametrize("make", DIFFERENTIABLE)
def test_the_derivative_by_the_learning_rate_through_steps(make, options):
    make = DIFFERENTIABLE[make]
    derivative, value = torch.func.grad_and_value(after_steps)(LR, make, **options)
    torch.testing.assert_close(value, after_steps(LR, make, **options))
    torch.testing.assert_close(derivative, slope(make, **options), rtol=1e-5, atol=1e-8)
    assert derivative != 0


@pytest.mark.parametrize("make", DIFFERENTIABLE)
def test_the_forward_derivative_is_the_same(make):
    make = DIFFERENTIABLE[make]
    _, forward = torch.func.jvp(lambda lr: after_steps(lr, make), (LR,), (torch.ones_like(LR),))
    backward = torch.func.grad(after_steps)(LR, make)
    torch.testing.assert_close(forward, backward)


def test_the_derivative_by_the_first_parameters_through_steps():
    optimizer = pt.optim.adam(0.1)
    step = pt.train_step(quadratic, optimizer, draws=False)
    batch = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def end(w):
        params = {"w": w, "v": torch.tensor([0.5, 1.5], dtype=torch.float64)}
        state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
        state = step(step(state, batch), batch)
        return state.metrics["loss"]

    w = torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=torch.float64)
    gradient = torch.func.grad(end)(w)
    for i in range(2):
        for j in range(2):
            d = torch.zeros_like(w)
            d[i, j] = 1e-6
            expected = (end(w + d) - end(w - d)) / 2e-6
            torch.testing.assert_close(gradient[i, j], expected, rtol=1e-5, atol=1e-8)


def test_a_sweep_of_learning_rates_is_a_vmap_of_a_gradient():
    rates = torch.tensor([0.01, 0.05, 0.1], dtype=torch.float64)
    sweep = torch.func.vmap(torch.func.grad(lambda lr: after_steps(lr, DIFFERENTIABLE["adamw"])))
    expected = [torch.func.grad(after_steps)(lr, DIFFERENTIABLE["adamw"]) for lr in rates]
    torch.testing.assert_close(sweep(rates), torch.stack(expected))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_equals_eager(backend, name, optimizer, steps=3, **options):
    state, step = start(name, optimizer, draws=False, **options)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    state = eager = step(state, batch_of(9))  # its metrics have names now: one compilation less
    for n in range(steps):
        state, eager = compiled(state, batch_of(n)), step(eager, batch_of(n))
    close(state, eager)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"nonfinite": "skip"}, {"precision": "bf16"}, {"precision": "16"}],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_equals_an_eager_one(options):
    compiled_equals_eager("eager", "batch norm", pt.optim.adamw(0.01), **options)


@pytest.mark.parametrize("optimizer", TRANSFORMABLE)
@pytest.mark.usefixtures("fresh_compiler")
def test_optimizers_compile_with_the_step(optimizer):
    compiled_equals_eager("aot_eager", "mlp", TRANSFORMABLE[optimizer])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_loss_that_returns_nothing_besides_compiles():
    optimizer = pt.optim.sgd(0.1)
    step = pt.train_step(
        lambda params, buffers, batch, key: (params["w"] * batch).sum(), optimizer, draws=False
    )
    state = pt.TrainState.create({"w": torch.ones(2)}, None, optimizer, key=pt.random.key(0))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert tree_equal(compiled(state, torch.ones(2)).params, step(state, torch.ones(2)).params)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_step_that_inductor_has_compiled():
    compiled_equals_eager("inductor", "mlp", pt.optim.adamw(0.01))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_ensemble():
    state, step = start("mlp", pt.optim.sgd(0.1, momentum=0.9), draws=False)
    many = tree_stack([state, state.replace(params=tree_map(lambda x: x + 1, state.params))])
    ensemble = torch.func.vmap(step, (0, None))
    close(
        torch.compile(ensemble, fullgraph=True, backend="eager")(many, batch_of(0)),
        ensemble(many, batch_of(0)),
    )


def test_what_cannot_be_transformed_says_so():
    state, step = start("mlp", pt.optim.sgd(0.1))
    _, raising = start("mlp", pt.optim.sgd(0.1), nonfinite="raise")
    foreign, foreign_step = start("mlp", pt.optim.from_torch(torch.optim.SGD, lr=0.1))

    def donating(state, batch):
        return step(state, batch, donate=True)

    for function, of, message in (
        (donating, state, "a state can't be donated inside a transform"),
        (raising, state, "nonfinite='raise' can't look at values inside a transform"),
        (foreign_step, foreign, r"torch\.optim\.SGD"),
    ):
        many = tree_stack([of, of])
        with pytest.raises(TransformError, match=message):
            torch.func.vmap(function, (0, None))(many, batch_of(0))

        def loss_after(params, function=function, of=of):
            return function(of.replace(params=params), batch_of(0)).metrics["loss"]

        with pytest.raises(TransformError, match=message):
            torch.func.grad(loss_after)(of.params)


@pytest.mark.parametrize(
    ("options", "donate", "message"),
    [
        ({}, False, r"TransformError.*puretrain\.compiled.*train_step\(\.\.\., draws=False\)"),
        ({"draws": False}, True, "TransformError.*a state can't be donated inside a transform"),
        ({"draws": False, "nonfinite": "raise"}, False, "TransformError.*use 'skip'"),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_what_cannot_be_compiled_says_so(options, donate, message):
    state, step = start("mlp", pt.optim.sgd(0.1), **options)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=message):
        compiled(state, batch_of(0), donate=donate)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_step_that_draws_runs_between_compiled_parts():
    """Without fullgraph the compiler leaves out what it can't do, the seeding among it."""
    state, step = start("dropout", pt.optim.sgd(0.1))
    compiled = torch.compile(step, backend="eager")
    generators = global_generators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler tells what it has left out
        after = compiled(compiled(state, batch_of(0)), batch_of(1))
    assert_generators_are(generators)
    close(after, step(step(state, batch_of(0)), batch_of(1)))


def test_steps_compose_as_functions():
    """A step of two models is two steps: what a GAN does, by hand."""
    first, step_a = start("mlp", pt.optim.adamw(0.01))
    second, step_b = start("dropout", pt.optim.sgd(0.1))

    def both(states, batch):
        return step_a(states[0], batch), step_b(states[1], batch)

    states = both(both((first, second), batch_of(0)), batch_of(1))
    assert tree_equal(states[0], step_a(step_a(first, batch_of(0)), batch_of(1)))
    assert tree_equal(states[1], step_b(step_b(second, batch_of(0)), batch_of(1)))


# ── 5 Effects at the edge ─────────────────────────────────────────────────────────────────────────


def run(*, reducers=(), observers=()):
    state, step = start("dropout", pt.optim.adamw(0.01), accumulate=2)
    source = pt.batches(DATA, 4, shuffle=True, seed=1)
    return pt.fit(state, step, source, epochs=2, reducers=reducers, observers=observers)


def test_observers_do_not_change_a_run(tmp_path):
    seen = []

    def draws(state, event):
        torch.rand(5)
        python_random.random()
        seen.append((event.kind, int(state.step)))

    kept = []

    def keeps(state, event):
        kept.append((state, pt.lease(state), tree_digest(state)))

    observers = [
        draws,
        keeps,
        pt.csv_log(tmp_path / "log.csv"),
        pt.jsonl_log(tmp_path / "log.jsonl"),
        pt.tensorboard(tmp_path / "board", every=2),
        pt.checkpoints(tmp_path / "checkpoints", every=2, keep=2),
    ]
    reducers = [pt.ema(0.9), pt.best_k("train/loss", 2)]
    silent = tree_digest(run(reducers=reducers))
    assert tree_digest(run(reducers=reducers, observers=observers)) == silent
    assert len(seen) == len(kept) > 12
    assert all(tree_digest(state) == digest for state, _, digest in kept)


def test_a_reducer_acts_on_the_state_alone():
    """Applied once more to the same state and event, it gives the same; and it changes neither."""
    calls = []

    def checked(reducer):
        def reduce(state, event):
            event = event._replace(donate=False)
            generators, before = global_generators(), tree_digest(state)
            once, twice = reducer.reduce(state, event), reducer.reduce(state, event)
            assert tree_equal(once, twice)
            assert tree_digest(state) == before
            assert_generators_are(generators)
            calls.append(reducer.name)
            return once

        return reducer._replace(reduce=reduce)

    reducers = [
        pt.ema(0.9),
        pt.swa(start_step=2),
        pt.early_stopping("train/loss", patience=3),
        pt.best_k("train/loss", 2),
        pt.nan_guard(),
    ]
    plain = run(reducers=reducers)
    assert tree_equal(run(reducers=[checked(reducer) for reducer in reducers]), plain)
    assert set(calls) == {reducer.name for reducer in reducers}


def test_what_a_reducer_remembers_of_the_parameters_stays():
    """A user's reducer that keeps the parameters, in the middle of a run that donates its state."""
    snapshots = {}

    def keep_best(state, event):
        if event.step == 3:
            snapshots["then"] = clone(state.params)
            return state.replace(reducers=state.reducers | {"best": state.params})
        return state

    end = run(reducers=[keep_best])
    assert tree_equal(end.reducers["best"], snapshots["then"])
    without = run()
    assert tree_equal(end.params, without.params)
    assert not tree_equal(end.params, snapshots["then"])


def test_leaves_of_a_state_are_tensors():
    """Whatever a run has put into it, it can be saved, moved and transformed."""
    state = run(reducers=[pt.ema(0.9), pt.best_k("train/loss", 2), pt.early_stopping("train/loss")])
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(state))
    assert isinstance(state.reducers, FrozenDict)
