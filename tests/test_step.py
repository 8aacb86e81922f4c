"""A step against the loop that it replaces, written in plain torch."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import puretrain as pt
from puretrain.errors import (
    ConfigurationError,
    DonatedStateError,
    LossError,
    NonFiniteError,
    OptimizerError,
    StructureError,
)
from puretrain.step import train_step
from puretrain.tree import FrozenDict, tree_cast, tree_diff, tree_equal, tree_leaves, tree_map

# ── Models and plain loops ────────────────────────────────────────────────────────────────────────


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


class Unused(nn.Module):
    """One parameter takes part in every other call only, one never."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.sometimes = nn.Linear(6, 4)
        self.never = nn.Linear(2, 2)

    def forward(self, x):
        return self.first(x) + (self.sometimes(x) if x[0, 0] > 0 else 0)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x[:, None])[0][:, 0]


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LazyLinear(4),
    ),
    "tied": Tied,
    "unused": Unused,
    "recurrent": Recurrent,
    "partly frozen": lambda: frozen(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))),
}

OPTIMIZERS = {
    "adamw": (
        functools.partial(pt.optim.adamw, 1e-2, weight_decay=0.1),
        functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    ),
    "sgd": (
        functools.partial(pt.optim.sgd, 0.1, momentum=0.9, weight_decay=0.01),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
}


def optimizers(name, model="mlp"):
    """One of ours, and how to make torch's for some parameters.

    The fused kernels, except where torch's own optimizer fails with them: SGD, when a parameter
    gets its first gradient after the others.
    """
    ours, torchs = OPTIMIZERS[name]
    fused = (name, model) != ("sgd", "unused")
    return ours(fused=fused), functools.partial(torchs, fused=fused)


def frozen(model):
    model[0].weight.requires_grad_(False)
    return model


def build(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]()
    if name == "convolution":
        model(torch.zeros(2, 6))
    return model


def data(name, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        if name == "tied":
            tokens = torch.randint(0, 11, (6, 3), generator=generator)
            batches.append((tokens, tokens.roll(1)))
        else:
            x = torch.randn(12, 6, generator=generator)
            batches.append((x, torch.randint(0, 4, (12,), generator=generator)))
    return batches


def cross_entropy(output, y):
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def plain_loop(model, optimizer, batches, key, accumulate=1):
    """The usual loop; before each batch it seeds torch as the step of that number does."""
    losses = []
    for n, (x, y) in enumerate(batches):
        with pt.random.scope(pt.random.fold_in(key, n)):
            loss = cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.detach())
        if (n + 1) % accumulate == 0 or n + 1 == len(batches):
            for p in model.parameters():
                if p.grad is not None and accumulate > 1:
                    p.grad /= n % accumulate + 1
            optimizer.step()
            optimizer.zero_grad()
    return losses


def module_loss(apply):
    def loss(params, buffers, batch, key):
        x, y = batch
        output, buffers = apply(params, buffers, x)
        return cross_entropy(output, y), pt.Aux(buffers=buffers, metrics={"mean": output.mean()})

    return loss


def start(model, optimizer, **options):
    apply, params, buffers = pt.functional(model)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(5))
    return state, pt.train_step(module_loss(apply), optimizer, **options)


def assert_same(state, model):
    """The parameters and buffers of a state are those of a module, bit for bit."""
    differences = []
    for tree in (state.params, state.buffers):
        own = model.state_dict(keep_vars=True)
        assert set(tree) <= set(own)
        differences += tree_diff(tree, FrozenDict({n: own[n].detach() for n in tree}))
    assert not differences, differences


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_plain_loop_bit_for_bit(name, optimizer, donate):
    ours, torchs = optimizers(optimizer, name)
    model = build(name)
    before = copy.deepcopy(model)
    state, step = start(model, ours)
    batches = data(name, 12)
    reference = copy.deepcopy(model)
    losses = plain_loop(
        reference,
        torchs([p for p in reference.parameters() if p.requires_grad]),
        batches,
        state.key,
    )
    for batch, expected in zip(batches, losses, strict=True):
        state = step(state, batch, donate=donate)
        assert tree_equal(state.metrics["loss"], expected)
    assert_same(state, reference)
    assert_same(start(before, ours)[0], model)  # and the module is as it was
    assert int(state.step) == int(state.updates) == 12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["batch norm", "dropout", "unused", "tied"])
