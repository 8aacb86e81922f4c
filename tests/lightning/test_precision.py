"""The numbers to compute with: spellings, dtypes, and the loss scale of precision 16.

The loss scale runs on the CPU here, on torch's own scaler, where a GPU would be asked for.
"""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning.trainer import steps
from puretrain.lightning.trainer.precision import cast_to_half
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import WarningCache

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch):
    """What is warned of once must still be news to other tests."""
    monkeypatch.setattr(steps, "_warnings", WarningCache())


class Model(pl.LightningModule):
    def __init__(self, automatic=True, skip=False, own_step=False):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.automatic_optimization = automatic
        self.dtypes, self.skip = set(), skip
        if own_step:
            self.optimizer_step = self._own_step

    def _own_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, *rest):
        optimizer.step(closure=optimizer_closure)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        if self.skip and batch_idx == 0:
            return None
        y = self.layer(x)
        self.dtypes.add((self.layer.weight.dtype, x.dtype, y.dtype))
        loss = (y.float() if y.dtype == torch.float16 else y).pow(2).mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def train_dataloader(self):
        return DataLoader(TensorDataset(X), 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer_of(tmp_path, half=False, **arguments):
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), logger=False, progress_bar_refresh_rate=0,
        weights_summary=None, **{"max_epochs": 1, **arguments},
    )  # fmt: skip
    if half:
        cast_to_half(trainer, "cpu")
    return trainer


F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("precision", "dtypes"),
    [
        (32, (F32, F32, F32)), ("32", (F32, F32, F32)), ("32-true", (F32, F32, F32)),
        (64, (F64, F64, F64)), ("64", (F64, F64, F64)), ("64-true", (F64, F64, F64)),
        ("bf16", (F32, F32, BF16)), ("bf16-mixed", (F32, F32, BF16)),
        ("bf16-true", (BF16, BF16, BF16)), ("16-true", (F16, F16, F16)),
    ],
)  # fmt: skip
def test_spellings(precision, dtypes, tmp_path):
    model = Model()
    trainer_of(tmp_path, precision=precision).fit(model)
    assert model.dtypes == {dtypes}


def test_16_on_the_cpu(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(MisconfigurationException, match="AMP is only available on GPU"):
            trainer_of(tmp_path, precision=16)
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        trainer = trainer_of(tmp_path, precision="16-mixed")
    assert trainer.precision == "bf16-mixed"
    model = Model()
    trainer.fit(model)
    assert model.dtypes == {(F32, F32, BF16)}
    with pytest.raises(MisconfigurationException, match="Apex"):
        trainer_of(tmp_path, precision=16, amp_backend="apex")
    with pytest.raises(MisconfigurationException, match="is not one of"):
        trainer_of(tmp_path, precision=8)


def plainly(clip=None, accumulate=1, first=0):
    """The same training in plain torch."""
    pl.seed_everything(1)
    layer = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    for i, x in enumerate(X.split(8)):
        if i < first:
            continue
        if i % accumulate == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = layer(x).float().pow(2).mean() / accumulate
        scaler.scale(loss).backward()
        if (i + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(layer.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    return layer, scaler


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        ({}, {}, {}),
        ({"own_step": True}, {}, {}),
        ({"automatic": False}, {}, {}),
        ({"skip": True}, {}, {"first": 1}),
        ({}, {"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({}, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # in one of the cases
def test_half_precision_is_that_of_plain_torch(model, arguments, expected, tmp_path):
    layer, scaler = plainly(**expected)
    pl.seed_everything(1)
    model = Model(**model)
    trainer = trainer_of(tmp_path, half=True, **arguments)
    trainer.fit(model)
    assert torch.equal(model.layer.weight, layer.weight)
    assert torch.equal(model.layer.bias, layer.bias)
    assert trainer.scaler.state_dict() == scaler.state_dict()
    assert model.dtypes == {(F32, F32, F16)}


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path):
    model = Model()
    with torch.no_grad():
        model.layer.weight.fill_(1e4)
    before = model.layer.weight.clone()
    trainer = trainer_of(tmp_path, half=True, max_steps=1)
    trainer.fit(model)
    assert torch.equal(model.layer.weight, before)
    assert trainer.scaler.get_scale() == 2.0**15


def test_the_scale_is_in_the_checkpoint(tmp_path):
    def fit(steps, path=None, half=True):
        pl.seed_everything(1)
        trainer = trainer_of(tmp_path, half, max_steps=steps, resume_from_checkpoint=path)
        if half:
            small = {"scale": 8.0, "growth_interval": 2}
            trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), **small})
        model = Model()
        trainer.fit(model)
        return model, trainer

    whole, last = fit(4)
    _, trainer = fit(3)
    path = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(path)
    state = torch.load(path)["native_amp_scaling_state"]
    assert state == trainer.scaler.state_dict()
    assert state["scale"] == 16.0
    assert state["_growth_tracker"] == 1
    resumed, trainer = fit(4, path)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert trainer.scaler.state_dict() == last.scaler.state_dict()
    with pytest.warns(UserWarning, match="the loss scale begins anew"):
        fit(4, path, half=False)


def test_lbfgs_has_no_place_for_a_scale(tmp_path):
    class Second(Model):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="LBFGS"):
        trainer_of(tmp_path, half=True).fit(Second())
