"""Programs for one or the other Lightning: each takes the package as ``pl``."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


def data(count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter([self.dataset[i] for i in range(len(self.dataset))])


def classifier(
    pl, *, optimizers=None, manual=False, iterable=False, val=True, dropout=0.0, epoch_end=False
):
    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Linear(8, 2)
            self.automatic_optimization = not manual
            self.seen = []

        def forward(self, x):
            return self.head(self.body(x))

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self(x), y)

        def training_step(self, batch, batch_idx):
            self.seen.append(round(float(batch[0].sum()), 4))
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("plain", loss * 2)
            if not manual:
                return loss
            given = self.optimizers()
            for optimizer in given if isinstance(given, list) else [given]:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in given if isinstance(given, list) else [given]:
                optimizer.step()
            return None

        def configure_optimizers(self):
            if optimizers is not None:
                return optimizers(self)
            return torch.optim.Adam(self.parameters(), lr=0.05)

        def train_dataloader(self):
            if iterable:
                return DataLoader(Stream(data()), batch_size=4)
            return DataLoader(data(), batch_size=4, shuffle=True)

    if val:

        class WithValidation(Classifier):
            def validation_step(self, batch, batch_idx):
                loss = self.loss(batch)
                self.log("val_loss", loss)
                self.log("val_max", loss, reduce_fx="max")

            def val_dataloader(self):
                return DataLoader(data(14, seed=1), batch_size=4)

        if not epoch_end:
            return WithValidation

        class WithEpochEnd(WithValidation):
            def on_train_epoch_end(self):
                """As in programs for 2.x, which know the validation's values here."""
                known = self.trainer.callback_metrics
                self.log("twice", 2 * known["val_loss"] + self.current_epoch, prog_bar=True)

        return WithEpochEnd
    return Classifier


def stepped(interval="epoch"):
    def optimizers(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
        return [optimizer], [{"scheduler": schedule, "interval": interval}]

    return optimizers


def plateau(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def lbfgs(module):
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)


def two(module):
    return [
        torch.optim.Adam(module.body.parameters(), lr=0.03),
        torch.optim.SGD(module.head.parameters(), lr=0.1),
    ]


def moving_average(pl, decay=0.9):
    """The callback that many projects have: it validates with an average of the weights."""

    class MovingAverage(pl.Callback):
        def __init__(self):
            self.average = None

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, *rest):
            if self.average is None:
                self.average = {k: v.clone() for k, v in module.state_dict().items()}
            for name, value in module.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)

        def on_validation_epoch_end(self, trainer, module):
            if self.average is None:  # the short validation before training
                return
            raw = {k: v.clone() for k, v in module.state_dict().items()}
            module.load_state_dict(self.average)
            with torch.no_grad():
                module.log("val_average", module.loss(next(iter(module.val_dataloader()))))
            module.load_state_dict(raw)

        def state_dict(self):
            return {"average": self.average}

        def load_state_dict(self, state):
            self.average = state["average"]

    return MovingAverage()


# name: (arguments of the model, arguments of the Trainer, makes callbacks out of pl)
MATRIX = {
    "plain": ({}, {}, None),
    "dropout": ({"dropout": 0.3}, {}, None),
    "without validation": ({"val": False}, {}, None),
    "accumulate": ({}, {"accumulate_grad_batches": 4}, None),
    "accumulate unevenly": ({}, {"accumulate_grad_batches": 3}, None),
    "clip by norm": ({}, {"gradient_clip_val": 0.1}, None),
    "clip by value": (
        {},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        None,
    ),
    "schedule by epoch": ({"optimizers": stepped()}, {}, None),
    "schedule by step": ({"optimizers": stepped("step")}, {}, None),
    "schedule by step, accumulating": (
        {"optimizers": stepped("step")},
        {"accumulate_grad_batches": 2},
        None,
    ),
    "plateau": ({"optimizers": plateau}, {}, None),
    "lbfgs": ({"optimizers": lbfgs}, {}, None),
    "manual": ({"manual": True}, {}, None),
    "two optimizers by hand": ({"manual": True, "optimizers": two}, {}, None),
    "validation in the middle": ({}, {"val_check_interval": 0.5}, None),
    "validation every 3 batches": ({}, {"val_check_interval": 3}, None),
    "validation every 2 epochs": ({}, {"check_val_every_n_epoch": 2, "max_epochs": 4}, None),
    "limits": ({}, {"limit_train_batches": 5, "limit_val_batches": 2}, None),
    "limit as fraction": ({}, {"limit_train_batches": 0.5}, None),
    "max_steps": ({}, {"max_steps": 13}, None),
    "iterable": ({"iterable": True}, {}, None),
    "bf16": ({}, {"precision": "bf16-mixed"}, None),
    "64": ({}, {"precision": "64-true"}, None),
    "early stopping": (
        {},
        {"max_epochs": 12},
        lambda pl: [pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.05)],
    ),
    "averaging": (
        {"optimizers": stepped()},
        {"max_epochs": 5},
        lambda pl: [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)],
    ),
    "moving average": ({}, {}, lambda pl: [moving_average(pl)]),
    "end of an epoch": (
        {"epoch_end": True},
        {"enable_progress_bar": False, "max_epochs": 4},
        lambda pl: [
            pl.callbacks.ModelCheckpoint(monitor="twice", filename="{epoch}-{twice:.2f}"),
            pl.callbacks.EarlyStopping("twice", patience=1),
        ],
    ),
    "best two": (
        {},
        {},
        lambda pl: [pl.callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)],
    ),
    "checkpoint by steps": (
        {},
        {},
        lambda pl: [pl.callbacks.ModelCheckpoint(every_n_train_steps=5, save_top_k=-1)],
    ),
    "checkpoint by name": (
        {},
        {},
        lambda pl: [
            pl.callbacks.ModelCheckpoint(
                monitor="val_loss", filename="{epoch}-{val_loss:.2f}", save_top_k=-1
            )
        ],
    ),
}
