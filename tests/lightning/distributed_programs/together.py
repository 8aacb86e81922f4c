"""Started plainly; the trainer starts the second process. Each writes what it has seen to a file.

The programs of all parts run one after the other in the same two processes, since starting them
takes longer than everything else.
"""

import os
import signal
import sys
import warnings

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning.metrics import Accuracy, Metric
from puretrain.lightning.utilities import rank_zero_only

warnings.simplefilter("ignore")
QUIET = {
    "checkpoint_callback": False,
    "logger": False,
    "progress_bar_refresh_rate": 0,
    "weights_summary": None,
}
TWO = {"accelerator": "ddp", "num_processes": 2}


def samples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


class Base(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.notes = []

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(samples(22), batch_size=3, shuffle=True)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────


class Logging(Base):
    """Different parameters at first; gradients accumulated and clipped; values of all kinds."""

    def __init__(self):
        super().__init__()
        self.accuracy = Accuracy()
        self.order = []
        with torch.no_grad():
            self.net[0].weight += int(os.environ.get("LOCAL_RANK", "0"))
        self.prepared = 0

    def prepare_data(self):
        self.prepared += 1

    def training_step(self, batch, batch_idx):
        self.order.append(batch[0][:, 0].tolist())
        loss = self.loss(batch)
        self.log("mean", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", loss, on_step=False, on_epoch=True)
        self.log("summed", float(self.global_rank + 1), on_step=False, on_epoch=True,
                 sync_dist=True, sync_dist_op="sum")  # fmt: skip
        return loss

    def validation_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]).softmax(1), batch[1])
        self.log("accuracy", self.accuracy)
        self.log("largest", batch[0].max(), reduce_fx="max", sync_dist=True)
        self.log("val_rank", float(self.global_rank))  # not the same in both
        if self.global_rank == 0:
            self.log("only_first", 1.0, rank_zero_only=True)

    def on_validation_epoch_end(self):
        if self.global_rank == 0 and not self.trainer.sanity_checking:  # by one alone
            assert "accuracy" in self.trainer.callback_metrics

    def val_dataloader(self):
        return DataLoader(samples(14, 1), batch_size=4)


def logging(folder):
    pl.seed_everything(3, verbose=False)
    model = Logging()
    saving = pl.callbacks.ModelCheckpoint(folder + "/saved", "{epoch}-{val_rank}", "val_rank",
                                          save_top_k=-1)  # fmt: skip
    options = {**QUIET, "checkpoint_callback": True, "logger": True}
    trainer = pl.Trainer(**TWO, **options, max_epochs=2, default_root_dir=folder,
                         accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[saving],
                         log_every_n_steps=1)  # fmt: skip
    trainer.fit(model)
    (tested,) = trainer.validate(model, verbose=False)
    return {
        "weights": weights(model),
        "order": model.order,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "validated": tested,
        "best": os.path.basename(saving.best_model_path),
        "files": sorted(os.listdir(folder + "/saved")),
        "log_dir": trainer.log_dir,
        "prepared": model.prepared,
        "ranks": (trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size),
        "zero": rank_zero_only(lambda: "first")(),
    }


