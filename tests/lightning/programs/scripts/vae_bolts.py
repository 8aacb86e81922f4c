"""A VAE in the manner of lightning-bolts, with a data module that splits and normalizes."""

from argparse import ArgumentParser

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split


class VisionDataModule(LightningDataModule):
    name = "made"

    def __init__(
        self, data_dir=None, val_split=0.2, num_workers=0, batch_size=16, seed=42, *args, **kwargs
    ):
        super().__init__(*args)
        self.dims = (1, 8, 8)
        self.val_split, self.batch_size, self.seed, self.num_workers = (
            val_split,
            batch_size,
            seed,
            num_workers,
        )

    @property
    def num_classes(self):
        return 10

    def prepare_data(self, *args, **kwargs):
        self.made = True

    def setup(self, stage=None):
        whole = [(torch.rand(1, 8, 8), i % 10) for i in range(80)]
        count = int(len(whole) * self.val_split)
        self.train, self.val = random_split(
            whole, [len(whole) - count, count], generator=torch.Generator().manual_seed(self.seed)
        )

    def train_dataloader(self, *args, **kwargs):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self, *args, **kwargs):
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self):
        return self.val_dataloader()


class VAE(LightningModule):
    def __init__(
        self,
        input_height: int,
        enc_type: str = "mlp",
        first_conv: bool = False,
        latent_dim: int = 4,
        kl_coeff: float = 0.1,
        lr: float = 1e-3,
        **kwargs,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.kl_coeff = lr, kl_coeff
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(input_height**2, 16), nn.ReLU())
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, input_height**2), nn.Unflatten(1, (1, input_height, input_height))
        )
        self.fc_mu, self.fc_var = nn.Linear(16, latent_dim), nn.Linear(16, latent_dim)

    def forward(self, x):
        x = self.encoder(x)
        p, q, z = self.sample(self.fc_mu(x), self.fc_var(x))
        return self.decoder(z)

    def sample(self, mu, log_var):
        std = torch.exp(log_var / 2)
        p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(std))
        q = torch.distributions.Normal(mu, std)
        return p, q, q.rsample()

    def step(self, batch, batch_idx):
        x, y = batch
        h = self.encoder(x)
        p, q, z = self.sample(self.fc_mu(h), self.fc_var(h))
        recon = F.mse_loss(self.decoder(z), x, reduction="mean")
        kl = torch.distributions.kl_divergence(q, p).mean() * self.kl_coeff
        return kl + recon, {"recon_loss": recon, "kl": kl, "loss": kl + recon}

    def training_step(self, batch, batch_idx):
        loss, logs = self.step(batch, batch_idx)
        self.log_dict({f"train_{k}": v for k, v in logs.items()}, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, logs = self.step(batch, batch_idx)
        self.log_dict({f"val_{k}": v for k, v in logs.items()})
        return loss

    def test_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
            "interval": "step",
            "name": "lr",
        }
        return [optimizer], [scheduler]


class PrintLosses(Callback):
    seen = 0

    def on_validation_epoch_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking:
            self.seen += 1
            assert "val_loss" in metrics and "train_kl" in metrics, dict(metrics)
            pl_module.print("epoch", trainer.current_epoch, float(metrics["val_loss"]))


if __name__ == "__main__":
    seed_everything(7)
    parser = ArgumentParser()
    parser = Trainer.add_argparse_args(parser)
    args = parser.parse_args()
    dm = VisionDataModule()
    model = VAE(input_height=dm.size()[-1], **vars(args))
    printer = PrintLosses()
    args.callbacks = [
        EarlyStopping("val_loss"),
        LearningRateMonitor("step"),
        ModelCheckpoint(monitor="val_loss", save_last=True),
        printer,
    ]
    trainer = Trainer.from_argparse_args(args, log_every_n_steps=2)
    trainer.fit(model, datamodule=dm)
    assert printer.seen == 2
    assert "val_loss" in trainer.test(datamodule=dm)[0]
    again = VAE.load_from_checkpoint(trainer.checkpoint_callback.last_model_path)
    assert again.hparams.latent_dim == 4
