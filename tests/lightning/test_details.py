"""Arguments of callbacks, of the trainer and of checkpoints that few programs use."""

import functools
import http.server
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning.callbacks import EarlyStopping, LearningRateMonitor
from puretrain.lightning.loggers.base import DummyLogger


class Model(pl.LightningModule):
    def __init__(self, width=1, values=()):
        super().__init__()
        self.save_hyperparameters("width")
        self.layer, self.values, self.steps = nn.Linear(3, width), values, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        if self.values:
            self.log("metric", self.values[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def loader(count=8):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), 2)


def trainer_of(tmp_path, **arguments):
    defaults = {"max_epochs": 1, "logger": False, "checkpoint_callback": False}
    defaults |= {"progress_bar_refresh_rate": 0, "weights_summary": None}
    return pl.Trainer(default_root_dir=str(tmp_path), **{**defaults, **arguments})


# ── Callbacks ─────────────────────────────────────────────────────────────────────────────────────

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "values", "stopped"),
    [
        ({"patience": 2}, (3.0, 2.0, 2.5, 2.1, 1.0), 3),
        ({"patience": 1, "min_delta": 0.5}, (3.0, 2.6, 1.0, 0.0, 0.0), 1),  # 0.4 is none
        ({"patience": 1, "min_delta": 0.3}, (3.0, 2.6, 2.2, 1.8, 1.4), None),
        ({"patience": 1, "mode": "max"}, (1.0, 2.0, 1.5, 3.0, 4.0), 2),
        ({"patience": 9, "stopping_threshold": 1.0}, (3.0, 2.0, 0.9, 0.8, 0.7), 2),
        ({"patience": 9, "divergence_threshold": 5.0}, (3.0, 6.0, 0.9, 0.8, 0.7), 1),
        ({"patience": 9}, (3.0, NAN, 0.9, 0.8, 0.7), 1),
        ({"patience": 9, "check_finite": False}, (3.0, NAN, 0.9, 0.8, 0.7), None),
    ],
)
def test_when_early_stopping_stops(tmp_path, options, values, stopped):
    callback = EarlyStopping("metric", **options)
    trainer = trainer_of(tmp_path, callbacks=[callback], max_epochs=5, num_sanity_val_steps=0)
    trainer.fit(Model(values=values), loader(), loader())
    assert trainer.current_epoch == (4 if stopped is None else stopped)
    assert callback.stopped_epoch == (0 if stopped is None else stopped)


def test_early_stopping_guesses_the_mode_and_wants_its_metric(tmp_path):
    assert EarlyStopping("val_acc", mode="auto").mode == "max"
    assert EarlyStopping("val_loss", mode="auto").mode == "min"
    with pytest.raises(RuntimeError, match="nothing"):
        trainer_of(tmp_path, callbacks=[EarlyStopping("nothing")]).fit(
            Model(values=(1.0,)), loader(), loader()
        )
    lenient = EarlyStopping("nothing", strict=False)
    with pytest.warns(UserWarning, match="nothing"):
        trainer_of(tmp_path, callbacks=[lenient]).fit(Model(values=(1.0,)), loader(), loader())


def test_momentum_is_monitored_too(tmp_path):
    class Logger(DummyLogger):
        def log_metrics(self, metrics, step):
            rows.append(metrics)

    rows = []
    monitor = LearningRateMonitor("step", log_momentum=True)
    trainer_of(tmp_path, callbacks=[monitor], logger=Logger(), log_every_n_steps=1).fit(
        WithSchedule(), loader()
    )
    assert {"lr-SGD": 0.1, "lr-SGD-momentum": 0.9}.items() <= rows[0].items()
    assert rows[-1]["lr-SGD"] == 0.1


class WithSchedule(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 2}, 8),
        ({"max_epochs": 5, "max_steps": 6}, 6),
        ({"max_epochs": 1, "max_steps": 60}, 4),
        ({"max_steps": 6, "max_epochs": None}, 6),
        ({"max_epochs": 9, "min_steps": 10, "min_epochs": 1}, 12),  # the end of that epoch
        ({"max_epochs": 9, "min_epochs": 2, "min_steps": 2}, 8),
        ({"max_epochs": 9, "min_epochs": 1}, 4),
    ],
)
def test_how_long_a_run_takes(tmp_path, arguments, steps):
    class Wants(Model):
        def training_step(self, batch, batch_idx):
            if "min_epochs" in arguments:
                self.trainer.should_stop = batch_idx == 3
            return super().training_step(batch, batch_idx)

    model = Wants()
    trainer = trainer_of(tmp_path, **arguments)
    trainer.fit(model, loader())
    assert model.steps == trainer.global_step == steps


