import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import puretrain as pt
from puretrain.errors import StructureError
from puretrain.functional import functional, load_into
from puretrain.tree import tree_equal, tree_map


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


class Shared(nn.Module):
    """One submodule reached by two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


class Reassigns(nn.Module):
    """Replaces a buffer instead of changing it in place, and keeps one out of its state_dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Sequence(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 3, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.rnn(x[None])[0]


BUILDERS = [
    (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), None),
    (Tied, torch.tensor([[1, 2, 3], [0, 6, 1]])),
    (Shared, None),
    (Reassigns, None),
    (lambda: Sequence(nn.LSTM), None),
    (lambda: Sequence(nn.GRU), None),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), None),
    (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), None),
    (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), torch.randn(5, 2, 4)),
]


def snapshot(model):
    return {
        "tensors": {id(t): t.detach().clone() for t in [*model.parameters(), *model.buffers()]},
        "modes": [m.training for m in model.modules()],
        "names": [name for name, _ in model.named_parameters(remove_duplicate=False)],
    }


@pytest.mark.parametrize(("build", "given_input"), BUILDERS)
def test_apply_equals_the_module_and_leaves_it_alone(build, given_input):
    torch.manual_seed(0)
    model = build()
    x = torch.randn(6, 3) if given_input is None else given_input
    apply, params, buffers = functional(model)
    kept = copy.deepcopy((params, buffers))
    before = snapshot(model)
    twin = copy.deepcopy(model)

    outputs = []
    for _ in range(3):
        output, buffers = apply(params, buffers, x)
        outputs.append(output)

    assert tree_equal(snapshot(model), before)
    assert tree_equal(params, kept[0])
    for output in outputs:
        assert torch.equal(output, twin(x))
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffers[name], buffer)
    _, _, original = functional(model)
    assert tree_equal(original, kept[1])


@pytest.mark.parametrize(
    ("build", "given_input"), [pair for pair in BUILDERS if pair[0] is not Reassigns]
)
def test_gradients_equal_those_of_the_module(build, given_input):
    torch.manual_seed(0)
    model = build()
    x = torch.randn(6, 3) if given_input is None else given_input
    apply, params, buffers = functional(model)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    apply(leaves, buffers, x)[0].square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(leaves[name].grad, parameter.grad)


def test_tied_weights_are_one_leaf():
    model = Tied()
    apply, params, _ = functional(model)
    assert list(params) == ["embed.weight", "norm.weight", "norm.bias"]
    changed = params | {"embed.weight": torch.zeros(7, 4)}
    output, _ = apply(changed, {}, torch.tensor([1, 2]))
    assert not output.any()
    assert model.head.weight is model.embed.weight


def test_frozen_parameters_are_buffers_and_may_move():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    apply, params, buffers = functional(model)
    assert list(params) == ["1.weight", "1.bias"]
    assert list(buffers) == ["0.weight", "0.bias"]
    x = torch.randn(3, 2)
    expected = model(x)
    assert torch.equal(apply(params, buffers, x)[0], expected)
    assert torch.equal(apply({**params, **buffers}, {}, x)[0], expected)


def test_modes():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    model[0].eval()
    apply, params, buffers = functional(model)
    model.eval()  # a later change of the module does not count
    x = torch.ones(64, 2)
    noted, after = apply(params, buffers, x, key=pt.random.key(0))
    assert (noted == 0).any()  # dropout was in training mode
    assert tree_equal(after, buffers)  # the norm was in evaluation mode
    trained, after = apply(params, buffers, x, key=pt.random.key(0), train=True)
    assert not tree_equal(after, buffers)
    evaluated, after = apply(params, buffers, x, train=False)
    assert tree_equal(after, buffers)
    assert (evaluated != 0).all()
    assert [m.training for m in model.modules()] == [False, False, False]


def test_key_makes_draws_a_function_and_restores_the_generator():
    apply, params, buffers = functional(nn.Dropout(0.5))
    x = torch.ones(100)
    outside = torch.get_rng_state()
    draws = [apply(params, buffers, x, key=pt.random.key(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_module_survives_an_exception():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.BatchNorm1d(2)

        def forward(self, x):
            self.inner(x)
            raise KeyError("inside")

    model = Fails().eval()
    before = snapshot(model)
    own = model.inner.weight
    apply, params, buffers = functional(model)
    with pytest.raises(KeyError, match="inside"):
        apply(tree_map(torch.zeros_like, params), buffers, torch.ones(3, 2), train=True)
    assert tree_equal(snapshot(model), before)
    assert model.inner.weight is own


def test_meta_modules_take_real_tensors():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    apply, params, buffers = functional(model)
    assert params["weight"].device.type == "meta"
    real = tree_map(lambda leaf: torch.ones(leaf.shape), params)
    output, _ = apply(real, buffers, torch.ones(1, 3))
    assert output.tolist() == [[4.0, 4.0]]
    assert model.weight.device.type == "meta"


def test_what_is_no_module_is_refused():
    for other in (3, nn.Linear):
        with pytest.raises(pt.errors.ConfigurationError, match="takes a torch.nn.Module, not"):
            pt.functional(other)


def test_lazy_modules_are_refused_by_name():
    model = nn.Sequential(nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(StructureError, match=r"1\.weight of Sequential has no shape yet"):
        functional(model)


def test_wrong_names_are_refused():
    apply, params, buffers = functional(nn.Linear(2, 2))
    with pytest.raises(StructureError, match="Linear: missing bias and unknown bais"):
        apply({"weight": params["weight"], "bais": params["bias"]}, buffers, torch.ones(1, 2))


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_vmap_over_parameters_equals_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    apply, params, buffers = functional(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = torch.randn(5, 3, generator=generator)
    members = [
        tree_map(lambda leaf: torch.randn(leaf.shape, generator=generator), params)
        for _ in range(3)
    ]
    stacked = (pt.tree.tree_stack(members), pt.tree.tree_stack([buffers] * 3))
    outputs, after = torch.func.vmap(apply, (0, 0, None))(*stacked, x)
    for i, member in enumerate(members):
        output, own_after = apply(member, buffers, x)
        torch.testing.assert_close(outputs[i], output)
        torch.testing.assert_close(after["1.running_var"][i], own_after["1.running_var"])


@pytest.mark.parametrize("build", [BUILDERS[0][0], Reassigns])
def test_compiles_without_a_graph_break(build):
    torch.manual_seed(0)
    apply, params, buffers = functional(build())
    x = torch.randn(6, 3)
    compiled = torch.compile(apply, fullgraph=True, backend="eager")
    output, after = compiled(params, buffers, x)
    expected, expected_after = apply(params, buffers, x)
    assert torch.equal(output, expected)
    assert tree_equal(after, expected_after)


def test_load_into_is_the_way_back():
    torch.manual_seed(0)
    source, target = Tied(), Tied()
    target.norm.requires_grad_(False)
    returned = load_into(target, functional(source))
    assert returned is target
    assert target.head.weight is target.embed.weight
    tokens = torch.tensor([[1, 2]])
    assert torch.equal(source(tokens), target(tokens))


def test_load_into_copies_all_or_nothing():
    target = nn.Linear(2, 2)
    before = snapshot(target)
    _, params, buffers = functional(nn.Linear(2, 2))
    wrong = pt.functional(nn.Linear(3, 2))
    with pytest.raises(StructureError, match=r"weight is torch.float32 of shape \(2, 2\)"):
        load_into(target, wrong)
    assert tree_equal(snapshot(target), before)
    with pytest.raises(StructureError, match="missing bias"):
        load_into(target, functional(nn.Linear(2, 2, bias=False)))
