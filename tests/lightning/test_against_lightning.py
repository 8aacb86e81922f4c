"""The same programs, run by this package and by the real pytorch-lightning: same bits."""

import csv
import functools
import pathlib
import warnings

import pytest
import torch
from feature_matrix import MATRIX, classifier, stepped

import puretrain as pt
import puretrain.lightning as ours

real = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
if not int(real.__version__.split(".")[0]) >= 2:
    pytest.skip("pytorch-lightning 2 is compared with", allow_module_level=True)


def run(pl, directory, model_arguments, trainer_arguments, make_callbacks, version=None):
    pl.seed_everything(3)
    model = classifier(pl, **model_arguments)()
    trainer = pl.Trainer(
        **{
            "max_epochs": 3,
            "default_root_dir": str(directory),
            "logger": pl.loggers.CSVLogger(str(directory)),
            "callbacks": make_callbacks(pl) if make_callbacks else None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 2,
            **trainer_arguments,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model)
    return model, trainer


def checkpoints(directory):
    return sorted(path.name for path in pathlib.Path(directory).rglob("*.ckpt"))


def logged(directory):
    """All rows of metrics.csv: {(step, name): value}."""
    (path,) = pathlib.Path(directory).rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value not in ("", None) and name != "step"
        }


@pytest.mark.parametrize("name", MATRIX)
def test_same_bits_values_and_names(name, tmp_path):
    mine, my_trainer = run(ours, tmp_path / "ours", *MATRIX[name])
    theirs, their_trainer = run(real, tmp_path / "theirs", *MATRIX[name])
    assert mine.seen == theirs.seen
    for (path, a), (_, b) in zip(
        mine.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), path
    a, b = my_trainer.callback_metrics, their_trainer.callback_metrics
    assert set(a) == set(b)
    for key in a:
        assert a[key].item() == b[key].item(), key
    assert logged(tmp_path / "ours") == logged(tmp_path / "theirs")
    if name != "two optimizers by hand":  # there 2.x counts the steps of both
        assert checkpoints(tmp_path / "ours") == checkpoints(tmp_path / "theirs")


@pytest.mark.parametrize(("first", "second"), [(ours, real), (real, ours)])
def test_a_run_goes_on_in_the_other(first, second, tmp_path):
    def fit(pl, name, epochs, path=None):
        pl.seed_everything(3)
        model = classifier(pl, iterable=True, optimizers=stepped())()
        folder = str(tmp_path / name)
        trainer = pl.Trainer(
            max_epochs=epochs,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                pl.callbacks.EarlyStopping("val_loss", patience=50),
                pl.callbacks.ModelCheckpoint(folder, monitor="val_loss", save_last=True),
            ],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, ckpt_path=path)
        return model, trainer

    whole, _ = fit(first, "whole", 4)
    _, trainer = fit(first, "first", 2)
    path = trainer.checkpoint_callback.last_model_path
    resumed, trainer = fit(second, "second", 4, path)
    assert len(resumed.seen) == 16
    assert trainer.global_step == 32
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("way", ["store", "state of the adapter", "checkpoint of the adapter"])
def test_lightning_goes_on_from_a_converted_checkpoint(way, tmp_path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
            )

        def forward(self, x):
            return self.body(x).square().mean()

    def wrapped(package):
        class Wrapped(package.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(1)
                self.model = Module()
                self.seen = 0

            def training_step(self, batch, batch_idx):
                self.seen += 1
                return self.model(batch[0])

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)

        return Wrapped()

    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    rename = {}

    def fit(package, epochs, path=None):
        module = wrapped(package)
        trainer = package.Trainer(
            max_epochs=epochs, logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, default_root_dir=str(tmp_path / package.__name__),
        )  # fmt: skip
        trainer.fit(module, loader, ckpt_path=path)
        return module, trainer

    expected, _ = fit(real, 4)
    source = tmp_path / "store"
    if way == "store":
        torch.manual_seed(1)
        apply, params, buffers = pt.functional(Module())
        optimizer = pt.optim.adamw(0.01)

        def loss(params, buffers, batch, key):
            value, buffers = apply(params, buffers, batch[0])
            return value, pt.Aux(buffers)

        state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
        step, observer = pt.train_step(loss, optimizer), pt.checkpoints(source, every=3)
        pt.fit(state, step, pt.batches((x,), 4), epochs=2, observers=[observer])
        (source,) = source.glob("*12.ckpt")
        rename = {"**": "model.**"}
    else:
        _, trainer = fit(ours, 2)
        source = source.with_suffix(".ckpt")
        if way.startswith("state"):
            pt.save(source, trainer.train_state)
        else:  # our core reads it, and gives it back
            pt.convert(trainer.checkpoint_callback.best_model_path, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pt.convert(
            source, tmp_path / "theirs.ckpt", lightning=True, rename=rename,
            optimizer=functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
        )  # fmt: skip
    # a converted checkpoint says nothing of the place in the data: that was lost on the way
    epochs = 2 if way != "checkpoint of the adapter" else 0
    found, trainer = fit(real, 2 + epochs, str(tmp_path / "theirs.ckpt"))
    assert (trainer.global_step, found.seen) == (24, 12)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
