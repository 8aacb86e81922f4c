"""Single promises of the interface: loggers, profilers, signatures, arguments."""

import os
from argparse import ArgumentParser

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import puretrain.lightning as pl
from puretrain.errors import CheckpointError
from puretrain.lightning.callbacks import Callback, EarlyStopping, LearningRateMonitor, ProgressBar
from puretrain.lightning.loggers.base import LightningLoggerBase, rank_zero_experiment
from puretrain.lightning.utilities import rank_zero_only


class Model(pl.LightningModule):
    def __init__(self, lr=0.1, obj=None):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("train", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("x", self(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    def loader(self):
        return DataLoader(torch.randn(8, 4), batch_size=2)

    train_dataloader = val_dataloader = loader


def trainer_for(tmp_path, **arguments):
    options = {"max_epochs": 2, "progress_bar_refresh_rate": 0, "weights_summary": None}
    return pl.Trainer(default_root_dir=str(tmp_path), **{**options, **arguments})


def test_a_hook_set_to_none_is_not_called(tmp_path):
    model = Model()
    model.validation_epoch_end = model.training_epoch_end = None
    trainer_for(tmp_path).fit(model)


def test_metric_objects_are_logged(tmp_path):
    class Module(Model):
        def __init__(self):
            super().__init__()
            self.accuracy = pl.metrics.Accuracy()

        def training_step(self, batch, batch_idx):
            right = batch_idx % 2
            self.accuracy(torch.tensor([right, 0]), torch.tensor([1, 1]))
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = trainer_for(tmp_path)
    trainer.fit(Module())
    assert trainer.callback_metrics["accuracy_step"] == 0.5
    assert trainer.callback_metrics["accuracy_epoch"] == 0.25


def test_a_profiler_reports(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer_for(tmp_path, profiler="simple", track_grad_norm=2, log_every_n_steps=1).fit(Model())
    assert "training_step" in caplog.text


def test_a_logger_of_the_users_own(tmp_path):
    class Logger(LightningLoggerBase):
        def __init__(self):
            super().__init__()
            self.hparams, self.rows, self.status = None, [], None

        @property
        @rank_zero_experiment
        def experiment(self):
            return "experiment"

        @rank_zero_only
        def log_hyperparams(self, params):
            self.hparams = dict(params)

        @rank_zero_only
        def log_metrics(self, metrics, step):
            self.rows.append((step, sorted(metrics)))

        @property
        def name(self):
            return "name"

        @property
        def version(self):
            return "1"

        def finalize(self, status):
            self.status = status

    logger = Logger()
    trainer_for(tmp_path, logger=logger, log_every_n_steps=2).fit(Model())
    assert logger.hparams == {"lr": 0.1, "obj": None}
    assert logger.rows == [
        (1, ["epoch", "train"]),
        (3, ["epoch", "train", "x"]),
        (5, ["epoch", "train"]),
        (7, ["epoch", "train", "x"]),
    ]
    assert logger.status == "success"


def test_callbacks_of_the_module_and_an_exception(tmp_path):
    seen = []

    class Watches(Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append(str(exception))

    class Module(Model):
        def configure_callbacks(self):
            return [EarlyStopping("x"), Watches()]

        def training_step(self, batch, batch_idx):
            assert self.trainer.training
            assert self.trainer.state.stage == "train"
            raise ValueError("boom")

    trainer = trainer_for(tmp_path)
    with pytest.raises(ValueError, match="boom"):
        trainer.fit(Module())
    assert seen == ["boom"]
    assert trainer.early_stopping_callback.monitor == "x"
    assert trainer.state.interrupted


def test_names_of_learning_rates(tmp_path):
    class Module(Model):
        def configure_optimizers(self):
            first = torch.optim.Adam([self.layer.weight], lr=0.1)
            second = torch.optim.Adam(
                [{"params": [self.layer.bias]}, {"params": [torch.zeros(1)]}], lr=0.2
            )
            named = {"scheduler": torch.optim.lr_scheduler.StepLR(first, 1), "name": "mine"}
            return [first, second], [named, torch.optim.lr_scheduler.StepLR(second, 1)]

        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

    monitor = LearningRateMonitor()
    trainer_for(tmp_path, callbacks=[monitor], log_every_n_steps=1).fit(Module())
    expected = {"mine": [0.1, 0.01], "lr-Adam/pg1": [0.2, 0.02], "lr-Adam/pg2": [0.2, 0.02]}
    assert {name: pytest.approx(rates) for name, rates in monitor.lrs.items()} == expected


def test_what_is_no_plain_value_is_not_read_from_a_checkpoint(tmp_path):
    trainer = trainer_for(tmp_path, max_epochs=1)
    with (
        pytest.warns(UserWarning, match="'obj' is an instance of `nn.Module`"),
        pytest.warns(UserWarning, match="Skipping 'obj' parameter"),
    ):
        trainer.fit(Model(obj=nn.ReLU()))
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(CheckpointError, match="obj"):
        Model.load_from_checkpoint(path)
    assert Model.load_from_checkpoint(path, obj=3).hparams.obj == 3
    with pytest.warns(UserWarning, match="'obj' is an instance of `nn.Module`"):
        loaded = Model.load_from_checkpoint(path, weights_only=False)
    assert isinstance(loaded.hparams.obj, nn.ReLU)


def test_the_state_is_bound_to_the_module(tmp_path):
    trainer, model = trainer_for(tmp_path), Model()
    trainer.fit(model)
    state = trainer.train_state
    assert state.params["layer.weight"].data_ptr() == model.layer.weight.data_ptr()
    assert int(state.step) == 8
    assert int(state.cursor.epoch) == 2


def test_hooks_of_1_2_with_all_their_arguments(tmp_path):
    class Module(Model):
        def optimizer_step(
            self, epoch=None, batch_idx=None, optimizer=None, optimizer_idx=None,
            optimizer_closure=None, on_tpu=None, using_native_amp=None, using_lbfgs=None,
        ):  # fmt: skip
            assert optimizer_idx == 0
            optimizer.step(closure=optimizer_closure)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer, optimizer_idx):
            optimizer.zero_grad()

        def backward(self, loss, optimizer, optimizer_idx):
            loss.backward()

    torch.manual_seed(0)
    changed, plain = Module(), Model()
    plain.load_state_dict(changed.state_dict())
    loader = DataLoader(torch.randn(8, 4), batch_size=2)
    trainer_for(tmp_path).fit(changed, loader)
    trainer_for(tmp_path).fit(plain, loader)
    assert torch.equal(changed.layer.weight, plain.layer.weight)


def test_arguments_from_the_command_line():
    parser = pl.Trainer.add_argparse_args(ArgumentParser())
    arguments = ["--max_epochs", "3", "--fast_dev_run", "True", "--gpus", "0"]
    trainer = pl.Trainer.from_argparse_args(parser.parse_args(arguments), logger=False)
    assert trainer.fast_dev_run is True
    assert trainer.max_epochs == 1


def test_resume_from_checkpoint_and_the_bar(tmp_path):
    trainer = trainer_for(tmp_path, max_epochs=1)
    trainer.fit(Model())
    path = os.path.join(tmp_path, "saved.ckpt")
    trainer.save_checkpoint(path)
    bar = ProgressBar()
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), max_epochs=3, resume_from_checkpoint=path, callbacks=[bar]
    )
    trainer.fit(Model())
    assert trainer.global_step == 12
    assert bar.train_batch_idx == 4
    assert trainer.progress_bar_callback is bar
