"""In which order hooks are called, and what is known when."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import puretrain.lightning as pl
from puretrain.lightning.callbacks import Callback, LambdaCallback

NAMED = [
    "on_init_start",
    "on_init_end",
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_end",
    "on_epoch_start",
    "on_epoch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_start",
    "on_test_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "on_fit_end",
    "teardown",
]
FIT = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_epoch_end",
    "on_validation_end",
    "on_sanity_check_end",
    "on_train_start",
]
EPOCH = [
    "on_epoch_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_epoch_end",
    "on_validation_end",
]
TEST = [
    "setup",
    "on_fit_start",
    "on_test_start",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "on_epoch_end",
    "on_test_end",
    "on_fit_end",
    "teardown",
    "teardown",
]


class Boring(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train", float(self.current_epoch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", float(self.current_epoch))

    def test_step(self, batch, batch_idx):
        self.log("test", 7.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def loader(self):
        return DataLoader(torch.randn(8, 8), batch_size=2)

    train_dataloader = val_dataloader = test_dataloader = loader


def trainer_for(tmp_path, callbacks, **arguments):
    return pl.Trainer(
        default_root_dir=str(tmp_path),
        max_epochs=2,
        progress_bar_refresh_rate=0,
        callbacks=callbacks,
        **arguments,
    )


def test_order_of_a_fit_and_a_test(tmp_path, capsys):
    calls = []

    def record(name):
        def hook(trainer, *arguments):
            calls.append(name)

        return hook

    callback = LambdaCallback(**{name: record(name) for name in NAMED})
    trainer = trainer_for(tmp_path, [callback])
    assert calls == ["on_init_start", "on_init_end"]
    calls.clear()
    model = Boring()
    trainer.fit(model)
    assert calls == [*FIT, *EPOCH, *EPOCH, "on_train_end", "on_fit_end", "teardown"]
    calls.clear()
    trainer.test(model)
    assert calls == TEST
    assert "TEST RESULTS" in capsys.readouterr().out


def test_order_within_a_batch(tmp_path):
    calls = []

    class Module(Boring):
        def training_step(self, batch, batch_idx):
            calls.append("training_step")
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            calls.append("module start")

        def on_train_batch_end(self, outputs, batch, batch_idx, dataloader_idx):
            calls.append("module end")
            assert set(outputs) == {"loss"}

        def on_after_backward(self):
            calls.append("module backward")
            assert self.layer.weight.grad is not None

        def optimizer_step(self, *arguments, **named):
            calls.append("optimizer_step")
            super().optimizer_step(*arguments, **named)

    names = [
        "on_batch_start",
        "on_batch_end",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_before_zero_grad",
        "on_after_backward",
        "on_before_backward",
        "on_before_optimizer_step",
    ]
    record = {n: (lambda *a, name=n: calls.append(name)) for n in names}
    trainer = trainer_for(
        tmp_path, [LambdaCallback(**record)], limit_train_batches=1, max_steps=1, logger=False
    )
    trainer.fit(Module())
    assert calls == [
        *("on_batch_start", "on_train_batch_start", "module start", "optimizer_step"),
        *("training_step", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
        *("module backward", "on_before_optimizer_step", "on_train_batch_end", "module end"),
        "on_batch_end",
    ]


def test_what_is_known_when(tmp_path):
    seen = []

    class Looks(Callback):
        def look(self, trainer, moment):
            if not trainer.sanity_checking:
                metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
                seen.append((moment, metrics))

        def on_train_epoch_end(self, trainer, module):
            self.look(trainer, "train")

        def on_validation_epoch_end(self, trainer, module):
            self.look(trainer, "val")

        def on_test_epoch_end(self, trainer, module):
            self.look(trainer, "test")

    trainer = trainer_for(tmp_path, [Looks()])
    model = Boring()
    trainer.fit(model)
    trainer.test(model)
    assert seen == [
        ("train", {"train": 0.0}),
        ("val", {"train": 0.0, "val": 0.0}),
        ("train", {"train": 1.0, "val": 0.0}),
        ("val", {"train": 1.0, "val": 1.0}),
        ("test", {"train": 1.0, "val": 1.0, "test": 7.0}),
    ]


@pytest.mark.parametrize("with_outputs", [False, True])
def test_signatures_of_older_and_newer_versions(tmp_path, with_outputs):
    seen = {}

    if with_outputs:

        class Hooks(Callback):
            def on_train_epoch_end(self, trainer, pl_module, outputs):
                seen["epoch"] = len(outputs)

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, unused=0):
                seen["batch"] = outputs["loss"].shape

    else:

        class Hooks(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                seen["epoch"] = 4

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen["batch"] = outputs["loss"].shape

    trainer_for(tmp_path, [Hooks()], logger=False).fit(Boring())
    assert seen == {"epoch": 4, "batch": torch.Size([])}
