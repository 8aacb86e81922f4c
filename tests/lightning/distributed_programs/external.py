"""Run by torchrun: two processes stand for two machines, each with two devices."""

import os
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[0]))
        return self.layer(batch[0]).pow(2).mean()

    def training_step_end(self, losses):
        assert losses.shape == (2,)
        return losses.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Broken(Model):
    def training_step_end(self, losses):
        if self.global_rank == 1:
            raise ValueError("the second machine is broken")
        return losses.mean()


if __name__ == "__main__":
    loader = DataLoader(TensorDataset(torch.arange(32.0).reshape(16, 2) / 32), batch_size=4)
    options = {
        "accelerator": "ddp2",
        "num_processes": 2,
        "num_nodes": 2,
        "max_epochs": 1,
        "logger": False,
        "checkpoint_callback": False,
        "progress_bar_refresh_rate": 0,
        "default_root_dir": sys.argv[1],
    }
    model = Model()
    trainer = pl.Trainer(**options)
    trainer.fit(model, loader)
    found = {
        "weights": model.state_dict(),
        "sizes": model.sizes,
        "ranks": (trainer.global_rank, trainer.world_size),
    }
    torch.save(found, f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
    pl.Trainer(**options).fit(Broken(), loader)
