"""A student learns of a frozen teacher out of a checkpoint; two training sets; own checkpoint keys."""

import os

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler, LambdaCallback
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(count, generator=generator) < 0.3).long()
    return TensorDataset(torch.randn(count, 4, generator=generator) + 2 * y[:, None], y)


class Teacher(pl.LightningModule):
    def __init__(self, width=32):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        acc = (self(x).argmax(1) == y).float().mean()
        self.log("acc", acc)
        return acc

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Student(Teacher):
    def __init__(self, teacher_path, width=4, temperature=2.0):
        super().__init__(width)
        self.save_hyperparameters()
        self.teacher = Teacher.load_from_checkpoint(teacher_path)
        self.teacher.freeze()
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.epochs_done = 0

    def training_step(self, batch, batch_idx):
        (x, y), (free, _) = batch["labelled"], batch["free"]
        hard = F.cross_entropy(self(x), y)
        soft = F.kl_div(
            F.log_softmax(self(free) / self.hparams.temperature, -1),
            F.softmax(self.teacher(free) / self.hparams.temperature, -1),
            reduction="batchmean",
        )
        self.log_dict({"hard": hard, "soft": soft}, on_epoch=True, on_step=True)
        return {"loss": hard + soft + 0 * self.log_temperature, "size": len(x)}

    def training_step_end(self, outputs):
        assert set(outputs) == {"loss", "size"}
        return outputs

    def training_epoch_end(self, outputs):
        self.epochs_done += 1

    def on_save_checkpoint(self, checkpoint):
        for key in [k for k in checkpoint["state_dict"] if k.startswith("teacher.")]:
            del checkpoint["state_dict"][key]
        checkpoint["epochs_done"] = self.epochs_done

    def on_load_checkpoint(self, checkpoint):
        self.epochs_done = checkpoint["epochs_done"]
        for name, value in self.teacher.state_dict().items():
            checkpoint["state_dict"][f"teacher.{name}"] = value

    def configure_callbacks(self):
        return [GradientAccumulationScheduler({0: 1, 1: 2})]

    def configure_optimizers(self):
        groups = [{"params": self.net.parameters()}, {"params": [self.log_temperature], "lr": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.5)]


class PrintsTable(Callback):
    def on_fit_end(self, trainer, pl_module):
        trainer.table = {k: round(float(v), 3) for k, v in trainer.logged_metrics.items()}


def main():
    pl.seed_everything(3)
    train, free, val = blobs(96, 0), blobs(160, 1), blobs(64, 2)
    weights = torch.where(train.tensors[1] == 1, 7.0, 3.0)
    sampler = WeightedRandomSampler(weights, len(train), generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(max_epochs=4, progress_bar_refresh_rate=0, weights_summary=None)
    teacher = Teacher()
    trainer.fit(teacher, DataLoader(train, 16, sampler=sampler), DataLoader(val, 64))
    trainer.save_checkpoint("teacher.ckpt")
    assert trainer.callback_metrics["acc"] > 0.85

    loaders = {"labelled": DataLoader(train, 16, shuffle=True), "free": DataLoader(free, 16)}
    options = dict(
        progress_bar_refresh_rate=0, multiple_trainloader_mode="min_size", weights_summary=None
    )
    ended = []
    callbacks = [PrintsTable(), LambdaCallback(on_epoch_end=lambda *_: ended.append(1))]
    student = Student("teacher.ckpt")
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **options)
    trainer.fit(student, loaders, DataLoader(val, 64))
    assert trainer.num_training_batches == 6 and trainer.global_step == 6 + 3
    assert {"hard_epoch", "soft_epoch", "acc"} <= set(trainer.table)
    path = trainer.checkpoint_callback.best_model_path
    assert not any(k.startswith("teacher.") for k in torch.load(path)["state_dict"])

    again = Student("teacher.ckpt")
    trainer = pl.Trainer(max_epochs=4, resume_from_checkpoint=path, **options)
    trainer.fit(again, loaders, DataLoader(val, 64))
    assert again.epochs_done == 4 and trainer.global_step == 9 + 6
    assert trainer.optimizers[0].param_groups[1]["lr"] == 0.1 * 0.25
    assert trainer.validate(again, DataLoader(val, 64), verbose=False)[0]["acc"] > 0.8
    script = again.net
    torch.jit.trace(script, torch.zeros(1, 4)).save("student.pt")
    assert os.path.getsize("student.pt") > 0
    try:
        pl.Trainer(gpus=99)
    except MisconfigurationException as error:
        assert "machine only has" in str(error)


if __name__ == "__main__":
    main()
