"""Gradient transformations and what puts optimizers together: against torch run the usual way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puretrain import optim
from puretrain.errors import OptimizerError, PatternError
from puretrain.tree import FrozenDict, tree_digest, tree_equal, tree_leaves, tree_map, tree_stack

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = {"body.0.weight": (17, 5), "body.0.bias": (17,), "head.weight": (3, 17), "scale": ()}


def randoms(shapes=SHAPES, dtype=torch.float32, seed=0, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    return FrozenDict(
        {
            name: (factor * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for name, shape in shapes.items()
        }
    )


def gradients(count=12, dtype=torch.float32):
    """One tree for each step; 'scale' misses every third, the head has none at first."""
    trees = []
    for n in range(count):
        tree = dict(randoms(dtype=dtype, seed=n + 1, factor=3.0 ** (n % 4 - 2)))
        if n % 3 == 2:
            tree["scale"] = None
        if n < 4:
            tree["head.weight"] = None
        trees.append(FrozenDict(tree))
    return trees


def cloned(tree):
    return tree_map(torch.clone, tree)


def run(optimizer, params, trees, state=None, donate=False):
    params = cloned(params)
    state = optimizer.init(params) if state is None else state
    for tree in trees:
        params, state = optimizer.update(cloned(tree), state, params, donate=donate)
    return params, state


def run_torch(make, params, trees, before=lambda weights, n: None):
    """The usual way; ``before`` is called between the backward pass and the optimizer's step."""
    weights = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = make(weights)
    for n, tree in enumerate(trees):
        for name, weight in weights.items():
            weight.grad = None if tree[name] is None else tree[name].clone()
        before(weights, n)
        optimizer.step()
    return FrozenDict({name: weight.detach() for name, weight in weights.items()})


def transformed(transformation, grads, params, state=None, donate=False):
    state = transformation.init(params) if state is None else state
    return transformation.update(cloned(grads), state, params, donate=donate)


def as_parameters(grads):
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads.values() if g is not None]
    for weight, grad in zip(weights, (g for g in grads.values() if g is not None), strict=True):
        weight.grad = grad.clone()
    return weights


def slopes_of(weights, like):
    slopes = iter([weight.grad for weight in weights])
    return FrozenDict({k: None if g is None else next(slopes) for k, g in like.items()})


# ── Transformations ───────────────────────────────────────────────────────────────────────────────

TRANSFORMATIONS = {
    "clip_by_global_norm": (optim.clip_by_global_norm, 0.5),
    "clip_by_value": (optim.clip_by_value, 0.3),
    "add_decayed_weights": (optim.add_decayed_weights, 0.1),
    "scale": (optim.scale, -0.7),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [0.0, 0.01, 1.0, 1e6])
def test_clipping_equals_torch_to_the_bit(dtype, limit):
    params = randoms(dtype=dtype)
    for grads in gradients(dtype=dtype):
        by_norm, by_value = as_parameters(grads), as_parameters(grads)
        norm = torch.nn.utils.clip_grad_norm_(by_norm, limit)
        torch.nn.utils.clip_grad_value_(by_value, limit)
        for donate in (False, True):
            ours, _ = transformed(optim.clip_by_global_norm(limit), grads, params, donate=donate)
            assert tree_equal(ours, slopes_of(by_norm, grads))
            ours, _ = transformed(optim.clip_by_value(limit), grads, params, donate=donate)
            assert tree_equal(ours, slopes_of(by_value, grads))
        assert tree_equal(optim.global_norm(grads), norm)


def test_clipping_gradients_of_several_dtypes_equals_torch():
    grads = FrozenDict(a=torch.randn(9), b=torch.randn(9).double(), c=torch.randn(9).bfloat16())
    weights = as_parameters(grads)
    norm = torch.nn.utils.clip_grad_norm_(weights, 0.5)
    for donate in (False, True):
        ours, _ = transformed(optim.clip_by_global_norm(0.5), grads, grads, donate=donate)
        assert tree_equal(ours, slopes_of(weights, grads))
    assert tree_equal(optim.global_norm(grads), norm)