@pytest.mark.parametrize(("accumulate", "count"), [(2, 8), (3, 10), (4, 3)])
def test_accumulated_gradients_equal_a_loop_that_sums_and_divides(
    name, optimizer, accumulate, count
):
    ours, torchs = optimizers(optimizer, name)
    model = build(name)
    batches = data(name, count)
    state, step = start(model, ours, accumulate=accumulate)
    reference = copy.deepcopy(model)
    plain_loop(reference, torchs(reference.parameters()), batches, state.key, accumulate)
    for donate in (False, True):
        now = state
        for batch in batches:
            now = step(now, batch, donate=donate)
        full, rest = divmod(count, accumulate)
        assert int(now.updates) == full
        assert int(now.accumulator.count) == rest
        now = step.flush(now, donate=donate)
        assert_same(now, reference)
        assert int(now.updates) == full + (rest > 0)
        assert int(now.step) == count
        assert int(now.accumulator.count) == 0
        assert tree_equal(step.flush(now), now)


def test_the_mean_of_micro_batches_by_hand():
    def loss(params, buffers, batch, key):
        return params["w"] * batch

    step = train_step(loss, pt.optim.sgd(1.0), accumulate=3)
    optimizer = pt.optim.sgd(1.0)
    state = pt.TrainState.create({"w": torch.tensor(0.0)}, None, optimizer, key=pt.random.key(0))
    seen = []
    for batch in (1.0, 2.0, 6.0, 10.0, 20.0):
        state = step(state, torch.tensor(batch))
        seen.append(float(state.params["w"]))
    assert seen == [0, 0, -3, -3, -3]
    assert float(step.flush(state).params["w"]) == -18


def test_a_gradient_of_minus_zero_stays_so_when_accumulated():
    def loss(params, buffers, batch, key):
        return (params["w"] * batch).sum()

    grads = []
    record = pt.optim.Optimizer(
        lambda params: (),
        lambda g, state, params, donate=False: (grads.append(g["w"]), (params, ()))[1],
    )
    step = train_step(loss, record, accumulate=1)
    summed = train_step(loss, record, accumulate=2)
    state = pt.TrainState.create({"w": torch.ones(2)}, None, record, key=pt.random.key(0))
    batch = torch.tensor([-0.0, 1.0])
    step(state, batch)
    summed.flush(summed(state, batch))
    assert tree_equal(*grads)


@pytest.mark.parametrize("position", range(1, 6))
def test_a_save_in_the_middle_of_a_group_continues_bit_for_bit(position, tmp_path):
    batches = data("dropout", 6)
    state, step = start(build("dropout"), optimizers("adamw")[0], accumulate=4)
    straight = state
    for batch in batches:
        straight = step(straight, batch)
    for batch in batches[:position]:
        state = step(state, batch, donate=True)
    pt.save(tmp_path / "s.ckpt", state)
    fresh, _ = start(build("dropout", seed=9), optimizers("adamw")[0])
    for donate in (False, True):
        loaded = pt.load(tmp_path / "s.ckpt", like=fresh)
        for batch in batches[position:]:
            loaded = step(loaded, batch, donate=donate)
        assert tree_equal(loaded, straight)
        assert tree_equal(step.flush(loaded, donate=donate), step.flush(straight))


def test_a_loaded_accumulator_is_not_shared_with_the_state_it_came_from(tmp_path):
    batches = data("mlp", 6)
    state, step = start(build("mlp"), optimizers("sgd")[0], accumulate=4)
    pt.save(tmp_path / "s.ckpt", step(state, batches[0]))
    loaded = pt.load(tmp_path / "s.ckpt", like=state)
    before = tree_map(torch.clone, loaded)
    skipped = step.flush(step(loaded, batches[1]))
    step(step(skipped, batches[2], donate=True), batches[3], donate=True)
    assert tree_equal(loaded, before)


# ── Precision ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("donate", [False, True])
def test_precision_64_equals_a_loop_in_float64(donate):
    model = build("batch norm").double()
    optimizer, torchs = optimizers("adamw")
    state, step = start(model, optimizer, precision="64")
    batches = data("batch norm", 6)  # in float32: the step converts them
    reference = copy.deepcopy(model)
    plain_loop(
        reference,
        torchs(reference.parameters()),
        [(x.double(), y) for x, y in batches],
        state.key,
    )
    for batch in batches:
        state = step(state, batch, donate=donate)
    assert_same(state, reference)
    assert state.metrics["loss"].dtype == torch.float64


