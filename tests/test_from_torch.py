"""from_torch: every class against itself, run the usual way."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from puretrain.errors import OptimizerError, PatternError, TransformError
from puretrain.optim.from_torch import TorchOptimizerState, from_torch
from puretrain.optim.schedules import cosine, step
from puretrain.tree import FrozenDict, tree_digest, tree_equal, tree_leaves, tree_map

SHAPES = {"encoder.weight": (4, 3), "encoder.bias": (4,), "scale": (), "late.weight": (2, 5)}


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return FrozenDict(
        {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }
    )


def gradients(params, count=50, seed=1):
    """One tree for each step; 'late' has none at first, 'scale' misses every fourth."""
    generator = torch.Generator().manual_seed(seed)
    trees = []
    for n in range(count):
        tree = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for name, p in params.items()
        }
        if n < 5 and "late.weight" in tree:
            tree["late.weight"] = None
        if n % 4 == 3 and "scale" in tree:
            tree["scale"] = None
        trees.append(FrozenDict(tree))
    return trees


def run_torch(optimizer_class, params, trees, groups=None, schedule=None, **hyperparameters):
    """The same the usual way: the parameters and the optimizer object after the last step."""
    weights = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    if schedule is not None:
        hyperparameters["lr"] = schedule(0)
    content = groups(weights) if groups else list(weights.values())
    optimizer = optimizer_class(content, **hyperparameters)
    for n, tree in enumerate(trees):
        for name, weight in weights.items():
            weight.grad = None if tree[name] is None else tree[name].clone()
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(n)
        optimizer.step()
    return FrozenDict({name: weight.detach() for name, weight in weights.items()}), optimizer


def run(optimizer, params, trees, state=None, donate=False):
    params = tree_map(torch.clone, params)
    state = optimizer.init(params) if state is None else state
    for tree in trees:
        tree = FrozenDict({k: None if g is None else g.clone() for k, g in tree.items()})
        params, state = optimizer.update(tree, state, params, donate=donate)
    return params, state


CASES = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "foreach": True}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    (torch.optim.Adam, {"lr": torch.tensor(0.01)}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    (torch.optim.NAdam, {"lr": 0.01, "momentum_decay": 0.01}),
    (torch.optim.RAdam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {"lr": 0.01}),
    (torch.optim.ASGD, {"lr": 0.01, "t0": 10.0}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.5}),
    (torch.optim.Adadelta, {"lr": 1.0, "weight_decay": 0.1}),
    (torch.optim.Adamax, {"lr": 0.01}),
    (torch.optim.Adafactor, {"lr": 0.01}),
    (torch.optim.Muon, {"lr": 0.01}),
]
NAMES = [f"{cls.__name__} {i}" for i, (cls, _) in enumerate(CASES)]


def shapes_for(optimizer_class):
    matrices = optimizer_class is torch.optim.Muon
    return {k: s for k, s in SHAPES.items() if len(s) == 2} if matrices else SHAPES


def test_no_class_of_torch_is_forgotten():
    unusable = {torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam}
    every = {c for c in vars(torch.optim).values() if isinstance(c, type)}
    assert {cls for cls, _ in CASES} == {
        c for c in every if issubclass(c, torch.optim.Optimizer)
    } - unusable


@pytest.mark.parametrize(("optimizer_class", "hyperparameters"), CASES, ids=NAMES)
def test_equals_torch_to_the_bit(optimizer_class, hyperparameters):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        params = parameters(shapes_for(optimizer_class), dtype)
        trees = gradients(params)
        expected, raw = run_torch(optimizer_class, params, trees, **hyperparameters)
        optimizer = from_torch(optimizer_class, **hyperparameters)

        first = optimizer.init(params)
        pure, state = run(optimizer, params, trees)
        donated, donated_state = run(optimizer, params, trees, donate=True)
        assert tree_equal(pure, expected)
        assert tree_equal(donated, expected)
        assert tree_equal(state, donated_state)
        assert tree_digest(tree_map(torch.zeros_like, first)) == tree_digest(
            tree_map(torch.zeros_like, state)
        )
        assert int(state.count) == len(trees)

        # the slots are what the raw optimizer holds
        for name, weight in zip(params, raw.param_groups[0]["params"], strict=True):
            held = raw.state[weight]
            for key, value in held.items():
                assert tree_equal(state.slots[key][name], torch.as_tensor(value))

        # a fresh optimizer goes on from a copy of the state in the middle
        middle = run(optimizer, params, trees[:20])
        again = from_torch(optimizer_class, **hyperparameters)
        copied = pickle.loads(pickle.dumps(tree_map(torch.clone, middle[1])))
        ended, ended_state = run(again, middle[0], trees[20:], state=copied, donate=True)
        assert tree_equal(ended, expected)
        assert tree_equal(ended_state, state)


@pytest.mark.parametrize(("optimizer_class", "hyperparameters"), CASES, ids=NAMES)
def test_an_update_changes_and_shares_nothing(optimizer_class, hyperparameters):
    params = parameters(shapes_for(optimizer_class))
    optimizer = from_torch(optimizer_class, **hyperparameters)
    params, state = run(optimizer, params, gradients(params, 3))
    grads = gradients(params, 4)[3]
    before = tree_digest((params, state, grads))
    generator = torch.get_rng_state()
    new = optimizer.update(grads, state, params)
    again = optimizer.update(grads, state, params)
    assert tree_digest((params, state, grads)) == before
    assert tree_equal(new, again)
    assert torch.equal(torch.get_rng_state(), generator)
    old = {leaf.data_ptr() for leaf in tree_leaves((params, state, grads))}
    assert not old & {leaf.data_ptr() for leaf in tree_leaves(new)}
    assert all(leaf.grad is None for leaf in tree_leaves((params, new)) if leaf.is_leaf)


def test_donation_keeps_the_memory():
    params = parameters()
    optimizer = from_torch(torch.optim.Adam, lr=0.1)
    params, state = run(optimizer, params, gradients(params, 8))
    grads = gradients(params, 1)[0]
    new_params, new_state = optimizer.update(grads, state, params, donate=True)
    assert [id(p) for p in new_params.values()] == [id(p) for p in params.values()]
    assert all(leaf.grad is None for leaf in params.values())
    for name, slot in state.slots.items():
        for key, value in slot.items():
            assert new_state.slots[name][key].data_ptr() == value.data_ptr()
    assert new_params is not params
    assert new_state is not state


def test_an_uninitialised_leaf_starts_as_torch_starts_it():
    # the first momentum of SGD is the gradient itself, not (1 - dampening) times it
    params = FrozenDict(a=torch.zeros(1), b=torch.zeros(1))
    optimizer = from_torch(torch.optim.SGD, lr=1.0, momentum=0.5, dampening=0.5)
    state = optimizer.init(params)
    assert state.initialised.tolist() == [False, False]
    params, state = optimizer.update(FrozenDict(a=torch.ones(1), b=None), state, params)
    assert state.initialised.tolist() == [True, False]
    assert state.slots["momentum_buffer"]["b"].tolist() == [0.0]
    params, state = optimizer.update(FrozenDict(a=None, b=torch.ones(1)), state, params)
    assert (params["a"].item(), params["b"].item()) == (-1.0, -1.0)
    assert state.initialised.tolist() == [True, True]


def test_groups_and_schedules():
    params = parameters()
    trees = gradients(params)
    schedule, slow = cosine(0.1, 40), step(0.01, 10)

    def raw_groups(weights):
        bias = [weights["encoder.bias"]]
        late = [weights["late.weight"]]
        rest = [weights["encoder.weight"], weights["scale"]]
        return [
            {"params": rest},
            {"params": bias, "weight_decay": 0.0},
            {"params": late, "momentum": 0.5},
        ]

    expected, _ = run_torch(
        torch.optim.SGD, params, trees, raw_groups, schedule, momentum=0.9, weight_decay=0.1
    )
    optimizer = from_torch(
        torch.optim.SGD,
        lr=schedule,
        momentum=0.9,
        weight_decay=0.1,
        groups={"**.bias": {"weight_decay": 0.0}, "late.**": {"momentum": 0.5}},
    )
    assert tree_equal(run(optimizer, params, trees)[0], expected)
    assert tree_equal(run(optimizer, params, trees, donate=True)[0], expected)

    one = from_torch(torch.optim.SGD, lr=0.0, groups={"scale": {"lr": slow}, "**": {"lr": 0.5}})
    grads = tree_map(torch.ones_like, params)
    new, state = one.update(grads, one.init(params), params)
    assert torch.equal(new["scale"], params["scale"] - 0.01)
    assert torch.equal(new["encoder.bias"], params["encoder.bias"] - 0.5)
    assert int(state.count) == 1


def test_momentum_absent_in_some_groups_has_no_slot_there():
    optimizer = from_torch(torch.optim.SGD, lr=0.1, groups={"encoder.**": {"momentum": 0.9}})
    state = optimizer.init(parameters())
    slot = state.slots["momentum_buffer"]
    assert [name for name in slot if slot[name] is not None] == ["encoder.weight", "encoder.bias"]


# ── Optimizers of one's own ───────────────────────────────────────────────────────────────────────


class Kitchen(torch.optim.Optimizer):
    """Keeps something of every kind, everywhere."""

    def __init__(self, params, lr=0.1, decay=0.9, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "decay": decay, "betas": betas, "k": 0, "weight": 0})
        self.calls = 0
        self.largest = None
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["start"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        self.state["total"] = self.state.get("total", 0.0) + 0.5 * self.calls
        for group in self.param_groups:
            group["k"] += 1
            group["weight"] = group["weight"] + 0.25
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "count" not in state:
                    state["count"] = 0
                    state["rate"] = 1.0
                    state["flip"] = False
                    state["nothing"] = None
                    state["last"] = None
                    state["pair"] = [torch.zeros_like(p), {"n": 1}]
                state["count"] += 1
                state["rate"] *= group["decay"]
                state["flip"] = not state["flip"]
                assert type(state["count"]) is int
                assert type(state["rate"]) is float
                assert type(state["flip"]) is bool
                assert state["nothing"] is None
                assert type(group["k"]) is int
                if state["last"] is not None:
                    p.add_(state["last"], alpha=-0.01)
                state["last"] = p.grad  # an alias of the gradient
                if "twice" in state:
                    state["twice"] += 1
                elif state["count"] == 2:
                    state["twice"] = 2
                state["pair"][0].add_(p.grad)
                state["pair"][1]["n"] += group["k"]
                scale = group["lr"] * state["rate"] * (1.0 if state["flip"] else 0.5)
                scale *= 1 + 0.001 * self.state["total"] + 0.01 * state["pair"][1]["n"]
                p.add_(p.grad + state["pair"][0] * 0.1, alpha=-scale)
                p.lerp_(state["start"], 0.01 * group["weight"] / (1 + group["k"]))
                p.grad.zero_().add_(p)  # gradients are not sacred either


class Moving(torch.optim.Optimizer):
    """Puts new memory under its parameters, keeps a list of them, and draws random numbers."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.order = [p for group in self.param_groups for p in group["params"]][::-1]

    def step(self):
        for p in self.order:
            if p.grad is not None:
                noise = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
                p.data = p.data - self.param_groups[0]["lr"] * (p.grad + 0.1 * noise)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimizer_of_ones_own(donate, dtype):
    params = parameters(dtype=dtype)
    trees = gradients(params)
    expected, raw = run_torch(Kitchen, params, trees, decay=0.95)
    optimizer = from_torch(Kitchen, decay=0.95)
    got, state = run(optimizer, params, trees, donate=donate)
    assert tree_equal(got, expected)
    # "twice" is only there from the second gradient on; the constructor's slot from the first
    first = optimizer.init(params)
    assert first.initialised.all()
    assert tree_equal(first.slots["start"], params)
    assert state.present["twice"].tolist() == [2] * 4
    assert not first.present["twice"].any()
    assert float(state.shared["state.total"]) == raw.state["total"]
    assert int(state.shared["groups.0.k"]) == int(state.shared["self.calls"]) == 50
    assert state.slots["pair.1.n"]["scale"].dtype == torch.int64

    middle = run(optimizer, params, trees[:1], donate=donate)  # "last" and "twice" are not there
    for count in (1, 6, 23):
        middle = run(optimizer, params, trees[:count], donate=donate)
        assert isinstance(middle[1], TorchOptimizerState)
        ended, ended_state = run(
            from_torch(Kitchen, decay=0.95),
            middle[0],
            trees[count:],
            state=tree_map(torch.clone, middle[1]),
        )
        assert tree_equal(ended, expected)
        assert tree_equal(ended_state, state)


