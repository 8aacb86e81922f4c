"""A short program of the kind of the introduction, with a bare test and an inference at the end."""

import os

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from pytorch_lightning.metrics.functional import accuracy
from torch import nn
from torch.utils.data import DataLoader, random_split


class LitAutoEncoder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))

    def forward(self, x):
        return self.encoder(x)

    def shared_step(self, batch):
        x, y = batch
        x = x.view(x.size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def training_step(self, batch, batch_idx):
        loss = self.shared_step(batch)
        result = {"loss": loss, "log": {"a": 1}}
        self.log("train_loss", loss)
        return result

    def validation_step(self, batch, batch_idx):
        return {"val_loss": self.shared_step(batch)}

    def validation_epoch_end(self, outputs):
        avg_loss = torch.stack([x["val_loss"] for x in outputs]).mean()
        self.log("val_loss", avg_loss)
        return {"val_loss": avg_loss, "log": {"val_loss": avg_loss}}

    def test_step(self, batch, batch_idx):
        return {"test_loss": self.shared_step(batch)}

    def test_epoch_end(self, outputs):
        avg = torch.stack([x["test_loss"] for x in outputs]).mean()
        return {"avg_test_loss": avg, "log": {"test_loss": avg}}

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(
            self.parameters(), lr=(self.lr if hasattr(self, "lr") else 1e-3)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            "monitor": "val_loss",
        }


dataset = [(torch.rand(1, 28, 28), i % 10) for i in range(60)]
train, val = random_split(dataset, [48, 12])
autoencoder = LitAutoEncoder()
trainer = pl.Trainer(
    max_epochs=2, gpus=(1 if torch.cuda.is_available() else 0), default_root_dir=os.getcwd()
)
trainer.fit(autoencoder, DataLoader(train, batch_size=8), DataLoader(val, batch_size=8))
trainer.test(test_dataloaders=DataLoader(val, batch_size=8))
trainer.save_checkpoint("example.ckpt")
new_model = LitAutoEncoder.load_from_checkpoint(checkpoint_path="example.ckpt")
new_model.freeze()
assert not new_model(torch.rand(2, 784)).requires_grad
assert accuracy(torch.tensor([0, 1]), torch.tensor([0, 1])) == 1
script = autoencoder.to_torchscript()
torch.jit.save(script, "model.pt")
assert isinstance(trainer, Trainer)
