"""A small diffusion model for 2.x: averaged weights, a schedule over all steps, predictions to disk."""

import copy
import math
import os

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class EMA(L.Callback):
    def __init__(self, decay=0.95):
        self.decay, self.shadow, self.kept = decay, None, None

    def on_fit_start(self, trainer, pl_module):
        if self.shadow is None:
            self.shadow = copy.deepcopy(pl_module.net.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, value in pl_module.net.state_dict().items():
            self.shadow[name].lerp_(value, 1 - self.decay)

    def on_validation_epoch_start(self, trainer, pl_module):
        self.kept = copy.deepcopy(pl_module.net.state_dict())
        pl_module.net.load_state_dict(self.shadow)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.net.load_state_dict(self.kept)

    def state_dict(self):
        return {"shadow": self.shadow}

    def load_state_dict(self, state_dict):
        self.shadow = state_dict["shadow"]


class Writer(BasePredictionWriter):
    def __init__(self, folder):
        super().__init__(write_interval="batch_and_epoch")
        self.folder = folder
        os.makedirs(folder, exist_ok=True)

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ):
        torch.save(
            {"x": prediction, "places": batch_indices}, os.path.join(self.folder, f"{batch_idx}.pt")
        )

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save((predictions, batch_indices), os.path.join(self.folder, "all.pt"))


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str):
        angle = torch.rand(160, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
        points = torch.stack([angle.cos(), angle.sin()], 1)
        if stage == "fit":
            self.train, self.val = TensorDataset(points[:128]), TensorDataset(points[128:])
        if stage == "predict":
            self.noise = TensorDataset(
                torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
            )

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)

    def predict_dataloader(self):
        return DataLoader(self.noise, batch_size=4)


class Diffusion(L.LightningModule):
    def __init__(self, steps: int = 10, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))
        self.register_buffer("alpha", torch.linspace(0.99, 0.05, steps))
        self.validation_step_outputs, self.history = [], []

    def loss(self, x):
        t = torch.randint(0, self.hparams.steps, (len(x),), device=self.device)
        noise, a = torch.randn_like(x), self.alpha[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        return (
            (self.net(torch.cat([noisy, t[:, None] / self.hparams.steps], 1)) - noise)
            .square()
            .mean()
        )

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch[0])
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validation_step_outputs.append(self.loss(batch[0]))

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.validation_step_outputs).mean(), prog_bar=True)
        self.validation_step_outputs.clear()

    def on_train_epoch_end(self):
        metrics = self.trainer.callback_metrics
        self.history.append((float(metrics["train_loss_epoch"]), float(metrics["val_loss"])))
        self.log("gap", self.history[-1][1] - self.history[-1][0])

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self.net, norm_type=2))

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def predict_step(self, batch, batch_idx):
        x = batch[0]
        for t in reversed(range(self.hparams.steps)):
            time = torch.full((len(x), 1), t / self.hparams.steps, device=self.device)
            x = x - self.net(torch.cat([x, time], 1)) / self.hparams.steps
        return x

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        total = self.trainer.estimated_stepping_batches
        assert total == 4 * 8
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@rank_zero_only
def say(text):
    print(text)


def main():
    L.seed_everything(1, workers=True)
    data, model, ema = Data(), Diffusion(), EMA()
    best = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{step}", save_last="link")
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=4,
        gradient_clip_val=1.0,
        log_every_n_steps=4,
        callbacks=[ema, best, LearningRateMonitor("step"), RichProgressBar(), Writer("out")],
        logger=CSVLogger("logs"),
        enable_model_summary=False,
        num_sanity_val_steps=2,
    )
    trainer.fit(model, datamodule=data)
    assert len(model.history) == 4 and model.history[-1][1] < 1.2, model.history
    assert "gap" in trainer.callback_metrics
    assert any(k.startswith("grad_2.0_norm") for k in trainer.logged_metrics)
    trainer.predict(model, datamodule=data, ckpt_path="best", return_predictions=False)
    predictions, places = torch.load("out/all.pt", weights_only=False)
    assert [len(p) for p in predictions] == [4, 4, 2] and places == [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    ]
    assert torch.load("out/2.pt")["places"] == [8, 9]
    resumed = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[EMA()],
    )
    resumed.fit(Diffusion(), datamodule=Data(), ckpt_path=best.best_model_path)
    say(trainer.validate(model, datamodule=data, verbose=False))


if __name__ == "__main__":
    main()
