"""A model of one layer and random data, as tests of Lightning 1.x use them."""

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Dataset


class RandomDataset(Dataset):
    def __init__(self, size=32, length=64):
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index):
        return self.data[index]

    def __len__(self):
        return self.len


class BoringModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)

    def forward(self, x):
        return self.layer(x)

    def loss(self, batch, prediction):
        return torch.nn.functional.mse_loss(prediction, torch.ones_like(prediction))

    def step(self, x):
        return self.loss(None, self(x))

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch, self.layer(batch))}

    def training_step_end(self, training_step_outputs):
        return training_step_outputs

    def training_epoch_end(self, outputs):
        torch.stack([x["loss"] for x in outputs]).mean()

    def validation_step(self, batch, batch_idx):
        return {"x": self.loss(batch, self.layer(batch))}

    def validation_epoch_end(self, outputs):
        torch.stack([x["x"] for x in outputs]).mean()

    def test_step(self, batch, batch_idx):
        return {"y": self.loss(batch, self.layer(batch))}

    def test_epoch_end(self, outputs):
        torch.stack([x["y"] for x in outputs]).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
        return [optimizer], [lr_scheduler]

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 64))

    def val_dataloader(self):
        return DataLoader(RandomDataset(32, 64))

    def test_dataloader(self):
        return DataLoader(RandomDataset(32, 64))


class BoringDataModule(LightningDataModule):
    def prepare_data(self):
        self.random_full = RandomDataset(32, 192)

    def setup(self, stage=None):
        if stage == "fit" or stage is None:
            self.random_train = torch.utils.data.Subset(self.random_full, indices=range(64))
            self.dims = self.random_train[0].shape
            self.random_val = torch.utils.data.Subset(self.random_full, indices=range(64, 128))
        if stage == "test" or stage is None:
            self.random_test = torch.utils.data.Subset(self.random_full, indices=range(128, 192))
            self.dims = getattr(self, "dims", self.random_test[0].shape)

    def train_dataloader(self):
        return DataLoader(self.random_train)

    def val_dataloader(self):
        return DataLoader(self.random_val)

    def test_dataloader(self):
        return DataLoader(self.random_test)