def test_a_norm_that_is_not_finite_is_not_hidden():
    params = FrozenDict(w=torch.zeros(2))
    for bad in (math.nan, math.inf):
        grads = FrozenDict(w=torch.tensor([bad, 1.0]))
        weights = as_parameters(grads)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        ours = transformed(optim.clip_by_global_norm(1.0), grads, params)[0]
        assert tree_equal(ours, slopes_of(weights, grads))
        assert ours["w"].isnan().any()


@given(
    limit=st.floats(1e-3, 1e3),
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
)
def test_a_clipped_norm_is_at_most_the_limit(limit, values):
    grads = FrozenDict(w=torch.tensor(values, dtype=torch.float64))
    clipped = transformed(optim.clip_by_global_norm(limit), grads, grads)[0]
    before, after = float(optim.global_norm(grads)), float(optim.global_norm(clipped))
    assert after <= limit * (1 + 1e-12)
    if before <= limit - 1e-5:
        assert tree_equal(clipped, grads)


def test_without_gradients_there_is_nothing_to_do():
    params = randoms()
    none = FrozenDict(dict.fromkeys(params))
    for make, value in TRANSFORMATIONS.values():
        assert tree_equal(transformed(make(value), none, params)[0], none)
    assert float(optim.global_norm(none)) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decay_and_scale_equal_torch_to_the_bit(dtype):
    params, trees = randoms(dtype=dtype), gradients(dtype=dtype)
    ours = optim.chain(optim.add_decayed_weights(0.1), optim.sgd(0.2, fused=False))
    expected = run_torch(
        lambda weights: torch.optim.SGD(weights.values(), lr=0.2, weight_decay=0.1), params, trees
    )
    assert tree_equal(run(ours, params, trees)[0], expected)
    assert tree_equal(run(ours, params, trees, donate=True)[0], expected)

    ours = optim.chain(optim.scale(-0.7), optim.adamw(0.01))

    def scale(weights, n):
        for weight in weights.values():
            if weight.grad is not None:
                weight.grad.mul_(-0.7)

    expected = run_torch(
        lambda weights: torch.optim.AdamW(weights.values(), lr=0.01, fused=True),
        params,
        trees,
        scale,
    )
    assert tree_equal(run(ours, params, trees)[0], expected)
    assert tree_equal(run(ours, params, trees, donate=True)[0], expected)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_is_pure(name):
    make, value = TRANSFORMATIONS[name]
    params, grads = randoms(), gradients()[5]
    for transformation in (make(value), make(lambda n: value / (n + 1))):
        state = transformation.init(params)
        before = tree_digest((params, grads, state))
        first = transformation.update(grads, state, params)
        assert tree_equal(transformation.update(grads, state, params), first)
        assert tree_digest((params, grads, state)) == before
        old = {leaf.data_ptr() for leaf in tree_leaves((params, grads, state))}
        assert not old & {leaf.data_ptr() for leaf in tree_leaves(first)}
        given_grads = cloned(grads)
        donated = transformation.update(given_grads, cloned(state), params, donate=True)
        assert tree_equal(donated, first)
        for old_leaf, new_leaf in zip(
            tree_leaves(given_grads), tree_leaves(donated[0]), strict=True
        ):
            assert old_leaf.data_ptr() == new_leaf.data_ptr()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_follows_a_schedule(name):
    make, value = TRANSFORMATIONS[name]
    params = randoms()
    scheduled = make(lambda n: value * (n + 1))
    state = scheduled.init(params)
    for n, grads in enumerate(gradients(5)):
        ours, state = scheduled.update(grads, state, params)
        assert tree_equal(ours, transformed(make(value * (n + 1)), grads, params)[0])
    assert int(state.count) == 5


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_tensor_is_as_good_as_a_number(name):
    make, value = TRANSFORMATIONS[name]
    params, grads = randoms(), gradients()[5]
    expected = transformed(make(value), grads, params)[0]
    tensor = torch.tensor(value, dtype=torch.float64)
    assert tree_equal(transformed(make(tensor), grads, params)[0], expected)
    (argument,) = {"max_norm", "max_value", "weight_decay", "factor"} & set(
        make.__code__.co_varnames[: make.__code__.co_argcount]
    )
    injected = optim.inject_hyperparams(make)(**{argument: value})
    assert isinstance(injected, optim.GradientTransformation)
    assert tree_equal(transformed(injected, grads, params)[0], expected)
    with pytest.raises(OptimizerError, match=rf"^{name}: {argument} requires grad"):
        transformed(make(torch.tensor(0.5, requires_grad=True)), grads, params)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_under_vmap_and_grad(name):
    make, value = TRANSFORMATIONS[name]
    members = [randoms(dtype=torch.float64, seed=seed) for seed in range(3)]
    series = [gradients(dtype=torch.float64)[5 + 3 * seed] for seed in range(3)]
    transformation = make(optim.linear(value, 0.5 * value, 10))
    state = transformation.init(members[0])
    stacked = torch.func.vmap(transformation.update, (0, None, 0))(
        tree_stack(series), state, tree_stack(members)
    )
    for i, (params, grads) in enumerate(zip(members, series, strict=True)):
        alone = transformation.update(grads, state, params)
        for key, grad in alone[0].items():
            if grad is not None:
                torch.testing.assert_close(stacked[0][key][i], grad, rtol=1e-14, atol=1e-14)
    assert stacked[1].count.tolist() == [1, 1, 1]

    params, grads = members[0], series[0]

    def total(number):
        leaves = tree_leaves(make(number).update(grads, (), params)[0])
        return sum((leaf**2).sum() for leaf in leaves)

    number = torch.tensor(value, dtype=torch.float64)
    slope = torch.func.grad(total)(number)
    finite = (total(number + 1e-6) - total(number - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, finite, rtol=1e-6, atol=1e-8)


# ── chain ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_chain_equals_torch_to_the_bit():
    params, trees = randoms(), gradients()
    ours = optim.chain(
        optim.clip_by_value(0.4), optim.clip_by_global_norm(0.5), optim.adamw(0.01, amsgrad=True)
    )

    def clip(weights, n):
        torch.nn.utils.clip_grad_value_(weights.values(), 0.4)
        torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)

    expected = run_torch(
        lambda w: torch.optim.AdamW(w.values(), lr=0.01, amsgrad=True, fused=True),
        params,
        trees,
        clip,
    )
    pure, state = run(ours, params, trees)
    assert tree_equal(pure, expected)
    assert tree_equal(run(ours, params, trees, donate=True), (pure, state))
    assert isinstance(ours, optim.Optimizer)


