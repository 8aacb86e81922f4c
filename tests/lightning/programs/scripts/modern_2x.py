"""A program of 2.x: lightning as L, devices, outputs kept by hand, predictions to a file."""

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Lit(L.LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
        self.training_step_outputs = []
        self.validation_step_outputs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.training_step_outputs.append(loss.detach())
        self.log("train/loss", loss, batch_size=len(x), sync_dist=True)
        return loss

    def on_train_epoch_end(self):
        self.log("train/mean", torch.stack(self.training_step_outputs).mean())
        self.training_step_outputs.clear()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.validation_step_outputs.append(loss)
        self.log("val/loss", loss, prog_bar=True)

    def on_validation_epoch_end(self):
        self.validation_step_outputs.clear()

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch[0])

    def on_before_optimizer_step(self, optimizer):
        norms = L.pytorch.utilities.grad_norm(self, norm_type=2)
        self.log_dict(norms)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Writer(BasePredictionWriter):
    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save(predictions, "predictions.pt")


@rank_zero_only
def say(text):
    print(text)


if __name__ == "__main__":
    L.seed_everything(1, workers=True)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    loader = DataLoader(data, 8)
    checkpoint = ModelCheckpoint(
        monitor="val/loss",
        filename="best-{epoch:02d}",
        auto_insert_metric_name=False,
        save_last=True,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy="auto",
        max_epochs=3,
        logger=CSVLogger("logs", name="x"),
        callbacks=[
            checkpoint,
            EarlyStopping(monitor="val/loss", mode="min"),
            LearningRateMonitor(),
            TQDMProgressBar(refresh_rate=20),
            Writer("epoch"),
        ],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        gradient_clip_algorithm="norm",
        deterministic="warn",
        inference_mode=False,
    )
    trainer.fit(Lit(), train_dataloaders=loader, val_dataloaders=loader)
    trainer.validate(dataloaders=loader, ckpt_path="best")
    found = trainer.predict(dataloaders=loader, ckpt_path="best")
    assert sum(len(x) for x in found) == 32
    assert "train/mean" in trainer.callback_metrics or checkpoint.best_model_score is not None
    model = Lit.load_from_checkpoint(checkpoint.best_model_path, lr=0.5)
    assert model.hparams.lr == 0.5 and model.hparams.width == 8
    say(trainer.log_dir)
    assert RichProgressBar
