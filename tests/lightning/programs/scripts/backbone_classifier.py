"""A classifier around a backbone, with arguments from the command line, as in pl_examples."""

from argparse import ArgumentParser

import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split


class Backbone(torch.nn.Module):
    def __init__(self, hidden_dim=128):
        super().__init__()
        self.l1 = torch.nn.Linear(28 * 28, hidden_dim)
        self.l2 = torch.nn.Linear(hidden_dim, 10)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        return torch.relu(self.l2(torch.relu(self.l1(x))))


class LitClassifier(pl.LightningModule):
    def __init__(self, backbone, learning_rate=1e-3):
        super().__init__()
        self.save_hyperparameters("learning_rate")
        self.backbone = backbone
        self.accuracy = pl.metrics.Accuracy()

    def forward(self, x):
        return self.backbone(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = F.cross_entropy(y_hat, y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self.backbone(x)
        self.log("valid_loss", F.cross_entropy(y_hat, y), on_step=True)
        self.log("valid_acc", self.accuracy(y_hat.softmax(-1), y), prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self.backbone(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)

    @staticmethod
    def add_model_specific_args(parent_parser):
        parser = ArgumentParser(parents=[parent_parser], add_help=False)
        parser.add_argument("--learning_rate", type=float, default=0.0001)
        return parser


def cli_main():
    pl.seed_everything(1234)
    parser = ArgumentParser()
    parser.add_argument("--batch_size", default=32, type=int)
    parser.add_argument("--hidden_dim", type=int, default=128)
    parser = pl.Trainer.add_argparse_args(parser)
    parser = LitClassifier.add_model_specific_args(parser)
    args = parser.parse_args()
    dataset = TensorDataset(torch.rand(192, 1, 28, 28), torch.randint(0, 10, (192,)))
    train, val, test = random_split(dataset, [128, 32, 32])
    model = LitClassifier(Backbone(hidden_dim=args.hidden_dim), args.learning_rate)
    trainer = pl.Trainer.from_argparse_args(args)
    trainer.fit(model, DataLoader(train, args.batch_size), DataLoader(val, args.batch_size))
    result = trainer.test(test_dataloaders=DataLoader(test, args.batch_size))
    assert "test_loss" in result[0]
    assert trainer.logger.log_dir.endswith("version_0")
    assert trainer.checkpoint_callback.best_model_path.endswith("epoch=1-step=7.ckpt")


if __name__ == "__main__":
    cli_main()