def test_a_chain_of_transformations_is_one():
    inner = optim.chain(optim.scale(2.0), optim.clip_by_global_norm(1.0))
    assert isinstance(inner, optim.GradientTransformation)
    params, trees = randoms(), gradients()
    nested = run(optim.chain(inner, optim.sgd(0.1)), params, trees)[0]
    flat = optim.chain(optim.scale(2.0), optim.clip_by_global_norm(1.0), optim.sgd(0.1))
    assert tree_equal(nested, run(flat, params, trees)[0])
    alone = optim.chain(optim.sgd(0.1))
    assert tree_equal(run(alone, params, trees)[0], run(optim.sgd(0.1), params, trees)[0])


def test_what_can_not_be_chained_is_named():
    with pytest.raises(OptimizerError, match=r"^chain: there are no parts"):
        optim.chain()
    with pytest.raises(
        OptimizerError, match=r"^chain: part 1 is 0\.1; the parts are gradient tran"
    ):
        optim.chain(optim.scale(1.0), 0.1)
    with pytest.raises(OptimizerError, match=r"^chain: part 0 is an optimizer, .* put it last"):
        optim.chain(optim.sgd(0.1), optim.scale(1.0))
    params = randoms()
    chain = optim.chain(optim.scale(1.0), optim.sgd(0.1))
    with pytest.raises(OptimizerError, match=r"^chain: the state is one of 1 parts, not of 2"):
        chain.update(params, ((),), params)
    with pytest.raises(OptimizerError, match=r"^chain: the state is one of SGDState, not of 2"):
        chain.update(params, optim.sgd(0.1).init(params), params)