def test_inputs_stay_when_an_optimizer_spoils_its_gradients():
    params = parameters()
    optimizer = from_torch(Kitchen)
    state = optimizer.init(params)
    grads = gradients(params, 1)[0]
    before = tree_digest((params, state, grads))
    new = optimizer.update(grads, state, params)
    assert tree_digest((params, state, grads)) == before
    old = {leaf.data_ptr() for leaf in tree_leaves((params, state, grads))}
    assert not old & {leaf.data_ptr() for leaf in tree_leaves(new)}


@pytest.mark.parametrize("donate", [False, True])
def test_new_memory_and_random_numbers(donate):
    params = parameters()
    trees = gradients(params, 10)
    torch.manual_seed(3)
    expected, _ = run_torch(Moving, params, trees)
    optimizer = from_torch(Moving)
    torch.manual_seed(3)
    state = optimizer.init(params)  # its trial must not draw from the global generator
    got, _ = run(optimizer, params, trees, state=state, donate=donate)
    assert tree_equal(got, expected)


def optimizer_with(step, **defaults):
    class Own(torch.optim.Optimizer):
        def __init__(self, params, **more):
            super().__init__(params, {"lr": 0.1, **defaults, **more})

    Own.step = step
    return Own


def grows(self):
    for p in self.param_groups[0]["params"]:
        self.state[p].setdefault("history", []).append(p.detach().clone())


