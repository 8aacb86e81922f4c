"""LightningDataModule."""

import pickle
from argparse import ArgumentParser

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import puretrain.lightning as pl


class Data(pl.LightningDataModule):
    def __init__(self, size: int = 8, batch_size: int = 2, shuffle: bool = False):
        super().__init__(train_transforms="t", dims=(1, 2))
        self.save_hyperparameters()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage=None):
        self.calls.append(f"setup {stage}")
        self.numbers = TensorDataset(torch.arange(float(self.hparams.size)).reshape(-1, 1))

    def teardown(self, stage=None):
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self):
        return DataLoader(self.numbers, batch_size=self.hparams.batch_size)

    val_dataloader = test_dataloader = train_dataloader


class Child(Data):
    def setup(self, stage=None):
        super().setup(stage)


def test_what_ran():
    data = Child()
    assert not data.has_prepared_data
    data.prepare_data()
    assert data.has_prepared_data
    data.setup("fit")
    assert data.has_setup_fit
    assert not data.has_setup_test
    data.setup(stage="test")
    assert data.has_setup_test
    assert not data.has_setup_validate
    data.teardown()
    assert data.has_teardown_fit
    assert data.has_teardown_test
    assert data.calls == ["prepare_data", "setup fit", "setup test", "teardown None"]
    assert not Child().has_prepared_data
    everything = Child()
    everything.setup()
    assert everything.has_setup_fit
    assert everything.has_setup_validate
    assert everything.has_setup_test


def test_attributes():
    data = Data()
    assert data.train_transforms == "t"
    assert data.val_transforms is None
    assert data.size() == (1, 2)
    assert data.size(1) == 2
    assert pl.LightningDataModule().dims == ()
    data.dims = (3,)
    assert data.dims == (3,)


def test_hyperparameters():
    data = Data(4, shuffle=True)
    assert data.hparams == {"size": 4, "batch_size": 2, "shuffle": True}
    assert data.hparams.size == 4
    data.hparams.size = 6
    assert data.hparams_initial.size == 4


def test_arguments_of_the_command_line():
    parser = Data.add_argparse_args(ArgumentParser())
    args = parser.parse_args(["--size", "6", "--shuffle"])
    data = Data.from_argparse_args(args, batch_size=3)
    assert data.hparams == {"size": 6, "batch_size": 3, "shuffle": True}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(1)] * 3)


def test_from_datasets():
    numbers = TensorDataset(torch.arange(6.0))
    data = pl.LightningDataModule.from_datasets(
        {"a": numbers, "b": Stream()}, [numbers, numbers], numbers, batch_size=4
    )
    train = data.train_dataloader()
    assert isinstance(train["a"].sampler, RandomSampler)
    assert len(list(train["b"])) == 1
    first, second = data.val_dataloader()
    assert len(first) == len(second) == 2
    assert torch.equal(next(iter(data.test_dataloader()))[0], torch.arange(4.0))


def test_a_pickle():
    data = Child()
    data.setup("fit")
    again = pickle.loads(pickle.dumps(data))
    assert again.has_setup_fit
    assert len(again.train_dataloader()) == 4


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch[0]).square().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_in_a_run(tmp_path):
    data = Data()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        logger=False,
        checkpoint_callback=False,
        progress_bar_refresh_rate=0,
        weights_summary=None,
    )
    trainer.fit(Model(), datamodule=data)
    assert data.calls[:2] == ["prepare_data", "setup fit"]
    assert data.trainer is trainer
    assert trainer.datamodule is data
    trainer.test(datamodule=data, verbose=False)
    assert "setup test" in data.calls
