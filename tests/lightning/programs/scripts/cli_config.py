"""LightningCLI with a YAML file, links between arguments, and callbacks by class path."""

import sys

import torch
import yaml
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.utilities.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

CONFIG = {
    "seed_everything": 11,
    "trainer": {
        "max_epochs": 2,
        "progress_bar_refresh_rate": 0,
        "callbacks": [
            {
                "class_path": "pytorch_lightning.callbacks.EarlyStopping",
                "init_args": {"monitor": "val_loss"},
            },
            {"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"},
        ],
    },
    "model": {"hidden": 6, "learning_rate": 0.05},
    "data": {"batch_size": 10, "features": 3},
}


class Regressor(LightningModule):
    """A model whose width comes from the data."""

    def __init__(self, hidden: int = 4, learning_rate: float = 0.1, features: int = 2):
        """Make it.

        Args:
            hidden: the width.
            learning_rate: of Adam.
            features: the inputs.
        """
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(features, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)
        )

    def step(self, batch):
        x, y = batch
        return (self.net(x).squeeze(-1) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


class Linear(LightningDataModule):
    def __init__(self, batch_size: int = 8, features: int = 2):
        super().__init__()
        self.batch_size, self.features = batch_size, features

    def loader(self):
        x = torch.randn(40, self.features)
        return DataLoader(TensorDataset(x, x.sum(1)), self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = loader


class MyCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--test_after", type=bool, default=True)
        parser.link_arguments("data.features", "model.features")

    def after_fit(self):
        if self.config["test_after"]:
            self.results = self.trainer.test(datamodule=self.datamodule, verbose=False)


if __name__ == "__main__":
    with open("config.yaml", "w") as file:
        yaml.safe_dump(CONFIG, file)
    sys.argv = [sys.argv[0], "--config", "config.yaml", "--model.learning_rate", "0.02"]
    cli = MyCLI(Regressor, Linear)
    assert cli.model.hparams.features == 3 and cli.model.hparams.hidden == 6
    assert cli.model.hparams.learning_rate == 0.02
    assert cli.trainer.current_epoch == 1 and cli.trainer.global_step == 8
    assert {type(c).__name__ for c in cli.trainer.callbacks} >= {
        "EarlyStopping",
        "LearningRateMonitor",
    }
    assert "test_loss" in cli.results[0]
    with open(f"{cli.trainer.log_dir}/config.yaml") as file:
        assert yaml.safe_load(file)["model"]["hidden"] == 6
