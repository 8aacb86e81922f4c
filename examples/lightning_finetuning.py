"""Fine-tuning: a frozen backbone, and a callback that unfreezes it.

python examples/lightning_finetuning.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning.callbacks.finetuning import BaseFinetuning


class UnfreezeAt(BaseFinetuning):
    def __init__(self, epoch: int = 2):
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, current_epoch, optimizer, optimizer_idx):
        if current_epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=1e-3)


class Classifier(pl.LightningModule):
    def __init__(self, classes, backbone=None):
        super().__init__()
        self.backbone = backbone or nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
        )
        self.head = nn.Linear(32, classes)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.backbone(x)), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        predicted = self.head(self.backbone(x)).argmax(1)
        self.log("acc", (predicted == y).float().mean())

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, lr=3e-3)


def digits(low, high, shuffle=True):
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= low) & (labels < high)
    x = torch.tensor(images[chosen] / 16, dtype=torch.float32)
    return DataLoader(TensorDataset(x, torch.tensor(labels[chosen] - low)), 32, shuffle=shuffle)


def main():
    pl.seed_everything(0)
    first = Classifier(5)
    options = {"logger": False, "checkpoint_callback": False}
    pl.Trainer(max_epochs=5, **options).fit(first, digits(0, 5))
    second = Classifier(5, backbone=first.backbone)
    trainer = pl.Trainer(max_epochs=5, callbacks=[UnfreezeAt(2)], **options)
    trainer.fit(second, digits(5, 10))
    (result,) = trainer.test(second, digits(5, 10, shuffle=False), verbose=False)
    print(f"groups of the optimizer: {len(trainer.optimizers[0].param_groups)}")
    print(f"accuracy on the other digits {result['acc']:.1%}")


if __name__ == "__main__":
    main()
