"""In the manner of tests/trainer/optimization, logging_ and models/test_hooks.py."""

import collections
import inspect
import os
from unittest import mock

import pytest
import torch
from boring import BoringModel, RandomDataset
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.trainer.states import TrainerState
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader


class Manual(BoringModel):
    @property
    def automatic_optimization(self):
        return False

    def training_step(self, batch, batch_idx, optimizer_idx=None):
        opt_a, opt_b = self.optimizers()
        assert isinstance(opt_a, LightningOptimizer)

        def compute_loss():
            return self.step(batch)

        def gen_closure():
            loss = compute_loss()
            self.manual_backward(loss, opt_a)

        with (
            opt_a.toggle_model(sync_grad=True)
            if hasattr(opt_a, "toggle_model")
            else mock.MagicMock()
        ):
            opt_a.step(closure=gen_closure)
            opt_a.zero_grad()
        if batch_idx % 2 == 0:
            loss = compute_loss()
            self.manual_backward(loss, opt_b)
            opt_b.step()
            opt_b.zero_grad()

    training_epoch_end = None

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.1), torch.optim.Adam(
            self.layer.parameters(), lr=0.1
        )


def test_manual(tmpdir):
    model = Manual()
    trainer = Trainer(
        default_root_dir=tmpdir,
        limit_train_batches=4,
        limit_val_batches=1,
        max_epochs=1,
        log_every_n_steps=1,
        weights_summary=None,
    )
    with mock.patch("torch.optim.Adam.step") as adam, mock.patch("torch.optim.SGD.step") as sgd:
        trainer.fit(model)
    assert sgd.call_count == 4 and adam.call_count == 2


@pytest.mark.parametrize("form", ["one", "list", "two", "dict", "dicts", "none"])
def test_forms(tmpdir, form):
    class Current(BoringModel):
        def configure_optimizers(self):
            o = torch.optim.Adam(self.parameters(), lr=0.1)
            s = torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1)
            return {
                "one": o,
                "list": [o],
                "two": ([o], [s]),
                "dict": {"optimizer": o, "lr_scheduler": s},
                "dicts": (
                    {
                        "optimizer": o,
                        "lr_scheduler": {"scheduler": s, "interval": "epoch", "name": "x"},
                    },
                ),
                "none": None,
            }[form]

    model = Current()
    trainer = Trainer(
        default_root_dir=tmpdir, max_epochs=1, limit_train_batches=2, limit_val_batches=1
    )
    trainer.fit(model)
    assert len(trainer.optimizers) == (0 if form == "none" else 1) or form == "none"
    if form in ("two", "dict", "dicts"):
        default = dict(
            interval="epoch", frequency=1, reduce_on_plateau=False, strict=True, name=None
        )
        for key, value in default.items():
            if not (form == "dicts" and key == "name"):
                assert trainer.lr_schedulers[0][key] == value
        assert (
            trainer.lr_schedulers[0]["monitor"] is None
            or trainer.lr_schedulers[0]["monitor"] == "val_loss"
        )
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_unknown_config():
    class Current(BoringModel):
        def configure_optimizers(self):
            return 1

    with pytest.raises(
        MisconfigurationException, match="Unknown configuration for model optimizers"
    ):
        Trainer(fast_dev_run=True).fit(Current())


