"""A GAN with two optimizers, images logged when an epoch ends."""

from argparse import ArgumentParser, Namespace
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from pytorch_lightning.core import LightningDataModule, LightningModule
from pytorch_lightning.trainer import Trainer
from torch.utils.data import DataLoader, TensorDataset


class Generator(nn.Module):
    def __init__(self, latent_dim, img_shape):
        super().__init__()
        self.img_shape = img_shape

        def block(a, b, normalize=True):
            layers = [nn.Linear(a, b)]
            if normalize:
                layers.append(nn.BatchNorm1d(b, 0.8))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            return layers

        self.model = nn.Sequential(
            *block(latent_dim, 16, normalize=False),
            *block(16, 32),
            nn.Linear(32, int(np.prod(img_shape))),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.model(z).view(z.size(0), *self.img_shape)


class GAN(LightningModule):
    def __init__(self, hparams: Namespace):
        super().__init__()
        self.hparams = hparams
        img_shape = (1, 8, 8)
        self.generator = Generator(hparams.latent_dim, img_shape)
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)
        )
        self.validation_z = torch.randn(8, hparams.latent_dim)
        self.example_input_array = torch.zeros(2, hparams.latent_dim)

    def forward(self, z):
        return self.generator(z)

    @staticmethod
    def adversarial_loss(y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch, batch_idx, optimizer_idx):
        imgs, _ = batch
        z = torch.randn(imgs.shape[0], self.hparams.latent_dim).type_as(imgs)
        if optimizer_idx == 0:
            self.generated_imgs = self(z)
            valid = torch.ones(imgs.size(0), 1).type_as(imgs)
            g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
            tqdm_dict = {"g_loss": g_loss}
            self.log_dict(tqdm_dict)
            return OrderedDict({"loss": g_loss, "progress_bar": tqdm_dict, "log": tqdm_dict})
        if optimizer_idx == 1:
            valid = torch.ones(imgs.size(0), 1).type_as(imgs)
            fake = torch.zeros(imgs.size(0), 1).type_as(imgs)
            real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
            fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
            d_loss = (real_loss + fake_loss) / 2
            self.log("d_loss", d_loss, prog_bar=True)
            return OrderedDict({"loss": d_loss})

    def configure_optimizers(self):
        lr, b1, b2 = self.hparams.lr, self.hparams.b1, self.hparams.b2
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=(b1, b2))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(b1, b2))
        return [opt_g, opt_d], []

    def on_epoch_end(self):
        z = self.validation_z.type_as(next(self.generator.parameters()))
        self.logger.experiment.add_images(
            "generated_images", self(z).clamp(0, 1), self.current_epoch
        )


class Data(LightningDataModule):
    def setup(self, stage=None):
        self.train = TensorDataset(torch.rand(64, 1, 8, 8), torch.zeros(64))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, num_workers=0)


def main(args):
    model = GAN(args)
    trainer = Trainer(gpus=0, max_epochs=2)
    trainer.fit(model, Data())
    assert {"g_loss", "d_loss"} <= set(trainer.callback_metrics)
    assert trainer.global_step == 8


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.0002)
    parser.add_argument("--b1", type=float, default=0.5)
    parser.add_argument("--b2", type=float, default=0.999)
    parser.add_argument("--latent_dim", type=int, default=10)
    hparams, _ = parser.parse_known_args()
    main(hparams)
