"""Finding the learning rate and the batch size, and that all is afterwards as it was."""

import copy
import random
import textwrap

import forking
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning.trainer import loaders
from puretrain.lightning.tuner import Tuner
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.tree import tree_digest

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Model(pl.LightningModule):
    def __init__(self, lr=0.123, batch_size=2, fits=10**6):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.net.append(nn.Linear(8, 1))
        self.seen = 0
        self.sizes = []
        self.order = torch.Generator().manual_seed(5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen += 1
        self.sizes.append(len(x))
        if len(x) > self.hparams.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def train_dataloader(self):
        data = TensorDataset(X, Y)
        size = getattr(self.hparams, "batch_size", 4)
        return DataLoader(data, size, shuffle=True, generator=self.order)

    def val_dataloader(self):
        return DataLoader(TensorDataset(X, Y), 16)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=getattr(self.hparams, "lr", 0.1))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def trainer_of(tmp_path, **arguments):
    return pl.Trainer(
        **{
            "default_root_dir": str(tmp_path),
            "max_epochs": 2,
            "progress_bar_refresh_rate": 0,
            "weights_summary": None,
            **arguments,
        }
    )


def digest(model, trainer):
    """All that a further run depends on, as one text."""
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    optimizers = [
        {f"{i}/{k}": torch.as_tensor(v) for i, s in o.state_dict()["state"].items()
         for k, v in s.items()} for o in trainer.optimizers
    ]  # fmt: skip
    rates = [torch.tensor(g["lr"]) for o in trainer.optimizers for g in o.param_groups]
    flags = [module.training for module in model.modules()]
    place = (trainer.global_step, trainer.current_epoch, trainer._total_batches, model.seen,
             trainer.max_steps, trainer.max_epochs, trainer.limit_val_batches)  # fmt: skip
    return (
        tree_digest(
            [tensors, grads, optimizers, rates, loaders.capture(), model.order.get_state()]
        ),
        flags,
        place,
        [id(p) for p in model.parameters()],
        (trainer.callbacks, trainer.logger, trainer.state.status, trainer.should_stop),
    )


@pytest.mark.parametrize("after_a_fit", [False, True])
@pytest.mark.parametrize("what", ["lr", "batch_size", "failure"])
def test_everything_is_put_back_to_the_bit(what, after_a_fit, tmp_path):
    pl.seed_everything(7)
    random.random(), np.random.rand()  # noqa: NPY002
    model, trainer = Model(batch_size=4), trainer_of(tmp_path)
    if after_a_fit:
        trainer.fit(model)
    else:
        model.eval()
    files = sorted(tmp_path.rglob("*"))
    before = digest(model, trainer)
    if what == "lr":
        found = trainer.tuner.lr_find(model, num_training=20)
        assert len(found.results["lr"]) == 20
    elif what == "batch_size":
        assert trainer.tuner.scale_batch_size(model, max_trials=2) == 8
        assert model.hparams.batch_size == 8
    else:
        model.hparams.fits = 0
        with pytest.raises(torch.OutOfMemoryError):
            trainer.tuner.lr_find(model)
    assert digest(model, trainer) == before
    assert sorted(tmp_path.rglob("*")) == files


def test_a_fit_after_the_finder_is_the_fit_without_it(tmp_path):
    def fitted(tune):
        pl.seed_everything(7)
        model, trainer = Model(batch_size=8), trainer_of(tmp_path, logger=False)
        if tune:
            trainer.tuner.lr_find(model)
        trainer.fit(model)
        return tree_digest(dict(model.state_dict()))

    assert fitted(True) == fitted(False)


