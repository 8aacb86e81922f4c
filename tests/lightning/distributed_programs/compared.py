"""One program for both packages: ``compared.py ours|real directory``."""

import os
import sys
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

if sys.argv[1] == "ours":
    import puretrain.lightning as pl
else:
    import pytorch_lightning as pl

warnings.simplefilter("ignore")


def samples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Model(pl.LightningModule):
    def __init__(self, *, manual=False, sampler=False, accumulate=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 2)
        self.automatic_optimization = not manual
        self.sampler = sampler
        self.seen = []

    def loss(self, batch):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].sum().item())
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", loss, on_step=False, on_epoch=True)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        self.log("val_max", loss, reduce_fx="max", sync_dist=True)
        self.log("val_sum", loss, reduce_fx="sum", sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]

    def train_dataloader(self):
        data = samples(37, 0)
        if self.sampler:
            sampler = WeightedRandomSampler(torch.arange(37) + 1, 21)
            return DataLoader(data, batch_size=4, sampler=sampler)
        return DataLoader(data, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(samples(15, 1), batch_size=4)

    test_dataloader = val_dataloader


RUNS = {
    "accumulated": ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "by hand": ({"manual": True}, {}),
    "with a sampler": ({"sampler": True}, {"precision": "bf16-mixed", "max_epochs": 2}),
    "overfitted": ({}, {"overfit_batches": 3, "max_epochs": 2}),
}

if __name__ == "__main__":
    found = {}
    for name, (of_model, of_trainer) in RUNS.items():
        folder = os.path.join(sys.argv[2], name)
        pl.seed_everything(3)
        model = Model(**of_model)
        callbacks = [
            pl.callbacks.EarlyStopping("val_loss", patience=50),
            pl.callbacks.ModelCheckpoint(folder, monitor="val_loss", save_top_k=2),
        ]
        options = {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "max_epochs": 3,
            "default_root_dir": folder,
            "logger": False,
            "callbacks": callbacks,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **of_trainer,
        }
        trainer = pl.Trainer(**options)
        trainer.fit(model)
        fitted = {k: v.clone() for k, v in model.state_dict().items()}
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        found[name] = {
            "state": fitted,
            "seen": model.seen,
            "metrics": metrics,
            "best": os.path.basename(callbacks[1].best_model_path),
            "score": float(callbacks[1].best_model_score),
            "files": sorted(os.listdir(folder)),
            "tested": trainer.test(model, ckpt_path="best", verbose=False),
            "ranks": (trainer.global_rank, trainer.local_rank, trainer.world_size),
        }
    torch.save(found, f"{sys.argv[2]}/rank{trainer.global_rank}.pt")