# ── Groups of parameters ──────────────────────────────────────────────────────────────────────────


def test_multi_transform_equals_torchs_parameter_groups():
    params, trees = randoms(), gradients()
    ours = optim.multi_transform(
        {
            "**.bias": optim.adamw(0.01, weight_decay=0.0),
            "head.**": optim.adamw(0.1, betas=(0.8, 0.9)),
            "**": optim.adamw(0.01),
        }
    )

    def groups(w):
        return torch.optim.AdamW(
            [
                {"params": [w["body.0.bias"]], "weight_decay": 0.0},
                {"params": [w["head.weight"]], "lr": 0.1, "betas": (0.8, 0.9)},
                {"params": [w["body.0.weight"], w["scale"]]},
            ],
            lr=0.01,
            fused=True,
        )

    expected = run_torch(groups, params, trees)
    pure, state = run(ours, params, trees)
    assert tree_equal(pure, expected)
    assert tree_equal(run(ours, params, trees, donate=True), (pure, state))
    assert list(state) == ["**.bias", "head.**", "**"]
    assert list(pure) == list(params)


def test_multi_transform_of_different_optimizers():
    shapes = {"embedding": (7, 4), "layers.0.weight": (4, 4), "layers.0.bias": (4,)}
    params = randoms(shapes)
    trees = [randoms(shapes, seed=n) for n in range(1, 8)]
    ours = optim.multi_transform({"layers.**.weight": optim.muon(0.02), "**": optim.adamw(1e-3)})
    pure = run(ours, params, trees)[0]
    for names, make in (
        (("layers.0.weight",), lambda w: torch.optim.Muon(w.values(), lr=0.02)),
        (("embedding", "layers.0.bias"), lambda w: torch.optim.AdamW(w.values(), fused=True)),
    ):
        part = FrozenDict({name: params[name] for name in names})
        expected = run_torch(make, part, trees)
        assert tree_equal(FrozenDict({name: pure[name] for name in names}), expected)


@pytest.mark.parametrize("donate", [False, True])
def test_a_frozen_group_stays_and_needs_no_state(donate):
    params, trees = randoms(), gradients()
    small = FrozenDict({k: p for k, p in params.items() if not k.startswith("body")})
    expected = run(optim.adamw(0.1), small, [FrozenDict({k: t[k] for k in small}) for t in trees])
    for ours in (
        optim.multi_transform({"body.**": None, "**": optim.adamw(0.1)}),
        optim.masked(optim.adamw(0.1), lambda path: not path[0].startswith("body")),
        optim.masked(optim.adamw(0.1), ["head.*", "scale"]),
        optim.masked(optim.adamw(0.1), (pattern for pattern in ("head.*", "scale"))),
        optim.chain(optim.freeze("body.**"), optim.adamw(0.1)),
        optim.chain(optim.freeze(lambda path: path[0].startswith("body")), optim.adamw(0.1)),
    ):
        pure, state = run(ours, params, trees, donate=donate)
        assert tree_equal(pure, params | expected[0])
        assert pure["body.0.bias"].data_ptr() != params["body.0.bias"].data_ptr()
    state = optim.multi_transform({"body.**": None, "**": optim.adamw(0.1)}).init(params)
    assert state["body.**"] == ()
    assert len(tree_leaves(state)) == len(tree_leaves(optim.adamw().init(small)))


def test_multi_transform_of_transformations():
    params, grads = randoms(), gradients()[5]
    ours = optim.multi_transform({"head.**": optim.scale(2.0), "scale": None, "**": optim.scale(0)})
    assert isinstance(ours, optim.GradientTransformation)
    new = transformed(ours, grads, params)[0]
    assert tree_equal(new["head.weight"], 2 * grads["head.weight"])
    assert new["scale"] is grads["scale"] is None
    assert not new["body.0.weight"].any()


