"""Single lines of what the interface promises, each against a value worked out beside it."""

import io
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning.callbacks import BasePredictionWriter, RichProgressBar, Timer
from puretrain.lightning.callbacks.progress.rich_progress import RichProgressBarTheme
from puretrain.lightning.loggers import TensorBoardLogger


def samples(count=8, seed=0):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def loader(count=8, size=2, **options):
    return DataLoader(TensorDataset(samples(count)), size, **options)


class Model(pl.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(4, 1)
        self.seen = []

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].clone())
        loss = self(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


def trainer_of(tmp_path, **arguments):
    defaults = {"progress_bar_refresh_rate": 0, "weights_summary": None, "logger": False}
    if not arguments.keys() & {"enable_checkpointing", "callbacks"}:
        defaults["checkpoint_callback"] = False
    return pl.Trainer(default_root_dir=str(tmp_path), **{"max_epochs": 1, **defaults, **arguments})


# ── TensorBoard ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_fit_writes_the_graph_and_the_hyperparameters_with_their_metric(tmp_path):
    class Logs(Model):
        def __init__(self):
            super().__init__(0.25)
            self.example_input_array = torch.zeros(1, 4)

        def on_train_start(self):
            self.logger.log_hyperparams(self.hparams, {"hp/loss": 7.0})

        def on_train_epoch_end(self):
            self.log("hp/loss", 0.5)

    logger = TensorBoardLogger(str(tmp_path), log_graph=True, default_hp_metric=False)
    trainer_of(tmp_path, logger=logger).fit(Logs(), loader())
    events = EventAccumulator(logger.log_dir).Reload()
    assert any("layer" in node.name for node in events.Graph().node)
    assert [(e.step, e.value) for e in events.Scalars("hp/loss")] == [(0, 7.0), (3, 0.5)]
    assert "hp_metric" not in events.Tags()["scalars"]
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"lr" in start
    experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"hp/loss" in experiment


# ── The bar in colours ────────────────────────────────────────────────────────────────────────────


def test_the_rich_bar_shows_epoch_count_and_metrics_in_its_styles(tmp_path):
    class Shows(Model):
        def training_step(self, batch, batch_idx):
            self.log("shown", 0.123456, prog_bar=True)
            return super().training_step(batch, batch_idx)

    terminal = io.StringIO()
    bar = RichProgressBar(
        leave=True,
        theme=RichProgressBarTheme(description="green", metrics_format=".2f"),
        console_kwargs={"file": terminal, "force_terminal": True, "width": 160},
    )
    trainer = pl.Trainer(default_root_dir=str(tmp_path), max_epochs=2, logger=False,
                         callbacks=[bar], enable_checkpointing=False)  # fmt: skip
    assert trainer.progress_bar_callback is bar
    trainer.fit(Shows(), loader())
    text = terminal.getvalue()
    assert "\x1b[32mEpoch 1\x1b[0m" in text  # green
    assert "4/4" in text
    assert "shown: 0.12" in text
    assert "0.1234" not in text
    quiet = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": quiet, "force_terminal": False})
    pl.Trainer(default_root_dir=str(tmp_path), max_epochs=1, logger=False, callbacks=[bar],
               enable_checkpointing=False).fit(Model(), loader())  # fmt: skip
    assert quiet.getvalue() == ""
    assert RichProgressBar(refresh_rate=0).is_disabled


# ── Prediction ────────────────────────────────────────────────────────────────────────────────────


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage=None):
        self.calls.append(stage)

    def train_dataloader(self):
        return loader()

    def predict_dataloader(self):
        return loader(6)


class Predicts(Model):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        assert not self.training
        assert not torch.is_grad_enabled()
        return self(batch[0])


def test_a_prediction_with_a_data_module(tmp_path):
    model, data = Predicts(), Data()
    trainer = trainer_of(tmp_path)
    found = trainer.predict(model, datamodule=data)
    with torch.no_grad():
        expected = [model(x) for x in samples(6).split(2)]
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert data.calls == ["prepare", "predict"]
    assert model.training  # as it was
    assert trainer.predict(model, data)[0].shape == (2, 1)  # where 2.x takes it, too
    assert trainer.predict(model, datamodule=data, return_predictions=False) is None


