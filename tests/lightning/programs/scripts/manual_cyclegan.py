"""Manual optimization with three optimizers, schedulers stepped by hand, and a pool of images."""

import itertools
import random

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net(out):
    return nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, out))


class ImagePool:
    def __init__(self, size):
        self.size, self.images = size, []

    def query(self, images):
        found = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image)
                found.append(image)
            elif random.random() > 0.5:
                index = random.randrange(self.size)
                old, self.images[index] = self.images[index], image
                found.append(old)
            else:
                found.append(image)
        return torch.stack(found)


class CycleGAN(pl.LightningModule):
    def __init__(self, lr=0.002, lambda_cycle=5.0, decay_from=1, accumulate=2):
        super().__init__()
        self.save_hyperparameters()
        self.g_ab, self.g_ba, self.d_a, self.d_b = net(6), net(6), net(1), net(1)
        self.pool_a, self.pool_b = ImagePool(20), ImagePool(20)
        self.mse, self.l1 = nn.MSELoss(), nn.L1Loss()

    @property
    def automatic_optimization(self):
        return False

    def adversarial(self, out, real):
        return self.mse(out, torch.full_like(out, float(real)))

    def training_step(self, batch, batch_idx):
        (a,), (b,) = batch["a"], batch["b"]
        opt_g, opt_da, opt_db = self.optimizers()

        self.toggle_optimizer(opt_g)
        fake_b, fake_a = self.g_ab(a), self.g_ba(b)
        cycle = self.l1(self.g_ba(fake_b), a) + self.l1(self.g_ab(fake_a), b)
        g_loss = (
            self.adversarial(self.d_b(fake_b), True)
            + self.adversarial(self.d_a(fake_a), True)
            + self.hparams.lambda_cycle * cycle
        )
        self.manual_backward(g_loss / self.hparams.accumulate)
        if (batch_idx + 1) % self.hparams.accumulate == 0:
            nn.utils.clip_grad_norm_(
                itertools.chain(self.g_ab.parameters(), self.g_ba.parameters()), 5.0
            )
            opt_g.step()
            opt_g.zero_grad()
        self.untoggle_optimizer(opt_g)

        for name, opt, d, real, fake in (
            ("d_a", opt_da, self.d_a, a, self.pool_a.query(fake_a)),
            ("d_b", opt_db, self.d_b, b, self.pool_b.query(fake_b)),
        ):
            loss = (self.adversarial(d(real), True) + self.adversarial(d(fake), False)) / 2
            opt.zero_grad()
            self.manual_backward(loss, opt)
            opt.step()
            self.log(f"{name}_loss", loss, on_epoch=True, on_step=False)
        self.log("g_loss", g_loss.detach(), prog_bar=True)
        self.log("lr", opt_g.optimizer.param_groups[0]["lr"])

    def training_epoch_end(self, outputs):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        lr = self.hparams.lr
        opt_g = torch.optim.Adam(
            itertools.chain(self.g_ab.parameters(), self.g_ba.parameters()), lr=lr
        )
        opts = [opt_g] + [torch.optim.Adam(d.parameters(), lr=lr) for d in (self.d_a, self.d_b)]

        def decay(epoch):
            return 1.0 - max(0, epoch - self.hparams.decay_from) / 4

        return opts, [torch.optim.lr_scheduler.LambdaLR(opt, decay) for opt in opts]

    def train_dataloader(self):
        a, b = torch.randn(48, 6), torch.randn(64, 6) * 0.5 + 2
        return {k: DataLoader(TensorDataset(x), 16, shuffle=True) for k, x in (("a", a), ("b", b))}


if __name__ == "__main__":
    pl.seed_everything(2)
    random.seed(2)
    model = CycleGAN()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = pl.Trainer(max_epochs=4, progress_bar_refresh_rate=0, log_every_n_steps=1)
    trainer.fit(model)
    assert all(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert trainer.num_training_batches == 4  # of the longer one
    rates = [opt.param_groups[0]["lr"] for opt in trainer.optimizers]
    assert rates == [0.002 * 0.25] * 3, rates
    assert {"d_a_loss", "d_b_loss", "g_loss", "lr"} <= set(trainer.logged_metrics)
