"""In the manner of tests/models/test_hparams.py, core/test_datamodules.py, loggers and callbacks."""

import argparse
import os
import pickle
from argparse import Namespace

import pytest
import torch
import yaml
from boring import BoringDataModule, BoringModel, RandomDataset
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    ProgressBarBase,
)
from pytorch_lightning.loggers import (
    CSVLogger,
    LightningLoggerBase,
    LoggerCollection,
    TensorBoardLogger,
)
from pytorch_lightning.loggers.base import DummyExperiment, DummyLogger, rank_zero_experiment
from pytorch_lightning.utilities import AttributeDict, is_picklable, rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader


class SaveHparamsModel(BoringModel):
    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters(hparams)


class AssignHparamsModel(BoringModel):
    def __init__(self, hparams):
        super().__init__()
        self.hparams = hparams


@pytest.mark.parametrize("cls", [SaveHparamsModel, AssignHparamsModel])
@pytest.mark.parametrize("make", [dict, lambda **k: Namespace(**k)])
def test_one_argument(tmpdir, cls, make):
    model = cls(make(test_arg=14))
    assert model.hparams.test_arg == 14
    trainer = Trainer(default_root_dir=tmpdir, max_epochs=1, limit_train_batches=2)
    trainer.fit(model)
    raw = os.path.join(
        trainer.checkpoint_callback.dirpath, os.listdir(trainer.checkpoint_callback.dirpath)[0]
    )
    ckpt = torch.load(raw, weights_only=False)
    assert LightningModule.CHECKPOINT_HYPER_PARAMS_KEY in ckpt
    assert ckpt[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]["test_arg"] == 14
    model2 = cls.load_from_checkpoint(raw)
    assert model2.hparams.test_arg == 14
    assert cls.load_from_checkpoint(raw, hparams={"test_arg": 78}).hparams.test_arg == 78
    folder = trainer.logger.log_dir
    with open(os.path.join(folder, trainer.logger.NAME_HPARAMS_FILE)) as file:
        assert yaml.safe_load(file)["test_arg"] == 14


class Explicit(BoringModel):
    def __init__(self, test_arg, test_arg2):
        super().__init__()
        self.save_hyperparameters("test_arg", "test_arg2")


class Implicit(BoringModel):
    def __init__(self, test_arg, test_arg2):
        super().__init__()
        self.save_hyperparameters()


class Mixed(BoringModel):
    def __init__(self, test_arg, test_arg2=120):
        super().__init__()
        self.save_hyperparameters("test_arg")


class Sub(Implicit):
    pass


