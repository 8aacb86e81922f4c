"""Self-supervised learning: BYOL with a moving average kept by a callback, then SimCLR's loss,
both watched by an online evaluator with an optimizer of its own."""

import copy
import math
from argparse import ArgumentParser

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.metrics.functional import accuracy
from torch import nn
from torch.utils.data import DataLoader, Dataset


class TwoViews(Dataset):
    """Blobs of three classes; each sample is seen twice under noise."""

    def __init__(self, count=120, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        centers = torch.eye(3).repeat(1, 4) * 3
        self.data = centers[self.labels] + torch.randn(count, 12, generator=generator) * 0.3

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x = self.data[index]
        views = x + 0.1 * torch.randn(12), x + 0.1 * torch.randn(12)
        return views, int(self.labels[index])


class WeightUpdate(Callback):
    """tau grows to one by a cosine."""

    def __init__(self, initial_tau=0.9):
        super().__init__()
        self.initial_tau = self.current_tau = initial_tau

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx):
        online, target = pl_module.online, pl_module.target
        for p_online, p_target in zip(online.parameters(), target.parameters()):
            p_target.data = (
                self.current_tau * p_target.data + (1 - self.current_tau) * p_online.data
            )
        max_steps = len(trainer.train_dataloader) * trainer.max_epochs
        progress = math.cos(math.pi * pl_module.global_step / max_steps)
        self.current_tau = 1 - (1 - self.initial_tau) * (progress + 1) / 2

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        return {"tau": self.current_tau}

    def on_load_checkpoint(self, callback_state):
        self.current_tau = callback_state["tau"]


class SSLOnlineEvaluator(Callback):
    def __init__(self, z_dim, num_classes):
        self.z_dim, self.num_classes = z_dim, num_classes

    def on_pretrain_routine_start(self, trainer, pl_module):
        pl_module.non_linear_evaluator = nn.Linear(self.z_dim, self.num_classes).to(
            pl_module.device
        )
        self.optimizer = torch.optim.SGD(pl_module.non_linear_evaluator.parameters(), lr=0.3)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx):
        (x, _), y = batch
        with torch.no_grad():
            representations = pl_module(x)
        logits = pl_module.non_linear_evaluator(representations.detach())
        loss = F.cross_entropy(logits, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = {"ssl_loss": loss, "ssl_acc": accuracy(logits.argmax(1), y)}
        pl_module.logger.log_metrics(metrics, step=trainer.global_step)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx
    ):
        (x, _), y = batch
        logits = pl_module.non_linear_evaluator(pl_module(x))
        pl_module.log("ssl_val_acc", accuracy(logits.argmax(1), y), on_epoch=True, on_step=False)


class Base(pl.LightningModule):
    def __init__(
        self, learning_rate=0.01, warmup_epochs=1, max_epochs=2, weight_decay=1e-4, **kwargs
    ):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8)
        )

    def forward(self, x):
        return self.encoder(x)

    def exclude_from_wt_decay(self, named_params, weight_decay, skip_list=("bias", "bn")):
        params, excluded = [], []
        for name, param in named_params:
            if not param.requires_grad:
                continue
            (excluded if any(skip in name for skip in skip_list) else params).append(param)
        return [
            {"params": params, "weight_decay": weight_decay},
            {"params": excluded, "weight_decay": 0.0},
        ]

    def configure_optimizers(self):
        groups = self.exclude_from_wt_decay(self.named_parameters(), self.hparams.weight_decay)
        optimizer = torch.optim.Adam(groups, lr=self.hparams.learning_rate)
        warmup = 4 * self.hparams.warmup_epochs
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup))
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "name": "warmup"}]

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.shared_step(batch))

    @staticmethod
    def add_model_specific_args(parent_parser):
        parser = ArgumentParser(parents=[parent_parser], add_help=False)
        parser.add_argument("--learning_rate", type=float, default=0.01)
        parser.add_argument("--warmup_epochs", type=int, default=1)
        parser.add_argument("--weight_decay", type=float, default=1e-4)
        return parser


class BYOL(Base):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.online = nn.Sequential(self.encoder, nn.Linear(8, 8))
        self.target = copy.deepcopy(self.online)
        for param in self.target.parameters():
            param.requires_grad = False
        self.predictor = nn.Linear(8, 8)

    def shared_step(self, batch):
        (one, two), _ = batch
        loss = 0
        for a, b in ((one, two), (two, one)):
            with torch.no_grad():
                z = self.target(b)
            loss = loss - F.cosine_similarity(self.predictor(self.online(a)), z, dim=-1).mean()
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.shared_step(batch)
        self.log_dict({"train_loss": loss, "tau": 0.5}, prog_bar=True)
        return loss


class SimCLR(Base):
    def __init__(self, temperature=0.5, **kwargs):
        super().__init__(**kwargs)
        self.projection = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))

    def nt_xent(self, a, b, temperature):
        out = torch.cat([a, b])
        similarity = torch.exp(out @ out.t() / temperature)
        negative = similarity.sum(-1) - math.e ** (1 / temperature)
        positive = torch.exp((a * b).sum(-1) / temperature)
        return -torch.log(torch.cat([positive, positive]) / negative).mean()

    def shared_step(self, batch):
        (one, two), _ = batch
        a, b = (F.normalize(self.projection(self(x)), dim=1) for x in (one, two))
        return self.nt_xent(a, b, 0.5)

    def training_step(self, batch, batch_idx):
        loss = self.shared_step(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


def cli_main():
    pl.seed_everything(1234)
    parser = ArgumentParser()
    parser = pl.Trainer.add_argparse_args(parser)
    parser = Base.add_model_specific_args(parser)
    args = parser.parse_args()
    args.max_epochs = 6
    loaders = [DataLoader(TwoViews(seed=s), batch_size=30, shuffle=not s) for s in (0, 1)]
    for cls in (BYOL, SimCLR):
        model = cls(**vars(args))
        update, checkpoint = (
            WeightUpdate(),
            ModelCheckpoint(monitor="ssl_val_acc", mode="max", save_last=True),
        )
        callbacks = [SSLOnlineEvaluator(8, 3), LearningRateMonitor(), checkpoint]
        if cls is BYOL:
            callbacks.append(update)
        trainer = pl.Trainer.from_argparse_args(args, callbacks=callbacks, log_every_n_steps=2)
        trainer.fit(model, loaders[0], loaders[1])
        assert trainer.callback_metrics["ssl_val_acc"] > 0.6, trainer.callback_metrics
        if cls is BYOL:
            assert update.current_tau > 0.98
            state = torch.load(checkpoint.last_model_path, weights_only=False)["callbacks"]
            assert any(isinstance(s, dict) and "tau" in s for s in state.values())
    again = SimCLR.load_from_checkpoint(checkpoint.best_model_path, strict=False)
    assert again.hparams.learning_rate == 0.01
    again.freeze()
    assert not any(p.requires_grad for p in again.parameters())


if __name__ == "__main__":
    cli_main()