def named(self):
    for p in self.param_groups[0]["params"]:
        self.state[p]["mode"] = "fast"


def remembers(self):
    self.seen = [*getattr(self, "seen", []), object()]


def odd_key(self):
    self.state[7] = 1


def decays(self):
    self.param_groups[0]["lr"] *= 0.5


def insists(self, closure=None):
    if closure is None:
        raise RuntimeError("I need the loss")


def narrows(self):
    for p in self.param_groups[0]["params"]:
        n = self.state[p].get("n", 0)
        self.state[p]["n"] = n + 1
        self.state[p]["x"] = torch.zeros(2 if n < 5 else 3)


def late_state(self):
    self.state["n"] = self.state.get("n", 0) + 1
    if self.state["n"] > 5:
        self.state["other"] = 1


def late_entry(self):
    for p in self.param_groups[0]["params"]:
        n = self.state[p].get("n", 0)
        self.state[p]["n"] = n + 1
        if n > 5:
            self.state[p]["other"] = 1


def late_group(self):
    self.state["n"] = self.state.get("n", 0) + 1
    if self.state["n"] > 5:
        self.param_groups[0]["phase"] += 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_torch(torch.optim.LBFGS), r"LBFGS.step needs a closure"),
        (lambda: from_torch(torch.optim.SparseAdam), "SparseAdam needs sparse gradients"),
        (lambda: from_torch(torch.optim.Adam, differentiable=True), "differentiable=True"),
        (lambda: from_torch(torch.nn.Linear), "takes a subclass of torch.optim.Optimizer"),
        (
            lambda: from_torch(torch.optim.SGD([torch.zeros(1)])),
            "the class and its hyper-parameters, not an instance",
        ),
    ],
)
def test_classes_that_can_not_work_are_refused(make, message):
    with pytest.raises(OptimizerError, match=message):
        make()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: from_torch(torch.optim.Muon), r"torch.optim.*Muon can't be constructed: .*2D"),
        (lambda: from_torch(torch.optim.SGD, lr=-1.0), "can't be constructed: Invalid learning"),
        (lambda: from_torch(torch.optim.SGD, rate=1.0), "can't be constructed: .*rate"),
        (
            lambda: from_torch(torch.optim.SGD, groups={"scale": {"weight_decy": 0.0}}),
            r"'scale' sets weight_decy, but the hyper-parameters of .*SGD are lr",
        ),
        (
            lambda: from_torch(torch.optim.SGD, groups={"**": {}, "scale": {}}),
            "the group 'scale' is empty: .*; name it before them",
        ),
        (lambda: from_torch(optimizer_with(grows)), "history.*structure; .* pair of functions"),
        (lambda: from_torch(optimizer_with(named)), r"keeps str in .*encoder.weight\['mode'\]"),
        (lambda: from_torch(optimizer_with(remembers)), "keeps self.seen, which changes its str"),
        (lambda: from_torch(optimizer_with(odd_key)), "under a int that is none of its param"),
        (lambda: from_torch(optimizer_with(insists)), "trial step .* failed: I need the loss"),
        (lambda: from_torch(optimizer_with(decays), lr=cosine(1.0, 5)), "a number, not a schedule"),
    ],
)
def test_init_says_what_is_wrong(optimizer, message):
    with pytest.raises(OptimizerError, match=message):
        optimizer().init(parameters())


