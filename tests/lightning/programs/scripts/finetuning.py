"""Fine-tuning in milestones: the backbone is frozen, then thawed."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks.finetuning import BaseFinetuning
from pytorch_lightning.utilities import rank_zero_info
from torch import nn, optim
from torch.optim.lr_scheduler import MultiStepLR
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader, TensorDataset


class MilestonesFinetuning(BaseFinetuning):
    def __init__(self, milestones: tuple = (1, 2), train_bn: bool = False):
        super().__init__()
        self.milestones = milestones
        self.train_bn = train_bn

    def freeze_before_training(self, pl_module: pl.LightningModule):
        self.freeze(modules=pl_module.feature_extractor, train_bn=self.train_bn)

    def finetune_function(self, pl_module, epoch: int, optimizer: Optimizer, opt_idx: int):
        if epoch == self.milestones[0]:
            self.unfreeze_and_add_param_group(
                modules=pl_module.feature_extractor[-3:],
                optimizer=optimizer,
                train_bn=self.train_bn,
            )
        elif epoch == self.milestones[1]:
            self.unfreeze_and_add_param_group(
                modules=pl_module.feature_extractor[:-3],
                optimizer=optimizer,
                train_bn=self.train_bn,
            )


class TransferLearningModel(pl.LightningModule):
    def __init__(
        self,
        train_bn: bool = False,
        milestones: tuple = (1, 2),
        batch_size: int = 8,
        lr: float = 1e-3,
        lr_scheduler_gamma: float = 1e-1,
        num_workers: int = 0,
        **kwargs,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.feature_extractor = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
        )
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
        self.train_acc = pl.metrics.Accuracy()
        self.valid_acc = pl.metrics.Accuracy()

    def forward(self, x):
        return torch.sigmoid(self.fc(self.feature_extractor(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        p = self.forward(x)
        loss = F.binary_cross_entropy(p, y[:, None].float())
        self.log("train_acc", self.train_acc(p.flatten(), y), prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        p = self.forward(x)
        self.log("val_loss", F.binary_cross_entropy(p, y[:, None].float()), prog_bar=True)
        self.log("val_acc", self.valid_acc(p.flatten(), y), prog_bar=True)

    def configure_optimizers(self):
        trainable = filter(lambda p: p.requires_grad, self.parameters())
        parameters = list(trainable)
        rank_zero_info(
            f"The model starts training with only {len(parameters)} trainable parameters out of {len(list(self.parameters()))}."
        )
        assert len(parameters) == 4
        optimizer = optim.Adam(parameters, lr=self.hparams.lr)
        return [optimizer], [
            MultiStepLR(
                optimizer, milestones=self.hparams.milestones, gamma=self.hparams.lr_scheduler_gamma
            )
        ]


if __name__ == "__main__":
    data = TensorDataset(torch.randn(32, 6), torch.randint(0, 2, (32,)))
    model = TransferLearningModel()
    trainer = pl.Trainer(
        weights_summary=None,
        progress_bar_refresh_rate=1,
        num_sanity_val_steps=0,
        gpus=None,
        max_epochs=4,
        callbacks=[MilestonesFinetuning()],
    )
    trainer.fit(model, DataLoader(data, 8, shuffle=True), DataLoader(data, 8))
    assert len(trainer.optimizers[0].param_groups) == 3
    assert all(p.requires_grad for n, p in model.named_parameters())