def test_precision_64_wants_such_parameters():
    state, step = start(build("mlp"), optimizers("sgd")[0], precision="64")
    with pytest.raises(StructureError, match=r"params/0.weight is torch.float32.*tree_cast"):
        step(state, data("mlp", 1)[0])
    wide = state.replace(params=tree_cast(state.params, torch.float64))
    with pytest.raises(OptimizerError):
        step(wide.replace(opt_state=()), data("mlp", 1)[0])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("16", torch.float16)])
def test_autocast_is_that_of_torch(precision, dtype):
    optimizer, torchs = optimizers("adamw")
    model = build("mlp")
    state, step = start(model, optimizer, precision=precision)
    reference = copy.deepcopy(model)
    own = torchs(reference.parameters())
    scale = 65536.0 if precision == "16" else 1.0
    for x, y in data("mlp", 8):
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(reference(x), y)
        (loss * scale).backward()
        for p in reference.parameters():
            p.grad /= scale
        own.step()
        own.zero_grad()
        state = step(state, (x, y), donate=True)
        assert tree_equal(state.metrics["loss"], loss.detach())
    assert_same(state, reference)
    assert state.params["0.weight"].dtype == torch.float32
    assert (state.loss_scale is not None) == (precision == "16")


def linear_loss(params, buffers, batch, key):
    return params["w"] * batch


def linear_state(optimizer=None, **changes):
    optimizer = optimizer or pt.optim.sgd(1e-3)
    state = pt.TrainState.create({"w": torch.tensor(1.0)}, None, optimizer, key=pt.random.key(0))
    return state.replace(**changes)