def test_a_prediction_with_the_best_weights_and_with_limits(tmp_path):
    class Scored(Predicts):
        def validation_step(self, batch, batch_idx):
            self.log("score", float(self.current_epoch))

    model = Scored()
    best = pl.callbacks.ModelCheckpoint(str(tmp_path), monitor="score", mode="min")
    trainer = trainer_of(tmp_path, callbacks=[best], max_epochs=3, limit_predict_batches=2)
    trainer.fit(model, loader(), loader())
    last = [p.detach().clone() for p in model.parameters()]
    found = trainer.predict(model, [loader(), loader(2)], ckpt_path="best")
    assert [len(batches) for batches in found] == [2, 1]
    saved = torch.load(best.best_model_path)["state_dict"]
    assert torch.equal(model.layer.weight, saved["layer.weight"])
    assert not torch.equal(model.layer.weight, last[0])


def test_a_writer_gets_the_places_of_the_samples_also_if_nothing_is_returned(tmp_path):
    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer, module, prediction, indices, batch, number, loader):
            by_batch.append((indices, len(prediction)))

        def write_on_epoch_end(self, trainer, module, predictions, indices):
            by_epoch.append((predictions, indices))

    by_batch, by_epoch = [], []
    trainer = trainer_of(tmp_path, callbacks=[Writer("batch_and_epoch")])
    torch.manual_seed(3)
    data = loader(5, shuffle=True, drop_last=True)
    with pytest.warns(UserWarning, match="predict_dataloader has `shuffle=True`"):
        assert trainer.predict(Predicts(), data, return_predictions=False) is None
    (((predictions,), (indices,)),) = by_epoch
    assert [count for _, count in by_batch] == [2, 2, 1]  # a prediction leaves nobody out
    assert [places for places, _ in by_batch] == indices
    assert sorted(place for batch in indices for place in batch) == list(range(5))
    assert [len(p) for p in predictions] == [2, 2, 1]
    by_batch.clear()
    with pytest.warns(UserWarning, match="infer the batch indices"):
        trainer.predict(Predicts(), [[(samples(),)]])
    assert by_batch == [([], 8)]


# ── Data modules ──────────────────────────────────────────────────────────────────────────────────


def test_1x_sets_a_data_module_up_once_and_2x_for_each_run(tmp_path):
    data = Data()
    data.prepare_data()
    data.setup("fit")
    trainer = trainer_of(tmp_path)
    trainer.fit(Model(), datamodule=data)
    trainer.fit(Model(), datamodule=data)
    trainer.predict(Predicts(), datamodule=data)
    assert data.calls == ["prepare", "fit", "predict"]
    data.calls.clear()
    trainer = pl.Trainer(max_epochs=1, enable_progress_bar=False, logger=False,
                         enable_checkpointing=False, default_root_dir=str(tmp_path))  # fmt: skip
    trainer.fit(Model(), datamodule=data)
    assert data.calls == ["prepare", "fit"]


def test_a_data_module_belongs_to_the_module_that_it_was_given_with(tmp_path):
    class Own(Predicts):
        def predict_dataloader(self):
            return loader(2)

    model, data = Own(), Data()
    trainer = trainer_of(tmp_path)
    trainer.fit(model, datamodule=data)
    assert len(trainer.predict(model)) == 3
    other = Own()
    assert len(trainer.predict(other)) == 1
    assert trainer.datamodule is None
    assert other.datamodule is None
    assert len(trainer.predict(model, loader(8))) == 4


