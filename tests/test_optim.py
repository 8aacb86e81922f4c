"""Optimizers: each against torch's own class to the bit, or else against its paper."""

import math
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from puretrain import optim
from puretrain.errors import DonatedStateError, OptimizerError
from puretrain.tree import (
    FrozenDict,
    invalidate,
    tree_digest,
    tree_equal,
    tree_leaves,
    tree_map,
    tree_stack,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = {
    "encoder.weight": (17, 9),
    "encoder.bias": (17,),
    "transposed": (5, 3),
    "scale": (),
    "late.weight": (2, 5),
    "frozen": (4, 4),
}


class Case(NamedTuple):
    """An optimizer, torch's class for the same, and how that is told to compute it as ours does."""

    make: Any
    torch_class: Any
    hyperparameters: dict[str, Any]
    torch_only: Any = MappingProxyType({})
    ours_only: Any = MappingProxyType({})


FUSED = {"fused": True}
UNFUSED = {"fused": False}

CASES = [
    Case(optim.sgd, torch.optim.SGD, {"lr": 0.1}, FUSED),
    Case(optim.sgd, torch.optim.SGD, {"lr": 0.1}, {}, UNFUSED),
    Case(optim.sgd, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, FUSED),
    Case(optim.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, FUSED),
    Case(optim.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {}, UNFUSED),
    Case(
        optim.sgd,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        FUSED,
    ),
    Case(
        optim.sgd,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {},
        UNFUSED,
    ),
    Case(optim.adam, torch.optim.Adam, {}, FUSED),
    Case(optim.adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9)}, {}, UNFUSED),
    Case(optim.adam, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}, FUSED),
    Case(optim.adam, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}, {}, UNFUSED),
    Case(
        optim.adam,
        torch.optim.Adam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        FUSED,
    ),
    Case(optim.adamw, torch.optim.AdamW, {}, FUSED),
    Case(optim.adamw, torch.optim.AdamW, {}, {}, UNFUSED),
    Case(optim.adamw, torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-3}, FUSED),
    Case(optim.adamw, torch.optim.AdamW, {"amsgrad": True, "maximize": True}, FUSED),
    Case(optim.adamw, torch.optim.AdamW, {"amsgrad": True, "maximize": True}, {}, UNFUSED),
    Case(optim.adamax, torch.optim.Adamax, {}),
    Case(optim.adamax, torch.optim.Adamax, {"weight_decay": 0.1, "maximize": True}),
    Case(optim.nadam, torch.optim.NAdam, {}),
    Case(optim.nadam, torch.optim.NAdam, {"weight_decay": 0.1, "momentum_decay": 0.1}),
    Case(
        optim.nadam,
        torch.optim.NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    Case(optim.radam, torch.optim.RAdam, {}),
    Case(optim.radam, torch.optim.RAdam, {"betas": (0.9, 0.8), "weight_decay": 0.1}),
    Case(
        optim.radam,
        torch.optim.RAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    Case(optim.rmsprop, torch.optim.RMSprop, {}),
    Case(optim.rmsprop, torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}),
    Case(optim.rmsprop, torch.optim.RMSprop, {"centered": True, "maximize": True, "alpha": 0.9}),
    Case(optim.rmsprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    Case(optim.adagrad, torch.optim.Adagrad, {"lr": 0.1}, FUSED),
    Case(optim.adagrad, torch.optim.Adagrad, {"lr": 0.1}, {}, UNFUSED),
    Case(
        optim.adagrad,
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1, "maximize": True},
        FUSED,
    ),
    Case(optim.adadelta, torch.optim.Adadelta, {}),
    Case(optim.adadelta, torch.optim.Adadelta, {"rho": 0.5, "weight_decay": 0.1, "maximize": True}),
    Case(optim.muon, torch.optim.Muon, {"lr": 0.02}),
    Case(optim.muon, torch.optim.Muon, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    Case(
        optim.muon,
        torch.optim.Muon,
        {"weight_decay": 0.0, "ns_steps": 2, "ns_coefficients": (3.0, -4.0, 2.0), "momentum": 0.5},
    ),
]
WITHOUT_TORCH = [
    Case(optim.lion, None, {"lr": 0.01}),
    Case(optim.lion, None, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    Case(optim.lion, None, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case(optim.lamb, None, {"lr": 0.01}),
    Case(optim.lamb, None, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    Case(optim.lamb, None, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
]
EVERY = CASES + WITHOUT_TORCH
FIRST = list({case.make: case for case in reversed(EVERY)}.values())  # one of each


def names(cases):
    return [f"{case.make.__name__} {i}" for i, case in enumerate(cases)]


def made(case, **more):
    return case.make(**{**case.hyperparameters, **case.ours_only, **more})


def parameters(case, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in SHAPES.items():
        if len(shape) == 2 or case.make is not optim.muon:
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            params[name] = value.t().contiguous().t() if name == "transposed" else value
    return FrozenDict(params)


def gradients(params, count=50, seed=1):
    """One tree for each step; 'frozen' has none, 'late' not at first, 'transposed' often none."""
    generator = torch.Generator().manual_seed(seed)
    trees = []
    for n in range(count):
        tree = {}
        for name, p in params.items():
            value = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            tree[name] = torch.empty_like(p).copy_(value)  # laid out as autograd does
        tree["frozen"] = None
        if n < 5:
            tree["late.weight"] = None
        if n % 4 == 3:
            tree["transposed"] = None
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


def run_torch(case, params, trees, schedule=None, **more):
    """The same the usual way: the parameters and the optimizer object after the last step."""
    weights = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    # A group for each: torch's fused SGD can't begin with a momentum for some of a group.
    groups = [{"params": [weight]} for weight in weights.values()]
    hyperparameters = {**case.hyperparameters, **case.torch_only, **more}
    optimizer = case.torch_class(groups, **hyperparameters)
    for n, tree in enumerate(trees):
        for name, weight in weights.items():
            weight.grad = None if tree[name] is None else tree[name].clone()
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(n)
        optimizer.step()
    held = {name: optimizer.state[weight] for name, weight in weights.items()}
    return FrozenDict({name: weight.detach() for name, weight in weights.items()}), held


# ── Against torch ─────────────────────────────────────────────────────────────────────────────────


def test_no_class_of_torch_is_forgotten():
    elsewhere = {  # reached through from_torch
        torch.optim.Adafactor,
        torch.optim.ASGD,
        torch.optim.LBFGS,
        torch.optim.Optimizer,
        torch.optim.Rprop,
        torch.optim.SparseAdam,
    }
    every = {c for c in vars(torch.optim).values() if isinstance(c, type)}
    every = {c for c in every if issubclass(c, torch.optim.Optimizer)}
    assert {case.torch_class for case in CASES} == every - elsewhere


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_equals_torch_to_the_bit(case):
    for dtype in DTYPES:
        # Without Nesterov torch's Muon spoils its momentum in bfloat16, see below
        if case.hyperparameters.get("nesterov", True) or dtype is not torch.bfloat16:
            compare_with_torch(case, dtype)


def compare_with_torch(case, dtype):
    params = parameters(case, dtype)
    trees = gradients(params)
    if case.make is optim.sgd and dtype is torch.bfloat16:
        # Torch's fused kernel is wrong there (see below), so ours takes the other by default
        case = case._replace(torch_only={})
    expected, held = run_torch(case, params, trees)
    optimizer = made(case)
    pure, state = run(optimizer, params, trees)
    donated, donated_state = run(optimizer, params, trees, donate=True)
    assert tree_equal(pure, expected)
    assert tree_equal(donated, expected)
    assert tree_equal(donated_state, state)
    assert tree_equal(pure["frozen"], params["frozen"])
    assert not tree_equal(pure["late.weight"], params["late.weight"])
    assert int(state.count) == len(trees)
    # What it remembers is what torch's optimizer remembers, under the same names
    for i, name in enumerate(params):
        for key, value in held[name].items():
            if value is None or (key == "step" and not hasattr(state, "step")):
                continue
            ours = getattr(state, key)
            if ours is not None:
                ours = ours[i] if isinstance(ours, Tensor) else ours[name]
                assert tree_equal(ours, torch.as_tensor(value).to(ours.dtype)), (name, key)


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_defaults_are_those_of_torch(case):
    params = parameters(case)
    trees = gradients(params, 3)
    bare = case._replace(hyperparameters={})
    assert tree_equal(run(made(bare), params, trees)[0], run_torch(bare, params, trees)[0])


@pytest.mark.parametrize("case", FIRST, ids=names(FIRST))
def test_a_schedule_sets_the_learning_rate_of_each_update(case):
    params = parameters(case)
    trees = gradients(params)
    schedule = optim.warmup_cosine(0.1, 10, 50)
    pure, state = run(made(case, lr=schedule), params, trees)
    donated = run(made(case, lr=schedule), params, trees, donate=True)
    assert tree_equal(donated, (pure, state))
    if case.torch_class is not None:
        assert tree_equal(pure, run_torch(case, params, trees, schedule)[0])
        return
    params, state = cloned(params), made(case).init(params)
    for n, tree in enumerate(trees):
        params, state = made(case, lr=schedule(n)).update(tree, state, params)
    assert tree_equal(pure, params)


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_a_tensor_is_as_good_as_a_number(case):
    fixed = {"ns_coefficients", "initial_accumulator_value"}
    as_tensors = {
        key: tuple(map(double, value)) if isinstance(value, tuple) else double(value)
        for key, value in case.hyperparameters.items()
        if key not in fixed and not isinstance(value, (bool, str, int))
    }
    params = parameters(case)
    trees = gradients(params, 8)
    with_tensors, with_numbers = made(case, **as_tensors), made(case)
    assert tree_equal(run(with_tensors, params, trees), run(with_numbers, params, trees))
    injected = optim.inject_hyperparams(case.make, static=fixed | {"fused"})
    if any(key in as_tensors for key in case.hyperparameters):
        injected = injected(**case.hyperparameters, **case.ours_only)
        params_of_injected, state = run(injected, params, trees)
        donated = run(injected, params, trees, donate=True)
        assert tree_equal(donated, (params_of_injected, state))
        assert tree_equal(params_of_injected, run(with_numbers, params, trees)[0])


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def test_fused_is_the_default_where_there_is_a_fused_kernel():
    for case in CASES:
        if case.torch_only == FUSED:
            params = parameters(case)
            trees = gradients(params)
            pure = run(made(case), params, trees)
            assert tree_equal(pure, run(made(case, fused=True), params, trees))
            unfused = run(made(case, fused=False), params, trees)
            torch.testing.assert_close(pure[0], unfused[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sgd_moves_every_element_of_16_bit_parameters(dtype):
    """Torch's fused kernel for the CPU leaves most of them where they are, so it is not used."""
    params = FrozenDict(w=torch.ones(100, dtype=dtype))
    for momentum in (0.0, 0.5):
        optimizer = optim.sgd(0.25, momentum=momentum)
        new = run(optimizer, params, [FrozenDict(w=torch.ones(100, dtype=dtype))] * 2)[0]
        assert new["w"].tolist() == [1.0 - 0.25 * (2 + momentum)] * 100
        with pytest.raises(
            OptimizerError, match=r"^sgd: fused=True, but .* takes a tensor of .*16"
        ):
            run(optim.sgd(0.25, momentum=momentum, fused=True), params, [params])


def test_muon_keeps_its_momentum_in_bfloat16_without_nesterov():
    """Torch normalizes it in place, so here its buffer is put right after each step."""
    case = Case(optim.muon, torch.optim.Muon, {"lr": 0.1, "nesterov": False, "momentum": 0.5})
    params = FrozenDict(w=torch.randn(6, 4).bfloat16())
    trees = [tree_map(torch.randn_like, params) for _ in range(8)]
    pure, state = run(made(case), params, trees)
    weight = torch.nn.Parameter(params["w"].clone())
    optimizer, momentum = torch.optim.Muon([weight], **case.hyperparameters), torch.zeros(6, 4)
    momentum = momentum.bfloat16()
    for tree in trees:
        weight.grad = tree["w"].clone()
        momentum.lerp_(tree["w"], 0.5)
        optimizer.step()
        optimizer.state[weight]["momentum_buffer"].copy_(momentum)
    assert tree_equal(pure["w"], weight.detach())
    assert tree_equal(state.momentum_buffer["w"], momentum)


def test_momentum_0_in_the_state_is_no_momentum():
    params = parameters(CASES[0])
    trees = gradients(params, 8)
    for more in ({}, {"dampening": 0.5}, {"nesterov": True}):
        optimizer = optim.inject_hyperparams(optim.sgd)(lr=0.1, momentum=0.5, **more)
        state = optim.set_hyperparams(optimizer.init(params), momentum=0.0)
        expected = run(optim.sgd(0.1), params, trees)[0]
        assert tree_equal(run(optimizer, params, trees, cloned(state))[0], expected)
        assert tree_equal(run(optimizer, params, trees, state, donate=True)[0], expected)
    optimizer = optim.inject_hyperparams(optim.rmsprop)(lr=0.1, momentum=0.0)
    expected = run(optim.rmsprop(0.1), params, trees)[0]
    assert tree_equal(run(optimizer, params, trees)[0], expected)


# ── Against the papers ────────────────────────────────────────────────────────────────────────────


def lion_of_the_paper(params, trees, lr, betas=(0.9, 0.99), weight_decay=0.0, sign=1.0):
    """Algorithm 2 of Chen et al. (2023), in float64."""
    weights = {name: p.double() for name, p in params.items()}
    momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
    for tree in trees:
        for name, grad in tree.items():
            if grad is None:
                continue
            g = sign * grad.double()
            update = momentum[name].lerp(g, 1 - betas[0]).sign_()
            weights[name] = weights[name].mul(1 - lr * weight_decay).sub(update, alpha=lr)
            momentum[name] = momentum[name].lerp(g, 1 - betas[1])
    return weights


def lamb_of_the_paper(params, trees, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, sign=1.0):
    """Algorithm 2 of You et al. (2020), in float64; each tensor is a layer."""
    weights = {name: p.double() for name, p in params.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    updates = dict.fromkeys(weights, 0)
    for tree in trees:
        for name, grad in tree.items():
            if grad is None:
                continue
            g = sign * grad.double()
            updates[name] += 1
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g**2
            m = first[name] / (1 - betas[0] ** updates[name])
            v = second[name] / (1 - betas[1] ** updates[name])
            r = m / (v.sqrt() + eps) + weight_decay * weights[name]
            ratio = float(weights[name].norm() / r.norm())
            weights[name] = weights[name] - lr * ratio * r
    return weights


@pytest.mark.parametrize("case", WITHOUT_TORCH, ids=names(WITHOUT_TORCH))
def test_equals_the_paper(case):
    paper = {optim.lion: lion_of_the_paper, optim.lamb: lamb_of_the_paper}[case.make]
    hyperparameters = dict(case.hyperparameters)
    sign = -1.0 if hyperparameters.pop("maximize", False) else 1.0
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        params = parameters(case, dtype)
        trees = gradients(params)
        expected = paper(params, trees, sign=sign, **hyperparameters)
        pure, state = run(made(case), params, trees)
        for name, value in expected.items():
            torch.testing.assert_close(pure[name].double(), value, rtol=tolerance, atol=tolerance)
        donated, donated_state = run(made(case), params, trees, donate=True)
        assert tree_equal((donated, donated_state), (pure, state))
        assert tree_equal(pure["frozen"], params["frozen"])


def test_lamb_leaves_zeros_alone_in_its_quotient():
    params = FrozenDict(zero=torch.zeros(2), still=torch.tensor([3.0, 4.0]))
    grads = FrozenDict(zero=torch.tensor([1.0, -1.0]), still=torch.zeros(2))
    optimizer = optim.lamb(lr=0.1, eps=0.0)
    new, _ = optimizer.update(grads, optimizer.init(params), params)
    torch.testing.assert_close(new["zero"], torch.tensor([-0.1, 0.1]))  # a quotient of 1
    assert new["still"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("case", WITHOUT_TORCH, ids=names(WITHOUT_TORCH))
def test_narrow_parameters_are_computed_in_float32(case):
    params = parameters(case, torch.bfloat16)
    trees = gradients(params, 10)
    optimizer = made(case)
    state = optimizer.init(params)
    for tree in trees:
        wide = tree_map(lambda x: x.float() if x.is_floating_point() else x, (tree, state, params))
        expected = optimizer.update(*wide)
        params, state = optimizer.update(tree, state, params)
        assert tree_equal(params, tree_map(torch.Tensor.bfloat16, expected[0]))
        for slot in ("exp_avg", "exp_avg_sq"):
            if hasattr(state, slot):
                rounded = tree_map(torch.Tensor.bfloat16, getattr(expected[1], slot))
                assert tree_equal(getattr(state, slot), rounded)


# ── A pair of pure functions ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_an_update_changes_and_shares_nothing(case):
    params = parameters(case)
    optimizer = made(case)
    params, state = run(optimizer, params, gradients(params, 3))
    grads = gradients(params, 6)[5]
    before = tree_digest((params, state, grads))
    generator = torch.get_rng_state()
    new = optimizer.update(grads, state, params)
    again = optimizer.update(grads, state, params)
    assert tree_digest((params, state, grads)) == before
    assert tree_equal(new, again)
    assert torch.equal(torch.get_rng_state(), generator)
    old = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((params, state))}
    assert not old & {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(new)}
    assert not {leaf.data_ptr() for leaf in params.values()} & {
        leaf.data_ptr() for leaf in tree_leaves(optimizer.init(params))
    }


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_donation_keeps_the_memory(case):
    params = parameters(case)
    optimizer = made(case)
    params, state = run(optimizer, params, gradients(params, 3))
    grads = gradients(params, 6)[5]
    new_params, new_state = optimizer.update(grads, state, params, donate=True)
    for old, new in zip(
        tree_leaves((params, state)), tree_leaves((new_params, new_state)), strict=True
    ):
        assert new.data_ptr() == old.data_ptr()
    assert new_params is not params
    assert new_state is not state


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_the_layout_of_a_leaf_does_not_matter(case):
    """A leaf with gaps, and gradients laid out otherwise; donated and not."""
    params = parameters(case)
    trees = gradients(params, 6)
    expected = run(made(case), cloned(params) | {"encoder.weight": params["encoder.weight"]}, trees)

    def spread(x):
        wide = torch.full((*x.shape, 2), math.nan, dtype=x.dtype)
        wide[..., 0] = x
        return wide[..., 0]

    for donate in (False, True):
        ours = cloned(params) | {"encoder.weight": spread(params["encoder.weight"])}
        state = made(case).init(ours)
        for tree in trees:
            grads = cloned(tree) | {"encoder.weight": tree["encoder.weight"].t().contiguous().t()}
            ours, state = made(case).update(grads, state, ours, donate=donate)
        assert tree_equal((ours, state), expected)


@pytest.mark.parametrize("case", FIRST, ids=names(FIRST))
def test_a_tree_of_several_dtypes_is_updated_leaf_by_leaf(case):
    matrices = {f"{dtype}": torch.randn(6, 5).to(dtype) for dtype in DTYPES}
    params = FrozenDict(matrices)
    trees = [tree_map(torch.randn_like, params) for _ in range(5)]
    whole = run(made(case), params, trees, donate=True)[0]
    for name, param in params.items():
        alone = run(made(case), FrozenDict(x=param), [FrozenDict(x=t[name]) for t in trees])[0]
        assert tree_equal(whole[name], alone["x"])


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_an_update_without_any_gradient_only_counts(case):
    params = parameters(case)
    optimizer = made(case)
    params, state = run(optimizer, params, gradients(params, 7))
    none = FrozenDict(dict.fromkeys(params))
    for donate in (False, True):
        given = cloned((params, state))
        new, new_state = optimizer.update(none, given[1], given[0], donate=donate)
        assert tree_equal(new, params)
        assert tree_equal(new_state.replace(count=state.count), state)
        assert int(new_state.count) == int(state.count) + 1


def test_an_empty_tree_is_no_special_case():
    for case in EVERY:
        optimizer = made(case)
        new, state = optimizer.update(FrozenDict(), optimizer.init(FrozenDict()), FrozenDict())
        assert len(new) == 0
        assert int(state.count) == 1


@given(
    data=st.data(),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    index=st.integers(0, len(EVERY) - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_donated_equals_out_of_place_for_any_tree(data, shapes, index, dtype):
    case = EVERY[index]
    if case.make is optim.muon:
        shapes = [(*shape, 2, 2)[:2] if 0 not in shape else (3, 2) for shape in shapes]
    params = {"nested": [torch.randn(shape).to(dtype) for shape in shapes]}
    pattern = st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes))
    trees = []
    for present in data.draw(st.lists(pattern, min_size=1, max_size=4)):
        grads = [
            torch.randn(s).to(dtype) if p else None for s, p in zip(shapes, present, strict=True)
        ]
        trees.append({"nested": grads})
    pure = run(made(case), params, trees)
    assert tree_equal(run(made(case), params, trees, donate=True), pure)
    for leaf, new, *slopes in zip(
        params["nested"], pure[0]["nested"], *(t["nested"] for t in trees), strict=True
    ):
        if all(slope is None for slope in slopes):
            assert tree_equal(new, leaf)


# ── Under transforms ──────────────────────────────────────────────────────────────────────────────


def close(ours, expected, ulps):
    """Equal up to so many units in the last place of the largest element."""
    for a, b in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.is_floating_point() and a.numel():
            unit = torch.finfo(a.dtype).eps * float(b.abs().max())
            assert float((a - b).abs().max()) <= ulps * unit
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_the_formula_agrees_with_the_kernel(case):
    """Under vmap, from the same state: within 4 ulps of the largest element of each leaf.

    Muon's iteration is in bfloat16, whose last bit is 2**16 ulps of float32.
    """
    optimizer = made(case)
    for dtype in (torch.float32, torch.float64):
        members = [parameters(case, dtype, seed) for seed in range(2)]
        states = [optimizer.init(params) for params in members]
        series = [gradients(params, 8, seed=seed) for seed, params in enumerate(members)]
        for trees in zip(*series, strict=True):
            stacked = tuple(map(tree_stack, (trees, states, members)))
            new, new_states = torch.func.vmap(optimizer.update)(*stacked)
            results = [optimizer.update(*each) for each in zip(trees, states, members, strict=True)]
            members, states = [r[0] for r in results], [r[1] for r in results]
            if case.make is optim.muon:
                for name, member in tree_stack(members).items():  # of a step of about lr * 5
                    torch.testing.assert_close(new[name], member, rtol=0.0, atol=5e-3)
                new = tree_stack(members)
            close((new, new_states), tree_stack(results), 4)


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_bfloat16_under_a_transform_keeps_its_dtypes_and_is_near(case):
    """The formula rounds once where some kernels round each operation: 4 ulps of the largest."""
    optimizer = made(case)
    params = parameters(case, torch.bfloat16)
    params, state = run(optimizer, params, gradients(params, 8))
    tree = gradients(params, 10)[9]
    batched = tuple(tree_map(lambda x: x.unsqueeze(0), x) for x in (tree, state, params))
    new = tree_map(lambda x: x.squeeze(0), torch.func.vmap(optimizer.update)(*batched))
    close(new, optimizer.update(tree, state, params), 4)


def quadratic(params):
    target = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(2, 3)
    return ((params["w"] - target) ** 2).sum() + (params["b"] ** 4).sum()


SMOOTH = [case for case in EVERY if case.make is not optim.muon]  # whose bfloat16 has steps


@pytest.mark.parametrize("case", SMOOTH, ids=names(SMOOTH))
def test_a_loss_can_be_differentiated_by_the_learning_rate(case):
    params = FrozenDict(
        w=torch.linspace(1.0, 2.0, 6, dtype=torch.float64).reshape(2, 3),
        b=torch.full((2, 2), 0.5, dtype=torch.float64),
        unused=torch.ones(2, 1, dtype=torch.float64),
    )

    def after_training(lr):
        weights, optimizer = params, made(case, lr=lr)
        state = optimizer.init(weights)
        for _ in range(4):
            grads = torch.func.grad(lambda w: quadratic(w) + 0 * w["unused"].sum())(weights)
            weights, state = optimizer.update(grads, state, weights)
        return quadratic(weights)

    at, width = torch.tensor(0.01, dtype=torch.float64), 1e-5
    slope = torch.func.grad(after_training)(at)
    finite = (after_training(at + width) - after_training(at - width)) / (2 * width)
    assert math.isfinite(float(slope))
    torch.testing.assert_close(slope, finite, rtol=1e-5, atol=1e-6)


def test_muon_can_be_differentiated_by_the_learning_rate():
    params = FrozenDict(w=torch.eye(3, dtype=torch.float64), b=torch.ones(3, 2))
    optimizer = optim.inject_hyperparams(optim.muon)(lr=0.1, weight_decay=0.0)
    state = optimizer.init(params)
    grads = tree_map(torch.ones_like, params)

    def first_step(lr):
        return optimizer.update(grads, optim.set_hyperparams(state, lr=lr), params)[0]["w"].sum()

    slope = torch.func.grad(first_step)(torch.tensor(0.1, dtype=torch.float64))
    moved = first_step(torch.tensor(1.0, dtype=torch.float64)) - params["w"].sum()
    torch.testing.assert_close(slope, moved, rtol=1e-3, atol=0.0)  # it is linear in lr


@pytest.mark.parametrize("case", FIRST, ids=names(FIRST))
def test_a_sweep_over_learning_rates_equals_separate_runs(case):
    rates = [0.003, 0.01, 0.03]
    params = parameters(case, torch.float64)
    trees = gradients(params, 6)
    fixed = ("ns_coefficients", "initial_accumulator_value")
    sweep = optim.inject_hyperparams(case.make, static=fixed)(**{**case.hyperparameters, "lr": 0.1})
    state = sweep.init(params)
    states = torch.func.vmap(lambda lr: optim.set_hyperparams(state, lr=lr))(torch.tensor(rates))
    members = tree_map(lambda p: p.expand(3, *p.shape), params)
    for tree in trees:
        members, states = torch.func.vmap(sweep.update, (None, 0, 0))(tree, states, members)
    assert optim.get_hyperparams(states)["lr"].shape == (3,)
    for i, rate in enumerate(torch.tensor(rates).double().tolist()):
        alone = run(made(case, lr=rate), params, trees)[0]
        # Muon rounds to bfloat16 in both, but not at the same places
        tolerance = 2e-2 if case.make is optim.muon else 1e-10
        for name, leaf in alone.items():
            torch.testing.assert_close(members[name][i], leaf, rtol=tolerance, atol=tolerance)


def test_a_schedule_works_inside_of_a_transform():
    params = FrozenDict(w=torch.ones(3, dtype=torch.float64))
    grads = FrozenDict(w=torch.full((3,), 0.5, dtype=torch.float64))
    optimizer = optim.adamw(optim.linear(0.1, 0.0, 10))
    expected = run(optimizer, params, [grads] * 12)

    def series(params):
        state = optimizer.init(params)
        for _ in range(12):
            params, state = optimizer.update(grads, state, params)
        return params, state

    batched = torch.func.vmap(series)(tree_map(lambda p: p.unsqueeze(0), params))
    torch.testing.assert_close(batched[0]["w"][0], expected[0]["w"], rtol=1e-12, atol=1e-12)


def test_an_update_compiles():
    params = FrozenDict(w=torch.randn(4, 3), b=torch.randn(4))
    grads = tree_map(torch.randn_like, params)
    for optimizer in (optim.adamw(optim.linear(0.1, 0.0, 10)), optim.sgd(0.1, momentum=0.9)):
        state = optimizer.init(params)
        compiled = torch.compile(optimizer.update, backend="eager", fullgraph=True)
        for _ in range(3):
            expected = optimizer.update(grads, state, params)
            close(compiled(grads, state, params), expected, 4)
            state = expected[1]


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────

BAD_ARGUMENTS = [
    (optim.sgd, {"lr": -1.0}, r"^sgd: lr must be finite and at least 0, not -1\.0$"),
    (optim.sgd, {"lr": math.nan}, r"^sgd: lr must be finite and at least 0, not nan$"),
    (optim.sgd, {"lr": "fast"}, r"^sgd: lr is a number, not 'fast'$"),
    (optim.sgd, {"lr": True}, r"^sgd: lr is a number, not True$"),
    (optim.sgd, {"lr": torch.ones(2)}, r"^sgd: lr is a number or .* shape \(\), not .* \(2,\)$"),
    (optim.sgd, {"lr": torch.tensor(1)}, r"^sgd: lr is a number or .* not a tensor of torch.int64"),
    (optim.sgd, {"lr": torch.tensor(-1.0)}, r"^sgd: lr must be .* at least 0, not -1\.0$"),
    (optim.sgd, {"momentum": -0.1}, r"^sgd: momentum must be"),
    (optim.sgd, {"dampening": math.inf}, r"^sgd: dampening must be finite, not inf$"),
    (optim.sgd, {"weight_decay": -0.1}, r"^sgd: weight_decay must be"),
    (optim.sgd, {"nesterov": True}, r"^sgd: nesterov=True needs a momentum greater than 0"),
    (
        optim.sgd,
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        r"^sgd: nesterov=True needs .* not momentum=0.9 and dampening=0.1$",
    ),
    (optim.muon, {"momentum": 1.1}, r"^muon: momentum must be finite and at least 0 and at most 1"),
    (optim.muon, {"eps": -1.0}, r"^muon: eps must be"),
    (optim.muon, {"ns_coefficients": (1.0, 2.0)}, r"^muon: ns_coefficients are three numbers"),
    (optim.muon, {"ns_coefficients": (1.0, 2.0, None)}, r"^muon: ns_coefficients\[2\] is a number"),
    (
        optim.muon,
        {"ns_coefficients": (torch.tensor(1.0), 2.0, 3.0)},
        r'^muon: ns_coefficients\[0\] is a plain number.*static=\("ns_coefficients",\)$',
    ),
    (optim.muon, {"ns_steps": 100}, r"^muon: ns_steps is a whole number from 0 to 99"),
    (optim.muon, {"ns_steps": 2.5}, r"^muon: ns_steps is .* not 2\.5$"),
    (optim.muon, {"adjust_lr_fn": "best"}, r"^muon: adjust_lr_fn is one of None, .* not 'best'$"),
    (optim.adadelta, {"rho": 1.5}, r"^adadelta: rho must be finite and at least 0 and at most 1"),
    (optim.rmsprop, {"alpha": 1.5}, r"^rmsprop: alpha must be"),
    (optim.rmsprop, {"momentum": -0.1}, r"^rmsprop: momentum must be"),
    (optim.adagrad, {"lr_decay": -0.1}, r"^adagrad: lr_decay must be"),
    (optim.adagrad, {"initial_accumulator_value": -0.1}, r"^adagrad: initial_accumulator_value"),
    (optim.nadam, {"momentum_decay": -0.1}, r"^nadam: momentum_decay must be"),
]
WITH_BETAS = (
    optim.adam,
    optim.adamw,
    optim.adamax,
    optim.nadam,
    optim.radam,
    optim.lion,
    optim.lamb,
)
for make in WITH_BETAS:
    name = make.__name__
    BAD_ARGUMENTS += [
        (make, {"betas": (0.9, 1.0)}, rf"^{name}: betas\[1\] must be .* below 1, not 1\.0$"),
        (make, {"betas": (-0.1, 0.9)}, rf"^{name}: betas\[0\] must be"),
        (make, {"betas": 0.9}, rf"^{name}: betas are a pair of numbers, not 0\.9$"),
        (make, {"betas": (0.9,)}, rf"^{name}: betas are a pair of numbers"),
    ]
for case in FIRST:
    name = case.make.__name__
    BAD_ARGUMENTS += [
        (case.make, {"lr": -1.0}, rf"^{name}: lr must be finite and at least 0, not -1\.0$"),
        (case.make, {"weight_decay": None}, rf"^{name}: weight_decay is a number, not None$"),
    ]
    if case.make not in (optim.sgd, optim.lion):
        BAD_ARGUMENTS.append((case.make, {"eps": -1e-8}, rf"^{name}: eps must be"))


@pytest.mark.parametrize(("make", "arguments", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named(make, arguments, message):
    with pytest.raises(OptimizerError, match=message):
        make(**arguments)


@pytest.mark.parametrize("case", FIRST, ids=names(FIRST))
def test_a_bad_parameter_is_named(case):
    name = case.make.__name__
    optimizer = made(case)
    for leaf, message in (
        (3.0, rf"^{name}: a/1 is float, not a tensor$"),
        (torch.ones(2, 2, dtype=torch.complex64), rf"^{name}: a/1 is complex; train torch.view_as"),
        (torch.ones(2, 2, dtype=torch.int64), rf"^{name}: a/1 is of torch.int64, which has no gra"),
    ):
        with pytest.raises(OptimizerError, match=message):
            optimizer.init({"a": [torch.ones(2, 2), leaf]})


def test_muon_names_what_is_no_matrix():
    params = FrozenDict(weight=torch.ones(2, 2), bias=torch.ones(2), scale=torch.tensor(1.0))
    with pytest.raises(
        OptimizerError,
        match=r"matrices only, but there are bias of shape \(2,\), scale of shape \(\); .*"
        r"multi_transform\(",
    ):
        optim.muon().init(params)


@pytest.mark.parametrize("case", FIRST, ids=names(FIRST))
def test_what_does_not_fit_is_named(case):
    name = case.make.__name__
    optimizer = made(case)
    params = {"a": torch.ones(2, 3), "b": torch.ones(3, 2)}
    state = optimizer.init(params)
    grads = {"a": torch.ones(2, 3), "b": torch.ones(3, 2)}
    other = optim.adamw(0.1) if case.make is optim.sgd else optim.sgd(0.1)
    slot = next((s for s in state._names if isinstance(getattr(state, s), dict)), None)
    bad = [
        (grads, other.init(params), params, "the state is of type .*State, not .*State; make one"),
        (grads, (), params, "the state is of type tuple, not .*State; make one with init"),
        ({"a": grads["a"]}, state, params, "the gradients do not fit the parameters: "),
        (grads | {"b": torch.ones(2)}, state, params, r"b is torch.float32 \[3, 2\], but its grad"),
        (grads | {"b": 1.0}, state, params, r"b is .*, but its gradient is 1\.0"),
        (grads | {"b": grads["b"].double()}, state, params, "b is .* gradient is torch.float64"),
        (grads | {"b": grads["b"].to_sparse()}, state, params, r"b is .*sparse_coo; make it dense"),
        (grads, state, params | {"a": 1.0}, "a is float, not a tensor"),
    ]
    if slot is not None:
        wrong = {"a": torch.ones(2, 3), "b": torch.ones(2, 2)}
        bad += [
            (
                grads,
                optimizer.init(wrong),
                params,
                rf"b is .*\[3, 2\], but in the state's {slot} i",
            ),
            (grads, optimizer.init({"a": params["a"]}), params, "the state does not fit the param"),
            (grads, optimizer.init({**params, "c": params["a"]}), params, "the state does not fit"),
            (
                grads,
                optimizer.init(tree_map(torch.Tensor.bfloat16, params)),
                params,
                f"a is torch.float32 .* in the state's {slot} it is torch.bfloat16",
            ),
            (
                grads,
                state.replace(**{slot: None}),
                params,
                f"the state lacks {slot}: it was made with other hyper-parameters",
            ),
        ]
    if getattr(state, "step", None) is not None:
        short = state.replace(step=torch.zeros(1))
        bad.append((grads, short, params, r"the state's step has shape \(1,\), but there are 2"))
    for arguments in bad:
        with pytest.raises(OptimizerError, match=f"^{name}: {arguments[3]}"):
            optimizer.update(*arguments[:3])
        # A refused donation takes nothing
        before = tree_digest((state, grads))
        with pytest.raises(OptimizerError, match=f"^{name}: "):
            optimizer.update(*arguments[:3], donate=True)
        assert tree_digest((state, grads)) == before


def test_a_state_made_with_other_hyperparameters_is_refused():
    params = {"w": torch.ones(2)}
    for plain, more, slot in (
        (optim.sgd(), optim.sgd(momentum=0.9), "step"),
        (optim.adam(), optim.adam(amsgrad=True), "max_exp_avg_sq"),
        (optim.rmsprop(), optim.rmsprop(momentum=0.9), "momentum_buffer"),
        (optim.rmsprop(), optim.rmsprop(centered=True), "grad_avg"),
    ):
        with pytest.raises(OptimizerError, match=f"the state lacks {slot}: it was made with other"):
            more.update(params, plain.init(params), params)
        with pytest.raises(OptimizerError, match=f"the state has {slot}: it was made with other"):
            plain.update(params, more.init(params), params)


def test_a_donated_state_stays_unreadable():
    params = FrozenDict(w=torch.ones(2))
    optimizer = optim.adamw()
    state = optimizer.init(params)
    invalidate(state, "a test used it up")
    with pytest.raises(DonatedStateError, match="a test used it up"):
        optimizer.update(params, state, params)


def test_a_fused_kernel_that_does_not_exist_is_refused():
    params = {"w": torch.ones(2, device="meta")}
    for make in (optim.sgd, optim.adam, optim.adamw, optim.adagrad):
        optimizer = make(fused=True)
        with pytest.raises(OptimizerError, match=rf"^{make.__name__}: fused=True, but .* on meta"):
            optimizer.update(params, optimizer.init(params), params)


def test_a_gradient_that_would_get_lost_is_refused():
    params = {"w": torch.ones(2)}
    rate = torch.tensor(0.1, requires_grad=True)
    optimizer = optim.adamw(rate)
    state = optimizer.init(params)
    with pytest.raises(OptimizerError, match=r"^adamw: lr requires grad, but no .*torch.func.grad"):
        optimizer.update(params, state, params)
    with torch.no_grad():
        optimizer.update(params, state, params)
