"""A run that goes on from any of its checkpoints ends as if nothing had happened, to the bit."""

import signal
import warnings

import pytest
import torch
from feature_matrix import MATRIX, classifier

import puretrain.lightning as pl
from puretrain.lightning.callbacks import Callback

FEATURES = [name for name in MATRIX if not name.startswith("checkpoint by")]


class Saves(Callback):
    """Writes a checkpoint at chosen moments of an epoch, named after the moment."""

    def __init__(self, directory, epoch=1):
        self.directory, self.epoch = directory, epoch

    def save(self, trainer, moment):
        if trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            trainer.save_checkpoint(self.directory / f"{moment}.ckpt")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx):
        if batch_idx in (0, 2, 4, 7):
            self.save(trainer, f"batch {batch_idx}")

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx):
        self.save(trainer, f"validation batch {batch_idx} after {trainer.batch_idx}")

    def on_validation_end(self, trainer, module):
        self.save(trainer, f"validation after {trainer.batch_idx}")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "epoch end")


def run(directory, name, callbacks, path=None):
    model_arguments, trainer_arguments, make_callbacks = MATRIX[name]
    pl.seed_everything(3 if path is None else 99)
    model = classifier(pl, **model_arguments)()
    own = make_callbacks(pl) if make_callbacks else []
    saving = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in own)
    trainer = pl.Trainer(
        **{
            "max_epochs": 3,
            "default_root_dir": str(directory),
            "logger": False,
            "checkpoint_callback": saving,
            "progress_bar_refresh_rate": 0,
            "weights_summary": None,
            **trainer_arguments,
        },
        callbacks=[*own, *callbacks],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, ckpt_path=path)
    return model, trainer


@pytest.mark.parametrize("name", FEATURES)
def test_resume_at_any_moment(name, tmp_path):
    whole, trainer = run(tmp_path / "a", name, [Saves(tmp_path)])
    expected = whole.state_dict()
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        resumed, again = run(tmp_path / "b", name, [], path)
        for key, value in resumed.state_dict().items():
            assert torch.equal(value, expected[key]), (path.name, key)
        # the batches that follow are those that followed, none twice and none left out
        assert whole.seen[len(whole.seen) - len(resumed.seen) :] == resumed.seen, path.name
        assert again.global_step == trainer.global_step, path.name
        a, b = again.callback_metrics, trainer.callback_metrics
        assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}, path.name


def test_fit_to_more_epochs_is_one_run(tmp_path):
    whole, _ = run(tmp_path, "dropout", [])
    pl.seed_everything(3)
    model = classifier(pl, dropout=0.3)()
    trainer = pl.Trainer(
        max_steps=11, logger=False, checkpoint_callback=False, progress_bar_refresh_rate=0,
        weights_summary=None, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(model)
    assert trainer.global_step == 11
    trainer.max_steps = 24
    trainer.fit(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])


def test_ctrl_c_ends_between_two_batches_and_the_run_goes_on(tmp_path):
    class Presses(Callback):
        heard = 0

        def on_train_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx):
            if trainer.current_epoch == 1 and batch_idx == 3:
                signal.raise_signal(signal.SIGINT)

        def on_keyboard_interrupt(self, trainer, module):
            self.heard += 1
            trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    whole, _ = run(tmp_path, "dropout", [])
    presses = Presses()
    model, trainer = run(tmp_path, "dropout", [presses])
    assert presses.heard == 1
    assert trainer.interrupted
    assert trainer.state == pl.trainer.states.TrainerState.INTERRUPTED
    assert len(model.seen) == 8 + 4
    resumed, again = run(tmp_path, "dropout", [], tmp_path / "interrupted.ckpt")
    assert not again.interrupted
    assert model.seen + resumed.seen == whole.seen
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])
