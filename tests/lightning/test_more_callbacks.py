"""Pruning, what devices say of themselves, and callbacks that end, write, freeze or print."""

import csv
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    DeviceStatsMonitor,
    GPUStatsMonitor,
    ModelPruning,
    ModelSummary,
    QuantizationAwareTraining,
    Timer,
)
from puretrain.lightning.loggers import CSVLogger
from puretrain.lightning.utilities.exceptions import MisconfigurationException


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).mean())

    def train_dataloader(self):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x), 8)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, callback, model=None, **arguments):
    model = model or Model()
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), progress_bar_refresh_rate=0, weights_summary=None,
        callbacks=[callback], **{"max_epochs": 2, "logger": False, **arguments},
    )  # fmt: skip
    trainer.fit(model)
    return model, trainer


def zeros(model):
    weights = [model.net[0].weight, model.net[2].weight, model.net[0].bias, model.net[2].bias]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


@pytest.mark.parametrize("late", [False, True])
def test_each_epoch_prunes_a_part_of_what_is_left(late, tmp_path):
    callback = ModelPruning(
        "l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False,
        prune_on_train_epoch_end=not late,
    )  # fmt: skip
    model, _ = fit(tmp_path, callback)
    pruned, size = zeros(model)
    assert pruned == pytest.approx(size * 0.75, abs=2)  # a half, and a half of the rest
    assert set(dict(model.named_parameters())) == {
        "net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"
    }  # fmt: skip
    assert not dict(model.named_buffers())


def test_the_pruned_weights_are_those_of_torch(tmp_path):
    pl.seed_everything(1)
    model = Model()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    where = [(model.net[0], "weight")]
    callback = ModelPruning(
        "l1_unstructured", where, use_global_unstructured=False, amount=0.3,
        use_lottery_ticket_hypothesis=False, make_pruning_permanent=False,
    )  # fmt: skip
    _, trainer = fit(tmp_path, callback, model, max_epochs=1)
    plain = Model()
    plain.load_state_dict(start)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in plain.train_dataloader():
        optimizer.zero_grad()
        plain.training_step(batch, 0).backward()
        optimizer.step()
    prune.l1_unstructured(plain.net[0], "weight", amount=0.3)
    assert torch.equal(model.net[0].weight_orig, plain.net[0].weight_orig)
    assert torch.equal(model.net[0].weight_mask, plain.net[0].weight_mask)
    assert trainer.optimizers[0].param_groups[0]["params"][0] is model.net[0].weight_orig


def test_the_winning_ticket_begins_where_the_network_began(tmp_path):
    pl.seed_everything(1)
    model = Model()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    fit(tmp_path, ModelPruning("random_unstructured", amount=0.4), model, max_epochs=1)
    for name, value in model.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], start[name][kept])
    assert zeros(model)[0] > 0


def test_a_checkpoint_of_a_pruned_module_is_plain(tmp_path):
    callback = ModelPruning("l1_unstructured", use_lottery_ticket_hypothesis=False)
    model, trainer = fit(tmp_path, callback)
    saved = torch.load(trainer.checkpoint_callback.best_model_path)["state_dict"]
    assert set(saved) == set(Model().state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value)
    assert zeros(Model.load_from_checkpoint(trainer.checkpoint_callback.best_model_path))[0] > 0


