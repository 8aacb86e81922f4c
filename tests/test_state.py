"""TrainState, leases and donation."""

import copy
import gc
import pickle
import weakref

import optree
import pytest
import torch
from torch import nn

import puretrain as pt
from puretrain.errors import DonatedStateError, StructureError
from puretrain.tree import FrozenDict, tree_digest, tree_equal, tree_leaves, tree_map

X = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]])
OPTIMIZER = pt.optim.adamw(1e-1)


class WithTeacher(pt.TrainState):
    teacher: FrozenDict
    rounds: torch.Tensor


def loss(params, buffers, batch, key):
    return ((batch @ params["weight"] + params["bias"]) ** 2).mean()


STEP = pt.train_step(loss, OPTIMIZER, draws=False)


def fresh_params():
    return {"weight": torch.tensor([1.0, -1.0]), "bias": torch.tensor([0.5])}


def create(params=None, buffers=None, optimizer=OPTIMIZER, kind=pt.TrainState, **extra):
    params = fresh_params() if params is None else params
    return kind.create(params, buffers, optimizer, key=pt.random.key(3), **extra)


def after(steps, state=None):
    """A state of a run, whose tensors a step has made."""
    state = create() if state is None else state
    for _ in range(steps):
        state = STEP(state, X)
    return state


def copied(state):
    return tree_map(torch.clone, state)


# ── Creation ──────────────────────────────────────────────────────────────────────────────────────


def test_a_new_state_has_done_nothing():
    state = create()
    counters = (state.step, state.updates, state.skipped, state.cursor.epoch, state.cursor.offset)
    assert [(int(c), c.dtype, c.shape) for c in counters] == [(0, torch.int64, ())] * 5
    assert int(state.validated) == -1
    assert state.stop.dtype == torch.bool
    assert not state.stop
    assert state.accumulator is None
    assert state.loss_scale is None
    assert not tree_leaves((state.metrics, state.epoch_metrics, state.reducers, state.buffers))
    assert state.cursor.source.shape == (0,)
    assert tree_equal(state.opt_state, OPTIMIZER.init(FrozenDict(fresh_params())))


def test_dicts_are_frozen_and_lists_become_tuples():
    params = {"layers": [{"w": torch.ones(1)}, {"w": torch.zeros(1)}]}
    state = create(params, {"mean": torch.zeros(2)}, None)
    assert type(state.params) is type(state.buffers) is FrozenDict
    assert type(state.params["layers"]) is tuple
    params["layers"].append("more")
    assert len(state.params["layers"]) == 2
    assert state.opt_state == ()


def test_parameters_that_require_grad_are_detached_without_a_copy():
    model = nn.Linear(2, 1)
    state = create(dict(model.named_parameters()), optimizer=None)
    assert not any(leaf.requires_grad for leaf in state.params.values())
    assert state.params["weight"].data_ptr() == model.weight.data_ptr()
    assert model.weight.requires_grad


def test_a_subclass_adds_fields():
    state = create(kind=WithTeacher, teacher={"w": torch.ones(1)}, rounds=torch.tensor(2))
    assert type(state.teacher) is FrozenDict
    after = STEP(state, X)
    assert type(after) is WithTeacher
    assert after.teacher is state.teacher
    assert int(after.rounds) == 2


def test_other_fields_can_be_set_at_creation():
    assert int(create(step=torch.tensor(7)).step) == 7


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "WithTeacher.create: missing teacher, rounds"),
        ({"teacher": {}, "rounds": 1, "student": {}}, "no such field: student"),
    ],
)
def test_fields_missing_or_unknown_are_named(extra, message):
    with pytest.raises(StructureError, match=message):
        create(kind=WithTeacher, **extra)


@pytest.mark.parametrize("key", [0, torch.tensor([0.0, 1.0]), torch.zeros(3, dtype=torch.int64)])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(StructureError, match=r"key must be made by puretrain\.random\.key"):
        pt.TrainState.create({}, key=key)


def test_a_state_is_a_tree_for_optree_and_torch_alike():
    state = after(1)
    doubled = optree.tree_map(lambda x: x * 2, state)
    assert type(doubled) is pt.TrainState
    assert torch.equal(doubled.params["bias"], 2 * state.params["bias"])
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    assert tree_equal(torch.utils._pytree.tree_unflatten(leaves, spec), state)


def test_a_state_can_be_pickled_and_copied():
    state = after(2)
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state), copy.copy(state)):
        assert type(other) is pt.TrainState
        assert tree_equal(other, state)


def test_a_state_cannot_be_changed():
    state = create()
    with pytest.raises(AttributeError):
        state.step = torch.tensor(1)
    with pytest.raises(TypeError):
        state.params["weight"] = torch.zeros(2)


