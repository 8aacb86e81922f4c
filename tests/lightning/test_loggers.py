"""Loggers: what is on disk afterwards, read by others than us."""

import csv
import importlib.util
import operator
import os
import pickle
from argparse import Namespace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import puretrain.lightning as pl
from puretrain.lightning.core.saving import (
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
    save_hparams_to_tags_csv,
    save_hparams_to_yaml,
)
from puretrain.lightning.loggers import (
    CSVLogger,
    LoggerCollection,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from puretrain.lightning.loggers.base import (
    DummyExperiment,
    DummyLogger,
    LightningLoggerBase,
    merge_dicts,
    rank_zero_experiment,
)
from puretrain.lightning.loggers.csv_logs import ExperimentWriter
from puretrain.lightning.utilities import rank_zero_only
from puretrain.lightning.utilities.exceptions import MisconfigurationException


def scalars(folder):
    events = EventAccumulator(folder).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


class Lines(LightningLoggerBase):
    """As a user writes one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lines, self.params, self.ended = [], None, None

    @property
    @rank_zero_experiment
    def experiment(self):
        return "test"

    @rank_zero_only
    def log_hyperparams(self, params):
        self.params = params

    @rank_zero_only
    def log_metrics(self, metrics, step):
        self.lines.append((step, metrics))

    @rank_zero_only
    def finalize(self, status):
        self.ended = status

    @property
    def name(self):
        return "lines"

    @property
    def version(self):
        return "1"


# ── TensorBoard ───────────────────────────────────────────────────────────────────────────────────


def test_tensorboard_directories(tmp_path):
    first = TensorBoardLogger(tmp_path, name="a")
    assert first.version == 0
    first.log_metrics({"loss": 1.0}, 3)
    first.finalize("success")
    assert os.path.isfile(tmp_path / "a" / "version_0" / "hparams.yaml")
    (tmp_path / "a" / "version_7").mkdir()
    (tmp_path / "a" / "other").mkdir()
    assert TensorBoardLogger(tmp_path, name="a").version == 8
    assert TensorBoardLogger(tmp_path).root_dir == str(tmp_path / "default")
    named = TensorBoardLogger(str(tmp_path), name=None, version="best", sub_dir="deep")
    assert named.log_dir == str(tmp_path / "best" / "deep")
    assert named.name == ""
    assert scalars(first.log_dir) == {"loss": [(3, 1.0)]}


def test_tensorboard_metrics(tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="run")
    logger.log_metrics({"a": torch.tensor(0.5), "b": 2, "c": {"x": 1.0}}, step=1)
    with pytest.raises(ValueError, match="you tried to log .* not currently supported"):
        logger.log_metrics({"d": "text"}, step=1)
    logger.finalize("success")
    found = scalars(logger.log_dir)
    assert found["run-a"] == [(1, 0.5)]
    assert found["run-b"] == [(1, 2.0)]
    assert scalars(os.path.join(logger.log_dir, "run-c_x")) == {"run-c": [(1, 1.0)]}


@pytest.mark.parametrize(
    ("metrics", "default", "expected"),
    [(None, True, -1), (None, False, None), (0.5, True, 0.5), ({"hp_metric": 2}, False, 2)],
)
def test_tensorboard_hyperparameters(tmp_path, metrics, default, expected):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=default)
    params = {"lr": 0.1, "name": "x", "nested": {"layers": 2}, "sizes": [1, 2], "on": True}
    logger.log_hyperparams(params, metrics)
    logger.finalize("success")
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text()) == params
    if expected is None:
        return
    assert scalars(logger.log_dir)["hp_metric"] == [(0, expected)]
    events = EventAccumulator(logger.log_dir).Reload()
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"nested/layers" in plugin


def test_tensorboard_survives_a_pickle(tmp_path):
    logger = TensorBoardLogger(tmp_path, version=4)
    logger.log_metrics({"a": 1.0}, 0)
    again = pickle.loads(pickle.dumps(logger))
    again.log_metrics({"b": 1.0}, 0)
    assert again.log_dir == logger.log_dir


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.example_input_array = torch.zeros(1, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tensorboard_graph(tmp_path):
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    logger.log_graph(Model())
    logger.finalize("success")
    graph = EventAccumulator(logger.log_dir).Reload().Graph()
    assert any("layer" in node.name for node in graph.node)
    model = Model()
    model.example_input_array = None
    with pytest.warns(UserWarning, match="Could not log computational graph"):
        logger.log_graph(model)


# ── CSV ───────────────────────────────────────────────────────────────────────────────────────────


def test_csv(tmp_path):
    logger = CSVLogger(tmp_path, name="a", prefix="p")
    logger.log_hyperparams(Namespace(lr=0.1))
    logger.log_metrics({"loss": torch.tensor(1.5)}, step=10)
    logger.save()
    logger.log_metrics({"loss": 1.0}, step=11)
    logger.save()
    logger.log_metrics({"accuracy": 0.5})
    logger.save()
    logger.save()
    folder = tmp_path / "a" / "version_0"
    assert logger.log_dir == str(folder)
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert rows == [
        {"p-loss": "1.5", "step": "10", "p-accuracy": ""},
        {"p-loss": "1.0", "step": "11", "p-accuracy": ""},
        {"p-loss": "", "step": "2", "p-accuracy": "0.5"},
    ]
    assert yaml.safe_load((folder / ExperimentWriter.NAME_HPARAMS_FILE).read_text()) == {"lr": 0.1}
    assert CSVLogger(tmp_path, name="a").version == 1
    with pytest.warns(UserWarning, match="exists and is not empty"):
        _ = CSVLogger(tmp_path, name="a", version=0).experiment


# ── Several, none, one's own ──────────────────────────────────────────────────────────────────────


def test_values_of_one_step_become_one():
    logger = Lines(agg_key_funcs={"low": min}, agg_default_func=max)
    logger.agg_and_log_metrics({"low": 2.0, "high": 1.0}, step=1)
    logger.agg_and_log_metrics({"low": 1.0, "high": 5.0}, step=1)
    assert logger.lines == []
    logger.agg_and_log_metrics({"low": 7.0}, step=2)
    logger.save()
    assert logger.lines == [(1, {"low": 1.0, "high": 5.0}), (2, {"low": 7.0})]


def test_merge_dicts():
    first = {"a": 1.7, "b": 2.0, "c": 1, "d": {"d1": 1, "d3": 3}}
    second = {"a": 1.1, "b": 2.2, "v": 1, "d": {"d1": 2, "d2": 3}}
    third = {"a": 1.1, "v": 2.3, "d": {"d3": 3, "d4": {"d5": 1}}}
    functions = {"a": min, "v": max, "d": {"d1": sum}}
    merged = merge_dicts([first, second, third], functions)
    assert merged == {
        "a": 1.1,
        "b": pytest.approx(2.1),
        "c": 1,
        "d": {"d1": 3, "d2": 3, "d3": 3, "d4": {"d5": 1}},
        "v": 2.3,
    }


def test_collection(tmp_path):
    both = LoggerCollection([Lines(), CSVLogger(tmp_path, version=3)])
    both.log_metrics({"a": 1.0}, 2)
    assert both[0].lines == [(2, {"a": 1.0})]
    assert both[1].experiment.metrics == [{"a": 1.0, "step": 2}]
    assert both.name == "lines_default"
    assert both.version == "1_3"
    assert both.experiment[0] == "test"
    both.finalize("success")
    assert both[0].ended == "success"


def test_dummies():
    logger = DummyLogger()
    assert logger.experiment.add_image("a", 1) is None
    assert isinstance(logger.experiment[0], DummyExperiment)
    assert logger[3] is logger
    logger.log_metrics({"a": 1}, 0)
    logger.log_anything("b")
    assert list(logger) == []
    pickle.dumps(logger)


def test_other_ranks_get_dummies(tmp_path):
    rank = rank_zero_only.rank
    rank_zero_only.rank = 1
    try:
        logger = TensorBoardLogger(tmp_path / "a")
        assert isinstance(logger.experiment, DummyExperiment)
        logger.log_metrics({"a": 1.0}, 0)
        logger.log_hyperparams({"a": 1})
        logger.save()
        logger.finalize("success")
    finally:
        rank_zero_only.rank = rank
    assert not (tmp_path / "a").exists()


def test_a_logger_of_ones_own_in_a_run(tmp_path):
    class Fits(Model):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters()

        def training_step(self, batch, batch_idx):
            loss = self(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.hparams.lr)

    logger, board = Lines(), TensorBoardLogger(tmp_path, log_graph=False)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        logger=[logger, board],
        max_epochs=1,
        log_every_n_steps=2,
        progress_bar_refresh_rate=0,
        weights_summary=None,
    )
    trainer.fit(Fits(), torch.utils.data.DataLoader(torch.rand(8, 2), batch_size=2))
    assert logger.params == {"lr": 0.1}
    assert logger.ended == "success"
    steps = [step for step, metrics in logger.lines if "loss" in metrics]
    assert steps == [1, 3]
    assert [step for step, _ in scalars(board.log_dir)["loss"]] == [1, 3]


@pytest.mark.parametrize(("cls", "client"), [(WandbLogger, "wandb"), (MLFlowLogger, "mlflow")])
def test_a_service_without_its_client(cls, client):
    if importlib.util.find_spec(client):
        pytest.skip(f"{client} is installed")
    with pytest.raises(ImportError, match=f"pip install {client}"):
        cls()


def test_test_tube_says_what_to_use():
    with pytest.raises(MisconfigurationException, match="TensorBoardLogger"):
        pl.loggers.TestTubeLogger("x")


# ── Files of hyper-parameters ─────────────────────────────────────────────────────────────────────


class Colour(Enum):
    RED = 1


def test_hparams_as_yaml(tmp_path):
    params = {
        "size": 32,
        "rate": 1e-3,
        "nested": {"a": [1, 2], "pair": (1, 2)},
        "none": None,
        "number": np.float32(0.5),
        "colour": Colour.RED,
        "where": tmp_path,
    }
    path = tmp_path / "hparams.yaml"
    save_hparams_to_yaml(path, params)
    assert load_hparams_from_yaml(path) == {
        **params,
        "number": 0.5,
        "colour": "RED",
        "where": str(tmp_path),
    }
    with pytest.warns(UserWarning, match="Skipping 'model' parameter"):
        save_hparams_to_yaml(path, {"model": nn.Linear(1, 1), "a": 1})
    assert load_hparams_from_yaml(path) == {"model": "Linear", "a": 1}
    with pytest.raises(RuntimeError, match="Missing folder"):
        save_hparams_to_yaml(tmp_path / "no" / "hparams.yaml", params)
    with pytest.warns(RuntimeWarning, match="Missing Tags"):
        assert load_hparams_from_yaml(tmp_path / "none.yaml") == {}


def test_yaml_never_runs_what_it_names(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(MisconfigurationException, match="plain YAML"):
        load_hparams_from_yaml(path)
    assert not (tmp_path / "made").exists()


def test_hparams_as_csv(tmp_path):
    params = {"size": 32, "rate": 0.001, "name": "x", "list": [1, 2]}
    save_hparams_to_tags_csv(tmp_path / "tags.csv", Namespace(**params))
    assert (tmp_path / "tags.csv").read_text().splitlines()[0] == "key,value"
    assert load_hparams_from_tags_csv(tmp_path / "tags.csv") == params


def test_formats_of_parameters():
    convert = LightningLoggerBase._sanitize_params
    assert convert({"a": nn.ReLU(), "b": 1}) == {"a": "ReLU()", "b": 1}
    called = LightningLoggerBase._sanitize_callable_params({"f": lambda: 3, "g": operator.add})
    assert called == {"f": 3, "g": "add"}


def test_several_loggers_in_a_run_get_the_same(tmp_path):
    own = Lines()
    loggers = [TensorBoardLogger(str(tmp_path), name="tb"), CSVLogger(str(tmp_path), "csv"), own]
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), logger=loggers, max_epochs=1, log_every_n_steps=1,
        progress_bar_refresh_rate=0, weights_summary=None, checkpoint_callback=False,
    )  # fmt: skip
    assert trainer.loggers == loggers

    class Logs(pl.LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(2, width)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer.fit(Logs(), torch.utils.data.DataLoader(torch.ones(4, 2), 1))
    with open(tmp_path / "csv" / "version_0" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    from_csv = {int(r["step"]): float(r["loss"]) for r in rows if r.get("loss")}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "version_0"))
    events.Reload()
    from_tb = {event.step: event.value for event in events.Scalars("loss")}
    assert sorted(from_csv) == sorted(from_tb) == [0, 1, 2, 3]
    for step, value in from_csv.items():
        assert value == pytest.approx(from_tb[step], rel=1e-5)
    for folder in ("tb", "csv"):
        text = (tmp_path / folder / "version_0" / "hparams.yaml").read_text(encoding="utf-8")
        assert "width: 3" in text