def test_the_losses_are_those_of_the_steps(tmp_path):
    pl.seed_everything(1)
    model = Model(batch_size=16)
    model.net = nn.Linear(8, 1)
    start = copy.deepcopy(model.net)
    data = DataLoader(TensorDataset(X, Y), 16)
    trainer = trainer_of(tmp_path, limit_train_batches=1, min_epochs=3, max_epochs=3)
    found = trainer.tuner.lr_find(model, data, min_lr=1e-5, max_lr=10, num_training=30)
    optimizer, mean, expected = torch.optim.Adam(start.parameters()), 0.0, []
    rates = [1e-5 * 1e6 ** (i / 29) for i in range(30)]
    for number, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(start(X[:16]), Y[:16])
        loss.backward()
        optimizer.step()
        mean = 0.98 * mean + 0.02 * loss.item()
        expected.append(mean / (1 - 0.98 ** (number + 1)))
    count = len(found.results["loss"])
    assert found.results["loss"] == pytest.approx(expected[:count], rel=1e-5)
    assert found.results["lr"] == pytest.approx(rates[:count])
    chosen = found.suggestion()
    place = np.gradient(np.array(found.results["loss"][10:-1])).argmin() + 10
    assert chosen == found.results["lr"][place]
    import matplotlib as mpl

    mpl.use("Agg")
    curve, point = found.plot(suggest=True).axes[0].lines
    assert len(curve.get_xdata()) == count
    assert list(point.get_xdata()) == [chosen]


def test_it_stops_where_the_loss_diverges(tmp_path):
    pl.seed_everything(1)
    found = trainer_of(tmp_path).tuner.lr_find(Model(batch_size=8), max_lr=1e6)
    losses = found.results["loss"]
    assert len(losses) < 100
    assert losses[-1] > 4 * min(losses[:-1])
    whole = trainer_of(tmp_path).tuner.lr_find(
        Model(batch_size=8), max_lr=1e6, early_stop_threshold=None
    )
    assert len(whole.results["loss"]) == 100


def test_accumulated_batches_are_one_point(tmp_path):
    model = Model(batch_size=16)
    trainer = trainer_of(tmp_path, accumulate_grad_batches=2)
    found = trainer.tuner.lr_find(model, num_training=6, mode="linear")
    assert len(found.results["lr"]) == 6
    assert found._total_batch_idx == 12
    assert len(model.sizes) == 12


def test_a_batch_without_a_loss_leaves_a_gap(tmp_path):
    class Sometimes(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        found = trainer_of(tmp_path).tuner.lr_find(Sometimes(batch_size=8), num_training=40)
    losses = found.results["loss"]
    assert all(np.isnan(losses[0::2]))
    assert all(np.isfinite(losses[1::2]))
    assert found.suggestion() in found.results["lr"]


class Own(Model):
    def __init__(self, name):
        super().__init__()
        del self._hparams["lr"]
        setattr(self, name, 0.5)


@pytest.mark.parametrize("name", ["hparams.lr", "lr", "learning_rate", "other"])
def test_tune_sets_the_learning_rate(name, tmp_path):
    pl.seed_everything(3)
    model = Model() if name == "hparams.lr" else Own(name)
    trainer = trainer_of(tmp_path, auto_lr_find=name if name == "other" else True)
    found = trainer.tune(model)
    chosen = found["lr_find"].suggestion()
    assert chosen is not None
    assert (model.hparams.lr if name == "hparams.lr" else getattr(model, name)) == chosen
    trainer.fit(model)  # as well as before


def test_what_the_finder_refuses(tmp_path):
    class Two(Model):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    with pytest.raises(MisconfigurationException, match="only works with single optimizer"):
        trainer_of(tmp_path).tuner.lr_find(Two())
    with pytest.raises(MisconfigurationException, match="field `lr` or `learning_rate`"):
        trainer_of(tmp_path, auto_lr_find=True).tune(Own("rate"))
    with pytest.raises(MisconfigurationException, match="`auto_lr_find` was set to nothing"):
        trainer_of(tmp_path, auto_lr_find="nothing").tune(Model())
    with pytest.raises(MisconfigurationException, match="mode"):
        trainer_of(tmp_path).tuner.lr_find(Model(), mode="cubic")
    with pytest.warns(UserWarning, match="fast_dev_run"):
        assert trainer_of(tmp_path, fast_dev_run=True).tuner.lr_find(Model()) is None
    few = trainer_of(tmp_path).tuner.lr_find(Model(), num_training=5)
    with pytest.warns(UserWarning, match="enough points"):
        assert few.suggestion() is None


def test_the_tuner_of_2x_sets_the_learning_rate(tmp_path):
    model = Model()
    found = Tuner(trainer_of(tmp_path)).lr_find(model, min_lr=1e-4)
    assert model.hparams.lr == found.suggestion()
    model = Model()
    trainer_of(tmp_path).tuner.lr_find(model)
    assert model.hparams.lr == 0.123
    trainer_of(tmp_path).tuner.lr_find(model, update_attr=True)
    assert model.hparams.lr != 0.123


# ── Batch size ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mode", "fits", "expected", "tried"),
    [
        ("power", 20, 16, {2, 4, 8, 16, 32}),
        ("binsearch", 20, 20, {2, 4, 8, 16, 32, 24, 20, 22, 21}),
        ("power", 1, 1, {2, 1}),
        ("binsearch", 3, 3, {2, 4, 3}),
        ("power", 10**6, 64, {2, 4, 8, 16, 32, 64}),
    ],
)
def test_the_batch_grows_until_memory_is_used_up(mode, fits, expected, tried, tmp_path):
    model = Model(fits=fits)
    model.net = nn.Linear(8, 1)
    trainer = trainer_of(tmp_path, auto_scale_batch_size=mode)
    assert trainer.tune(model)["scale_batch_size"] == expected
    assert model.hparams.batch_size == expected
    assert {size for size in model.sizes if size in tried} == tried
    trainer.fit(model)