# ── Donation ──────────────────────────────────────────────────────────────────────────────────────


def test_a_donated_state_is_overwritten_in_place():
    state = after(1)
    tensors = {x.data_ptr() for x in tree_leaves((state.params, state.opt_state))}
    expected = STEP(copied(state), X)
    new = STEP(state, X, donate=True)
    assert {x.data_ptr() for x in tree_leaves((new.params, new.opt_state))} == tensors
    assert tree_equal(new, expected)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_every_way_to_read_a_donated_state_raises(steps):
    state = after(steps)
    params, slots = state.params, state.opt_state
    STEP(state, X, donate=True)
    reads = [
        *(lambda name=name: getattr(state, name) for name in pt.TrainState._names),
        lambda: state.replace(step=torch.tensor(0)),
        lambda: tree_leaves(state),
        lambda: torch.utils._pytree.tree_leaves(state),
        lambda: tree_digest(state),
        lambda: pickle.dumps(state),
        lambda: copy.copy(state),
        lambda: STEP(state, X),
        lambda: STEP(state, X, donate=True),
        lambda: pt.lease(state),
        lambda: params["weight"],
        lambda: dict(params),
        lambda: list(params),
        lambda: len(params),
        lambda: "weight" in params,
        lambda: params | {"bias": torch.zeros(1)},
        params.items,
        lambda: params.get("weight"),
        lambda: tree_leaves(params),
        lambda: pt.TrainState.create(params, key=pt.random.key(0)),
        lambda: slots.exp_avg,
        lambda: slots.replace(count=torch.tensor(0)),
    ]
    for read in reads:
        with pytest.raises(DonatedStateError, match=f"step {steps + 1} was computed with donate="):
            read()
    assert repr(state) == "<donated TrainState>"
    assert repr(params) == "<donated FrozenDict>"


def test_the_error_says_what_to_do():
    state = after(1)
    STEP(state, X, donate=True)
    with pytest.raises(DonatedStateError, match=r"lease\(state\)` or donate=False"):
        _ = state.params


def test_saving_a_donated_state_raises(tmp_path):
    state = after(1)
    STEP(state, X, donate=True)
    with pytest.raises(DonatedStateError):
        pt.save(tmp_path / "s.ckpt", state)
    assert not list(tmp_path.iterdir())


def test_a_donated_state_keeps_what_no_step_overwrites():
    """Who holds the metrics or buffers of an earlier state goes on reading them."""
    state = after(1, create(buffers={"mean": torch.ones(2)}))
    metrics, buffers, key, loss_then = (
        state.metrics,
        state.buffers,
        state.key,
        state.metrics["loss"],
    )
    before = copied((metrics, buffers, key))
    STEP(STEP(state, X, donate=True), X, donate=True)
    assert tree_equal((metrics, buffers, key), before)
    assert metrics["loss"] is loss_then


def test_a_copy_with_other_fields_is_donated_along():
    """It shares the containers, so it cannot be read as if nothing had happened."""
    state = after(1)
    other = state.replace(step=torch.tensor(9))
    STEP(state, X, donate=True)
    assert int(other.step) == 9
    with pytest.raises(DonatedStateError):
        other.params["weight"]
    with pytest.raises(DonatedStateError):
        STEP(other, X)


def test_a_module_is_never_overwritten():
    model = nn.Linear(2, 1)
    before = copy.deepcopy(model.state_dict())
    apply, params, buffers = pt.functional(model)
    optimizer = pt.optim.sgd(0.1, momentum=0.9)
    step = pt.train_step(
        lambda p, b, batch, key: apply(p, b, batch)[0].square().mean(), optimizer, draws=False
    )
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    for _ in range(3):
        state = step(state, X, donate=True)
    assert tree_equal(dict(model.state_dict()), dict(before))
    assert not torch.equal(state.params["weight"], model.weight)


def test_two_states_made_of_the_same_tensors_are_independent():
    params = fresh_params()
    runs = []
    for _ in range(2):
        state = create(params)
        for _ in range(3):
            state = STEP(state, X, donate=True)
        runs.append(state)
    assert tree_equal(*runs)
    assert tree_equal(params, fresh_params())


