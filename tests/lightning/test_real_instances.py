"""Modules and callbacks of the real Lightning, handed to our trainer."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

import puretrain.lightning as ours

real = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
if not int(real.__version__.split(".")[0]) >= 2:
    pytest.skip("only instances of 2.x are taken", allow_module_level=True)


class Module(real.LightningModule):
    def __init__(self, lr=0.1, manual=False):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)
        self.automatic_optimization = not manual
        self.example_input_array = torch.zeros(1, 4)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.lr_schedulers().step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val": self(batch).square().mean()})

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Seen(real.Callback):
    def __init__(self):
        self.batches, self.state = [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch_idx)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("from_callback", 1.0)

    def state_dict(self):
        return {"count": len(self.batches)}

    def load_state_dict(self, state_dict):
        self.state = state_dict


def fit(pl, folder, manual, callbacks=(), path=None, epochs=2):
    real.seed_everything(5)
    module = Module(manual=manual)
    loader = DataLoader(torch.randn(8, 4), 2)
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, callbacks=list(callbacks), enable_progress_bar=False,
        default_root_dir=str(folder), enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, loader, ckpt_path=path)
    return module, trainer, loader


@pytest.mark.parametrize("manual", [False, True])
def test_a_module_trains_as_in_its_own_trainer(tmp_path, manual):
    seen = Seen()
    mine, my_trainer, loader = fit(ours, tmp_path, manual, [seen])
    theirs, their_trainer, _ = fit(real, tmp_path, manual, [Seen()])
    assert torch.equal(mine.layer.weight, theirs.layer.weight)
    assert mine.trainer is my_trainer
    assert (mine.current_epoch, mine.global_step) == (1, 8)
    assert seen.batches == [0, 1, 2, 3] * 2
    expected = {name: float(value) for name, value in their_trainer.callback_metrics.items()}
    found = {name: float(value) for name, value in my_trainer.callback_metrics.items()}
    assert found == expected
    assert [len(x) for x in my_trainer.predict(mine, loader)] == [2] * 4
    my_trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Seen()
    fit(ours, tmp_path, manual, [again], str(tmp_path / "a.ckpt"), epochs=3)
    assert again.state == {"count": 8}
    assert again.batches == [0, 1, 2, 3]
    assert torch.equal(
        Module.load_from_checkpoint(tmp_path / "a.ckpt").layer.weight, mine.layer.weight
    )


def test_its_own_early_stopping_and_checkpoint_callbacks(tmp_path):
    class Growing(Module):
        def validation_step(self, batch, batch_idx):
            self.log("val", float(self.current_epoch))

    stop = real.callbacks.EarlyStopping("val", patience=2)
    best = real.callbacks.ModelCheckpoint(str(tmp_path), monitor="val", filename="{epoch}")
    loader = DataLoader(torch.randn(8, 4), 2)
    trainer = ours.Trainer(
        max_epochs=9, logger=False, callbacks=[stop, best], enable_progress_bar=False,
        enable_checkpointing=None, checkpoint_callback=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(Growing(), loader, loader)
    assert trainer.current_epoch == 2
    assert stop.stopped_epoch == 2
    assert best.best_model_path == str(tmp_path / "epoch=0.ckpt")
    assert Growing.load_from_checkpoint(best.best_model_path).hparams.lr == 0.1


def test_an_override_of_log_calls_its_base_in_either_trainer(tmp_path):
    class Prefixes(Module):
        def log(self, name, value, **options):
            super().log(f"own/{name}", value, **options)

    found = []
    for pl in (ours, real, ours):
        real.seed_everything(5)
        module = Prefixes()
        trainer = pl.Trainer(
            max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            default_root_dir=str(tmp_path),
        )  # fmt: skip
        loader = DataLoader(torch.randn(8, 4), 2)
        trainer.fit(module, loader, loader)
        found.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"own/loss", "own/loss_step", "own/loss_epoch", "own/val"}


def test_its_own_prediction_writer(tmp_path):
    class Writer(real.callbacks.BasePredictionWriter):
        def __init__(self):
            super().__init__("batch_and_epoch")
            self.seen = []

        def write_on_batch_end(self, trainer, module, prediction, indices, batch, number, loader):
            self.seen.append((indices, number, loader))

        def write_on_epoch_end(self, trainer, module, predictions, indices):
            self.seen.append((len(predictions), indices))

    def written(pl, loaders):
        writer = Writer()
        torch.manual_seed(7)
        trainer = pl.Trainer(
            logger=False, enable_progress_bar=False, enable_checkpointing=False,
            default_root_dir=str(tmp_path), callbacks=[writer], limit_predict_batches=2,
        )  # fmt: skip
        given = trainer.predict(Predicts(), loaders, return_predictions=False)
        return writer.seen, given

    class Predicts(Module):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return self(batch)

    def samples(**options):
        return DataLoader(torch.randn(7, 4), batch_size=3, **options)

    mine = written(ours, samples())
    assert mine == written(real, samples())
    assert mine[0][0] == ([0, 1, 2], 0, 0)
    assert mine[0][-1] == (2, [[[0, 1, 2], [3, 4, 5]]])
    two = [samples(), samples(num_workers=1)]
    assert written(ours, two) == written(real, two)


@pytest.mark.parametrize("drop_last", [False, True])
def test_our_prediction_writer_is_told_what_theirs_is(tmp_path, drop_last):
    def written(pl, loader):
        class Writer(pl.callbacks.BasePredictionWriter):
            def write_on_batch_end(self, *arguments):
                seen.append(arguments[3])

            def write_on_epoch_end(self, *arguments):
                seen.append(([p.tolist() for p in arguments[2]], arguments[3]))

        class Echo(pl.LightningModule):
            def predict_step(self, batch, batch_idx):
                return batch

        seen = []
        trainer = pl.Trainer(
            logger=False, enable_progress_bar=False, enable_checkpointing=False,
            default_root_dir=str(tmp_path), callbacks=[Writer("batch_and_epoch")],
        )  # fmt: skip
        torch.manual_seed(7)
        trainer.predict(Echo(), loader)
        return seen

    def loader():
        return DataLoader(torch.arange(7), batch_size=3, shuffle=True, drop_last=drop_last)

    mine = written(ours, loader())
    assert mine == written(real, loader())
    assert mine[-1][0] == mine[-1][1][0]  # of these samples each is its own place
    assert sorted(place for batch in mine[-1][0] for place in batch) == list(range(7))


def test_its_epoch_ends_after_validation_in_a_trainer_of_1x_too(tmp_path):
    class Reads(Module):
        def validation_step(self, batch, batch_idx):
            self.log("val", float(self.current_epoch + 1))

        def on_train_epoch_end(self):
            self.log("twice", 2 * self.trainer.callback_metrics["val"])

    class Watches(real.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["val"]))

    seen = []
    trainer = ours.Trainer(
        max_epochs=2, logger=False, progress_bar_refresh_rate=0, checkpoint_callback=False,
        default_root_dir=str(tmp_path), callbacks=[Watches()], num_sanity_val_steps=0,
    )  # fmt: skip
    loader = DataLoader(torch.randn(8, 4), 2)
    trainer.fit(Reads(), loader, loader)
    assert seen == [1.0, 2.0]
    assert trainer.callback_metrics["twice"] == 4.0