def test_flags_of_torch_are_set(tmp_path):
    try:
        trainer_of(tmp_path, deterministic=True, benchmark=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_barebones_does_nothing_beside_training(tmp_path):
    trainer = pl.Trainer(barebones=True, max_epochs=1, default_root_dir=str(tmp_path))
    assert trainer.logger is None
    assert trainer.callbacks == []
    model = Model(values=(1.0,))
    trainer.fit(model, loader(), loader())
    assert model.steps == 4
    assert list(tmp_path.iterdir()) == []


def test_old_arguments_without_a_meaning_here_are_taken(tmp_path):
    model = Model()
    trainer_of(
        tmp_path, enable_pl_optimizer=True, amp_level="O1", process_position=2,
        prepare_data_per_node=False, replace_sampler_ddp=False, use_distributed_sampler=False,
    ).fit(model, loader())  # fmt: skip
    assert model.steps == 4


# ── A batch on its way ────────────────────────────────────────────────────────────────────────────


def test_a_batch_is_changed_before_and_after_its_transfer(tmp_path):
    class Moves(Model):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            order.append("before")
            return [batch[0] * 2]

        def transfer_batch_to_device(self, batch, device):
            order.append(str(device))
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            order.append("after")
            return [batch[0] + 1]

        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    order, seen = [], []
    trainer_of(tmp_path, limit_train_batches=1).fit(Moves(), loader())
    assert order == ["before", "cpu", "after"]
    assert torch.equal(seen[0], next(iter(loader()))[0] * 2 + 1)


def test_a_split_of_ones_own_for_truncated_backpropagation(tmp_path):
    class Splits(Model):
        def __init__(self):
            super().__init__()
            self.truncated_bptt_steps = 1

        def tbptt_split_batch(self, batch, split_size):
            assert split_size == 1
            return [[row[None]] for row in batch[0]]

        def training_step(self, batch, batch_idx, hiddens):
            seen.append((batch[0].shape, hiddens))
            return {"loss": super().training_step(batch, batch_idx), "hiddens": torch.ones(1)}

    seen = []
    trainer = trainer_of(tmp_path)
    trainer.fit(Splits(), loader(4))
    assert [hiddens is None for _, hiddens in seen] == [True, False] * 2
    assert {tuple(shape) for shape, _ in seen} == {(1, 3)}


def test_what_the_bar_shows_is_the_modules_own(tmp_path):
    class Shows(Model):
        def get_progress_bar_dict(self):
            found = super().get_progress_bar_dict()
            found.pop("v_num", None)
            return {**found, "own": 7}

    model = Shows()
    trainer = pl.Trainer(default_root_dir=str(tmp_path), max_epochs=1, checkpoint_callback=False)
    trainer.fit(model, loader())
    assert set(trainer.progress_bar_dict) == {"loss", "own"}


def test_a_model_that_is_made_late(tmp_path):
    class Late(Model):
        def configure_model(self):
            calls.append("made")
            self.layer = nn.Linear(3, 2)

    calls, model = [], Late()
    trainer_of(tmp_path).fit(model, loader())
    assert calls == ["made"]
    assert model.layer.weight.shape == (2, 3)
    assert model.layer.weight.grad is not None


def test_a_metric_of_torchmetrics_is_logged(tmp_path):
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

    class Measures(Model):
        def __init__(self):
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def validation_step(self, batch, batch_idx):
            self.mean.update(batch[0])
            self.log("mean", self.mean)

    trainer = trainer_of(tmp_path)
    trainer.fit(Measures(), loader(), loader())
    expected = loader().dataset.tensors[0].mean()
    assert torch.allclose(trainer.callback_metrics["mean"], expected)


# ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────


def test_a_module_is_loaded_from_a_path_an_open_file_and_a_url(tmp_path):
    model, path = Model(width=2), tmp_path / "a.ckpt"
    trainer = trainer_of(tmp_path)
    trainer.fit(model, loader())
    trainer.save_checkpoint(path, weights_only=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with path.open("rb") as file:
            url = f"http://127.0.0.1:{server.server_port}/a.ckpt"
            for place in (path, str(path), file, url):
                again = Model.load_from_checkpoint(place, map_location="cpu")
                assert again.hparams.width == 2
                assert torch.equal(again.layer.weight, model.layer.weight)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    with pytest.raises(RuntimeError, match="size mismatch"):
        Model.load_from_checkpoint(path, width=5)
    with pytest.raises(KeyError, match="contains only the model"):
        trainer_of(tmp_path, resume_from_checkpoint=str(path)).fit(Model(2), loader())


# ── Warnings ──────────────────────────────────────────────────────────────────────────────────────


def test_a_fit_warns_of_what_will_not_be_seen(tmp_path):
    with (
        pytest.warns(UserWarning, match=r"training samples \(4\) is smaller than the logging in"),
        pytest.warns(UserWarning, match="validation_step but have no val_dataloader"),
    ):
        trainer_of(tmp_path, logger=True).fit(Model(), loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of(tmp_path, log_every_n_steps=4, num_sanity_val_steps=0).fit(
            Model(), loader(), loader()
        )