def test_unknown_patterns_and_empty_trees():
    with pytest.raises(PatternError, match="nowhere"):
        from_torch(torch.optim.SGD, groups={"nowhere": {}}).init(parameters())
    with pytest.raises(OptimizerError, match="empty parameter list"):
        from_torch(torch.optim.SGD).init(FrozenDict())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: from_torch(optimizer_with(narrows)), r"changed x in its state from .*\(2,\) to"),
        (lambda: from_torch(optimizer_with(late_state)), r"began to keep self.state\['other'\]"),
        (lambda: from_torch(optimizer_with(late_entry)), "began to keep other in its state"),
        (
            lambda: from_torch(optimizer_with(late_group, phase=0)),
            r"changed self.param_groups\[0\]\['phase'\].*pass changing=\['phase'\]",
        ),
    ],
)
def test_late_changes_of_mind_are_refused(optimizer, message):
    optimizer = optimizer()
    params = parameters()
    with pytest.raises(OptimizerError, match=message):
        run(optimizer, params, gradients(params, 10))


def test_late_changes_may_be_announced():
    params = parameters()
    trees = gradients(params, 10)
    optimizer = from_torch(optimizer_with(late_group, phase=0), changing=["phase"])
    _, state = run(optimizer, params, trees)
    assert int(state.shared["groups.0.phase"]) == 5
    optimizer = from_torch(optimizer_with(decays))
    _, state = run(optimizer, params, trees)
    assert float(state.shared["groups.0.lr"]) == pytest.approx(0.1 * 0.5**10)


