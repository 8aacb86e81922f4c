"""A convolutional classifier with top-k accuracy, LambdaLR, own optimizer step and DDP-minded code."""

import os
from argparse import ArgumentParser, Namespace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torch.optim as optim
import torch.optim.lr_scheduler as lr_scheduler
from pytorch_lightning.core import LightningModule
from torch.utils.data import DataLoader, TensorDataset


class ImageNetLightningModel(LightningModule):
    MODEL_NAMES = ["tiny"]

    def __init__(
        self,
        arch: str,
        pretrained: bool,
        lr: float,
        momentum: float,
        weight_decay: int,
        data_path: str,
        batch_size: int,
        workers: int,
        **kwargs,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.arch, self.lr, self.momentum, self.weight_decay, self.batch_size = (
            arch,
            lr,
            momentum,
            weight_decay,
            batch_size,
        )
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, 10),
        )

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        images, target = batch
        output = self(images)
        loss_train = F.cross_entropy(output, target)
        acc1, acc5 = self.__accuracy(output, target, topk=(1, 5))
        self.log("train_loss", loss_train, on_step=True, on_epoch=True, logger=True)
        self.log("train_acc1", acc1, on_step=True, prog_bar=True, on_epoch=True, logger=True)
        self.log("train_acc5", acc5, on_step=True, on_epoch=True, logger=True)
        return loss_train

    def validation_step(self, batch, batch_idx):
        images, target = batch
        output = self(images)
        acc1, acc5 = self.__accuracy(output, target, topk=(1, 5))
        self.log("val_loss", F.cross_entropy(output, target), on_step=True, on_epoch=True)
        self.log("val_acc1", acc1, on_step=True, prog_bar=True, on_epoch=True)

    test_step = validation_step

    @staticmethod
    def __accuracy(output, target, topk=(1,)):
        with torch.no_grad():
            _, pred = output.topk(max(topk), 1, True, True)
            correct = pred.t().eq(target.view(1, -1).expand_as(pred.t()))
            return [
                correct[:k].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / target.size(0))
                for k in topk
            ]

    def configure_optimizers(self):
        optimizer = optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1 ** (epoch // 30))
        return [optimizer], [scheduler]

    def optimizer_step(
        self,
        epoch,
        batch_idx,
        optimizer,
        optimizer_idx,
        optimizer_closure,
        on_tpu,
        using_native_amp,
        using_lbfgs,
    ):
        if self.trainer.global_step < 4:
            scale = min(1.0, float(self.trainer.global_step + 1) / 4.0)
            for group in optimizer.param_groups:
                group["lr"] = scale * self.lr
        optimizer.step(closure=optimizer_closure)

    def _loader(self):
        data = TensorDataset(torch.rand(32, 3, 8, 8), torch.randint(0, 10, (32,)))
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.hparams.workers)

    def train_dataloader(self):
        return self._loader()

    def val_dataloader(self):
        return self._loader()

    def test_dataloader(self):
        return self.val_dataloader()

    @staticmethod
    def add_model_specific_args(parent_parser):
        parser = ArgumentParser(parents=[parent_parser], add_help=False)
        parser.add_argument(
            "-a", "--arch", default="tiny", choices=ImageNetLightningModel.MODEL_NAMES
        )
        parser.add_argument("-j", "--workers", default=0, type=int)
        parser.add_argument("-b", "--batch-size", default=8, type=int, dest="batch_size")
        parser.add_argument("--lr", "--learning-rate", default=0.1, type=float, dest="lr")
        parser.add_argument("--momentum", default=0.9, type=float)
        parser.add_argument("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
        parser.add_argument("--pretrained", dest="pretrained", action="store_true")
        return parser


def main(args: Namespace) -> None:
    if args.seed is not None:
        pl.seed_everything(args.seed)
    if args.accelerator == "ddp":
        args.batch_size = int(args.batch_size / max(1, args.gpus))
    model = ImageNetLightningModel(**vars(args))
    trainer = pl.Trainer.from_argparse_args(args)
    if args.evaluate:
        trainer.test(model)
    else:
        trainer.fit(model)
    assert "train_acc1_epoch" in trainer.callback_metrics


def run_cli():
    parent_parser = ArgumentParser(add_help=False)
    parent_parser = pl.Trainer.add_argparse_args(parent_parser)
    parent_parser.add_argument("--data-path", default=".", type=str)
    parent_parser.add_argument("-e", "--evaluate", dest="evaluate", action="store_true")
    parent_parser.add_argument("--seed", type=int, default=42)
    parser = ImageNetLightningModel.add_model_specific_args(parent_parser)
    parser.set_defaults(profiler="simple", deterministic=True, max_epochs=90)
    args = parser.parse_args()
    main(args)
    assert os.path.isdir("lightning_logs")


if __name__ == "__main__":
    run_cli()
