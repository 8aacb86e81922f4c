"""Programs as users of Lightning 1.1 to 1.3 write them, with made data."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

import puretrain.lightning as pl
from puretrain.lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from puretrain.lightning.trainer.states import TrainerState
from puretrain.lightning.utilities.exceptions import MisconfigurationException


def quiet(tmp_path, **arguments):
    options = {
        "default_root_dir": str(tmp_path),
        "progress_bar_refresh_rate": 0,
        "weights_summary": None,
        "max_epochs": 2,
        **arguments,
    }
    return pl.Trainer(**options)


def images(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    x = torch.randn(count, 1, 6, 6, generator=generator) + 2 * y.view(-1, 1, 1, 1).float()
    return TensorDataset(x, y)


class LitClassifier(pl.LightningModule):
    def __init__(self, hidden_dim: int = 16, learning_rate: float = 1e-2, name="digits"):
        super().__init__()
        self.save_hyperparameters()
        self.l1 = nn.Linear(36, self.hparams.hidden_dim)
        self.l2 = nn.Linear(self.hparams.hidden_dim, 4)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        return self.l2(torch.relu(self.l1(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss, "count": len(x)}

    def training_epoch_end(self, outputs):
        assert sum(o["count"] for o in outputs) == 48
        self.log("epoch_loss", torch.stack([o["loss"] for o in outputs]).mean())

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("valid_loss", F.cross_entropy(logits, y), on_step=True)
        return (logits.argmax(1) == y).float()

    def validation_epoch_end(self, outputs):
        self.log("valid_acc", torch.cat(outputs).mean(), prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch, batch_idx, dataloader_idx=None):
        return self(batch[0]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def test_a_classifier_is_trained_tested_and_loaded(tmp_path):
    pl.seed_everything(0)
    train, val = random_split(images(), [48, 16])
    model = LitClassifier(hidden_dim=8)
    checkpoint = ModelCheckpoint(
        monitor="valid_acc", mode="max", filename="{epoch}-{valid_acc:.2f}"
    )
    trainer = quiet(tmp_path, max_epochs=6, callbacks=[checkpoint, LearningRateMonitor("step")])
    with pytest.warns(UserWarning, match="models that have no learning rate schedulers"):
        assert trainer.fit(model, DataLoader(train, 8, shuffle=True), DataLoader(val, 8)) == 1
    assert trainer.state == TrainerState.FINISHED
    assert trainer.current_epoch == 5
    assert trainer.global_step == 36
    assert {"train_loss", "epoch_loss", "valid_acc", "valid_loss_epoch"} <= set(
        trainer.callback_metrics
    )
    assert trainer.callback_metrics["valid_acc"] > 0.25
    assert trainer.progress_bar_metrics["valid_acc"] == trainer.callback_metrics["valid_acc"]
    (result,) = trainer.test(test_dataloaders=DataLoader(val, 8))
    assert set(result) == {"test_loss"}
    assert isinstance(result["test_loss"], float)
    best = checkpoint.best_model_path
    assert os.path.basename(best).startswith("epoch=")
    assert "valid_acc=" in best
    loaded = LitClassifier.load_from_checkpoint(best)
    assert loaded.hparams.hidden_dim == 8
    assert loaded.hparams.name == "digits"
    plain = torch.load(best)  # with weights_only=True, which is torch's default
    assert plain["hyper_parameters"] == {
        "hidden_dim": 8,
        "learning_rate": 1e-2,
        "name": "digits",
    }
    for key, value in plain["state_dict"].items():
        assert torch.equal(loaded.state_dict()[key], value)
    batches = trainer.predict(loaded, DataLoader(val, 8))
    assert [len(batch) for batch in batches] == [8, 8]
    wider = LitClassifier.load_from_checkpoint(best, learning_rate=1.0)
    assert wider.hparams.learning_rate == 1.0


class GAN(pl.LightningModule):
    """Two optimizers, by turns, as in the well-known example."""

    def __init__(self, frequencies=None):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        self.frequencies, self.turns = frequencies, []

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.turns.append((batch_idx, optimizer_idx))
        z = torch.randn(batch.shape[0], 4).type_as(batch)
        if optimizer_idx == 0:
            assert not any(p.requires_grad for p in self.discriminator.parameters())
            valid = torch.ones(batch.size(0), 1)
            g_loss = self.adversarial_loss(self.discriminator(self.generator(z)), valid)
            self.log("g_loss", g_loss, prog_bar=True)
            return {"loss": g_loss, "progress_bar": {}, "log": {"g_loss": g_loss}}
        assert not any(p.requires_grad for p in self.generator.parameters())
        real = self.adversarial_loss(self.discriminator(batch), torch.ones(batch.size(0), 1))
        fake = self.discriminator(self.generator(z).detach())
        d_loss = (real + self.adversarial_loss(fake, torch.zeros(batch.size(0), 1))) / 2
        self.log("d_loss", d_loss)
        return d_loss

    def training_epoch_end(self, outputs):
        self.shape = [len(each) for each in outputs]

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=0.01)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=0.01)
        if self.frequencies:
            n, m = self.frequencies
            return {"optimizer": opt_g, "frequency": n}, {"optimizer": opt_d, "frequency": m}
        return [opt_g, opt_d], []


def test_a_gan_agrees_with_a_loop_by_hand(tmp_path):
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    pl.seed_everything(1)
    model = GAN()
    trainer = quiet(tmp_path, logger=False, checkpoint_callback=False)
    trainer.fit(model, DataLoader(data, 8))
    assert model.turns == [(b, o) for _ in range(2) for b in range(4) for o in range(2)]
    assert model.shape == [4, 4]
    assert trainer.global_step == 8
    pl.seed_everything(1)
    other = GAN()
    (opt_g, opt_d), _ = other.configure_optimizers()
    for _ in range(2):
        for batch in iter(DataLoader(data, 8)):
            z = torch.randn(8, 4)
            fake = other.discriminator(other.generator(z))
            opt_g.zero_grad()
            F.binary_cross_entropy_with_logits(fake, torch.ones(8, 1)).backward()
            opt_g.step()
            z = torch.randn(8, 4)
            real = F.binary_cross_entropy_with_logits(other.discriminator(batch), torch.ones(8, 1))
            fake = other.discriminator(other.generator(z).detach())
            opt_d.zero_grad()
            loss = (real + F.binary_cross_entropy_with_logits(fake, torch.zeros(8, 1))) / 2
            loss.backward()
            opt_d.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_optimizers_take_turns_by_their_frequencies(tmp_path):
    model = GAN(frequencies=(1, 2))
    trainer = quiet(tmp_path, logger=False, checkpoint_callback=False, max_epochs=1)
    trainer.fit(model, DataLoader(torch.randn(48, 6), 8))
    assert model.turns == [(0, 0), (1, 1), (2, 1), (3, 0), (4, 1), (5, 1)]


def test_manual_optimization_with_toggling_and_a_closure(tmp_path):
    class Manual(GAN):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            opt_g, opt_d = self.optimizers()
            assert isinstance(opt_g, torch.optim.Adam)

            def closure():
                loss = self.discriminator(self.generator(batch[:, :4])).mean()
                opt_g.zero_grad()
                self.manual_backward(loss, opt_g)
                return loss

            self.toggle_optimizer(opt_g)
            assert not any(p.requires_grad for p in self.discriminator.parameters())
            opt_g.step(closure=closure)
            self.untoggle_optimizer(opt_g)
            assert all(p.requires_grad for p in self.discriminator.parameters())
            loss = self.discriminator(batch).square().mean()
            self.manual_backward(loss, opt_d)
            if (batch_idx + 1) % 2 == 0:
                opt_d.step()
                opt_d.zero_grad()
            self.log("loss", loss)

        def training_epoch_end(self, outputs):
            pass

    model = Manual()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quiet(tmp_path, logger=False).fit(model, DataLoader(torch.randn(32, 6), 8))
    assert all(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Recurrent(pl.LightningModule):
    def __init__(self, how):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 1)
        self.hiddens_seen, self.how = [], how
        if how == "module":
            self.truncated_bptt_steps = 2

    def training_step(self, batch, batch_idx, hiddens):
        x, y = batch
        assert x.shape[1] == 2
        self.hiddens_seen.append(None if hiddens is None else hiddens[0].requires_grad)
        out, hiddens = self.lstm(x, hiddens)
        return {"loss": F.mse_loss(self.head(out), y), "hiddens": hiddens}

    def training_epoch_end(self, outputs):
        assert len(outputs) == 2
        assert len(outputs[0]) == 3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 6, 3), torch.randn(8, 6, 1)), batch_size=4)


@pytest.mark.parametrize("how", ["module", "trainer"])
def test_truncated_backpropagation(tmp_path, how):
    model = Recurrent(how)
    steps = 2 if how == "trainer" else None
    quiet(tmp_path, max_epochs=1, logger=False, truncated_bptt_steps=steps).fit(model)
    assert model.hiddens_seen == [None, False, False] * 2


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        leaves = batch.values() if isinstance(batch, dict) else [batch]
        return sum(self.layer(x).mean() for x in leaves)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("mode", "count"), [("min_size", 2), ("max_size_cycle", 3)])
def test_several_training_loaders(tmp_path, mode, count):
    model = Small()
    loaders = {
        "a": DataLoader(torch.zeros(4, 2), batch_size=2),
        "b": DataLoader(torch.ones(6, 2), batch_size=2),
    }
    trainer = quiet(tmp_path, max_epochs=1, multiple_trainloader_mode=mode, logger=False)
    trainer.fit(model, loaders)
    assert trainer.num_training_batches == count
    assert [set(batch) for batch in model.batches] == [{"a", "b"}] * count


def test_several_validation_loaders(tmp_path):
    class Validates(Small):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("value", batch.mean())
            self.log("same", batch.mean(), add_dataloader_idx=False) if not dataloader_idx else None
            return dataloader_idx

        def validation_epoch_end(self, outputs):
            self.outputs = outputs

    model = Validates()
    trainer = quiet(tmp_path, logger=False, num_sanity_val_steps=0, max_epochs=1)
    loaders = [DataLoader(torch.full((n, 2), float(n)), batch_size=2) for n in (2, 4)]
    trainer.fit(model, DataLoader(torch.zeros(4, 2)), loaders)
    assert model.outputs == [[0], [1, 1]]
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert metrics == {
        "value/dataloader_idx_0": 2.0,
        "value/dataloader_idx_1": 4.0,
        "same": 2.0,
    }
    first, second = trainer.validate(model, val_dataloaders=loaders, verbose=False)
    assert first["value/dataloader_idx_0"] == 2.0
    assert second["value/dataloader_idx_1"] == 4.0


def test_a_stream_that_the_module_feeds(tmp_path):
    class Experience(IterableDataset):
        def __init__(self, module):
            self.module = module

        def __iter__(self):
            for step in range(10):
                yield torch.randn(2) + step, float(self.module.layer.weight.detach().sum())

    class Agent(Small):
        def training_step(self, batch, batch_idx):
            state, reward = batch
            self.log("reward", reward.mean())
            return (self.layer(state).squeeze(-1) * reward).mean()

        def train_dataloader(self):
            return DataLoader(Experience(self), batch_size=4)

    model = Agent()
    trainer = quiet(tmp_path, max_epochs=3)
    trainer.fit(model)
    assert trainer.num_training_batches == float("inf")
    assert trainer.global_step == 9


def test_steps_may_be_skipped_and_an_epoch_ended_early(tmp_path):
    class Skips(Small):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx, dataloader_idx):
            return -1 if batch_idx == 4 else None

    model = Skips()
    with pytest.warns(UserWarning, match="returned `None`"):
        quiet(tmp_path, logger=False).fit(model, DataLoader(torch.randn(16, 2), batch_size=2))
    assert len(model.batches) == 4


def test_early_stopping_by_patience(tmp_path):
    class Scripted(Small):
        values = (5.0, 4.0, 4.5, 4.2, 3.0, 1.0)

        def validation_step(self, batch, batch_idx):
            self.log("metric", self.values[self.current_epoch])

    model = Scripted()
    stopping = EarlyStopping("metric", patience=2)
    trainer = quiet(tmp_path, max_epochs=6, callbacks=[stopping], num_sanity_val_steps=0)
    loader = DataLoader(torch.randn(4, 2))
    trainer.fit(model, loader, loader)
    assert trainer.current_epoch == 3
    assert stopping.stopped_epoch == 3
    assert stopping.best_score == 4.0
    trainer = quiet(
        tmp_path, max_epochs=6, min_epochs=5, callbacks=[EarlyStopping("metric", patience=1)]
    )
    trainer.fit(Scripted(), loader, loader)
    assert trainer.current_epoch >= 4


def test_limits_and_fast_dev_run(tmp_path):
    model = Small()
    trainer = quiet(tmp_path, fast_dev_run=True)
    trainer.fit(model, DataLoader(torch.randn(16, 2), batch_size=2))
    assert len(model.batches) == 1
    assert list(tmp_path.rglob("*.ckpt")) == []
    model = Small()
    with pytest.warns(UserWarning, match="turning off the training dataloader shuffling"):
        quiet(tmp_path, overfit_batches=2, logger=False).fit(
            model, DataLoader(torch.arange(16.0).view(8, 2), batch_size=2, shuffle=True)
        )
    assert [b[0, 0].item() for b in model.batches] == [0.0, 4.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit_train_batches": -1}, "limit_train_batches"),
        ({"limit_val_batches": 1.5}, "limit_val_batches"),
        ({"gpus": 3}, "GPU"),
        ({"accumulate_grad_batches": 0}, "accumulation"),
        ({"max_epochs": -3}, "max_epochs"),
        ({"checkpoint_callback": False, "callbacks": [ModelCheckpoint()]}, "checkpoint_callback"),
        ({"precision": 16}, "precision"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        quiet(tmp_path, **arguments)


def test_bad_modules(tmp_path):
    loader = DataLoader(torch.randn(4, 2))

    class NoStep(pl.LightningModule):
        def configure_optimizers(self):
            return None

    with pytest.raises(MisconfigurationException, match="training_step"):
        quiet(tmp_path).fit(NoStep(), loader)
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        quiet(tmp_path).fit(Small())
    checkpoint = ModelCheckpoint(monitor="nothing")

    class Logs(Small):
        def training_step(self, batch, batch_idx):
            self.log("something", 1.0)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match="something"):
        quiet(tmp_path, callbacks=[checkpoint]).fit(Logs(), loader)

    class NoOptimizer(Small):
        def configure_optimizers(self):
            return None

    model = NoOptimizer()
    before = model.layer.weight.clone()
    with pytest.warns(UserWarning, match="no optimizer"):
        quiet(tmp_path).fit(model, loader)
    assert torch.equal(before, model.layer.weight)


def test_checkpoints_and_arguments_of_later_versions(tmp_path):
    model = LitClassifier()
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), max_epochs=1, accelerator="cpu", devices=1,
        enable_progress_bar=False, enable_model_summary=False, strategy="auto",
    )  # fmt: skip
    loader = DataLoader(images(48), batch_size=8)
    trainer.fit(model, train_dataloaders=loader, val_dataloaders=loader)
    path = trainer.checkpoint_callback.best_model_path
    assert path.endswith("lightning_logs/version_0/checkpoints/epoch=0-step=6.ckpt")
    trainer = pl.Trainer(default_root_dir=str(tmp_path), max_epochs=2, enable_progress_bar=False)
    trainer.fit(model, loader, loader, ckpt_path=path)
    assert trainer.global_step == 12
    assert trainer.validate(model, dataloaders=loader, verbose=False)[0]["valid_acc"] >= 0


def test_a_damaged_checkpoint_is_found_out(tmp_path):
    model = LitClassifier()
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(model, DataLoader(images(48), batch_size=8))
    path = trainer.checkpoint_callback.best_model_path
    weight = model.state_dict()["l1.weight"].numpy().tobytes()
    with open(path, "rb") as file:
        content = bytearray(file.read())
    place = content.index(weight)
    content[place + 100] ^= 1
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(pl.trainer.checkpointing.CheckpointError, match="checksum"):
        LitClassifier.load_from_checkpoint(path)
