"""A Wasserstein GAN with gradient penalty: two optimizers that take turns by frequency."""

from argparse import ArgumentParser, Namespace

import pytorch_lightning as pl
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class WGANGP(LightningModule):
    def __init__(
        self,
        latent_dim: int = 8,
        lr: float = 0.005,
        b1: float = 0.5,
        b2: float = 0.9,
        n_critic: int = 3,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, 32), nn.LeakyReLU(0.2), nn.Linear(32, 16), nn.Tanh()
        )
        self.discriminator = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.validation_z = torch.randn(4, latent_dim)
        self.turns = []

    def forward(self, z):
        return self.generator(z)

    def compute_gradient_penalty(self, real, fake):
        alpha = torch.rand(real.size(0), 1).to(self.device)
        between = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        out = self.discriminator(between)
        (grad,) = torch.autograd.grad(
            outputs=out, inputs=between, grad_outputs=torch.ones_like(out), create_graph=True
        )
        return ((grad.norm(2, dim=1) - 1) ** 2).mean()

    def training_step(self, batch, batch_idx, optimizer_idx):
        imgs, _ = batch
        z = torch.randn(imgs.shape[0], self.hparams.latent_dim).type_as(imgs)
        self.turns.append(optimizer_idx)
        if optimizer_idx == 0:
            assert not next(self.discriminator.parameters()).requires_grad
            g_loss = -torch.mean(self.discriminator(self(z)))
            self.log("g_loss", g_loss, prog_bar=True)
            return {"loss": g_loss}
        fake = self(z)
        penalty = self.compute_gradient_penalty(imgs.data, fake.data)
        d_loss = (
            self.discriminator(fake.detach()).mean()
            - self.discriminator(imgs).mean()
            + 10 * penalty
        )
        self.log("d_loss", d_loss, prog_bar=True)
        return {"loss": d_loss}

    def configure_optimizers(self):
        lr, betas = self.hparams.lr, (self.hparams.b1, self.hparams.b2)
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=betas)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=betas)
        return (
            {"optimizer": opt_g, "frequency": 1},
            {"optimizer": opt_d, "frequency": self.hparams.n_critic},
        )

    def on_epoch_end(self):
        z = self.validation_z.to(self.device)
        grid = (self(z).reshape(1, 4, 4 * 4) + 1) / 2
        self.logger.experiment.add_image("generated_images", grid, self.current_epoch)

    def train_dataloader(self):
        x = torch.tanh(torch.randn(192, 16) * 0.1 + torch.linspace(-1, 1, 16))
        return DataLoader(TensorDataset(x, torch.zeros(192)), batch_size=16)


def main(args: Namespace) -> None:
    pl.seed_everything(0)
    model = WGANGP(**{k: v for k, v in vars(args).items() if k in ("latent_dim", "lr", "n_critic")})
    trainer = Trainer(max_epochs=args.max_epochs, gpus=args.gpus, progress_bar_refresh_rate=20)
    trainer.fit(model)
    assert model.turns == ([0] + [1] * 3) * 6, model.turns
    assert {"g_loss", "d_loss"} <= set(trainer.callback_metrics)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--max_epochs", type=int, default=2)
    parser.add_argument("--latent_dim", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--n_critic", type=int, default=3)
    main(parser.parse_args())