def test_a_masked_transformation_lets_the_other_gradients_pass():
    params, grads = randoms(), gradients()[4]
    for mask in ("**.bias", ["**.bias"], lambda path: path[-1].endswith("bias")):
        new = transformed(optim.masked(optim.scale(2.0), mask), grads, params)[0]
        decayed = transformed(optim.add_decayed_weights(0.1, mask), grads, params)[0]
        for name, grad in grads.items():
            bias = name.endswith("bias")
            assert tree_equal(new[name], 2 * grad if bias else grad)
            expected = grad.add(params[name], alpha=0.1) if bias else grad
            assert tree_equal(decayed[name], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.masked(optim.adamw(0.1), "**weight"),
        lambda: optim.multi_transform({"**weight": optim.adamw(0.1), "**": None}),
        lambda: optim.multi_transform({"**weight": optim.adamw(0.1), "**": optim.sgd(0.1)}),
        lambda: optim.apply_every(2, optim.adamw(0.1)),
        lambda: optim.chain(optim.freeze("head.**"), optim.adamw(0.1)),
        lambda: optim.inject_hyperparams(optim.adamw)(lr=0.1, weight_decay=optim.linear(0, 1, 9)),
    ],
    ids=["masked", "multi None", "multi", "apply_every", "freeze", "inject"],
)
def test_what_is_put_together_is_pure(make):
    optimizer = make()
    params, state = run(optimizer, randoms(), gradients(3))
    for grads in gradients()[8:10]:
        before = tree_digest((params, state, grads))
        first = optimizer.update(grads, state, params)
        assert tree_equal(optimizer.update(grads, state, params), first)
        assert tree_digest((params, state, grads)) == before
        old = {leaf.data_ptr() for leaf in tree_leaves((params, state, grads))}
        assert not old & {leaf.data_ptr() for leaf in tree_leaves(first)}
        donated = optimizer.update(*cloned((grads, state, params)), donate=True)
        assert tree_equal(donated, first)
        params, state = first