def test_the_loss_scale_moves_like_torchs_grad_scaler():
    """Overflows halve it, 2000 good batches in a row double it, and a skip leaves the rest."""
    pattern = [True] * 3 + [False, False] + [True] * 2001 + [False] + [True] * 5
    step = train_step(linear_loss, pt.optim.sgd(1e-3), precision="16")
    state = linear_state()
    weight = nn.Parameter(torch.tensor(1.0))
    own = torch.optim.SGD([weight], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    for good in pattern:
        batch = torch.tensor(0.5 if good else float("inf"))
        state = step(state, batch, donate=True)
        own.zero_grad()
        scaler.scale(weight * batch).backward()
        scaler.step(own)
        scaler.update()
        assert float(state.loss_scale.scale) == scaler.get_scale()
        assert int(state.loss_scale.good) == scaler._get_growth_tracker()
    assert tree_equal(state.params["w"], weight.detach())
    assert int(state.skipped) == pattern.count(False)
    assert int(state.updates) == pattern.count(True)
    assert int(state.step) == len(pattern)


def test_an_overflow_of_float16_alone_is_skipped():
    """The loss and the true gradient are finite; only the scaled gradient is not."""

    def loss(params, buffers, batch, key):
        return (params["w"] * batch).half().float().sum()

    optimizer = pt.optim.sgd(0.1, momentum=0.9)
    step = train_step(loss, optimizer, precision="16")
    state = pt.TrainState.create({"w": torch.ones(2)}, None, optimizer, key=pt.random.key(0))
    scales = []
    for _ in range(3):
        after = step(state, torch.tensor([1.0, 2.0]))
        scales.append(float(after.loss_scale.scale))
        assert tree_equal(after.params, state.params) == (int(after.skipped) > int(state.skipped))
        state = after
    assert scales == [32768.0, 32768.0, 32768.0]
    assert int(state.skipped) == 1
    torch.testing.assert_close(state.params["w"], torch.tensor([0.71, 0.42]))


def test_the_loss_scale_stays_finite():
    """With gradients of zero nothing overflows, and it would double for ever."""
    step = train_step(linear_loss, pt.optim.sgd(1e-3), precision="16")
    state = step(linear_state(), torch.tensor(0.0))
    largest = 2.0**127
    state = state.replace(
        loss_scale=state.loss_scale.replace(
            scale=torch.tensor(largest), good=torch.tensor(1999, dtype=torch.int32)
        )
    )
    state = step(state, torch.tensor(0.0))
    assert float(state.loss_scale.scale) == largest
    assert int(state.skipped) == 0


def test_the_loss_scale_is_saved_with_the_state(tmp_path):
    step = train_step(linear_loss, pt.optim.sgd(1e-3), precision="16")
    state = step(step(linear_state(), torch.tensor(float("inf"))), torch.tensor(1.0))
    pt.save(tmp_path / "s.ckpt", state)
    loaded = pt.load(tmp_path / "s.ckpt", like=linear_state())
    assert float(step(loaded, torch.tensor(1.0)).loss_scale.scale) == 32768.0
    assert tree_equal(step(loaded, torch.tensor(1.0)), step(state, torch.tensor(1.0)))


def test_an_overflow_leaves_its_group_waiting_for_another_batch():
    step = train_step(linear_loss, pt.optim.sgd(1.0), precision="16", accumulate=2)
    state = linear_state(pt.optim.sgd(1.0))
    for batch in (2.0, float("inf"), 4.0):
        state = step(state, torch.tensor(batch), donate=True)
    assert int(state.updates) == 1
    assert float(state.params["w"]) == 1 - (2 + 4) / 2


# ── What is not finite ────────────────────────────────────────────────────────────────────────────

NAN = float("nan")


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_raise_leaves_the_state_as_it_was(donate, accumulate):
    optimizer = pt.optim.adamw(0.1)
    step = train_step(linear_loss, optimizer, nonfinite="raise", accumulate=accumulate)
    state = step(linear_state(optimizer), torch.tensor(2.0))
    before = tree_map(torch.clone, state)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is not finite \(loss nan\)"):
        step(state, torch.tensor(NAN), donate=donate)
    assert tree_equal(state, before)
    assert tree_equal(
        step(state, torch.tensor(3.0), donate=donate), step(before, torch.tensor(3.0))
    )


def test_raise_names_the_gradient():
    def loss(params, buffers, batch, key):
        return params["a"].sum() + params["b"]["c"].sqrt().sum()

    optimizer = pt.optim.sgd(0.1)
    state = pt.TrainState.create(
        {"a": torch.ones(2), "b": {"c": torch.zeros(1)}}, None, optimizer, key=pt.random.key(0)
    )
    with pytest.raises(NonFiniteError, match="the gradient of params/b/c is not finite.*'skip'"):
        train_step(loss, optimizer, nonfinite="raise")(state, None)


@pytest.mark.parametrize("donate", [False, True])
def test_skip_counts_and_leaves_all_but_the_counters(donate):
    optimizer = pt.optim.adamw(0.1)

    def loss(params, buffers, batch, key):
        return params["w"] * batch, pt.Aux(buffers={"seen": buffers["seen"] + 1})

    step = train_step(loss, optimizer, nonfinite="skip")
    state = step(linear_state(optimizer, buffers=FrozenDict(seen=torch.tensor(0))), torch.ones(()))
    before = tree_map(torch.clone, state)
    for batch in (NAN, math.inf, -math.inf):
        state = step(state, torch.tensor(batch), donate=donate)
    changed = {difference.path for difference in tree_diff(before, state)}
    assert changed == {"step", "skipped", "metrics/loss"}
    assert (int(state.step), int(state.updates), int(state.skipped)) == (4, 1, 3)
    state = step(state, torch.ones(()), donate=donate)
    assert int(state.buffers["seen"]) == 2
    assert int(state.updates) == 2


def test_propagate_does_not_look():
    state = train_step(linear_loss, pt.optim.sgd(0.1))(linear_state(), torch.tensor(NAN))
    assert state.params["w"].isnan()
    assert int(state.skipped) == 0


def test_large_float64_and_empty_parameters_are_finite():
    optimizer = pt.optim.sgd(0.0)
    state = pt.TrainState.create(
        {"w": torch.tensor(1.0, dtype=torch.float64), "none": torch.zeros(0, dtype=torch.float64)},
        None,
        optimizer,
        key=pt.random.key(0),
    )
    step = train_step(
        lambda params, buffers, batch, key: params["w"] * 1e300 + params["none"].sum(),
        optimizer,
        nonfinite="raise",
        precision="64",
    )
    assert float(step(state, None).metrics["loss"]) == 1e300


# ── Aux, keys, randomness ─────────────────────────────────────────────────────────────────────────


def test_aux_metrics_and_buffers():
    def loss(params, buffers, batch, key):
        value = (params["w"] * batch).sum()
        metrics = {
            "double": 2 * value,
            "count": 3,
            "half": 0.5,
            "mean": pt.metrics.Mean.of(batch),
        }
        return value, pt.Aux(buffers={"last": value}, metrics=metrics)

    state = train_step(loss, pt.optim.sgd(0.1))(
        linear_state(buffers=FrozenDict(last=torch.zeros(()))), torch.tensor([1.0, 2.0])
    )
    assert list(state.metrics) == ["loss", "double", "count", "half", "mean"]
    assert float(state.metrics["double"]) == 6
    assert state.metrics["count"].dtype == state.metrics["half"].dtype == torch.float64
    assert float(state.metrics["mean"].compute()) == 1.5
    assert float(state.buffers["last"]) == 3
    assert not any(leaf.requires_grad or leaf.grad_fn for leaf in tree_leaves(state))


def test_no_aux_keeps_the_buffers():
    buffers = FrozenDict(mean=torch.ones(2))
    state = train_step(linear_loss, pt.optim.sgd(0.1))(
        linear_state(buffers=buffers), torch.tensor(1.0)
    )
    assert state.buffers is buffers


def test_the_key_of_a_step_is_a_function_of_the_keys_and_the_number():
    keys = []

    def loss(params, buffers, batch, key):
        keys.append(key)
        return params["w"] * torch.rand(())

    step = train_step(loss, pt.optim.sgd(0.1))
    state = linear_state()
    drawn = []
    for _ in range(3):
        state = step(state, None)
        drawn.append(state.metrics["loss"])
    assert tree_equal(keys, [pt.random.fold_in(state.key, n) for n in range(3)])
    assert len({float(x) for x in drawn}) == 3


def test_a_step_that_draws_nothing_has_no_key():
    def loss(params, buffers, batch, key):
        assert key is None
        return params["w"] * torch.rand(())

    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    state = train_step(loss, pt.optim.sgd(0.1), draws=False)(linear_state(), None)
    assert torch.equal(state.metrics["loss"], expected)  # the generator was left alone


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(context):
    step = train_step(linear_loss, pt.optim.sgd(0.1))
    expected = step(linear_state(), torch.tensor(2.0))
    with context():
        assert tree_equal(step(linear_state(), torch.tensor(2.0)), expected)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x.detach(), lambda x: x[1:], lambda x: x.view(1, -1)],
)
def test_metrics_and_buffers_do_not_change_with_what_they_were_taken_from(view, donate):
    def loss(params, buffers, batch, key):
        kept = {"param": view(params["w"]), "batch": view(batch)}
        return (params["w"] * batch).sum(), pt.Aux(buffers=dict(kept), metrics=kept)

    optimizer = pt.optim.sgd(1.0)
    step = train_step(loss, optimizer)
    state = pt.TrainState.create(
        {"w": torch.zeros(2)},
        {"param": view(torch.zeros(2)), "batch": view(torch.zeros(2))},
        optimizer,
        key=pt.random.key(0),
    )
    state = step(state, torch.ones(2))  # w is -1 now
    batch = torch.tensor([5.0, 6.0])
    after = step(state, batch, donate=donate)
    kept = after.metrics, after.buffers
    step(after, batch, donate=True)
    batch.zero_()
    for tree in kept:
        assert torch.equal(tree["param"], view(torch.tensor([-1.0, -1.0])))
        assert torch.equal(tree["batch"], view(torch.tensor([5.0, 6.0])))


