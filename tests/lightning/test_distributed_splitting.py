"""``dp``: a batch divided over the devices of one process; two CPUs stand for two devices."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl

QUIET = {
    "checkpoint_callback": False,
    "logger": False,
    "progress_bar_refresh_rate": 0,
    "weights_summary": None,
    "num_sanity_val_steps": 0,
}


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.sizes, self.gathered, self.ended = [], [], []

    def training_step(self, batch, batch_idx):
        x, names = batch["x"], batch["names"]
        self.sizes.append((len(x), len(names)))
        loss = self.layer(x).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "outputs": self.layer(x).detach(), "count": len(x)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Ending(Model):
    def training_step_end(self, outputs):
        self.gathered.append({k: tuple(v.shape) for k, v in outputs.items()})
        return {"loss": outputs["loss"].sum()}

    def validation_step(self, batch, batch_idx):
        value = self.layer(batch["x"]).mean()
        self.log("val", value)
        return value

    def validation_step_end(self, outputs):
        self.ended.append(tuple(outputs.shape))
        return outputs.mean()

    def validation_epoch_end(self, outputs):
        self.ended.append([value.dim() for value in outputs])


def batches():
    x = torch.arange(24.0).reshape(8, 3) / 10
    return [{"x": x[:4], "names": ("a", "b")}, {"x": x[4:7], "names": ("c", "d")}]


@pytest.mark.parametrize(
    "arguments",
    [
        {"accelerator": "dp", "num_processes": 2},
        {"accelerator": "cpu", "devices": 2, "strategy": "dp"},
        {"accelerator": "ddp2", "num_processes": 2},
    ],
)
@pytest.mark.parametrize("model", [Model, Ending])
def test_parts_are_computed_alone_and_their_outputs_gathered(model, arguments, tmp_path):
    module = model()
    trainer = pl.Trainer(**QUIET, **arguments, max_epochs=1, default_root_dir=str(tmp_path))
    trainer.fit(module, batches(), [batches()] if model is Ending else None)
    assert trainer.world_size == 1
    assert module.sizes == [(2, 2), (2, 2), (2, 2), (1, 2)]

    expected = Model().layer
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    means = []
    for batch in batches():
        losses = torch.stack([expected(part).pow(2).mean() for part in batch["x"].chunk(2)])
        means.append(losses.detach())
        optimizer.zero_grad()
        (losses.sum() if model is Ending else losses.mean()).backward()
        optimizer.step()
    for mine, theirs in zip(module.layer.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    metrics = trainer.callback_metrics
    assert metrics["loss_step"] == means[1].mean()
    weighted = (means[0].sum() * 2 + means[1][0] * 2 + means[1][1]) / 7
    assert torch.allclose(metrics["loss_epoch"], weighted)
    if model is Ending:
        assert module.gathered == [
            {"loss": (2,), "outputs": (4, 1), "count": (2,)},
            {"loss": (2,), "outputs": (3, 1), "count": (2,)},
        ]
        assert module.ended == [(2,), (2,), [0, 0]]


def test_a_loader_is_read_whole(tmp_path):
    class Counting(Model):
        def training_step(self, batch, batch_idx):
            self.sizes.append(len(batch[0]))
            return self.layer(batch[0]).mean()

    module = Counting()
    data = TensorDataset(torch.ones(5, 3))
    trainer = pl.Trainer(**QUIET, accelerator="dp", num_processes=2, max_epochs=1,
                         default_root_dir=str(tmp_path))  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=4))
    assert module.sizes == [2, 2, 1]
