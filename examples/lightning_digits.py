"""Images of handwritten digits with a Lightning module: the program is a Lightning user's own.

    python examples/lightning_digits.py --max_epochs 3

It runs with `import pytorch_lightning as pl` in the place of the first import just as well.
"""

from argparse import ArgumentParser

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import puretrain.lightning as pl
from puretrain.lightning.callbacks import EarlyStopping, ModelCheckpoint


class DigitsDataModule(pl.LightningDataModule):
    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images / 16, dtype=torch.float32)
        data = TensorDataset(x, torch.tensor(labels))
        generator = torch.Generator().manual_seed(0)
        self.train, self.val, self.test = random_split(data, [1297, 250, 250], generator)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=self.batch_size)


class LitClassifier(pl.LightningModule):
    def __init__(self, hidden_dim: int = 64, learning_rate: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.l1 = nn.Linear(64, self.hparams.hidden_dim)
        self.l2 = nn.Linear(self.hparams.hidden_dim, 10)

    def forward(self, x):
        return self.l2(torch.relu(self.l1(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def _evaluate(self, batch, name):
        x, y = batch
        logits = self(x)
        accuracy = (logits.argmax(1) == y).float().mean()
        self.log(f"{name}_loss", F.cross_entropy(logits, y))
        self.log(f"{name}_acc", accuracy, prog_bar=True)

    def validation_step(self, batch, batch_idx):
        self._evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self._evaluate(batch, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


def main():
    parser = ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--hidden_dim", type=int, default=64)
    parser = pl.Trainer.add_argparse_args(parser)
    parser.set_defaults(max_epochs=10, log_every_n_steps=10)
    args = parser.parse_args()

    pl.seed_everything(1234)
    data = DigitsDataModule(args.batch_size)
    checkpoint = ModelCheckpoint(monitor="val_acc", mode="max", filename="{epoch}-{val_acc:.3f}")
    stopping = EarlyStopping("val_loss", patience=5)
    trainer = pl.Trainer.from_argparse_args(args, callbacks=[checkpoint, stopping])
    trainer.fit(LitClassifier(args.hidden_dim), datamodule=data)
    (result,) = trainer.test(datamodule=data)
    loaded = LitClassifier.load_from_checkpoint(checkpoint.best_model_path)
    print(f"best checkpoint {checkpoint.best_model_path}")
    print(f"hidden_dim {loaded.hparams.hidden_dim}, test accuracy {result['test_acc']:.1%}")


if __name__ == "__main__":
    main()