# ── Order, as 2.x has it ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("later", [False, True])
def test_a_trainer_of_2x_validates_before_the_epoch_ends(tmp_path, later):
    order = []

    class Module(Model):
        def validation_step(self, batch, batch_idx):
            self.log("val", 1.5)

        def on_train_epoch_end(self):
            order.append("module")
            self.log("of_epoch", self.trainer.callback_metrics.get("val", 0) * 2)

    class Watches(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            order.append("train")

        def on_validation_end(self, trainer, pl_module):
            order.append("validation")

    new = {"enable_progress_bar": False, "progress_bar_refresh_rate": 0} if later else {}
    trainer = trainer_of(tmp_path, callbacks=[Watches()], num_sanity_val_steps=0, **new)
    trainer.fit(Module(), loader(), loader())
    old = ["train", "module", "validation"]
    assert order == (["validation", "train", "module"] if later else old)
    assert trainer.callback_metrics["of_epoch"] == (3.0 if later else 0.0)


@pytest.mark.parametrize("later", [False, True])
def test_each_of_several_equal_callbacks_is_called(tmp_path, later):
    class Same(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            called.append("same")

    def function(trainer, pl_module):
        called.append("function")

    called = []
    lambdas = [pl.callbacks.LambdaCallback(on_train_epoch_end=function) for _ in range(2)]
    saving = [pl.callbacks.ModelCheckpoint(str(tmp_path / name)) for name in "ab"]
    new = {"enable_progress_bar": False} if later else {}
    trainer = trainer_of(tmp_path, callbacks=[Same(), *lambdas, *saving, Same()], **new)
    trainer.fit(Model(), loader())
    assert called == ["same", "function", "function", "same"]
    assert all(list((tmp_path / name).glob("*.ckpt")) for name in "ab")


# ── Arguments of the trainer ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("share", "count"), [(2, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_overfit_batches_trains_validates_and_tests_on_the_same_few(tmp_path, share, count):
    class Sees(Model):
        def __init__(self):
            super().__init__()
            self.validated, self.tested = [], []

        def validation_step(self, batch, batch_idx):
            self.validated.append(batch[0])

        def test_step(self, batch, batch_idx):
            self.tested.append(batch[0])

    model = Sees()
    trainer = trainer_of(tmp_path, overfit_batches=share, num_sanity_val_steps=0, max_epochs=2)
    other = DataLoader(TensorDataset(samples(seed=1)), 2)
    with pytest.warns(UserWarning, match="turning off the training dataloader shuffling"):
        trainer.fit(model, loader(shuffle=True), other)
    trainer.test(model, other, verbose=False)
    few = samples()[: 2 * count]
    assert torch.equal(torch.cat(model.seen), torch.cat([few, few]))
    assert torch.equal(torch.cat(model.validated), torch.cat([few, few]))
    assert torch.equal(torch.cat(model.tested), few)


@pytest.mark.parametrize("kind", [1, 2, "inf"])
def test_norms_of_gradients_are_those_of_the_gradients(tmp_path, kind):
    norms = []

    class Notes(Model):
        def on_after_backward(self):
            weight, bias = self.layer.weight.grad.abs(), self.layer.bias.grad.abs()
            both = torch.cat([weight.flatten(), bias])
            p = math.inf if kind == "inf" else float(kind)
            found = [float(torch.linalg.vector_norm(x, p)) for x in (weight, bias, both)]
            norms.append(found)

    class Logger(pl.loggers.base.DummyLogger):
        def log_metrics(self, metrics, step):
            rows.append(metrics)

    rows = []
    trainer_of(
        tmp_path, track_grad_norm=kind, logger=Logger(), log_every_n_steps=1, gradient_clip_val=1e-3
    ).fit(Notes(), loader())
    label = "inf" if kind == "inf" else float(kind)
    names = [f"grad_{label}_norm_{end}" for end in ("layer.weight", "layer.bias", "total")]
    found = [[row[name] for name in names] for row in rows if names[0] in row]
    assert found == [pytest.approx(each, rel=1e-5) for each in norms]
    assert len(found) == 4


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        ({}, [0]),
        ({"reload_dataloaders_every_epoch": True}, [0, 1, 2, 3, 4]),
        ({"reload_dataloaders_every_n_epochs": 1}, [0, 1, 2, 3, 4]),
        ({"reload_dataloaders_every_n_epochs": 2}, [0, 2, 4]),
    ],
)
def test_loaders_are_asked_for_again(tmp_path, arguments, epochs):
    class Asked(Model):
        def __init__(self):
            super().__init__()
            self.asked = []

        def train_dataloader(self):
            self.asked.append(("train", self.current_epoch))
            return loader()

        def val_dataloader(self):
            self.asked.append(("val", self.current_epoch))
            return loader()

        def validation_step(self, batch, batch_idx):
            pass

    model = Asked()
    trainer_of(tmp_path, max_epochs=5, num_sanity_val_steps=0, **arguments).fit(model)
    for kind in ("train", "val"):
        assert [epoch for name, epoch in model.asked if name == kind] == epochs


