"""Run by ``python -m puretrain.lightning``: fits in new processes, and in some that fail."""

import sys

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

QUIET = {"progress_bar_refresh_rate": 0, "weights_summary": None}


class Model(pl.LightningModule):
    def __init__(self, fails=False):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.fails = fails

    def training_step(self, batch, batch_idx):
        if self.fails and self.global_rank == 1 and batch_idx == 1:
            raise ValueError("the second process is broken")
        loss = (self.layer(batch[0]) - 1).pow(2).mean()
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(24.0).reshape(12, 2) / 24), batch_size=3)


if __name__ == "__main__":
    out, kind = sys.argv[1:]
    pl.seed_everything(2)
    model = Model()
    before = model.layer.weight.detach().clone()
    saving = pl.callbacks.ModelCheckpoint(out, monitor="loss")
    two = {"num_processes": 2, "default_root_dir": out, **QUIET}
    if kind == "script":
        pl.Trainer(accelerator="ddp", max_epochs=1, **two).fit(Model(fails=True))
    trainer = pl.Trainer(accelerator=kind, max_epochs=2, callbacks=[saving], **two)
    assert trainer.fit(model) == 1
    found = {
        "module": pl.__name__,
        "trained": not torch.equal(before, model.layer.weight),
        "weights": model.state_dict(),
        "best": saving.best_model_path,
        "score": float(saving.best_model_score),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
        "log_dir": trainer.log_dir,
    }
    try:
        pl.Trainer(accelerator=kind, max_epochs=1, **two).fit(Model(fails=True))
    except torch.multiprocessing.ProcessRaisedException as error:
        found["error"] = str(error)
        found["failed"] = error.error_index
    torch.save(found, f"{out}/found.pt")
