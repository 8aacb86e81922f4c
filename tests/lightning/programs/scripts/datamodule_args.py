"""Arguments of trainer, data module and model on one command line; tuning; metrics by collection."""

from argparse import ArgumentParser

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.callbacks.early_stopping import EarlyStopping
from pytorch_lightning.core.datamodule import LightningDataModule
from pytorch_lightning.metrics import (
    F1,
    Accuracy,
    ConfusionMatrix,
    MetricCollection,
    Precision,
    Recall,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class ImagesDataModule(LightningDataModule):
    name = "images"

    def __init__(
        self,
        data_dir: str = "./",
        batch_size: int = 16,
        num_workers: int = 0,
        val_split: float = 0.2,
        *args,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.data_dir, self.batch_size, self.num_workers, self.val_split = (
            data_dir,
            batch_size,
            num_workers,
            val_split,
        )
        self.dims = (1, 6, 6)

    @property
    def num_classes(self):
        return 3

    def prepare_data(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(150) % 3
        x = torch.randn(150, 1, 6, 6, generator=generator) * 0.5
        for c in range(3):
            x[y == c, :, 2 * c : 2 * c + 2] += 1
        torch.save((x, y), f"{self.data_dir}/images.pt")

    def setup(self, stage=None):
        x, y = torch.load(f"{self.data_dir}/images.pt")
        count = int(120 * self.val_split)
        whole = TensorDataset(x[:120], y[:120])
        self.train, self.val = random_split(
            whole, [120 - count, count], torch.Generator().manual_seed(1)
        )
        self.test = TensorDataset(x[120:], y[120:])

    def train_dataloader(self):
        return DataLoader(
            self.train, batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers
        )

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=self.batch_size)


class ConvNet(pl.LightningModule):
    def __init__(self, num_classes, learning_rate=1e-2, channels=4, batch_size=16, **kwargs):
        super().__init__()
        self.save_hyperparameters("num_classes", "learning_rate", "channels")
        self.body = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(channels * 36, num_classes)
        self.learning_rate = learning_rate
        metrics = MetricCollection(
            [
                Accuracy(),
                Precision(num_classes=num_classes, average="macro"),
                Recall(num_classes=num_classes, average="macro"),
                F1(num_classes=num_classes, average="macro"),
            ]
        )
        self.valid_metrics, self.test_metrics = (
            metrics.clone(prefix="val_"),
            metrics.clone(prefix="test_"),
        )
        self.confusion = ConfusionMatrix(num_classes=num_classes)
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    @staticmethod
    def add_model_specific_args(parent_parser):
        parser = ArgumentParser(parents=[parent_parser], add_help=False)
        parser.add_argument("--channels", type=int, default=4)
        parser.add_argument("--learning_rate", type=float, default=0.01)
        return parser

    def forward(self, x):
        return F.log_softmax(self.head(self.body(x)), dim=-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.nll_loss(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, logger=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.log("val_loss", F.nll_loss(out, y), prog_bar=True)
        self.valid_metrics.update(out.exp(), y)

    def validation_epoch_end(self, outputs):
        self.log_dict(self.valid_metrics.compute(), prog_bar=True)
        self.valid_metrics.reset()

    def test_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.confusion.update(out.exp(), y)
        self.log_dict(self.test_metrics(out.exp(), y), on_epoch=True)

    def test_epoch_end(self, outputs):
        self.matrix = self.confusion.compute()
        self.confusion.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=200
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main():
    pl.seed_everything(42)
    parser = ArgumentParser()
    parser.add_argument("--run_name", type=str, default="convnet")
    parser = pl.Trainer.add_argparse_args(parser)
    parser = ImagesDataModule.add_argparse_args(parser)
    parser = ConvNet.add_model_specific_args(parser)
    args = parser.parse_args()
    args.max_epochs = 6
    dm = ImagesDataModule.from_argparse_args(args)
    assert dm.size() == (1, 6, 6) and dm.size(1) == 6 and not dm.has_prepared_data
    model = ConvNet(num_classes=dm.num_classes, **vars(args))
    callbacks = [
        LearningRateMonitor(logging_interval="step"),
        EarlyStopping(monitor="val_loss", patience=5),
        ModelCheckpoint(monitor="val_Accuracy", mode="max", save_last=True),
    ]
    trainer = pl.Trainer.from_argparse_args(
        args, callbacks=callbacks, auto_lr_find=True, log_every_n_steps=1
    )
    found = trainer.tune(model, datamodule=dm)["lr_find"]
    assert model.learning_rate == found.suggestion() != 0.01
    model.learning_rate = 0.05
    trainer.fit(model, datamodule=dm)
    assert dm.has_prepared_data and dm.has_setup_fit
    assert trainer.callback_metrics["val_Accuracy"] > 0.8, trainer.callback_metrics
    (result,) = trainer.test(datamodule=dm, ckpt_path="best")
    assert {"test_Accuracy", "test_F1", "test_Precision", "test_Recall"} <= set(result), result
    assert model.matrix.sum() == 30
    lines = str(model.summarize()).splitlines()
    assert any("In sizes" in line for line in lines)


if __name__ == "__main__":
    main()