def test_a_nan_in_backward_is_named_if_that_is_wanted(tmp_path):
    class Breaks(Model):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) * 0).sqrt().sum() * 0

    with (
        pytest.warns(UserWarning, match="Error detected in SqrtBackward0"),
        pytest.raises(RuntimeError, match=r"SqrtBackward0.*returned nan values"),
    ):
        trainer_of(tmp_path, detect_anomaly=True).fit(Breaks(), loader())
    assert not torch.is_anomaly_enabled()
    trainer_of(tmp_path).fit(Breaks(), loader())


@pytest.mark.parametrize(
    "limit", ["00:00:00:02", timedelta(seconds=2), {"seconds": 2}, {"minutes": 1 / 30}]
)
def test_max_time_in_all_its_spellings(tmp_path, limit):
    trainer = trainer_of(tmp_path, max_time=limit)
    (timer,) = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    assert timer.time_remaining() == pytest.approx(2)
    short = trainer_of(tmp_path, max_time=timedelta(microseconds=1), max_epochs=-1)
    short.fit(Model(), loader())
    assert short.global_step <= 4
    assert short.state.finished


def test_predictions_of_a_test_are_written_as_rows(tmp_path):
    first, second = str(tmp_path / "first.pt"), str(tmp_path / "more" / "second.pt")

    class Writes(Model):
        def test_step(self, batch, batch_idx):
            self.write_prediction("sum", batch[0].sum(1), first)
            self.write_prediction_dict({"name": ["a", "b"], "x": batch[0]}, first)
            self.write_prediction("number", batch_idx, second)

    trainer = trainer_of(tmp_path)
    for _ in range(2):  # the second test begins anew
        trainer.test(Writes(), loader(4), verbose=False)
        x = samples(4)
        rows = torch.load(first)
        assert [row["sum"] for row in rows] == x.sum(1).tolist()
        assert [row["name"] for row in rows] == ["a", "b", "a", "b"]
        assert [row["x"] for row in rows] == x.tolist()
        assert torch.load(second) == [{"number": 0}, {"number": 1}]

    class Uneven(Model):
        def test_step(self, batch, batch_idx):
            self.write_prediction_dict({"a": [1], "b": [1, 2]}, first)

    with pytest.raises(ValueError, match="Mismatching feature column lengths"):
        trainer.test(Uneven(), loader(2), verbose=False)


def test_memory_of_a_gpu_is_logged_where_there_is_one(tmp_path):
    class Logger(pl.loggers.base.DummyLogger):
        def log_metrics(self, metrics, step):
            rows.append(metrics)

    rows = []
    if torch.cuda.is_available():
        trainer = trainer_of(
            tmp_path, log_gpu_memory="all", gpus=1, logger=Logger(), log_every_n_steps=1
        )
        trainer.fit(Model(), loader())
        assert any("gpu_id: 0/memory.used (MB)" in row for row in rows)
    else:
        with pytest.warns(UserWarning, match="log_gpu_memory='min_max' has no effect"):
            trainer = trainer_of(
                tmp_path, log_gpu_memory="min_max", logger=Logger(), log_every_n_steps=1
            )
        trainer.fit(Model(), loader())
        assert rows
        assert not any("gpu" in name for row in rows for name in row)


def test_files_are_where_the_notes_say(tmp_path):
    trainer = pl.Trainer(default_root_dir=str(tmp_path), weights_save_path=str(tmp_path / "w"),
                         max_epochs=2, progress_bar_refresh_rate=0)  # fmt: skip
    trainer.fit(Model(), loader())
    assert Path(trainer.log_dir) == tmp_path / "lightning_logs" / "version_0"
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if path.is_file()}
    assert "w/lightning_logs/version_0/checkpoints/epoch=1-step=7.ckpt" in found
    assert "lightning_logs/version_0/hparams.yaml" in found