def test_a_state_or_gradient_that_does_not_fit():
    params = parameters()
    sgd, adam = from_torch(torch.optim.SGD), from_torch(torch.optim.Adam)
    grads = tree_map(torch.ones_like, params)
    with pytest.raises(OptimizerError, match=r"the state is one of .*SGD, 4 parameters"):
        adam.update(grads, sgd.init(params), params)
    fewer = FrozenDict({"scale": params["scale"]})
    with pytest.raises(OptimizerError, match="not of .*SGD with 1 parameters"):
        sgd.update(FrozenDict({"scale": grads["scale"]}), sgd.init(params), fewer)
    with pytest.raises(OptimizerError, match="for other parameter groups"):
        from_torch(torch.optim.SGD, groups={"scale": {}}).update(grads, sgd.init(params), params)
    wrong = grads | {"encoder.bias": torch.ones(7)}
    with pytest.raises(OptimizerError, match="the gradient of encoder.bias does not fit"):
        sgd.update(wrong, sgd.init(params), params)


def test_transforms_are_refused_by_name():
    params = FrozenDict(w=torch.ones(3))
    optimizer = from_torch(torch.optim.AdamW)
    state = optimizer.init(params)

    def after(w):
        return optimizer.update(FrozenDict(w=w), state, params)[0]["w"].sum()

    with pytest.raises(TransformError, match=r"AdamW .*use puretrain.optim.adamw"):
        torch.func.grad(after)(torch.ones(3))
    with pytest.raises(TransformError, match=r"AdamW .*use puretrain.optim.adamw"):
        torch.func.vmap(after)(torch.ones(2, 3))
    with pytest.raises(TransformError, match="Kitchen .*a pair of functions"):
        torch.func.vmap(lambda w: from_torch(Kitchen).init(FrozenDict(w=w)).count)(torch.ones(2, 3))


class Picky(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.requires_grad and p.is_leaf:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("donate", [False, True])
def test_parameters_look_trainable_to_the_optimizer_only(donate):
    optimizer = from_torch(Picky, lr=0.5)
    params = FrozenDict(w=torch.ones(2))
    state = optimizer.init(params)
    new, _ = optimizer.update(FrozenDict(w=torch.ones(2)), state, params, donate=donate)
    assert new["w"].tolist() == [0.5, 0.5]
    assert not new["w"].requires_grad
    assert not params["w"].requires_grad


def test_structures_survive_deep_copies():
    params = parameters()
    optimizer = from_torch(Kitchen)
    params, state = run(optimizer, params, gradients(params, 3))
    assert tree_equal(copy.deepcopy(state), state)
    assert math.isfinite(sum(float(p.sum()) for p in tree_leaves(params) if isinstance(p, Tensor)))