def test_plateau_needs_monitor(tmpdir):
    class Current(BoringModel):
        def configure_optimizers(self):
            o = torch.optim.Adam(self.parameters())
            return {"optimizer": o, "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o)}

    with pytest.raises(
        MisconfigurationException, match="must include a monitor when a `ReduceLROnPlateau`"
    ):
        Trainer(fast_dev_run=True).fit(Current())

    class Missing(BoringModel):
        def configure_optimizers(self):
            o = torch.optim.Adam(self.parameters())
            return {
                "optimizer": o,
                "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o),
                "monitor": "nope",
            }

    with pytest.raises(
        MisconfigurationException, match="ReduceLROnPlateau conditioned on metric nope"
    ):
        Trainer(
            default_root_dir=tmpdir, max_epochs=1, limit_train_batches=1, limit_val_batches=1
        ).fit(Missing())


def test_optimizer_step_override(tmpdir):
    class Current(BoringModel):
        called = collections.defaultdict(int)

        def training_step(self, batch, batch_idx, optimizer_idx):
            self.called[f"training_{optimizer_idx}"] += 1
            return super().training_step(batch, batch_idx)

        def training_epoch_end(self, outputs):
            assert len(outputs) == 2

        def optimizer_step(
            self,
            epoch,
            batch_idx,
            optimizer,
            optimizer_idx,
            optimizer_closure,
            on_tpu,
            using_native_amp,
            using_lbfgs,
        ):
            assert inspect.isfunction(optimizer_closure) or callable(optimizer_closure)
            assert isinstance(optimizer, LightningOptimizer)
            if optimizer_idx == 0 or batch_idx % 2:
                self.called[f"step_{optimizer_idx}"] += 1
                optimizer.step(closure=optimizer_closure)
                optimizer.zero_grad()

        def configure_optimizers(self):
            a = torch.optim.SGD(self.layer.parameters(), lr=0.1)
            b = torch.optim.Adam(self.layer.parameters(), lr=0.1)
            return [a, b], [
                torch.optim.lr_scheduler.StepLR(a, 1),
                torch.optim.lr_scheduler.StepLR(b, 1),
            ]

    model = Current()
    Trainer(default_root_dir=tmpdir, max_epochs=1, limit_train_batches=4, limit_val_batches=1).fit(
        model
    )
    assert model.called == {"training_0": 4, "training_1": 2, "step_0": 4, "step_1": 2}


def test_log_names_and_metrics(tmpdir):
    class Current(BoringModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            self.log("default", loss)
            self.log("l_s", loss, on_step=True, on_epoch=False, prog_bar=True)
            self.log("l_e", loss, on_step=False, on_epoch=True, prog_bar=True, logger=False)
            self.log("l_se", loss, on_step=True, on_epoch=True)
            self.log_dict(
                {"p_se": 1, "q": torch.tensor(2.0)}, on_step=True, on_epoch=True, prog_bar=True
            )
            return loss

        training_epoch_end = None

        def validation_step(self, batch, batch_idx):
            self.log("val", self.step(batch), prog_bar=True)

        validation_epoch_end = None

    model = Current()
    trainer = Trainer(
        default_root_dir=tmpdir,
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=2,
        log_every_n_steps=1,
        weights_summary=None,
    )
    trainer.fit(model)
    assert set(trainer.logged_metrics) == {
        "epoch",
        "default",
        "l_s",
        "l_se_step",
        "l_se_epoch",
        "p_se_step",
        "p_se_epoch",
        "q_step",
        "q_epoch",
        "val",
    }
    assert set(trainer.callback_metrics) >= {
        "default",
        "l_s",
        "l_e",
        "l_se",
        "l_se_step",
        "l_se_epoch",
        "val",
    }
    assert set(trainer.progress_bar_metrics) == {
        "l_s",
        "l_e",
        "p_se_step",
        "p_se_epoch",
        "q_step",
        "q_epoch",
        "val",
    }
    assert trainer.dev_debugger if hasattr(trainer, "dev_debugger") else True


def test_log_in_wrong_place(tmpdir):
    class Current(BoringModel):
        def on_fit_start(self):
            self.log("a", 1)

    with pytest.raises(MisconfigurationException):
        Trainer(fast_dev_run=True).fit(Current())


def test_log_not_tensor(tmpdir):
    class Current(BoringModel):
        def training_step(self, *args):
            self.log("foo", {"a": {"b": "text"}})
            return super().training_step(*args)

    with pytest.raises((ValueError, TypeError, MisconfigurationException)):
        Trainer(fast_dev_run=True).fit(Current())


def test_several_val_loaders(tmpdir):
    class Current(BoringModel):
        val_dataloader_return = None

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("loss", float(dataloader_idx))
            return dataloader_idx

        def validation_epoch_end(self, outputs):
            assert len(outputs) == 2 and set(outputs[1]) == {1}

        def val_dataloader(self):
            return [DataLoader(RandomDataset()), DataLoader(RandomDataset())]

    trainer = Trainer(
        default_root_dir=tmpdir, max_epochs=1, limit_train_batches=1, limit_val_batches=2
    )
    trainer.fit(Current())
    assert trainer.callback_metrics["loss/dataloader_idx_1"] == 1


def test_hooks_order(tmpdir):
    class Hooks(BoringModel):
        def __init__(self):
            super().__init__()
            self.called = []

        def __getattribute__(self, name):
            if name.startswith("on_") and name not in ("on_gpu",):
                object.__getattribute__(self, "called").append(name)
            return super().__getattribute__(name)

    class Real(BoringModel):
        def __init__(self):
            super().__init__()
            self.called = []

        def on_train_start(self):
            self.called.append("on_train_start")

        def on_train_epoch_start(self):
            self.called.append("on_train_epoch_start")

        def on_train_batch_start(self, batch, batch_idx, dataloader_idx):
            self.called.append("on_train_batch_start")

        def on_before_zero_grad(self, optimizer):
            self.called.append("on_before_zero_grad")

        def on_after_backward(self):
            self.called.append("on_after_backward")

        def on_train_batch_end(self, outputs, batch, batch_idx, dataloader_idx):
            self.called.append("on_train_batch_end")

        def on_train_epoch_end(self, outputs):
            self.called.append("on_train_epoch_end")

        def on_train_end(self):
            self.called.append("on_train_end")

        def transfer_batch_to_device(self, batch, device):
            assert device == torch.device("cpu")
            return super().transfer_batch_to_device(batch, device)

    model = Real()
    trainer = Trainer(
        default_root_dir=tmpdir, max_epochs=1, limit_train_batches=1, limit_val_batches=0
    )
    trainer.fit(model)
    assert model.called == [
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_after_backward",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_train_end",
    ]
    Trainer(fast_dev_run=True).fit(Hooks())


def test_hook_checkpoint(tmpdir):
    class Current(BoringModel):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 5

        def on_load_checkpoint(self, checkpoint):
            self.found = checkpoint["mine"]

    trainer = Trainer(default_root_dir=tmpdir, max_steps=1)
    trainer.fit(Current())
    assert Current.load_from_checkpoint(trainer.checkpoint_callback.best_model_path).found == 5


def test_exports(tmpdir):
    class Current(BoringModel):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.randn(5, 32)

    model = Current()
    script = model.to_torchscript()
    assert torch.allclose(script(torch.ones(1, 32)), model(torch.ones(1, 32)))
    traced = model.to_torchscript(method="trace", file_path=os.path.join(tmpdir, "a.pt"))
    assert torch.equal(
        torch.jit.load(os.path.join(tmpdir, "a.pt"))(torch.ones(1, 32)), traced(torch.ones(1, 32))
    )
    with pytest.raises(ValueError, match="only supports"):
        model.to_torchscript(method="temp")
    Trainer(fast_dev_run=True).fit(model)
    model.to_torchscript()
    model.example_input_array = None
    with pytest.raises(
        ValueError, match="requires either `example_inputs` or `model.example_input_array`"
    ):
        model.to_torchscript(method="trace")
    with pytest.raises(
        ValueError,
        match="Could not export to ONNX since neither `input_sample` nor `model.example_input_array`",
    ):
        model.to_onnx(os.path.join(tmpdir, "a.onnx"))


def test_write_prediction(tmpdir):
    path = os.path.join(tmpdir, "preds.pt")

    class Current(BoringModel):
        def test_step(self, batch, batch_idx):
            self.write_prediction("idxs", torch.arange(batch_idx * 2, batch_idx * 2 + 2), path)
            self.write_prediction_dict({"preds": batch[:, 0]}, path)

        test_epoch_end = None

        def test_dataloader(self):
            return DataLoader(RandomDataset(32, 8), batch_size=2)

    Trainer(default_root_dir=tmpdir, weights_summary=None).test(Current())
    rows = torch.load(path, weights_only=False)
    assert len(rows) == 8 and set(rows[0]) == {"idxs", "preds"}


def test_track_norms_anomaly_time(tmpdir):
    class Current(BoringModel):
        def training_step(self, *args):
            out = super().training_step(*args)
            self.log("a", 1.0)
            return out

    trainer = Trainer(default_root_dir=tmpdir, max_steps=2, track_grad_norm=2, log_every_n_steps=1)
    trainer.fit(Current())
    assert any(k.startswith("grad_2.0_norm_total") for k in trainer.logged_metrics)
    assert {"grad_2.0_norm_layer.weight", "grad_2.0_norm_layer.bias"} <= set(trainer.logged_metrics)

    class Slow(BoringModel):
        def training_step(self, *args):
            import time

            time.sleep(0.05)
            return super().training_step(*args)

    trainer = Trainer(
        default_root_dir=tmpdir, max_epochs=100, max_time={"seconds": 1}, limit_val_batches=0
    )
    trainer.fit(Slow())
    assert trainer.state == TrainerState.FINISHED and 5 < trainer.global_step < 64

    class Anomalous(BoringModel):
        def training_step(self, batch, batch_idx):
            loss = (self.layer(batch) * 0).sqrt().sum()
            return loss * 0

        training_epoch_end = None

    with pytest.raises(RuntimeError, match="returned nan values"):
        Trainer(default_root_dir=tmpdir, max_steps=1, detect_anomaly=True, limit_val_batches=0).fit(
            Anomalous()
        )
    assert not torch.is_anomaly_enabled()


def test_reload(tmpdir):
    class Current(BoringModel):
        trains = vals = 0

        def train_dataloader(self):
            self.trains += 1
            return super().train_dataloader()

        def val_dataloader(self):
            self.vals += 1
            return super().val_dataloader()

    model = Current()
    Trainer(
        default_root_dir=tmpdir,
        max_epochs=3,
        limit_train_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        reload_dataloaders_every_epoch=True,
    ).fit(model)
    assert model.trains == 3 and model.vals == 3


def test_skip_and_early_end(tmpdir):
    class Current(BoringModel):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                return None
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx, dataloader_idx):
            if batch_idx == 3:
                return -1

    trainer = Trainer(default_root_dir=tmpdir, max_epochs=1, limit_val_batches=0)
    trainer.fit(Current())
    assert trainer.batch_idx in (2, 3)
    assert isinstance(Callback(), Callback) and issubclass(BoringModel, LightningModule)
