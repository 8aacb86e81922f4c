"""Loggers of services, with the service's own client writing to a directory."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

import puretrain.lightning as pl
from puretrain.lightning.loggers import MLFlowLogger, WandbLogger


class Model(pl.LightningModule):
    def __init__(self, lr=0.25):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.log("value", float(batch_idx))
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


def fit(logger, tmp_path):
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), logger=logger, max_epochs=1, log_every_n_steps=2,
        progress_bar_refresh_rate=0, weights_summary=None,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(torch.ones(8, 2), batch_size=2))
    return trainer


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("digits", tracking_uri=(tmp_path / "runs").as_uri(), tags={"by": "me"})
    fit(logger, tmp_path)
    client = mlflow.tracking.MlflowClient((tmp_path / "runs").as_uri())
    run = client.get_run(logger.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "digits"
    assert run.data.params == {"lr": "0.25"}
    assert run.data.tags["by"] == "me"
    assert run.info.status == "FINISHED"
    found = client.get_metric_history(logger.run_id, "value")
    assert [(m.step, m.value) for m in found] == [(1, 1.0), (3, 3.0)]


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(name="first", project="digits", save_dir=str(tmp_path), offline=True)
    trainer = fit(logger, tmp_path)
    run = logger.experiment
    assert run.config["lr"] == 0.25
    assert (run.name, run.project) == ("first", "digits")
    assert {"value": 3.0, "trainer/global_step": 3}.items() <= dict(run.summary).items()
    assert str(logger.version) in str(trainer.checkpoint_callback.best_model_path)
    run.finish()
    assert list(tmp_path.rglob("run-*.wandb"))
    assert json.dumps(dict(run.config.items()))
