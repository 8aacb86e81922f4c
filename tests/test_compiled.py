"""A step as one compiled graph, and rematerialization, against the eager step and plain torch."""

import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import puretrain as pt
from puretrain.errors import ConfigurationError, DonatedStateError, TransformError
from puretrain.tree import tree_equal, tree_leaves, tree_map, tree_paths, tree_stack

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="the backend inductor compiles C++, and there is no C++ compiler on this machine",
)


@pytest.fixture(scope="module", autouse=True)
def _compiled_no_longer():
    yield
    torch.compiler.reset()


def network(dropout=0.5):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return pt.functional(nn.Sequential(*layers))


def start(optimizer, dropout=0.5, **options):
    apply, params, buffers = network(dropout)

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, buffers = apply(params, buffers, x)
        accuracy = (logits.argmax(1) == y).float().mean()
        return cross_entropy(logits, y), pt.Aux(buffers, {"accuracy": accuracy})

    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    return state, pt.train_step(loss, optimizer, **options)


def batch_of(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def close(a, b, **tolerance):
    for path, x, y in zip(tree_paths(a), tree_leaves(a), tree_leaves(b), strict=True):
        if path[-1] == "0.bias":  # its true gradient is zero, since a BatchNorm follows
            continue
        torch.testing.assert_close(x, y, msg=lambda text, path=path: f"{path}: {text}", **tolerance)


OPTIMIZER = pt.optim.chain(
    pt.optim.clip_by_global_norm(1.0), pt.optim.sgd(pt.optim.cosine(0.1, 10), momentum=0.9)
)


# ── One graph ─────────────────────────────────────────────────────────────────────────────────────


@needs_compiler
def test_a_compiled_fit_draws_and_equals_the_eager_one():
    state, step = start(OPTIMIZER)
    compiled = pt.compiled(step)
    data = pt.batches(batch_of(0, 48), 16)
    before = torch.get_rng_state()
    after = pt.fit(state, compiled, data, epochs=2, reducers=[pt.ema(0.9)])
    assert torch.equal(torch.get_rng_state(), before)
    close(after, pt.fit(state, step, data, epochs=2, reducers=[pt.ema(0.9)]))
    again = pt.fit(state, compiled, data, epochs=2, reducers=[pt.ema(0.9)])
    assert tree_equal(after, again)
    report = compiled.report()
    assert (report.calls, len(report.graphs), report.breaks, report.recompiles) == (12, 1, 0, ())
    assert report.graphs[0].operations > 50
    assert str(report).startswith("12 calls, 1 graphs, 0 breaks, 0 recompiles\ngraph 0: ")


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"nonfinite": "skip"}, {"precision": "16"}, {"draws": False}]
)
def test_the_options_of_a_step_compile(options):
    dropout = 0.0 if options.get("draws") is False else 0.5
    state, step = start(OPTIMIZER, dropout=dropout, **options)
    compiled = pt.compiled(step, backend="aot_eager")
    eager = tree_map(torch.clone, state)
    for n in range(3):
        state, eager = compiled(state, batch_of(n), donate=True), step(eager, batch_of(n))
    close(state, eager, rtol=1e-4, atol=1e-5)
    # The first step makes the accumulator or the loss scale, so the second has another structure.
    assert len(compiled.report().graphs) <= 2


def test_donation_keeps_the_memory_and_its_laws():
    state, step = start(OPTIMIZER)
    compiled = pt.compiled(step, backend="aot_eager")
    kept = tree_map(torch.clone, state)
    first = compiled(state, batch_of(0), donate=True)  # what came from elsewhere is copied
    places = [leaf.data_ptr() for leaf in tree_leaves((first.params, first.opt_state))]
    assert tree_equal(state.params if "params" in state.__dict__ else kept.params, kept.params)
    second = compiled(first, batch_of(1), donate=True)
    assert places == [leaf.data_ptr() for leaf in tree_leaves((second.params, second.opt_state))]
    with pytest.raises(DonatedStateError, match="step 2 was computed with donate=True"):
        _ = first.params
    with pt.lease(second):
        third = compiled(second, batch_of(2), donate=True)
        assert tree_equal(second.params, tree_map(torch.clone, second.params))
        assert third.params["0.weight"].data_ptr() != second.params["0.weight"].data_ptr()
    close(third, compiled(second, batch_of(2)))
    close(second, step(step(kept, batch_of(0)), batch_of(1)))


def test_out_of_place_leaves_the_given_state():
    state, step = start(OPTIMIZER)
    compiled = pt.compiled(step, backend="aot_eager")
    kept = tree_map(torch.clone, state)
    one, two = compiled(state, batch_of(0)), compiled(state, batch_of(0))
    assert tree_equal(state, kept)
    assert tree_equal(one, two)


