"""The summary of a model."""

import pytest
import torch
from torch import nn

import puretrain.lightning as pl
from puretrain.lightning.core.memory import (
    UNKNOWN_SIZE,
    LayerSummary,
    ModelSummary,
    get_human_readable_count,
    parse_batch_shape,
)
from puretrain.lightning.utilities.exceptions import MisconfigurationException


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0  "),
        (123, "123  "),
        (999, "999  "),
        (1234, "1.2 K"),
        (25_000, "25.0 K"),
        (300_000, "300 K"),
        (int(2e6), "2.0 M"),
        (int(3e9), "3.0 B"),
        (int(4e14), "400 T"),
        (int(5e15), "5,000 T"),
    ],
)
def test_counts(number, text):
    assert get_human_readable_count(number) == text


class Mixed(pl.LightningModule):
    def __init__(self, example=None):
        super().__init__()
        self.embed = nn.Embedding(10, 20)
        self.rnn = nn.LSTM(20, 5, batch_first=True)
        self.head = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
        self.unused = nn.Conv2d(3, 4, 1)
        for parameter in self.embed.parameters():
            parameter.requires_grad = False
        self.example_input_array = example
        self.modes = []

    def forward(self, x, flag=None):
        self.modes.append(self.training)
        return self.head(self.rnn(self.embed(x))[0])


PARAMETERS = [10 * 20, 4 * (20 * 5 + 5 * 5 + 10), 5 * 3 + 3, 3 * 4 + 4]


def test_top():
    summary = ModelSummary(Mixed(), mode="top")
    assert summary.layer_names == ["embed", "rnn", "head", "unused"]
    assert summary.layer_types == ["Embedding", "LSTM", "Sequential", "Conv2d"]
    assert summary.param_nums == PARAMETERS
    assert summary.in_sizes == [UNKNOWN_SIZE] * 4
    assert summary.total_parameters == sum(PARAMETERS)
    assert summary.trainable_parameters == sum(PARAMETERS[1:])
    assert summary.model_size == pytest.approx(sum(PARAMETERS) * 4e-6)


def test_full_and_depth():
    names = ["embed", "rnn", "head", "head.0", "head.1", "unused"]
    assert ModelSummary(Mixed(), mode="full").layer_names == names
    assert ModelSummary(Mixed(), max_depth=-1).layer_names == names
    assert ModelSummary(Mixed(), max_depth=1).layer_names == [n for n in names if "." not in n]
    assert ModelSummary(Mixed(), max_depth=0).layer_names == []
    with pytest.raises(MisconfigurationException, match="`mode` can be"):
        ModelSummary(Mixed(), mode="some")


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, 1), lambda x: {"x": x}])
def test_shapes_of_an_example(form):
    model = Mixed(form(torch.zeros(2, 7, dtype=torch.long)))
    model.rnn.eval()
    before = torch.get_rng_state()
    summary = ModelSummary(model)
    assert summary.in_sizes == [[2, 7], [2, 7, 20], [2, 7, 5], UNKNOWN_SIZE]
    assert summary.out_sizes[0] == [2, 7, 20]
    assert summary.out_sizes[1] == [[2, 7, 5], [[1, 2, 5], [1, 2, 5]]]
    assert summary.out_sizes[2:] == [[2, 7, 3], UNKNOWN_SIZE]
    assert model.modes == [False]
    assert model.training
    assert not model.rnn.training
    assert not model.rnn._forward_hooks
    assert torch.equal(before, torch.get_rng_state())


def test_table():
    lines = str(ModelSummary(Mixed(torch.zeros(2, 7, dtype=torch.long)))).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        "", "Name", "Type", "Params", "In sizes", "Out sizes",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].split("|")] == [
        "0", "embed", "Embedding", "200", "[2, 7]", "[2, 7, 20]",
    ]  # fmt: skip
    assert [line.split(maxsplit=1) for line in lines[-4:]][2][1] == "Total params"
    assert lines[-4] == "574       Trainable params"
    assert lines[-3] == "200       Non-trainable params"
    assert lines[-1] == "0.003     Total estimated model params size (MB)"


def test_precision_counts_in_the_size():
    model = Mixed()
    trainer = pl.Trainer(precision=64, logger=False, checkpoint_callback=False)
    model.trainer = trainer
    assert ModelSummary(model).model_size == pytest.approx(sum(PARAMETERS) * 8e-6)
    assert ModelSummary(nn.Linear(2, 1).double()).model_size == pytest.approx(3 * 8e-6)


def test_shared_parameters_count_once():
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    summary = ModelSummary(model)
    assert summary.param_nums == [20, 20]
    assert summary.total_parameters == 24


def test_lazy_layers():
    with pytest.warns(UserWarning, match="UninitializedParameter"):
        summary = ModelSummary(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)))
    assert summary.total_parameters == 4


def test_an_empty_model_and_a_script():
    assert ModelSummary(nn.Sequential()).param_nums == []
    assert "Total params" in str(ModelSummary(nn.Sequential()))
    scripted = torch.jit.script(nn.Linear(2, 3))
    assert LayerSummary(scripted).num_parameters == 9


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        (torch.zeros(2, 3), [2, 3]),
        ([torch.zeros(2), torch.zeros(3)], [[2], [3]]),
        ((torch.zeros(2), "a"), [[2], UNKNOWN_SIZE]),
        ({"a": torch.zeros(2)}, UNKNOWN_SIZE),
        (None, UNKNOWN_SIZE),
    ],
)
def test_shapes(batch, shape):
    assert parse_batch_shape(batch) == shape