class Named(torch.Tensor):
    """A kind of tensor of somebody else's."""


def test_parameters_of_another_kind_have_the_gradients_of_plain_ones():
    def loss(params, buffers, batch, key):
        return (params["w"] * batch).sin().sum()

    optimizer = pt.optim.sgd(0.5)
    step = pt.train_step(loss, optimizer)
    batch = torch.linspace(-2, 2, 5)
    after = {}
    for kind in (torch.Tensor, Named):
        params = {"w": torch.arange(5.0).as_subclass(kind), "unused": torch.ones(2)}
        state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
        after[kind] = step(state, batch)
        assert type(after[kind].params["w"]) is kind
        assert torch.equal(after[kind].params["unused"], torch.ones(2))
    w = torch.arange(5.0, requires_grad=True)
    (slope,) = torch.autograd.grad((w * batch).sin().sum(), w)
    for state in after.values():
        assert torch.equal(state.params["w"].as_subclass(torch.Tensor), w.detach() - 0.5 * slope)


def test_a_loss_that_is_a_parameter():
    step = train_step(lambda params, buffers, batch, key: params["w"], pt.optim.sgd(1.0))
    state, losses = linear_state(), []
    for _ in range(4):
        state = step(state, None, donate=True)
        losses.append(state.metrics["loss"])
    assert torch.stack(losses).tolist() == [1.0, 0.0, -1.0, -2.0]