def test_a_metric_that_is_a_parameter_keeps_the_old_value():
    def loss(params, buffers, batch, key):
        value = mse_loss(params["w"], batch)
        return value, pt.Aux({"before": params["w"]}, {"w": params["w"][0]})

    optimizer = pt.optim.sgd(0.5)
    params, buffers = {"w": torch.zeros(2)}, {"before": torch.ones(2)}
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = pt.train_step(loss, optimizer)
    compiled = pt.compiled(step, backend="aot_eager")
    state, eager = compiled(state, torch.ones(2)), step(state, torch.ones(2))
    state, eager = compiled(state, torch.ones(2), donate=True), step(eager, torch.ones(2))
    close(state, eager)
    assert state.metrics["w"] == state.buffers["before"][0] != state.params["w"][0]


def start_tiny():
    """The smallest step: for what is about graphs, whatever is in them."""
    optimizer = pt.optim.sgd(0.1)
    state = pt.TrainState.create({"w": torch.zeros(())}, None, optimizer, key=pt.random.key(0))
    return state, pt.train_step(lambda p, b, x, key: ((p["w"] - x) ** 2).sum(), optimizer)


def test_recompiles_are_counted_with_their_reasons():
    state, step = start_tiny()
    compiled = pt.compiled(step, backend="aot_eager")
    for size in (16, 16, 12, 16):
        state = compiled(state, torch.ones(size), donate=True)
    report = compiled.report()
    assert (len(report.graphs), len(report.recompiles)) == (2, 1)
    assert report.graphs[0].reason is None
    assert "size mismatch" in report.recompiles[0].reason
    assert "size mismatch" in str(report)


SCALE = [1.0]


def test_what_the_loss_finds_elsewhere_may_change():
    """Torch looks at what hangs on the user's modules, objects and closures before each call."""
    options = {"factor": 1.0}
    module = nn.Dropout(0.5).eval()

    def loss(params, buffers, batch, key):
        return (module(params["w"]) - SCALE[0] * options["factor"] * batch).pow(2).sum()

    optimizer = pt.optim.sgd(0.25)
    state = pt.TrainState.create({"w": torch.ones(64)}, None, optimizer, key=pt.random.key(0))
    eager = pt.train_step(loss, optimizer)
    step = pt.compiled(eager, backend="aot_eager")
    batch = torch.ones(64)
    try:
        for change in (None, lambda: SCALE.__setitem__(0, 3.0), lambda: options.update(factor=5.0)):
            if change is not None:
                change()
            assert tree_equal(step(state, batch).params, eager(state, batch).params)
        module.train()
        dropped = step(state, batch).params
        assert tree_equal(dropped, eager(state, batch).params)
        assert len(dropped["w"].unique()) == 2
    finally:
        SCALE[0] = 1.0
    assert len(step.report().graphs) == 4


@pytest.fixture
def limit():
    """Torch's limit of graphs, lowered: each takes a second."""
    with torch._dynamo.config.patch(recompile_limit=2):
        yield 2


def test_too_many_graphs_are_an_error_that_leaves_the_state(limit):
    state, step = start_tiny()
    compiled = pt.compiled(step, backend="eager")
    for size in range(1, limit + 1):
        state = compiled(state, torch.ones(size), donate=True)
    with pytest.raises(TransformError, match=f"compiled {limit} times.*size mismatch"):
        compiled(state, torch.ones(limit + 1), donate=True)
    assert int(state.step) == limit
    assert len(compiled.report().graphs) == limit


def test_one_step_does_not_use_up_the_recompiles_of_another(limit):
    for _ in range(limit + 1):
        state, step = start_tiny()
        compiled = pt.compiled(step, backend="eager")
        compiled(state, torch.ones(2))
        assert len(compiled.report().graphs) == 1


def test_a_rate_in_the_state_needs_no_second_graph():
    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.1)
    state, step = start(optimizer)
    compiled = pt.compiled(step, backend="aot_eager")
    one = compiled(state, batch_of(0))
    slow = pt.optim.set_hyperparams(one.opt_state, lr=0.01)
    eager = step(one.replace(opt_state=slow), batch_of(1))
    close(compiled(one.replace(opt_state=slow), batch_of(1)), eager)
    assert len(compiled.report().graphs) == 1


def test_an_ensemble_compiles():
    state, step = start(pt.optim.sgd(0.1), dropout=0.0, draws=False)
    many = tree_stack([state, state.replace(key=pt.random.key(1))])
    ensemble = torch.func.vmap(step, (0, None), randomness="different")
    compiled = pt.compiled(ensemble, backend="aot_eager")
    close(compiled(many, batch_of(0)), ensemble(many, batch_of(0)))


def test_what_does_not_fit_into_a_graph_says_so():
    optimizer = pt.optim.sgd(0.1)

    def looking(params, buffers, batch, key):
        value = mse_loss(params["w"], batch)
        return value if value.item() > 0 else 2 * value

    def stepping(loss, **options):
        state = pt.TrainState.create({"w": torch.zeros(2)}, None, optimizer, key=pt.random.key(0))
        return state, pt.compiled(pt.train_step(loss, optimizer, **options), backend="aot_eager")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, compiled = stepping(looking)
        with pytest.raises(TransformError, match="can't be compiled into one graph"):
            compiled(state, torch.ones(2))
    state, compiled = stepping(lambda p, b, x, key: mse_loss(p["w"], x), nonfinite="raise")
    with pytest.raises(TransformError, match="use 'skip'"):
        compiled(state, torch.ones(2), donate=True)
    assert torch.equal(state.params["w"], torch.zeros(2))
    with pytest.raises(TransformError, match="transform the step first"):
        torch.func.vmap(compiled, (None, 0))(state, torch.ones(3, 2))
    with pytest.raises(ConfigurationError, match="of the backend 'inductor', not of 'eager'"):
        pt.compiled(compiled, backend="eager", mode="max-autotune")