def test_the_number_of_trials_is_limited(tmp_path):
    model = Model()
    assert trainer_of(tmp_path).tuner.scale_batch_size(model, init_val=4, max_trials=3) == 32
    assert max(model.sizes) == 32
    assert trainer_of(tmp_path).tuner.scale_batch_size(model, mode="power", max_trials=0) == 2


def test_the_size_of_a_data_module(tmp_path):
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self):
            return DataLoader(TensorDataset(X, Y), self.batch_size)

    model, data = Model(fits=20), Data()
    del model._hparams["batch_size"]
    trainer = trainer_of(tmp_path, auto_scale_batch_size=True, auto_lr_find=True)
    trainer.tune(model, datamodule=data)
    assert data.batch_size == 16
    assert model.hparams.lr != 0.123


def test_what_scaling_refuses(tmp_path):
    model = Model()
    trainer = trainer_of(tmp_path, auto_scale_batch_size=True)
    with pytest.raises(MisconfigurationException, match="passed directly to `.fit"):
        trainer.tune(model, DataLoader(TensorDataset(X, Y), 2))
    with pytest.raises(MisconfigurationException, match="Field size not found"):
        trainer.tuner.scale_batch_size(model, batch_arg_name="size")
    with pytest.raises(MisconfigurationException, match="power"):
        trainer.tuner.scale_batch_size(model, mode="triple")
    model.hparams.fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        trainer.tuner.scale_batch_size(model)
    assert model.hparams.batch_size == 2

    class Broken(Model):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("another reason")

    model = Broken()
    with pytest.raises(RuntimeError, match="another reason"):
        trainer.tune(model)
    assert model.hparams.batch_size == 2


def test_the_cpu_runs_out_of_memory(tmp_path):
    program = """
    import resource, torch
    import puretrain.lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 2
            self.layer = torch.nn.Linear(1, 1)
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0].expand(-1, 1 << 20).reshape(-1, 1)).mean()
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(4096, 1)), self.batch_size)
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Model()
    trainer = pl.Trainer(progress_bar_refresh_rate=0, weights_summary=None, logger=False,
                         checkpoint_callback=False)
    trainer.tuner.scale_batch_size(model, max_trials=0)  # everything is loaded
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
    print("found", trainer.tuner.scale_batch_size(model, steps_per_trial=1))
    """
    done = forking.run("-c", textwrap.dedent(program), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = int(done.stdout.split("found")[-1])
    assert 2 <= found <= 64  # a batch of 64 takes 256 MiB and as much for its gradients


def test_paths_of_older_versions():
    from puretrain.lightning.tuner import auto_gpu_select, batch_size_scaling, lr_finder

    assert lr_finder.lr_find
    assert batch_size_scaling.scale_batch_size
    with pytest.raises(MisconfigurationException, match="not a valid configuration"):
        auto_gpu_select.pick_multiple_gpus(0)
    if not torch.cuda.is_available():
        with pytest.raises(MisconfigurationException, match="No GPUs available"):
            auto_gpu_select.pick_single_gpu([])