def test_groups_under_vmap():
    ours = optim.multi_transform(
        {"head.**": optim.adamw(0.1), "scale": None, "**": optim.masked(optim.sgd(0.1), "**bias")}
    )
    members = [randoms(dtype=torch.float64, seed=seed) for seed in range(2)]
    trees = [gradients(dtype=torch.float64)[9 + seed] for seed in range(2)]
    states = [ours.init(params) for params in members]
    stacked = torch.func.vmap(ours.update)(*map(tree_stack, (trees, states, members)))
    results = [ours.update(*x) for x in zip(trees, states, members, strict=True)]
    for a, b in zip(tree_leaves(stacked), tree_leaves(tree_stack(results)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bad_groups_are_named():
    params = randoms()
    with pytest.raises(OptimizerError, match=r"^multi_transform: .* there are none$"):
        optim.multi_transform({})
    with pytest.raises(OptimizerError, match=r"^multi_transform: .* there are none$"):
        optim.multi_transform({"**": None})
    with pytest.raises(OptimizerError, match=r"^multi_transform: .* give None for what is not to"):
        optim.multi_transform({"head.**": optim.freeze(), "**": optim.sgd(0.1)})
    with pytest.raises(OptimizerError, match=r"^multi_transform takes optimizers and .* not 0\.1"):
        optim.multi_transform({"**": 0.1})
    with pytest.raises(
        OptimizerError, match=r"nothing is left for 'head\.\*': .* narrower pattern"
    ):
        optim.multi_transform({"**": optim.sgd(0.1), "head.*": optim.sgd(0.2)}).init(params)
    with pytest.raises(OptimizerError, match=r"no pattern matches body.0.weight, .*add '\*\*'"):
        optim.multi_transform({"**bias": optim.sgd(0.1)}).init(params)
    for bad in (
        optim.multi_transform({"tail.*": optim.sgd(0.1), "**": optim.sgd(0.2)}),
        optim.masked(optim.sgd(0.1), "tail.*"),
        optim.freeze("tail.*"),
        optim.add_decayed_weights(0.1, ["**bias", "tail.*"]),
    ):
        with pytest.raises(
            PatternError, match=r"the pattern 'tail\.\*' matches no leaf; there are:"
        ):
            bad.init(params)
    groups = optim.multi_transform({"**bias": optim.sgd(0.1), "**": optim.sgd(0.2)})
    with pytest.raises(
        OptimizerError, match=r"^multi_transform: the state is not one of the group"
    ):
        groups.update(params, optim.sgd(0.1).init(params), params)
    with pytest.raises(OptimizerError, match=r"^masked takes optimizers .* not 'adamw'$"):
        optim.masked("adamw", "**")
    fewer = FrozenDict(scale=params["scale"])
    for optimizer in (
        groups,
        optim.masked(optim.sgd(0.1), "**bias"),
        optim.freeze(),
        optim.scale(1.0),
        optim.apply_every(2, optim.sgd(0.1)),
    ):
        with pytest.raises(
            OptimizerError, match=r"^\w+: the gradients do not fit the parameters: "
        ):
            optimizer.update(fewer, optimizer.init(params), params)


# ── apply_every ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("inner", "torch_class", "more"),
    [
        (optim.adamw(0.01), torch.optim.AdamW, {"lr": 0.01, "fused": True}),
        (
            optim.sgd(0.1, momentum=0.9, weight_decay=0.1, fused=False),
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_apply_every_equals_torch_with_accumulated_gradients(k, mean, inner, torch_class, more):
    params, trees = randoms(), gradients(12)
    trees = [tree | {"body.0.bias": torch.full((17,), -0.0)} for tree in trees]
    weights = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    raw = torch_class(weights.values(), **more)
    ours = optim.apply_every(k, inner)
    ours = optim.apply_every(k, inner, mean=True) if mean else ours
    pure, state = cloned(params), ours.init(params)
    donated, donated_state = cloned(params), ours.init(params)
    for n, tree in enumerate(trees, start=1):
        for name, grad in tree.items():
            if grad is not None:
                weight = weights[name]
                weight.grad = grad.clone() if weight.grad is None else weight.grad + grad
        if n % k == 0:
            for weight in weights.values():
                if mean and weight.grad is not None:
                    weight.grad /= k
            raw.step()
            raw.zero_grad()
        pure, state = ours.update(cloned(tree), state, pure)
        donated, donated_state = ours.update(cloned(tree), donated_state, donated, donate=True)
        expected = FrozenDict({name: weight.detach() for name, weight in weights.items()})
        assert tree_equal(pure, expected)
        assert tree_equal(donated, expected)
        assert tree_equal(donated_state, state)
        assert int(state.count) == n % k
    assert int(state.inner.count) == len(trees) // k


def test_apply_every_under_vmap():
    ours = optim.apply_every(2, optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1)))
    members = [randoms(dtype=torch.float64, seed=seed) for seed in range(2)]
    states = [ours.init(params) for params in members]
    states[1] = states[1].replace(count=states[1].count + 1)  # it is one update ahead
    stacked, stacked_states = tree_stack(members), tree_stack(states)
    for n in range(4):
        trees = [randoms(dtype=torch.float64, seed=10 + n + 10 * i) for i in range(2)]
        stacked, stacked_states = torch.func.vmap(ours.update)(
            tree_stack(trees), stacked_states, stacked
        )
        results = [ours.update(*x) for x in zip(trees, states, members, strict=True)]
        members, states = [r[0] for r in results], [r[1] for r in results]
        pairs = zip(
            tree_leaves((stacked, stacked_states)),
            tree_leaves((tree_stack(members), tree_stack(states))),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_bad_accumulation_is_named():
    for k in (0, -1, 1.5, True):
        with pytest.raises(OptimizerError, match=r"^apply_every: k is a whole number from 1, not"):
            optim.apply_every(k, optim.sgd(0.1))
    with pytest.raises(OptimizerError, match=r"^apply_every: it takes an optimizer, or a chain"):
        optim.apply_every(2, optim.scale(1.0))
    params = randoms()
    ours = optim.apply_every(2, optim.sgd(0.1))
    for state in (optim.sgd(0.1).init(params), ours.init({"w": torch.ones(1)}), ()):
        with pytest.raises(OptimizerError, match=r"^apply_every: the state, of type \w+, does not"):
            ours.update(params, state, params)


# ── Hyper-parameters in the state ─────────────────────────────────────────────────────────────────


def test_hyperparameters_can_be_read_and_set():
    params, trees = randoms(), gradients()
    ours = optim.inject_hyperparams(optim.adamw)(lr=0.1, betas=(0.8, 0.99), weight_decay=0)
    state = ours.init(params)
    values = optim.get_hyperparams(state)
    assert {k: v.item() for k, v in values.items()} == {
        "lr": 0.1,
        "betas.0": 0.8,
        "betas.1": 0.99,
        "weight_decay": 0.0,
    }
    assert all(v.dtype == torch.float64 and v.shape == () for v in values.values())

    params, state = run(ours, params, trees[:6], state)
    before = tree_digest(state)
    changed = optim.set_hyperparams(state, lr=0.01, **{"betas.0": torch.tensor(0.5)})
    assert tree_digest(state) == before
    assert optim.get_hyperparams(changed)["lr"].item() == 0.01
    later = run(ours, params, trees[6:], changed)[0]

    # The same in torch: change its groups in the middle
    def change(weights, n):
        if n == 6:
            optimizer.param_groups[0].update(lr=0.01, betas=(0.5, 0.99))

    def make(weights):
        nonlocal optimizer
        optimizer = torch.optim.AdamW(
            weights.values(), lr=0.1, betas=(0.8, 0.99), weight_decay=0.0, fused=True
        )
        return optimizer

    optimizer = None
    assert tree_equal(later, run_torch(make, randoms(), trees, change))


def test_the_state_shows_what_a_schedule_gave():
    params = randoms()
    schedule = optim.linear(1.0, 0.0, 10)
    ours = optim.inject_hyperparams(optim.sgd)(lr=schedule, momentum=0.9)
    state = ours.init(params)
    for n, grads in enumerate(gradients(4)):
        assert optim.get_hyperparams(state)["lr"].item() == schedule(max(n - 1, 0))
        params, state = ours.update(grads, state, params)
    assert int(state.count) == 4
    assert tree_equal(params, run(optim.sgd(schedule, 0.9), randoms(), gradients(4))[0])
    with pytest.raises(
        OptimizerError, match=r"^lr follows a schedule, .* give .* a number instead"
    ):
        optim.set_hyperparams(state, lr=0.1)
    assert optim.get_hyperparams(optim.set_hyperparams(state, momentum=0.1))["momentum"] == 0.1


def test_places_of_hyperparameters():
    params = randoms()
    make = optim.inject_hyperparams(optim.sgd)
    groups = optim.chain(
        optim.inject_hyperparams(optim.clip_by_global_norm)(max_norm=1.0),
        optim.multi_transform({"head.**": make(lr=0.1), "**": make(lr=0.2)}),
    )
    state = groups.init(params)
    assert {k: v.item() for k, v in optim.get_hyperparams(state).items()} == {
        "0/max_norm": 1.0,
        "1/head.**/lr": 0.1,
        "1/**/lr": 0.2,
    }
    one = optim.set_hyperparams(state, **{"1/**/lr": 0.5})
    assert [v.item() for v in optim.get_hyperparams(one).values()] == [1.0, 0.1, 0.5]
    both = optim.set_hyperparams(state, lr=0.5)
    assert [v.item() for v in optim.get_hyperparams(both).values()] == [1.0, 0.5, 0.5]
    assert type(both) is type(state)

    within = optim.apply_every(2, make(lr=0.1))
    assert list(optim.get_hyperparams(within.init(params))) == ["lr"]
    twice = optim.inject_hyperparams(lambda outer: make(lr=0.1))(outer=3.0)
    assert list(optim.get_hyperparams(twice.init(params))) == ["outer", "inner/lr"]
    new = optim.set_hyperparams(twice.init(params), **{"inner/lr": 0.3})
    assert run(twice, params, gradients(1), new)[1].inner.hyperparams["lr"].item() == 0.3
    assert optim.get_hyperparams(optim.sgd(0.1).init(params)) == {}


def test_one_state_for_each_of_several_hyperparameters():
    params, trees = randoms(dtype=torch.float64), gradients(6, torch.float64)
    ours = optim.inject_hyperparams(optim.sgd)(lr=0.1, momentum=0.9)
    start = ours.init(params)
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    momenta = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)

    def train(lr, momentum):
        state = optim.set_hyperparams(start, lr=lr, momentum=momentum)
        weights = params
        for grads in trees:
            weights, state = ours.update(grads, state, weights)
        return weights

    members = torch.func.vmap(train)(rates, momenta)
    for i, (lr, momentum) in enumerate(zip(rates.tolist(), momenta.tolist(), strict=True)):
        for name, leaf in run(optim.sgd(lr, momentum), params, trees)[0].items():
            torch.testing.assert_close(members[name][i], leaf, rtol=1e-12, atol=1e-12)

    # Sweeping them a second time: values of the shape that is there
    states = torch.func.vmap(lambda lr: optim.set_hyperparams(start, lr=lr))(rates)
    assert tree_equal(
        optim.get_hyperparams(optim.set_hyperparams(states, lr=rates * 2))["lr"], rates * 2
    )
    assert optim.get_hyperparams(optim.set_hyperparams(states, lr=0.5))["lr"].tolist() == [0.5] * 3


def test_bad_hyperparameters_are_named():
    params = randoms()
    make = optim.inject_hyperparams(optim.sgd)
    with pytest.raises(OptimizerError, match=r"^sgd: give the injected hyper-parameters by name$"):
        make(0.1)
    with pytest.raises(OptimizerError, match=r"^sgd: there is no hyper-parameter .* \(nesterov\)"):
        make(nesterov=False)
    with pytest.raises(OptimizerError, match=r"^sgd: there is no .* \(none are given\)"):
        make()
    with pytest.raises(OptimizerError, match=r"^sgd: lr must be finite and at least 0, not -0\.1"):
        make(lr=-0.1)
    ours = make(lr=0.1)
    state = ours.init(params)
    with pytest.raises(
        OptimizerError, match=r"holds no hyper-parameter 'rate'; it holds: lr\. Make"
    ):
        optim.set_hyperparams(state, rate=0.1)
    with pytest.raises(OptimizerError, match=r"holds no hyper-parameter 'lr'; it holds: none"):
        optim.set_hyperparams(optim.sgd(0.1).init(params), lr=0.1)
    with pytest.raises(OptimizerError, match=r"lr has shape \(\), not \(2,\); .* torch.func.vmap"):
        optim.set_hyperparams(state, lr=torch.ones(2))
    with pytest.raises(OptimizerError, match=r"^set_hyperparams: lr is a number, not 'slow'$"):
        optim.set_hyperparams(state, lr="slow")
    negative = optim.set_hyperparams(state, lr=-1.0)
    with pytest.raises(OptimizerError, match=r"^sgd: lr must be finite and at least 0, not -1\.0$"):
        ours.update(params, negative, params)
    with pytest.raises(
        OptimizerError, match=r"^sgd: the state is of type SGDState and does not hol"
    ):
        ours.update(params, optim.sgd(0.1).init(params), params)


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_bad_number_is_named(name):
    make, _ = TRANSFORMATIONS[name]
    for bad, what in ((math.nan, "nan"), (math.inf, "inf")):
        with pytest.raises(OptimizerError, match=rf"^{name}: \w+ must be finite.*, not {what}$"):
            make(bad)
    with pytest.raises(OptimizerError, match=rf"^{name}: \w+ is a number, not None$"):
        make(None)
    if name != "scale":
        with pytest.raises(
            OptimizerError, match=rf"^{name}: \w+ must be finite and at least 0, no"
        ):
            make(-1.0)
    params = randoms()
    with pytest.raises(
        OptimizerError, match=rf"^{name}: the state is of type tuple; make one with"
    ):
        make(lambda n: 1.0).update(params, (), params)
    with pytest.raises(
        OptimizerError, match=rf"^{name}: the state is of type CountState; make one"
    ):
        make(1.0).update(params, make(lambda n: 1.0).init(params), params)