def test_structure_amounts_and_times(tmp_path):
    asked = []

    def amount(epoch):
        asked.append(epoch)
        return 0.5 if epoch == 1 else 0

    model = Model()
    callback = ModelPruning(
        "ln_structured", [(model.net[0], "weight")], use_global_unstructured=False, pruning_dim=0,
        pruning_norm=2, amount=amount, use_lottery_ticket_hypothesis=lambda epoch: False, verbose=2,
    )  # fmt: skip
    fit(tmp_path, callback, model, max_epochs=3)
    assert asked == [0, 1, 2]
    assert int((model.net[0].weight.abs().sum(1) == 0).sum()) == 8
    model = Model()
    fit(tmp_path, ModelPruning("l1_unstructured", apply_pruning=lambda epoch: False), model)
    assert zeros(model)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_fn": "nothing"}, "isn't available"),
        ({"pruning_fn": print}, "is expected to be a str"),
        ({"pruning_fn": "random_structured"}, "`pruning_dim` should be provided"),
        ({"pruning_fn": "ln_structured", "pruning_dim": 0}, "`pruning_norm` should be"),
        ({"pruning_fn": "random_structured", "pruning_dim": 0}, '"unstructured" PRUNING_TYPE'),
        ({"pruning_fn": prune.L1Unstructured, "use_global_unstructured": False}, "only supported"),
        ({"pruning_fn": "l1_unstructured", "amount": "much"}, "`amount` should be"),
        ({"pruning_fn": "l1_unstructured", "verbose": 3}, "`verbose` must be"),
        ({"pruning_fn": "l1_unstructured", "parameter_names": ["x"]}, "isn't in"),
    ],
)
def test_what_pruning_refuses(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        ModelPruning(**arguments)


def test_parameters_of_another_module(tmp_path):
    with pytest.raises(MisconfigurationException, match="don't exist in the model"):
        fit(tmp_path, ModelPruning("l1_unstructured", [(nn.Linear(1, 1), "weight")]))
    with pytest.raises(MisconfigurationException, match="list of tuple"):
        fit(tmp_path, ModelPruning("l1_unstructured", ["weight"]))


def test_the_load_of_the_cpu(tmp_path):
    fit(tmp_path, DeviceStatsMonitor(), logger=CSVLogger(str(tmp_path)), log_every_n_steps=2)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        for name in ("cpu_percent", "cpu_vm_percent", "cpu_swap_percent"):
            values = [float(row[f"DeviceStatsMonitor.{hook}/{name}"]) for row in rows
                      if row.get(f"DeviceStatsMonitor.{hook}/{name}")]  # fmt: skip
            assert len(values) == 4
            assert all(0 <= value <= 100 for value in values)
    with pytest.raises(MisconfigurationException, match=r"`Trainer\(logger=False\)`"):
        fit(tmp_path, DeviceStatsMonitor())


def test_gpu_stats_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MisconfigurationException, match="NVIDIA driver is not installed"):
        GPUStatsMonitor()
    # a program that answers as nvidia-smi does, for a machine without one
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "35, 1200, 14900, [N/A]"\n')
    program.chmod(0o755)
    monitor = GPUStatsMonitor()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert monitor._stats(0, monitor._at_start) == {
        "gpu_id: 0/utilization.gpu (%)": 35.0,
        "gpu_id: 0/memory.used (MB)": 1200.0,
        "gpu_id: 0/memory.free (MB)": 14900.0,
        "gpu_id: 0/utilization.memory (%)": 0.0,
    }
    with pytest.raises(MisconfigurationException, match="no logger"):
        fit(tmp_path, monitor)
    with pytest.raises(MisconfigurationException, match="not running on GPU"):
        fit(tmp_path, monitor, logger=CSVLogger(str(tmp_path)))


def test_quantization_says_what_to_use():
    with pytest.raises(MisconfigurationException, match="torch.ao.quantization"):
        QuantizationAwareTraining()


def test_predictions_are_written_for_batches_and_in_the_end(tmp_path):
    class Writer(BasePredictionWriter):
        def __init__(self, interval):
            super().__init__(interval)
            self.batches, self.epochs = [], []

        def write_on_batch_end(
            self, trainer, pl_module, prediction, indices, batch, batch_idx, dataloader_idx
        ):
            assert torch.equal(prediction, pl_module(batch))
            self.batches.append((batch_idx, dataloader_idx))

        def write_on_epoch_end(self, trainer, pl_module, predictions, indices):
            self.epochs.append(predictions)

    class Predicts(Model):
        def forward(self, batch):
            return self.net(batch[0])

    for interval, batches, epochs in (("batch", 4, 0), ("epoch", 0, 1), ("batch_and_epoch", 4, 1)):
        writer, model = Writer(interval), Predicts()
        trainer = pl.Trainer(
            default_root_dir=str(tmp_path), logger=False, progress_bar_refresh_rate=0,
            callbacks=[writer], checkpoint_callback=False,
        )  # fmt: skip
        returned = trainer.predict(model, model.train_dataloader())
        assert writer.batches == [(i, 0) for i in range(batches)]
        assert len(writer.epochs) == epochs
        assert len(returned or []) in (0, 4)
    with pytest.raises(MisconfigurationException, match="write_interval"):
        Writer("sometimes")


def test_a_timer_ends_the_training(tmp_path):
    timer = Timer(timedelta(seconds=0))
    _, trainer = fit(tmp_path, timer, max_epochs=50)
    assert trainer.global_step < 200
    assert timer.time_elapsed("train") >= 0
    long = Timer("00:01:00:00")
    _, trainer = fit(tmp_path, long, max_epochs=1)
    assert trainer.global_step == 4
    assert 3500 < long.time_remaining() <= 3600
    for wrong in ({"duration": "1:00"}, {"duration": "00:00:00:01", "interval": "batch"}):
        with pytest.raises(MisconfigurationException):
            Timer(**wrong)


def test_a_backbone_is_frozen_until_its_epoch(tmp_path):
    class WithBackbone(Model):
        def __init__(self):
            super().__init__()
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return torch.optim.SGD(
                [p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.0
            )

    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            seen.append((pl_module.backbone.weight.detach().clone(), len(rates)))

    model = WithBackbone()
    start = model.backbone.weight.detach().clone()
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), progress_bar_refresh_rate=0, weights_summary=None,
        logger=False, max_epochs=4,
        callbacks=[BackboneFinetuning(2, backbone_initial_lr=0.05), Look()],
    )  # fmt: skip
    trainer.fit(model)
    assert torch.equal(seen[0][0], start)
    assert torch.equal(seen[1][0], start)
    assert not torch.equal(seen[2][0], start)
    assert [count for _, count in seen] == [1, 1, 2, 2]


def test_the_summary_is_a_callback_too(tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, ModelSummary(max_depth=-1), max_epochs=1)
    text = capsys.readouterr().out + caplog.text
    assert "net.0" in text
    assert "Total params" in text