# ── Rematerialization ─────────────────────────────────────────────────────────────────────────────

BLOCK, BLOCK_PARAMS, BLOCK_BUFFERS = pt.functional(
    nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5))
)


def deep(apply, layers=3):
    def loss(params, buffers, batch, key):
        x, y = batch
        for i in range(layers):
            x, _ = apply(params[f"{i}"], buffers, x)
        return cross_entropy(x, y)

    return loss


def deep_state(optimizer, layers=3):
    generator = torch.Generator().manual_seed(1)
    params = {
        f"{i}": {
            name: torch.randn(leaf.shape, generator=generator) / 3
            for name, leaf in BLOCK_PARAMS.items()
        }
        for i in range(layers)
    }
    return pt.TrainState.create(params, BLOCK_BUFFERS, optimizer, key=pt.random.key(0))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_step_with_rematerialization_has_the_same_bits(precision):
    optimizer = pt.optim.adamw(0.1)
    state = deep_state(optimizer)
    plain, saving = (
        pt.train_step(deep(apply), optimizer, precision=precision)
        for apply in (BLOCK, pt.rematerialize(BLOCK))
    )
    assert tree_equal(plain(state, batch_of(0)), saving(state, batch_of(0)))


def test_it_keeps_less_for_the_backward_pass():
    def kept(function):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        )
        w = torch.ones(8, 8, requires_grad=True)
        with hooks:
            x = function(w, torch.ones(64, 8)).sum()
        return sum(sizes), torch.autograd.grad(x, w)[0]

    def layer(w, x):
        return torch.sin(torch.exp(torch.tanh(x @ w)))

    before, expected = kept(layer)
    after, found = kept(pt.rematerialize(layer))
    assert after < before / 2
    assert torch.equal(found, expected)


def test_under_torch_func_it_draws_the_same_again():
    params = deep_state(pt.optim.sgd(0.1)).params
    gradients = []
    for apply in (BLOCK, pt.rematerialize(BLOCK)):
        with pt.random.scope(pt.random.key(3)):
            gradients.append(torch.func.grad(deep(apply))(params, BLOCK_BUFFERS, batch_of(0), None))
            gradients.append(torch.rand(3))  # and the generator stands where it stood
    assert tree_equal(gradients[:2], gradients[2:])


def test_under_vmap_and_second_derivatives():
    def layer(params, x):
        return torch.tanh(x @ params["w"]), x.argmax(-1)

    def square(layer):
        def value(params, x):
            y, place = layer(params, x)
            return (y.sum(-1) * (place + 1)).pow(2).sum()

        return value

    params, x = {"w": torch.eye(3, dtype=torch.float64)}, torch.rand(4, 3, dtype=torch.float64)

    def answers(layer):
        value = square(layer)
        gradient = torch.func.grad(value)
        each = torch.func.vmap(gradient, (None, 0))(params, x)
        norm = torch.func.grad(lambda params: gradient(params, x)["w"].pow(2).sum())(params)
        return each, norm

    for found, expected in zip(answers(pt.rematerialize(layer)), answers(layer), strict=True):
        torch.testing.assert_close(found["w"], expected["w"])


def test_a_compiled_step_computes_it_again():
    operations = []

    def counting(graph, inputs):
        operations.append(sum("tanh.default" in str(node.target) for node in graph.graph.nodes))
        return graph

    still, params, buffers = pt.functional(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    optimizer = pt.optim.sgd(0.1)
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=counting)
    states = []
    for apply in (still, pt.rematerialize(still)):
        state = deep_state(optimizer).replace(buffers=buffers)
        compiled = pt.compiled(pt.train_step(deep(apply), optimizer), backend=backend)
        states.append(compiled(state, batch_of(0)))
    close(*states)
    assert operations == [3, 6]


def test_what_it_cannot_do_says_so():
    with pytest.raises(pt.errors.StructureError, match="not a Linear"):
        pt.rematerialize(nn.Linear(1, 1))
    optimizer = pt.optim.sgd(0.1)
    step = pt.train_step(deep(pt.rematerialize(BLOCK)), optimizer)
    with pytest.raises(TransformError, match=r"draws \(aten.*draw outside"):
        pt.compiled(step, backend="aot_eager")(deep_state(optimizer), batch_of(0))

    def holding(w):
        return pt.rematerialize(lambda x: x * w)(torch.ones(2)).sum()

    with pytest.raises(TransformError, match="uses 'w', which is being differentiated"):
        torch.func.grad(holding)(torch.ones(2))