class SubAdds(Mixed):
    def __init__(self, *args, subclass_arg=1200, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_hyperparameters()


class Attr(BoringModel):
    any_other_loss = torch.nn.CrossEntropyLoss()

    def __init__(self, *args, batch_size=64, **kwargs):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("cls", [Explicit, Implicit, Sub])
def test_hparams_collected(tmpdir, cls):
    model = cls(test_arg=14, test_arg2=90)
    assert isinstance(model.hparams, AttributeDict)
    assert dict(model.hparams) == {"test_arg": 14, "test_arg2": 90}
    trainer = Trainer(default_root_dir=tmpdir, max_epochs=1, limit_train_batches=1)
    trainer.fit(model)
    path = trainer.checkpoint_callback.best_model_path
    assert dict(cls.load_from_checkpoint(path).hparams) == {"test_arg": 14, "test_arg2": 90}
    assert cls.load_from_checkpoint(path, test_arg=78).hparams.test_arg == 78


def test_mixed_and_extra(tmpdir):
    assert dict(Mixed(14).hparams) == {"test_arg": 14}
    assert SubAdds(test_arg=14).hparams.subclass_arg == 1200
    model = Attr(batch_size=17)
    assert model.hparams.batch_size == 17
    trainer = Trainer(default_root_dir=tmpdir, max_epochs=1, limit_train_batches=1)
    trainer.fit(model)
    path = trainer.checkpoint_callback.best_model_path
    assert Attr.load_from_checkpoint(path).hparams.batch_size == 17
    assert Attr.load_from_checkpoint(path, batch_size=99).hparams.batch_size == 99


def test_hparams_file(tmpdir):
    class Model(BoringModel):
        def __init__(self, lr=0.1, name="a"):
            super().__init__()
            self.save_hyperparameters()

    trainer = Trainer(
        default_root_dir=tmpdir, max_epochs=1, limit_train_batches=1, logger=CSVLogger(str(tmpdir))
    )
    trainer.fit(Model(lr=0.5))
    yml = os.path.join(trainer.logger.log_dir, "hparams.yaml")
    assert (
        Model.load_from_checkpoint(
            trainer.checkpoint_callback.best_model_path, hparams_file=yml
        ).hparams.lr
        == 0.5
    )


def test_hparams_assign_errors():
    class Model(BoringModel):
        def __init__(self, arg1, arg2):
            super().__init__()
            self.hparams = arg1

    with pytest.raises(ValueError):
        Model(1, 2)
    model = Implicit(1, 2)
    model.hparams.test_arg = 3
    model.hparams.update(new=5)
    assert model.hparams.new == 5 and model.hparams_initial.test_arg == 1
    assert is_picklable(model)
    pickle.loads(pickle.dumps(model))


def test_datamodule(tmpdir):
    dm = BoringDataModule()
    assert not dm.has_prepared_data and not dm.has_setup_fit
    dm.prepare_data()
    dm.setup()
    assert dm.has_prepared_data and dm.has_setup_fit and dm.has_setup_test
    trainer = Trainer(default_root_dir=tmpdir, max_epochs=1, weights_summary=None)
    assert trainer.fit(BoringModel(), dm) == 1
    assert dm.trainer is trainer
    assert isinstance(trainer.test(datamodule=dm)[0], dict)
    parser = argparse.ArgumentParser()

    class Args(LightningDataModule):
        def __init__(self, data_dir: str = "./", batch_size: int = 4, flag: bool = False):
            super().__init__()
            self.data_dir, self.batch_size = data_dir, batch_size

    args = Args.add_argparse_args(parser).parse_args(
        ["--data_dir", str(tmpdir), "--batch_size", "8"]
    )
    assert Args.from_argparse_args(args).batch_size == 8
    found = LightningDataModule.from_datasets(RandomDataset(), batch_size=4)
    assert len(found.train_dataloader()) == 16


class CustomLogger(LightningLoggerBase):
    def __init__(self):
        super().__init__()
        self.hparams_logged = None
        self.metrics_logged = {}
        self.finalized = False
        self.after_save_checkpoint_called = False

    @property
    @rank_zero_experiment
    def experiment(self):
        return "test"

    @rank_zero_only
    def log_hyperparams(self, params):
        self.hparams_logged = params

    @rank_zero_only
    def log_metrics(self, metrics, step):
        self.metrics_logged = metrics

    @rank_zero_only
    def finalize(self, status):
        self.finalized_status = status

    @property
    def name(self):
        return "name"

    @property
    def version(self):
        return "1"

    def after_save_checkpoint(self, checkpoint_callback):
        self.after_save_checkpoint_called = True


def test_custom_logger(tmpdir):
    class Current(BoringModel):
        def __init__(self, k=1):
            super().__init__()
            self.save_hyperparameters()

        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            self.log("train_loss", output["loss"])
            return output

    logger = CustomLogger()
    model = Current()
    trainer = Trainer(max_steps=2, log_every_n_steps=1, logger=logger, default_root_dir=tmpdir)
    trainer.fit(model)
    assert trainer.state.finished if hasattr(trainer.state, "finished") else True
    assert logger.hparams_logged == model.hparams
    assert logger.metrics_logged != {} and logger.after_save_checkpoint_called
    assert logger.finalized_status == "success"
    two = Trainer(max_steps=1, logger=[CustomLogger(), CustomLogger()], default_root_dir=tmpdir)
    assert isinstance(two.logger, LoggerCollection)
    assert two.logger[0].experiment == "test" and two.logger.name == "name_name"
    two.fit(model)
    assert isinstance(DummyLogger().experiment, DummyExperiment)


def test_with_accumulate_and_tb(tmpdir):
    logged = []

    class Logger(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((dict(metrics), step))

    class Current(BoringModel):
        def training_step(self, *args):
            self.log("foo", 1, on_step=True, on_epoch=True)
            return super().training_step(*args)

    trainer = Trainer(
        default_root_dir=tmpdir,
        limit_train_batches=12,
        limit_val_batches=0,
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=[Logger(str(tmpdir))],
        log_every_n_steps=3,
    )
    trainer.fit(Current())
    assert [s for m, s in logged if "foo_step" in m] == [2, 5]
    assert any("foo_epoch" in m for m, _ in logged)


def test_lr_monitor(tmpdir):
    lr_monitor = LearningRateMonitor()
    trainer = Trainer(
        default_root_dir=tmpdir,
        max_epochs=2,
        limit_val_batches=0.1,
        limit_train_batches=0.5,
        callbacks=[lr_monitor],
    )
    trainer.fit(BoringModel())
    assert lr_monitor.lrs
    assert all(v is None for v in lr_monitor.last_momentum_values.values())
    assert lr_monitor.lr_sch_names == list(lr_monitor.lrs.keys()) == ["lr-SGD"]
    with pytest.raises(
        MisconfigurationException, match="logging_interval should be `step` or `epoch`"
    ):
        LearningRateMonitor(logging_interval="foo")
    with pytest.raises(MisconfigurationException, match="`Trainer` that has no logger"):
        Trainer(
            default_root_dir=tmpdir, logger=False, max_epochs=1, callbacks=[LearningRateMonitor()]
        ).fit(BoringModel())


def test_early_stopping_state(tmpdir):
    class Current(BoringModel):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            self.log("train_loss", output["loss"])
            return output

        def validation_epoch_end(self, outputs):
            self.log("abc", torch.tensor(float(self.current_epoch)))

    saved = []

    class Stop(EarlyStopping):
        def on_train_end(self, trainer, pl_module):
            saved.append(self.best_score)

    stop = Stop(monitor="abc", patience=1)
    ckpt = ModelCheckpoint(dirpath=tmpdir, monitor="abc", save_top_k=1)
    trainer = Trainer(
        default_root_dir=tmpdir,
        callbacks=[stop, ckpt],
        max_epochs=5,
        limit_train_batches=2,
        limit_val_batches=2,
    )
    trainer.fit(Current())
    assert stop.stopped_epoch == trainer.current_epoch == 1
    path = ckpt.best_model_path
    assert os.path.basename(path) == "epoch=0-step=1.ckpt"
    checkpoint = torch.load(path)
    states = checkpoint["callbacks"]
    assert any("best_score" in s for s in states.values())
    with pytest.raises(RuntimeError, match="conditioned on metric `zzz` which is not available"):
        Trainer(
            default_root_dir=tmpdir,
            max_epochs=1,
            limit_train_batches=1,
            limit_val_batches=1,
            callbacks=[EarlyStopping("zzz")],
        ).fit(Current())
    with pytest.raises(MisconfigurationException, match="`mode` can be"):
        EarlyStopping(monitor="a", mode="unknown_option")


def test_checkpoint_names(tmpdir):
    name = ModelCheckpoint._format_checkpoint_name(None, 3, 2, {})
    assert name == "epoch=3-step=2"
    assert (
        ModelCheckpoint._format_checkpoint_name(None, 3, 2, {}, prefix="test")
        == "test-epoch=3-step=2"
    )
    assert ModelCheckpoint._format_checkpoint_name("{acc}", 3, 2, {"acc": 0.03}) == "acc=0.03"
    assert (
        ModelCheckpoint._format_checkpoint_name("{epoch:03d}-{acc:03.4f}", 3, 2, {"acc": 0.03})
        == "epoch=003-acc=0.0300"
    )
    ckpt = ModelCheckpoint(
        dirpath=tmpdir, filename="{epoch}_{val/loss:.5f}", auto_insert_metric_name=False
    )
    assert (
        os.path.basename(ckpt.format_checkpoint_name(4, 3, {"val/loss": 0.03})) == "4_0.03000.ckpt"
    )
    ckpt = ModelCheckpoint(monitor="early_stop_on", dirpath=None, filename="{epoch}")
    assert ckpt.format_checkpoint_name(3, 2, {}) == "epoch=3.ckpt"
    assert ckpt.format_checkpoint_name(3, 2, {}, ver=5) == "epoch=3-v5.ckpt"
    with pytest.raises(MisconfigurationException, match=r".*Must be >= -1"):
        ModelCheckpoint(dirpath=tmpdir, save_top_k=-2)
    with pytest.raises(MisconfigurationException, match=r".*is not a valid configuration.*"):
        ModelCheckpoint(dirpath=tmpdir, save_top_k=3)


def test_checkpoint_top_k_and_resume(tmpdir):
    class Current(BoringModel):
        def validation_epoch_end(self, outputs):
            self.log("val_loss", torch.tensor(float(5 - self.current_epoch)))

    callback = ModelCheckpoint(
        dirpath=str(tmpdir),
        monitor="val_loss",
        filename="{epoch}-{val_loss:.2f}",
        save_top_k=2,
        save_last=True,
        period=1,
    )
    trainer = Trainer(
        default_root_dir=tmpdir,
        max_epochs=3,
        limit_train_batches=3,
        limit_val_batches=2,
        callbacks=[callback],
    )
    trainer.fit(Current())
    assert sorted(f for f in os.listdir(tmpdir) if f.endswith("ckpt")) == [
        "epoch=1-val_loss=4.00.ckpt",
        "epoch=2-val_loss=3.00.ckpt",
        "last.ckpt",
    ]
    assert callback.best_model_score == 3.0 and callback.kth_best_model_path.endswith(
        "epoch=1-val_loss=4.00.ckpt"
    )
    ckpt = torch.load(callback.last_model_path)
    assert ckpt["epoch"] == 3 and ckpt["global_step"] == 9 and len(ckpt["optimizer_states"]) == 1
    assert trainer.checkpoint_callbacks == [callback]


def test_save_every_period_and_steps(tmpdir):
    callback = ModelCheckpoint(dirpath=tmpdir, filename="{epoch}", save_top_k=-1, period=2)
    Trainer(
        default_root_dir=tmpdir,
        max_epochs=5,
        limit_train_batches=1,
        limit_val_batches=1,
        callbacks=[callback],
    ).fit(BoringModel())
    assert sorted(f for f in os.listdir(tmpdir) if "ckpt" in f) == ["epoch=1.ckpt", "epoch=3.ckpt"]
    callback = ModelCheckpoint(dirpath=tmpdir / "s", every_n_train_steps=4, save_top_k=-1)
    Trainer(
        default_root_dir=tmpdir,
        max_epochs=2,
        limit_train_batches=5,
        limit_val_batches=1,
        callbacks=[callback],
    ).fit(BoringModel())
    assert sorted(os.listdir(tmpdir / "s")) == ["epoch=0-step=3.ckpt", "epoch=1-step=7.ckpt"]


def test_progress_bar(tmpdir):
    trainer = Trainer(default_root_dir=tmpdir, max_epochs=1, progress_bar_refresh_rate=1)
    bars = [c for c in trainer.callbacks if isinstance(c, ProgressBarBase)]
    assert len(bars) == 1 and trainer.progress_bar_callback is bars[0]
    trainer = Trainer(default_root_dir=tmpdir, progress_bar_refresh_rate=0)
    assert trainer.progress_bar_callback is None
    with pytest.raises(MisconfigurationException):
        Trainer(callbacks=[ProgressBar(), ProgressBar()])
    trainer = Trainer(
        default_root_dir=tmpdir,
        max_epochs=1,
        limit_train_batches=4,
        callbacks=[ProgressBar(refresh_rate=2)],
    )
    trainer.fit(BoringModel())
    bar = trainer.progress_bar_callback
    assert bar.main_progress_bar.n == bar.main_progress_bar.total
    assert bar.train_batch_idx == 4 and bar.total_train_batches == 4

    class Counting(ProgressBar):
        train_batches_seen = 0

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            self.train_batches_seen += 1

        def get_metrics(self, trainer, pl_module=None):
            return {}

    counting = Counting()
    Trainer(default_root_dir=tmpdir, fast_dev_run=3, callbacks=[counting]).fit(BoringModel())
    assert counting.train_batches_seen == 3


def test_lambda_and_configure_callbacks(tmpdir):
    seen = set()
    cb = LambdaCallback(
        on_train_batch_start=lambda *a: seen.add("start"), on_fit_end=lambda *a: seen.add("fit_end")
    )

    class Current(BoringModel):
        def configure_callbacks(self):
            return [EarlyStopping("x", strict=False)]

    trainer = Trainer(
        default_root_dir=tmpdir,
        fast_dev_run=True,
        callbacks=[cb, GradientAccumulationScheduler({1: 2})],
    )
    trainer.fit(Current())
    assert seen == {"start", "fit_end"} and trainer.early_stopping_callback is not None
    with pytest.raises(TypeError, match="Empty dict cannot be interpreted correct"):
        GradientAccumulationScheduler({})


def test_callback_states(tmpdir):
    class Cb(Callback):
        state = 0

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            return {"a": 10}

        def on_load_checkpoint(self, callback_state):
            Cb.state = callback_state["a"]

    trainer = Trainer(default_root_dir=tmpdir, max_steps=1, callbacks=[Cb()])
    trainer.fit(BoringModel())
    path = trainer.checkpoint_callback.best_model_path
    Trainer(
        default_root_dir=tmpdir, max_steps=2, callbacks=[Cb()], resume_from_checkpoint=path
    ).fit(BoringModel())
    assert Cb.state == 10