def test_one_gradient_for_two_parameters():
    """Autograd returns the same tensor for both; what changes one must not change the other."""

    def loss(params, buffers, batch, key):
        return params["a"] + params["b"]

    optimizer = pt.optim.chain(pt.optim.clip_by_value(0.5), pt.optim.sgd(1.0, weight_decay=0.5))
    step = train_step(loss, optimizer, accumulate=2)
    state = pt.TrainState.create(
        {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, None, optimizer, key=pt.random.key(0)
    )
    for _ in range(4):
        state = step(state, None, donate=True)
    expected = {}
    for name, value in (("a", 1.0), ("b", 2.0)):
        for _ in range(2):
            value -= 0.5 + 0.5 * value
        expected[name] = torch.tensor(value)
    assert tree_equal(dict(state.params), expected)


class ReturnsItsInput(torch.autograd.Function):
    """A dot product whose backward hands out the very tensor that it was given."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.saved_tensors[0]


def test_a_gradient_that_is_the_batch_leaves_it_alone():
    def loss(params, buffers, batch, key):
        return ReturnsItsInput.apply(batch, params["w"])

    optimizer = pt.optim.chain(pt.optim.clip_by_global_norm(1e-3), pt.optim.sgd(0.1))
    for accumulate in (1, 2):
        step = train_step(loss, optimizer, accumulate=accumulate)
        state = pt.TrainState.create({"w": torch.ones(2)}, None, optimizer, key=pt.random.key(0))
        batch = torch.tensor([3.0, 4.0])
        for _ in range(4):
            state = step(state, batch, donate=True)
        assert torch.equal(batch, torch.tensor([3.0, 4.0]))


def test_channels_last_parameters_train_like_others():
    def run(layout):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2).to(memory_format=layout)
        apply, params, buffers = pt.functional(model)
        optimizer = pt.optim.adamw(1e-2)
        state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
        step = train_step(
            lambda p, b, x, key: apply(p, b, x)[0].square().mean(), optimizer, draws=False
        )
        for x in torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(2)):
            state = step(state, x.to(memory_format=layout), donate=True)
        return state

    contiguous, last = run(torch.contiguous_format), run(torch.channels_last)
    assert last.params["weight"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dict(last.params), dict(contiguous.params))


def test_a_closure_that_keeps_what_it_was_given_changes_nothing():
    kept = []

    def loss(params, buffers, batch, key):
        kept.append((params, buffers, batch, key))
        return (params["w"] * batch).sum()

    def quiet(params, buffers, batch, key):
        return (params["w"] * batch).sum()

    runs = []
    for function in (loss, quiet):
        step = train_step(function, pt.optim.sgd(0.1))
        state = linear_state()
        for n in range(3):
            state = step(state, torch.tensor(float(n)), donate=True)
        runs.append(state)
    assert tree_equal(*runs)
    assert all(params["w"].requires_grad for params, *_ in kept)
    assert not any(leaf.requires_grad for leaf in tree_leaves(runs[0]))


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def test_eval_step_runs_without_gradients_and_changes_nothing():
    model = build("dropout")
    state, step = start(model, optimizers("sgd")[0])
    state = step(state, data("dropout", 1)[0])
    apply, *_ = pt.functional(model)
    before = tree_map(torch.clone, state)

    def metrics(params, buffers, batch, key):
        assert not torch.is_grad_enabled()
        output, _ = apply(params, buffers, batch, train=False)
        return {"mean": output.mean(), "w": params["0.weight"], "rate": 0.5}

    x = data("dropout", 1)[0][0]
    result = pt.eval_step(metrics)(state, x)
    reference = build("dropout").eval()
    reference.load_state_dict(dict(state.params))
    assert torch.equal(result["mean"], reference(x).mean().detach())
    assert result["rate"].dtype == torch.float64
    assert tree_equal(state, before)
    step(state, data("dropout", 1)[0], donate=True)
    assert torch.equal(result["w"], before.params["0.weight"])


def test_eval_step_draws_by_key_and_step_alone():
    step = pt.eval_step(lambda params, buffers, batch, key: {"drawn": torch.rand(())})
    state = linear_state()
    torch.manual_seed(1)
    first = step(state, None)
    torch.rand(3)
    assert tree_equal(step(state, None), first)
    assert not tree_equal(step(state.replace(step=torch.tensor(1)), None), first)


def test_eval_step_precision():
    step = pt.eval_step(
        lambda p, b, x, key: {"y": (x @ x).sum(), "wide": (x + 1).sum()}, precision="64"
    )
    assert step(linear_state(), torch.eye(2))["y"].dtype == torch.float64
    half = pt.eval_step(lambda p, b, x, key: {"y": (x @ x).sum()}, precision="bf16")
    assert half(linear_state(), torch.eye(2))["y"].dtype == torch.bfloat16


def test_eval_step_wants_metrics_by_name():
    with pytest.raises(LossError, match="the function of eval_step returned Tensor"):
        pt.eval_step(lambda p, b, x, key: x)(linear_state(), torch.ones(()))


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


def module_of_its_own():
    module = nn.Linear(2, 1)
    return lambda p, b, x, key: module(torch.ones(2)).sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, b, x, k: torch.stack([p["w"]] * 2), r"torch.float32 and shape \(2,\).*reduce"),
        (lambda p, b, x, k: p["w"].to(torch.complex64), "torch.complex64"),
        (lambda p, b, x, k: p["w"] > 0, "torch.bool"),
        (lambda p, b, x, k: 1.0, r"returned an object of type float.*Aux"),
        (lambda p, b, x, k: None, "type NoneType"),
        (lambda p, b, x, k: (p["w"], {"a": 1}), "type dict"),
        (lambda p, b, x, k: (p["w"], pt.Aux(), pt.Aux()), "type Aux"),
        (lambda p, b, x, k: {"loss": p["w"]}, "type dict"),
        (lambda p, b, x, k: torch.ones(()), "does not depend on any parameter"),
        (lambda p, b, x, k: p["w"].detach() + 1, "does not depend on any parameter"),
        (module_of_its_own(), r"does not depend on any parameter.*not from a module's own"),
        (
            lambda p, b, x, k: (p["w"], pt.Aux(metrics=p["w"])),
            "metrics in Aux are a tensor of torch.float32.*by name",
        ),
    ],
)
@pytest.mark.parametrize("donate", [False, True])
def test_a_bad_loss_is_a_named_error_and_leaves_the_state(loss, message, donate):
    state = train_step(linear_loss, pt.optim.sgd(0.1))(linear_state(), torch.tensor(1.0))
    before = tree_map(torch.clone, state)
    with pytest.raises(LossError, match=message):
        train_step(loss, pt.optim.sgd(0.1))(state, None, donate=donate)
    assert tree_equal(state, before)


def in_place(name):
    def loss(params, buffers, batch, key):
        with torch.no_grad():
            {"params/w": params["w"], "buffers/mean": buffers["mean"], "batch/1": batch[1]}[
                name
            ].mul_(2)
        return params["w"] * batch[0].detach()

    return loss


@pytest.mark.parametrize("name", ["params/w", "buffers/mean", "batch/1"])
def test_a_loss_that_changes_its_arguments_is_told_so(name):
    state = linear_state(buffers=FrozenDict(mean=torch.ones(2)))
    step = train_step(in_place(name), pt.optim.sgd(0.1))
    with pytest.raises(LossError, match=f"has changed {name} in place.*x = x / 255"):
        step(state, (torch.ones(()), torch.ones(2)))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (torch.tensor([1, 2]), r"params/a/b is a tensor of torch.int64 and shape \(2,\).*buffers"),
        (torch.tensor(True), "params/a/b is a tensor of torch.bool"),
        (0.5, "params/a/b is an object of type float"),
    ],
)
def test_a_parameter_that_has_no_gradient_is_named(leaf, message):
    state = linear_state().replace(params=FrozenDict(w=torch.ones(()), a=FrozenDict(b=leaf)))
    with pytest.raises(StructureError, match=message):
        train_step(linear_loss, pt.optim.sgd(0.1))(state, torch.ones(()))


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        params = FrozenDict(w=torch.ones(()))
    state = linear_state().replace(params=params)
    with pytest.raises(StructureError, match=r"torch\.inference_mode"):
        train_step(linear_loss, pt.optim.sgd(0.1))(state, torch.ones(()))


def test_a_batch_made_in_inference_mode_is_fine():
    with torch.inference_mode():
        batch = torch.tensor([0, 1])

    def loss(params, buffers, batch, key):
        return params["w"] * (batch == 1).sum()

    state = train_step(loss, pt.optim.sgd(0.1))(linear_state(), batch)
    assert float(state.params["w"]) == pytest.approx(0.9)


def test_a_sparse_gradient_is_named():
    apply, params, buffers = pt.functional(nn.Embedding(3, 2, sparse=True))
    optimizer = pt.optim.sgd(0.1)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = train_step(lambda p, b, x, key: apply(p, b, x)[0].sum(), optimizer)
    with pytest.raises(StructureError, match=r"params/weight has a gradient.*sparse=False"):
        step(state, torch.tensor([0, 1]))


def test_an_optimizer_that_does_not_match_the_state():
    step = train_step(linear_loss, pt.optim.adamw(0.1))
    with pytest.raises(OptimizerError, match="adamw.*init"):
        step(linear_state(pt.optim.sgd(0.1)), torch.ones(()))


@pytest.mark.parametrize("swapped", [torch.ones(()), None, {"params": {}}])
def test_a_step_takes_a_state_first(swapped):
    step = train_step(linear_loss, pt.optim.sgd(0.1))
    with pytest.raises(StructureError, match="a step takes a TrainState and a batch, in this"):
        step(swapped, linear_state())
    with pytest.raises(StructureError, match="a step takes a TrainState"):
        train_step(linear_loss, pt.optim.sgd(0.1), accumulate=2).flush(swapped)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulate": 0}, ConfigurationError, "accumulate is a whole number from 1, not 0"),
        ({"accumulate": 2.0}, ConfigurationError, "accumulate"),
        ({"precision": "fp8"}, ConfigurationError, "precision is one of '32', '64', 'bf16', '16'"),
        ({"nonfinite": "ignore"}, ConfigurationError, "nonfinite is one of 'propagate', 'raise'"),
        ({"optimizer": pt.optim.clip_by_value(1.0)}, OptimizerError, "end a chain"),
        ({"optimizer": torch.optim.SGD}, OptimizerError, "optimizer is an Optimizer"),
    ],
)
def test_bad_arguments_of_train_step(options, error, message):
    arguments = {"optimizer": pt.optim.sgd(0.1)} | options
    with pytest.raises(error, match=message):
        train_step(linear_loss, arguments.pop("optimizer"), **arguments)


def test_a_loss_that_is_no_function():
    with pytest.raises(LossError, match="loss is a function .* not an object of type int"):
        train_step(3, pt.optim.sgd(0.1))


def test_a_recipe_makes_the_same_step_but_for_one_argument():
    recipe = train_step(linear_loss, pt.optim.sgd(0.1)).recipe.replace(accumulate=4)
    assert recipe.step().recipe == recipe
    assert (recipe.loss, recipe.accumulate) == (linear_loss, 4)
    with pytest.raises(ConfigurationError, match="an argument of train_step is one of 'loss'"):
        recipe.replace(accumulation=4)


def test_bad_precision_of_eval_step():
    with pytest.raises(ConfigurationError, match="precision is one of"):
        pt.eval_step(lambda p, b, x, key: {}, precision="8")


@pytest.mark.parametrize("leased", [False, True])
def test_the_first_of_a_group_is_donated_like_every_other(leased):
    step = train_step(linear_loss, pt.optim.sgd(0.1), accumulate=2)
    state = linear_state()
    lease = pt.lease(state) if leased else None
    after = step(state, torch.ones(()), donate=True)
    assert int(after.accumulator.count) == 1
    if lease is not None:
        assert int(state.step) == 0
        assert state.accumulator is None
    else:
        for name in pt.TrainState._names:
            with pytest.raises(DonatedStateError):
                getattr(state, name)


def test_flushing_nothing_gives_the_state_back():
    step = train_step(linear_loss, pt.optim.sgd(0.1), accumulate=2)
    state = step(step(linear_state(), torch.ones(())), torch.ones(()))
    before = tree_map(torch.clone, state)
    assert tree_equal(step.flush(step.flush(state), donate=True), before)
    state = linear_state()
    assert float(step.flush(state, donate=True).params["w"]) == 1.0


def test_a_donated_state_is_refused_by_flush_and_eval_step():
    step = train_step(linear_loss, pt.optim.sgd(0.1), accumulate=2)
    state = step(linear_state(), torch.ones(()))
    step(state, torch.ones(()), donate=True)
    with pytest.raises(DonatedStateError):
        step.flush(state)
    with pytest.raises(DonatedStateError):
        pt.eval_step(lambda p, b, x, key: {})(state, None)