class Adversaries(Base):
    """Two networks trained by hand: each step leaves the other one without gradients."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge, self.unused = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        fake = self.maker(batch[0])
        self.toggle_optimizer(first)
        self.manual_backward((self.judge(fake) ** 2).mean())
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(0)
        judged = self.judge(batch[0]).mean() - self.judge(fake.detach()).mean()
        if self.global_rank == 0:  # a parameter that takes part in one process only
            judged = judged + self.unused(judged.reshape(1)).sum()
        self.manual_backward(judged)
        second.step()
        second.zero_grad()
        assert self.net[0].weight.grad is None

    def configure_optimizers(self):
        rest = [*self.judge.parameters(), *self.unused.parameters()]
        return torch.optim.SGD(self.maker.parameters(), 0.1), torch.optim.Adam(rest, 0.01)


def adversaries(folder):
    torch.manual_seed(1)
    model = Adversaries()
    pl.Trainer(**TWO, **QUIET, max_epochs=1, default_root_dir=folder).fit(model)
    trained = weights(model)
    if os.environ["LOCAL_RANK"] == "0":  # after a run nobody else is needed
        model.maker(torch.ones(4)).sum().backward()
    return {"weights": trained}


class InTurn(Base):
    """Two automatic optimizers, one of a frozen part that thaws; gathering with gradients."""

    def training_step(self, batch, batch_idx, optimizer_idx):
        together = self.all_gather(self.net(batch[0]).mean(), sync_grads=True)
        self.notes.append(tuple(together.shape))
        return together.pow(2).sum()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[3])]


class Thawing(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        module.net[3].requires_grad_(trainer.current_epoch > 0)


def in_turn(folder):
    model = InTurn()
    callbacks = [Thawing()]
    pl.Trainer(**TWO, **QUIET, max_epochs=2, default_root_dir=folder, callbacks=callbacks).fit(
        model
    )
    return {"weights": weights(model), "shapes": model.notes}


class Uneven(IterableDataset):
    def __init__(self, counts):
        self.counts = counts

    def __iter__(self):
        return iter(samples(self.counts[int(os.environ["LOCAL_RANK"])], 7))


class Batches(BatchSampler):
    def __iter__(self):
        return iter(list(super().__iter__()))


def uneven(folder):
    """Loaders of other lengths in each process: nobody waits for ever."""
    found = {}
    rank = int(os.environ["LOCAL_RANK"])
    sized = DataLoader(samples(8 if rank else 12), batch_size=2)
    wanted = samples(9)
    loaders = {
        "stream": (DataLoader(Uneven((6, 10)), batch_size=2), {}),
        "own": (sized, {"replace_sampler_ddp": False}),
        "batches": (DataLoader(wanted, batch_sampler=Batches(range(9), 2, True)), {}),
    }
    for name, (loader, options) in loaders.items():
        model = Base()
        trainer = pl.Trainer(**TWO, **QUIET, max_epochs=2, default_root_dir=folder, **options)
        trainer.fit(model, loader)
        found[name] = (trainer.global_step, weights(model))
    predicted = trainer.predict(Base(), DataLoader(samples(5), batch_size=1))
    found["predicted"] = len(predicted)
    return found


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, *rest):
        trainer.should_stop = trainer.should_stop or (trainer.global_rank == 1 and batch_idx == 2)


class Ctrl(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, *rest):
        if trainer.global_rank == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)


class Judged(Base):
    def validation_step(self, batch, batch_idx):
        self.log("worse", float(self.current_epoch * self.global_rank))

    def val_dataloader(self):
        return DataLoader(samples(4), batch_size=2)


def stopping(folder):
    """One process wants to stop: both do, after the same step."""
    first = pl.Trainer(**TWO, **QUIET, max_epochs=5, default_root_dir=folder, callbacks=[Stops()])
    first.fit(Base())
    early = pl.callbacks.EarlyStopping("worse", patience=1)
    second = pl.Trainer(**TWO, **QUIET, max_epochs=9, default_root_dir=folder, callbacks=[early])
    second.fit(Judged())
    third = pl.Trainer(**TWO, **QUIET, max_epochs=9, default_root_dir=folder, callbacks=[Ctrl()])
    third.fit(Base())
    interrupted = (third.interrupted, third.global_step)
    return {
        "steps": first.global_step,
        "epochs": second.current_epoch,
        "interrupted": interrupted,
    }


class Gathering(Metric):
    def __init__(self):
        super().__init__(dist_sync_on_step=True)
        self.add_state("parts", default=[], dist_reduce_fx="cat")

    def update(self, values):
        self.parts.append(values)

    def compute(self):
        return torch.cat(self.parts).sum() if isinstance(self.parts, list) else self.parts.sum()


class Resumed(Base):
    def __init__(self):
        super().__init__()
        self.gathering = Gathering()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.gathering(batch[0])
        self.notes.append(float(self.gathering._forward_cache))
        self.log("epoch", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("own", loss, on_step=False, on_epoch=True)
        return loss


def resumed(folder):
    """A run that goes on from the middle of an epoch is the whole run."""

    def fit(epochs, path=None, callbacks=()):
        pl.seed_everything(1, verbose=False)
        model = Resumed()
        trainer = pl.Trainer(**TWO, **QUIET | {"checkpoint_callback": bool(callbacks)},
                             max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks),
                             accumulate_grad_batches=3, resume_from_checkpoint=path)  # fmt: skip
        trainer.fit(model)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        return {"weights": weights(model), "metrics": metrics, "notes": model.notes}

    saving = pl.callbacks.ModelCheckpoint(folder, "middle", save_top_k=-1, every_n_train_steps=5)
    whole = fit(3, callbacks=[saving])
    return {"whole": whole, "rest": fit(3, folder + "/middle.ckpt")}


class Normed(Base):
    """Its gradients are those of the mean of both losses, if the norm is that of both batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.net = nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.GELU(),
                                 nn.Linear(9, 2))  # fmt: skip

    def forward(self, batch):
        return self.net(batch[0].unsqueeze(1))


class Data(pl.LightningDataModule):
    prepared = 0

    def prepare_data(self):
        self.prepared += 1

    def train_dataloader(self):
        return DataLoader(samples(22), batch_size=3, shuffle=True)


def normed(folder):
    model, data = Normed(), Data()
    trainer = pl.Trainer(**TWO, **QUIET, max_epochs=1, default_root_dir=folder, sync_batchnorm=True)
    trainer.fit(model, datamodule=data)
    other = pl.Trainer(**TWO, **QUIET, max_epochs=0, default_root_dir=folder)
    other.fit(Base(), datamodule=data)  # it was prepared already, which only one process knows
    assert data.prepared == (1 if trainer.is_global_zero else 0)
    (row,) = trainer.predict(model, DataLoader(samples(2), batch_size=1))
    return {"weights": weights(model), "predicted": row}


def gathering(folder):
    """A metric of which one process has seen nothing."""
    metric = Gathering()
    if os.environ["LOCAL_RANK"] == "1":
        metric.update(torch.tensor([[1, 2], [3, 4]]))
    before = [part.tolist() for part in metric.parts]
    metric._update_called = True
    found = int(metric.compute())
    assert [part.tolist() for part in metric.parts] == before
    return {"sum": found}


PARTS = (logging, adversaries, in_turn, uneven, stopping, resumed, normed, gathering)

if __name__ == "__main__":
    out = sys.argv[1]
    results = {part.__name__: part(f"{out}/{part.__name__}") for part in PARTS}
    torch.save(results, f"{out}/rank{os.environ['RANK']}.pt")
