"""One update of many members at once against an update of each, to the bit."""

import pytest
import torch

from puretrain import FrozenDict, optim
from puretrain.errors import OptimizerError
from puretrain.optim.members import update_members
from puretrain.tree import tree_equal, tree_index, tree_map, tree_stack

MEMBERS = 5
# Some have rows of whole pieces of 64 bytes, which a kernel takes together, others have not.
SHAPES = {"a": (4, 8), "b": (7,), "c": (5, 3), "d": (16,), "e": (1,)}
INJECT = optim.inject_hyperparams


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OPTIMIZERS = {
    "sgd": lambda: optim.sgd(0.1),
    "momentum": lambda: optim.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampening": lambda: optim.sgd(0.1, momentum=0.9, dampening=0.5, maximize=True),
    "adam": lambda: optim.adam(0.1, weight_decay=0.01),
    "adam, not fused": lambda: optim.adam(0.1, fused=False),
    "adamw": lambda: optim.adamw(optim.cosine(0.1, 5), amsgrad=True),
    "adamax": lambda: optim.adamax(0.1),
    "nadam": lambda: optim.nadam(0.1),
    "radam": lambda: optim.radam(0.1),
    "adagrad": lambda: optim.adagrad(0.1),
    "adadelta": lambda: optim.adadelta(1.0),
    "rmsprop": lambda: optim.rmsprop(0.1, momentum=0.9, centered=True),
    "lion": lambda: optim.lion(0.01),
    "lamb": lambda: optim.lamb(0.1),
    "muon": lambda: optim.multi_transform({"{a,c}": optim.muon(0.1), "**": optim.adamw(0.1)}),
    "chain": lambda: optim.chain(
        optim.clip_by_global_norm(0.5), optim.add_decayed_weights(0.1), optim.sgd(0.1)
    ),
    "value": lambda: optim.chain(
        optim.clip_by_value(0.5), optim.scale(optim.linear(1.0, 0.0, 9)), optim.adam(0.1)
    ),
    "frozen": lambda: optim.chain(optim.freeze("b"), optim.adamw(0.1)),
    "masked": lambda: optim.masked(optim.adamw(0.1), "{a,b}"),
    "every second": lambda: optim.apply_every(2, optim.adamw(0.1), mean=True),
    "injected": lambda: INJECT(optim.adamw)(lr=0.1, betas=(0.9, 0.99), weight_decay=0.1),
    "injected schedule": lambda: INJECT(optim.sgd)(lr=optim.cosine(0.1, 7), momentum=0.9),
    "injected clip": lambda: optim.chain(
        INJECT(optim.clip_by_global_norm)(max_norm=0.5), INJECT(optim.lamb)(lr=0.1)
    ),
    "injected chain": lambda: INJECT(
        lambda lr, limit: optim.chain(optim.clip_by_global_norm(limit), optim.adamw(lr))
    )(lr=0.1, limit=0.5),
    "of torch": lambda: optim.from_torch(torch.optim.Adam, lr=0.1),
}


def trees(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [
        FrozenDict(
            {
                name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                for name, shape in SHAPES.items()
            }
        )
        for _ in range(MEMBERS)
    ]


def swept(state, i):
    """Other hyper-parameters for each pair of members, where the state holds some."""
    found = optim.get_hyperparams(state)
    new = {name: value * (1 + i // 2) / 4 for name, value in found.items() if "betas" not in name}
    try:
        return optim.set_hyperparams(state, **new)
    except OptimizerError:  # they follow a schedule
        return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_members_together_are_members_alone(name, dtype):
    optimizer = OPTIMIZERS[name]()
    members = trees(0, dtype)
    states = [swept(optimizer.init(params), i) for i, params in enumerate(members)]
    params, state = tree_stack(members), tree_stack(states)
    for n in range(6):
        grads = trees(n + 1, dtype)
        # Now and then a member rests, so that the members' counts differ
        active = [i for i in range(MEMBERS) if n < 2 or (i + n) % 4]
        donate = n % 2 == 1
        before = tree_map(torch.clone, (params, state))
        new_params, new_state = update_members(
            [optimizer] * MEMBERS,
            tree_stack(grads),
            state,
            params,
            active,
            donate=donate,
        )
        if not donate:
            assert tree_equal((params, state), before)
        params, state = new_params, new_state
        for i in active:
            members[i], states[i] = optimizer.update(grads[i], states[i], members[i])
        for i in range(MEMBERS):
            assert tree_equal(tree_index(params, i), members[i]), (n, i)
            assert tree_equal(tree_index(state, i), states[i]), (n, i)


@pytest.mark.parametrize("name", ["adamw", "momentum", "lamb", "chain", "masked", "nadam"])
def test_a_leaf_without_a_gradient_stays(name):
    optimizer = OPTIMIZERS[name]()
    members = trees(0, torch.float32)
    states = [optimizer.init(params) for params in members]
    params, state = tree_stack(members), tree_stack(states)
    for n in range(3):
        grads = [grads | {"b": None} if n == 1 else grads for grads in trees(n + 1, torch.float32)]
        stacked = tree_stack(trees(n + 1, torch.float32)) | ({"b": None} if n == 1 else {})
        params, state = update_members(
            [optimizer] * MEMBERS, stacked, state, params, range(MEMBERS), donate=True
        )
        results = [optimizer.update(*each) for each in zip(grads, states, members, strict=True)]
        members, states = [r[0] for r in results], [r[1] for r in results]
        assert tree_equal(params, tree_stack(members))
        assert tree_equal(state, tree_stack(states))


def test_optimizers_of_different_kinds_each_for_its_members():
    optimizers = [optim.sgd(0.1), optim.sgd(0.2), optim.sgd(0.1), optim.sgd(0.3), optim.sgd(0.1)]
    members, grads = trees(0, torch.float32), trees(1, torch.float32)
    states = [o.init(params) for o, params in zip(optimizers, members, strict=True)]
    new, _ = update_members(
        optimizers, tree_stack(grads), tree_stack(states), tree_stack(members), range(MEMBERS)
    )
    for i, each in enumerate(zip(optimizers, grads, states, members, strict=True)):
        assert tree_equal(tree_index(new, i), each[0].update(*each[1:])[0])


def test_what_does_not_fit_says_so():
    optimizer = optim.adamw(0.1)
    members = trees(0, torch.float32)
    params = tree_stack(members)
    state = tree_stack([optimizer.init(x) for x in members])
    with pytest.raises(OptimizerError, match="adamw: b is torch.float32"):
        update_members(
            [optimizer] * MEMBERS, params | {"b": params["a"]}, state, params, range(MEMBERS)
        )
