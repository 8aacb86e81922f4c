"""A GAN with two optimizers in automatic optimization, on points of a ring.

python examples/lightning_gan.py
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import puretrain.lightning as pl


def ring(count):
    angle = 2 * math.pi * torch.rand(count)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def network(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
        nn.Linear(64, outputs),
    )  # fmt: skip


class GAN(pl.LightningModule):
    def __init__(self, latent_dim: int = 8, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.generator = network(latent_dim, 2)
        self.discriminator = network(2, 1)

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, real, batch_idx, optimizer_idx):
        z = torch.randn(real.shape[0], self.hparams.latent_dim).type_as(real)
        valid, fake = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        if optimizer_idx == 0:
            loss = self.adversarial_loss(self.discriminator(self(z)), valid)
            self.log("g_loss", loss, prog_bar=True)
            return loss
        real_loss = self.adversarial_loss(self.discriminator(real), valid)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
        loss = (real_loss + fake_loss) / 2
        self.log("d_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        options = {"lr": self.hparams.lr, "betas": (0.5, 0.999)}
        opt_g = torch.optim.Adam(self.generator.parameters(), **options)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), **options)
        return [opt_g, opt_d], []

    def train_dataloader(self):
        return DataLoader(ring(2048), batch_size=64, shuffle=True)


def main():
    pl.seed_everything(0)
    model = GAN()
    trainer = pl.Trainer(max_epochs=15, logger=False, checkpoint_callback=False)
    trainer.fit(model)
    with torch.no_grad():
        radius = model(torch.randn(1000, model.hparams.latent_dim)).norm(dim=1)
    print(f"mean radius {radius.mean():.2f} (of the data: 1.00)")


if __name__ == "__main__":
    main()
