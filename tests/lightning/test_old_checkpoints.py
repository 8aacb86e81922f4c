"""Files of Lightning 1.x, where the states of callbacks stand under their classes."""

import sys
import types

import pytest
import torch

import puretrain as pt
import puretrain.lightning as pl
from puretrain.errors import CheckpointError


class Model(pl.LightningModule):
    def __init__(self, lr=1.0, thing=None):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


def write(path, monkeypatch, thing=False):
    """Write a file as 1.2.10 did, with classes that nobody can import any more."""
    model = Model(0.1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model.layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    made = []
    with monkeypatch.context() as patch:
        for place, name in (
            ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
            ("vanished.callbacks", "Own"),
        ):
            parts = place.split(".")
            for count in range(1, len(parts) + 1):
                package = ".".join(parts[:count])
                patch.setitem(sys.modules, package, types.ModuleType(package))
            cls = type(name, (), {"__module__": place})
            setattr(sys.modules[place], name, cls)
            made.append(cls)
        saved, own = made
        torch.save(
            {
                "epoch": 2,
                "global_step": 4,
                "pytorch-lightning_version": "1.2.10",
                "state_dict": model.state_dict(),
                "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [],
                "callbacks": {
                    saved: {"best_model_path": "x.ckpt", "best_model_score": None, "dirpath": "d"},
                    own: {"a": 1},
                },
                "hparams_name": "kwargs",
                "hyper_parameters": {"lr": 0.1, "thing": own() if thing else None},
            },
            path,
        )
    return model, optimizer


def test_it_is_read_resumed_and_converted(tmp_path, monkeypatch):
    path = tmp_path / "old.ckpt"
    model, optimizer = write(path, monkeypatch)
    again = Model.load_from_checkpoint(path)
    assert again.hparams.lr == 0.1
    assert torch.equal(again.layer.weight, model.layer.weight)

    class Own(pl.Callback):
        state = None

        def on_load_checkpoint(self, callback_state):
            self.state = callback_state

    Own.__qualname__ = "Own"
    own = Own()
    trainer = pl.Trainer(
        max_epochs=3, resume_from_checkpoint=str(path), default_root_dir=str(tmp_path),
        logger=False, progress_bar_refresh_rate=0, callbacks=[own],
    )  # fmt: skip
    with (
        pytest.warns(UserWarning, match="Lightning, which does not keep the place in an epoch"),
        pytest.warns(UserWarning, match="The dirpath has changed from 'd'"),
    ):
        trainer.fit(again, torch.utils.data.DataLoader(torch.ones(2, 4)))
    assert own.state == {"a": 1}
    assert trainer.global_step == 6
    assert trainer.current_epoch == 2

    pt.convert(str(path), str(tmp_path / "ours.ckpt"))
    tree = pt.load(str(tmp_path / "ours.ckpt"))
    assert torch.equal(tree["params"]["layer.weight"], model.layer.weight)
    weight = optimizer.param_groups[0]["params"][0]
    found = tree["opt_state"]["exp_avg"]["layer.weight"]
    assert torch.equal(found, optimizer.state[weight]["exp_avg"])
    assert "vanished" not in sys.modules


def test_an_object_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "old.ckpt"
    write(path, monkeypatch, thing=True)
    with pytest.raises(CheckpointError, match=r"vanished\.callbacks\.Own"):
        Model.load_from_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"vanished\.callbacks\.Own"):
        pt.convert(str(path), str(tmp_path / "ours.ckpt"))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4 and no more", b"\x80\x02."])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "text.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="text.ckpt"):
        pl.LightningModule.load_from_checkpoint(path)


def test_a_checkpoint_of_the_adapter_converts(tmp_path):
    model = Model(0.1)
    trainer = pl.Trainer(
        max_epochs=1, default_root_dir=str(tmp_path), logger=False, progress_bar_refresh_rate=0
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(2, 4)))
    pt.convert(trainer.checkpoint_callback.best_model_path, str(tmp_path / "ours.ckpt"))
    tree = pt.load(str(tmp_path / "ours.ckpt"))
    assert torch.equal(tree["params"]["layer.weight"], model.layer.weight)
    assert int(tree["step"]) == 2
