"""``to_onnx``."""

import importlib.util

import pytest
import torch

import puretrain.lightning as pl
from puretrain.lightning.utilities.exceptions import MisconfigurationException


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.example_input_array = torch.zeros(1, 4)

    def forward(self, x):
        return self.layer(x).relu()


MISSING = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]


def test_to_onnx_writes_the_parameters_or_names_the_extra(tmp_path):
    path = str(tmp_path / "model.onnx")
    model = Model()
    if MISSING:
        with pytest.raises(MisconfigurationException, match=r"puretrain\[onnx\]"):
            model.to_onnx(path)
        return
    import onnx

    model.to_onnx(path)
    assert model.training
    weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    expected = model.layer.weight.detach().numpy()
    assert any((w == expected).all() for w in weights if w.shape == expected.shape)


def test_to_onnx_needs_an_input(tmp_path):
    model = Model()
    model.example_input_array = None
    with pytest.raises(ValueError, match="neither `input_sample` nor"):
        model.to_onnx(str(tmp_path / "model.onnx"))
