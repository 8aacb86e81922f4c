"""LightningCLI."""

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import puretrain.lightning as pl
from puretrain.lightning.utilities.cli import LightningCLI, SaveConfigCallback

pytest.importorskip("jsonargparse")


class Model(pl.LightningModule):
    def __init__(self, width: int = 1, rate: float = 0.1, optimizer_init: dict | None = None):
        """A line.

        Args:
            width: of the output.
            rate: of learning.
            optimizer_init: the optimizer.
        """
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.rate)


class Data(pl.LightningDataModule):
    def __init__(self, size: int = 4):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        return DataLoader(torch.rand(self.size, 2), batch_size=2)

    val_dataloader = train_dataloader


@pytest.fixture(autouse=True)
def _seed_put_back(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def defaults(tmp_path):
    return {
        "default_root_dir": str(tmp_path),
        "max_epochs": 1,
        "progress_bar_refresh_rate": 0,
        "weights_summary": None,
    }


def test_fit(tmp_path, defaults, monkeypatch):
    line = "script.py --model.width 3 --data.size 6 --trainer.max_epochs 2 --seed_everything 4"
    monkeypatch.setattr("sys.argv", line.split())
    cli = LightningCLI(Model, Data, trainer_defaults=defaults)
    assert cli.model.hparams.width == 3
    assert cli.datamodule.size == 6
    assert cli.trainer.max_epochs == 2
    assert cli.trainer.global_step == 6
    path = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    assert saved["model"]["width"] == 3
    assert saved["trainer"]["max_epochs"] == 2
    assert saved["seed_everything"] == 4
    monkeypatch.setattr("sys.argv", ["script.py", "--config", str(path), "--model.rate", "0.5"])
    again = LightningCLI(Model, Data, trainer_defaults=defaults)
    assert again.model.hparams.width == 3
    assert again.model.hparams.rate == 0.5


def test_a_later_version_names_what_to_run(defaults):
    defaults["logger"] = False
    cli = LightningCLI(Model, Data, trainer_defaults=defaults, args=["validate"])
    assert cli.trainer.global_step == 0
    assert "loss" in cli.trainer.callback_metrics


def test_only_the_objects(defaults):
    cli = LightningCLI(Model, Data, trainer_defaults=defaults, run=False, args=[])
    assert cli.trainer.global_step == 0
    assert isinstance(cli.datamodule, Data)


def test_hooks_and_more_arguments(defaults):
    class Own(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_argument("--note", default="none")
            parser.add_lightning_class_args(pl.callbacks.EarlyStopping, "stopping")
            parser.set_defaults({"stopping.monitor": "loss", "stopping.patience": 5})
            parser.add_optimizer_args(torch.optim.Adam)
            parser.link_arguments("data.size", "model.width")

        def before_fit(self):
            self.seen = self.config["note"]

    args = ["--note", "hello", "--data.size", "2", "--optimizer.lr", "0.25"]
    cli = Own(Model, Data, trainer_defaults=defaults, args=args)
    assert cli.seen == "hello"
    assert cli.model.hparams.width == 2
    assert cli.trainer.early_stopping_callback.patience == 5
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_another_config_is_not_overwritten(tmp_path, defaults):
    defaults["logger"] = False
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(RuntimeError, match="to NOT exist"):
        LightningCLI(Model, Data, trainer_defaults=defaults, args=[])
    LightningCLI(Model, Data, save_config_callback=None, trainer_defaults=defaults, args=[])
    LightningCLI(Model, Data, save_config_overwrite=True, trainer_defaults=defaults, args=[])
    assert "max_epochs" in (tmp_path / "config.yaml").read_text()
    assert issubclass(SaveConfigCallback, pl.Callback)


def test_an_unknown_argument(defaults, capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Model, Data, trainer_defaults=defaults, args=["--model.depth", "3"])
    assert "depth" in capsys.readouterr().err