@pytest.mark.parametrize(
    "take",
    [
        lambda params: params,
        FrozenDict,
        lambda params: params | {"weight": torch.ones(2)},
        lambda params: FrozenDict(w=params["weight"], nested=(params["bias"],)),
        lambda params: FrozenDict(w=params["weight"].detach()),
        lambda params: FrozenDict(w=params["weight"][1:]),
        lambda params: FrozenDict(w=params["weight"].view(1, 2)),
    ],
)
@pytest.mark.parametrize("field", ["teacher", "reducers", "buffers"])
def test_what_the_rest_of_a_state_shares_with_the_parameters_stays(take, field):
    """A target network, the memory of a reducer: they take the parameters as they are now."""
    state = create(kind=WithTeacher, teacher={}, rounds=torch.tensor(0))
    state = after(2, state)
    state = state.replace(**{field: take(state.params)})
    kept = copied(getattr(state, field))
    expected = STEP(copied(state), X)
    new = STEP(state, X, donate=True)
    assert tree_equal(getattr(new, field), kept)
    assert tree_equal(new, expected)
    third = STEP(new, X, donate=True)
    assert tree_equal(getattr(third, field), kept)


@pytest.mark.parametrize(
    ("rebuild", "given_up"),
    [
        (lambda state: tree_map(lambda leaf: leaf, state), []),
        (lambda state: pt.tree.tree_to(state, "cpu"), []),
        (lambda state: state.replace(params=FrozenDict(state.params)), ["opt_state"]),
        (
            lambda state: state.replace(params=state.params | {"bias": torch.zeros(1)}),
            ["opt_state"],
        ),
    ],
)
def test_a_state_built_out_of_anothers_tensors_does_not_overwrite_them(rebuild, given_up):
    """The containers that both hold are given up; the tensors in new containers are copied."""
    state = after(2)
    before = copied(state)
    STEP(STEP(rebuild(state), X, donate=True), X, donate=True)
    for name in ("params", "opt_state"):
        if name in given_up:
            with pytest.raises(DonatedStateError):
                tree_leaves(getattr(state, name))
        else:
            assert tree_equal(getattr(state, name), getattr(before, name))


def test_a_number_that_two_optimizer_states_share_is_not_counted_up_in_both():
    state = after(2)
    scheduled = state.opt_state.replace(step=torch.zeros(2))
    STEP(STEP(state.replace(opt_state=scheduled), X, donate=True), X, donate=True)
    assert int(state.opt_state.count) == 2


@pytest.mark.parametrize(
    "params",
    [
        torch.tensor([1.0, -1.0]),
        (torch.tensor([1.0]), torch.tensor([-1.0])),
        {"layers": (torch.tensor([1.0]), torch.tensor([-1.0]))},
        {"a": torch.tensor(1.0).expand(2)},
    ],
)
def test_any_tree_of_parameters_can_be_donated(params):
    def square(params, buffers, batch, key):
        return sum((leaf**2).sum() for leaf in tree_leaves(params))

    step = pt.train_step(square, OPTIMIZER, draws=False)
    state = create(params)
    start = copied(state.params)
    expected, donated = state, step(state, None)
    held = donated.params
    for _ in range(3):
        expected = step(expected, None)
    with pt.lease(donated):
        step(donated, None, donate=True)
        assert tree_equal(donated.params, step(create(params), None).params)
    before = copied(held)
    for _ in range(2):
        donated = step(donated, None, donate=True)
    assert tree_equal(donated, expected)
    if not isinstance(held, FrozenDict):  # nothing can mark a bare tuple: its tensors stay
        assert tree_equal(held, before)
    assert tree_equal(tree_leaves(params), tree_leaves(start))


def test_parameters_put_into_the_state_of_a_donating_run_are_not_overwritten():
    state = after(1)
    for _ in range(2):
        state = STEP(state, X, donate=True)
    for mine in (FrozenDict(fresh_params()), after(1).params):
        before = copied(mine)
        with_mine = state = state.replace(params=mine)
        with pt.lease(with_mine):
            state = STEP(state, X, donate=True)
            state = STEP(state, X, donate=True)
            assert tree_equal(mine, before)
    mine = FrozenDict(fresh_params())
    leaves = list(mine.values())
    state = state.replace(params=mine)
    state = STEP(STEP(state, X, donate=True), X, donate=True)
    assert tree_equal(leaves, list(fresh_params().values()))


def test_a_skipped_step_does_not_make_foreign_tensors_its_own():
    params = fresh_params()
    step = pt.train_step(loss, OPTIMIZER, nonfinite="skip", draws=False)
    skipped = step(create(params), X * float("nan"))
    assert int(skipped.skipped) == 1
    step(step(skipped, X, donate=True), X, donate=True)
    assert tree_equal(params, fresh_params())


