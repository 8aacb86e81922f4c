"""Cross-validation: for each fold a module, a data module and a trainer; predictions are averaged."""

import copy
import os

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.metrics import Accuracy
from torch.utils.data import DataLoader, Subset, TensorDataset


def tabular(count=150):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, (x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) > 0).long())


class FoldData(LightningDataModule):
    def __init__(self, fold, folds, batch_size=25):
        super().__init__()
        self.fold, self.folds, self.batch_size = fold, folds, batch_size

    def setup(self, stage=None):
        everything = tabular()
        places = np.random.RandomState(0).permutation(len(everything) - 30)
        val = np.array_split(places, self.folds)[self.fold]
        train = np.setdiff1d(places, val)
        if stage == "fit" or stage is None:
            self.train, self.val = Subset(everything, train), Subset(everything, val)
        if stage == "test" or stage == "predict" or stage is None:
            self.test = Subset(everything, range(len(everything) - 30, len(everything)))

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, self.batch_size)

    predict_dataloader = test_dataloader


class Net(LightningModule):
    def __init__(self, cfg: dict):
        super().__init__()
        self.cfg = cfg
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Dropout(cfg["dropout"]), nn.Linear(16, 2)
        )
        self.train_acc, self.val_acc, self.test_acc = Accuracy(), Accuracy(), Accuracy()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.train_acc(logits.softmax(-1), y)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, y)

    def evaluate(self, batch, stage, metric):
        x, y = batch
        logits = self(x)
        metric.update(logits.softmax(-1), y)
        self.log(f"{stage}/loss", F.cross_entropy(logits, y), prog_bar=stage == "val")
        self.log(f"{stage}/acc", metric)

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val", self.val_acc)

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch, batch_idx, dataloader_idx=None):
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.cfg["lr"])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.cfg["epochs"])
        return [optimizer], [scheduler]


def main():
    cfg = {"lr": 0.03, "dropout": 0.1, "epochs": 5, "folds": 3}
    scores, predictions, first = [], [], None
    for fold in range(cfg["folds"]):
        seed_everything(fold, workers=True)
        model, dm = Net(cfg), FoldData(fold, cfg["folds"])
        first = first or copy.deepcopy(model)
        checkpoint = ModelCheckpoint(monitor="val/loss", filename=f"fold{fold}-" + "{epoch}")
        loggers = [
            TensorBoardLogger("logs", name=f"fold_{fold}"),
            CSVLogger("csv", name=f"fold_{fold}"),
        ]
        trainer = Trainer(
            max_epochs=cfg["epochs"],
            logger=loggers,
            callbacks=[checkpoint, EarlyStopping("val/loss")],
            progress_bar_refresh_rate=0,
            weights_summary=None,
            deterministic=True,
            log_every_n_steps=1,
        )
        trainer.fit(model, datamodule=dm)
        scores.append(trainer.callback_metrics["val/acc"].item())
        (result,) = trainer.test(datamodule=dm, verbose=False)
        assert result["test/acc"] > 0.7, result
        best = Net.load_from_checkpoint(checkpoint.best_model_path)
        predictions.append(torch.cat(trainer.predict(best, datamodule=dm)))
        assert f"fold{fold}-epoch=" in os.path.basename(checkpoint.best_model_path)
        assert os.path.isfile(f"csv/fold_{fold}/version_0/metrics.csv")
    torch.use_deterministic_algorithms(False)
    voted = torch.stack(predictions).mean(0).argmax(-1)
    truth = torch.stack([y for _, y in dm.test])
    assert (voted == truth).float().mean() > 0.8
    print(f"{np.mean(scores):.3f} +- {np.std(scores):.3f}", pl.__version__)


if __name__ == "__main__":
    main()