def test_an_optimizer_that_hands_on_some_tensors_does_not_make_them_its_own():
    """Such as one that trains two networks in turn; the first state keeps the idle one."""
    inner = pt.optim.sgd(0.1)

    def update(grads, state, params, *, donate=False):
        name = ("weight", "bias")[int(state.count) % 2]
        part, state = inner.update(
            FrozenDict({name: grads[name]}), state, FrozenDict({name: params[name]}), donate=donate
        )
        return params | part, state

    step = pt.train_step(loss, pt.optim.Optimizer(inner.init, update), draws=False)
    first = step(create(optimizer=inner), X)
    before = copied(first)
    second = step(first, X)
    step(step(second, X, donate=True), X, donate=True)
    assert tree_equal(first, before)


def test_tied_leaves_part_in_the_same_way_donated_or_not():
    weight = torch.tensor([1.0, 2.0])

    def tied_loss(params, buffers, batch, key):
        return (params["a"] * params["b"]).sum()

    step = pt.train_step(tied_loss, OPTIMIZER, draws=False)
    state = create({"a": weight, "b": weight})
    plain, donated = step(step(state, None), None), step(state, None, donate=True)
    assert tree_equal(step(donated, None, donate=True), plain)
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))


def test_a_step_that_fails_half_way_leaves_nothing_to_read():
    """The optimizer may have overwritten some of it already."""

    def update(grads, state, params, *, donate=False):
        params["weight"].mul_(2) if donate else None
        if donate:
            raise KeyError("a bug")
        return tree_map(torch.clone, params), ()

    step = pt.train_step(loss, pt.optim.Optimizer(lambda params: (), update), draws=False)
    state = step(create(optimizer=None), X)
    params = state.params
    with pytest.raises(KeyError, match="a bug"):
        step(state, X, donate=True)
    for read in (lambda: state.step, lambda: params["weight"]):
        with pytest.raises(DonatedStateError, match="failed while it overwrote the state"):
            read()


def test_a_loss_that_fails_leaves_a_donated_state_intact():
    def broken(params, buffers, batch, key):
        raise ZeroDivisionError("in the loss")

    state = after(1)
    before = copied(state)
    with pytest.raises(ZeroDivisionError):
        pt.train_step(broken, OPTIMIZER)(state, X, donate=True)
    assert tree_equal(state, before)


# ── Leases ────────────────────────────────────────────────────────────────────────────────────────


def test_a_leased_state_stays_and_the_next_is_the_same():
    state = after(1)
    before, expected = copied(state), STEP(copied(state), X)
    with pt.lease(state):
        new = STEP(state, X, donate=True)
    assert tree_equal(new, expected)
    assert tree_equal(state, before)
    assert not {x.data_ptr() for x in tree_leaves(new.params)} & {
        x.data_ptr() for x in tree_leaves(state.params)
    }
    STEP(state, X, donate=True)  # the lease is over
    with pytest.raises(DonatedStateError):
        _ = state.params


def test_a_lease_outlasts_many_steps():
    """The state after the one leased is donated as usual; the leased one must not change."""
    state = after(1)
    before = copied(state)
    with pt.lease(state):
        later = state
        for _ in range(5):
            later = STEP(later, X, donate=True)
        assert tree_equal(state, before)
    assert tree_equal(later, after(6))


def test_leases_count():
    state = after(1)
    first, second = pt.lease(state), pt.lease(state)
    first.release()
    first.release()  # a second release must not end the other lease
    STEP(state, X, donate=True)
    assert int(state.step) == 1
    second.release()
    STEP(state, X, donate=True)
    with pytest.raises(DonatedStateError):
        _ = state.step


def test_nested_leases():
    state = after(1)
    with pt.lease(state):
        with pt.lease(state):
            pass
        STEP(state, X, donate=True)
        assert int(state.step) == 1


def test_a_lease_ends_with_an_exception_in_its_block():
    state = after(1)
    with pytest.raises(ZeroDivisionError), pt.lease(state):
        raise ZeroDivisionError
    STEP(state, X, donate=True)
    with pytest.raises(DonatedStateError):
        _ = state.step


def test_a_lease_covers_states_that_share_its_containers():
    state = after(1)
    before = copied(state)
    with pt.lease(state):
        STEP(state.replace(step=torch.tensor(5)), X, donate=True)
        STEP(state.replace(params=FrozenDict(fresh_params())), X, donate=True)  # the opt_state
    assert tree_equal(state, before)


def test_a_lease_does_not_keep_a_state_alive():
    state = after(1)
    lease = pt.lease(state)
    alive = []
    reference = weakref.ref(state.params["weight"], lambda _: alive.append(False))
    del state
    gc.collect()
    assert alive == [False]
    assert reference() is None
    lease.release()  # of what is no more: nothing happens


def test_a_forgotten_lease_holds_as_long_as_the_state():
    state = after(1)
    pt.lease(state)
    gc.collect()
    STEP(state, X, donate=True)
    assert int(state.step) == 1
