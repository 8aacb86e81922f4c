"""In the manner of tests/trainer/test_trainer.py."""

import os
import pickle
from argparse import ArgumentParser, Namespace
from copy import deepcopy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from boring import BoringModel, RandomDataset
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml
from pytorch_lightning.core.saving import save_hparams_to_tags_csv, save_hparams_to_yaml
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import RunningStage, TrainerState
from pytorch_lightning.utilities.cloud_io import load as pl_load
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset


def test_error_without_training_step(tmpdir):
    model = BoringModel()
    model.training_step = None
    trainer = Trainer(fast_dev_run=True)
    with pytest.raises(MisconfigurationException, match=r"No `training_step\(\)` method defined."):
        trainer.fit(model)


def test_no_val_end_module(tmpdir):
    class Model(BoringModel):
        validation_epoch_end = None

    model = Model()
    logger = TensorBoardLogger(str(tmpdir), name="lightning_logs")
    trainer = Trainer(
        max_epochs=1, logger=logger, checkpoint_callback=ModelCheckpoint(dirpath=tmpdir)
    )
    result = trainer.fit(model)
    assert result == 1
    new_weights_path = os.path.join(tmpdir, "save_test.ckpt")
    trainer.save_checkpoint(new_weights_path)
    model_2 = BoringModel.load_from_checkpoint(checkpoint_path=new_weights_path)
    model_2.eval()
    assert torch.equal(model.layer.weight, model_2.layer.weight)


@pytest.mark.parametrize(
    ["schedule", "expected"], [({1: 2, 3: 4}, [1, 2, 4]), (3, [3, 3, 3]), (4, [4, 4, 4])]
)
def test_gradient_accumulation_schedule(tmpdir, schedule, expected):
    class Model(BoringModel):
        def optimizer_step(
            self,
            epoch,
            batch_idx,
            optimizer,
            optimizer_idx,
            optimizer_closure=None,
            on_tpu=False,
            using_native_amp=False,
            using_lbfgs=False,
        ):
            self.calls.append((epoch, batch_idx))
            optimizer.step(closure=optimizer_closure)

    model = Model()
    model.calls = []
    trainer = Trainer(
        accumulate_grad_batches=schedule,
        limit_train_batches=8,
        limit_val_batches=1,
        max_epochs=4,
        default_root_dir=tmpdir,
    )
    assert trainer.accumulate_grad_batches == expected[0] or isinstance(schedule, dict)
    trainer.fit(model)
    assert model.calls


def test_loading_meta_tags(tmpdir):
    hparams = Namespace(batch_size=32, learning_rate=0.001 * 8, optimizer_name="adam")
    path = os.path.join(str(tmpdir), "meta_tags.csv")
    save_hparams_to_tags_csv(path, hparams)
    tags = load_hparams_from_tags_csv(path)
    assert Namespace(**tags) == hparams


def test_loading_yaml(tmpdir):
    hparams = dict(batch_size=32, learning_rate=0.001 * 8, optimizer_name="adam")
    path = os.path.join(str(tmpdir), "hparams.yaml")
    save_hparams_to_yaml(path, hparams)
    assert load_hparams_from_yaml(path) == hparams


@pytest.mark.parametrize(
    "save_top_k,save_last,expected_files",
    [
        (-1, False, {f"epoch={i}.ckpt" for i in range(5)}),
        (1, False, {"epoch=4.ckpt"}),
        (2, False, {"epoch=4.ckpt", "epoch=2.ckpt"}),
        (4, False, {f"epoch={i}.ckpt" for i in range(1, 5)}),
        (3, True, {"epoch=2.ckpt", "epoch=3.ckpt", "epoch=4.ckpt", "last.ckpt"}),
    ],
)
def test_model_checkpoint_options(tmpdir, save_top_k, save_last, expected_files):
    def mock_save_function(filepath, *args):
        open(filepath, "a").close()

    losses = [10, 9, 2.8, 5, 2.5]
    checkpoint_callback = ModelCheckpoint(
        dirpath=tmpdir,
        filename="{epoch}",
        monitor="checkpoint_on",
        save_top_k=save_top_k,
        save_last=save_last,
        prefix="",
        verbose=True,
    )
    checkpoint_callback.save_function = mock_save_function
    trainer = Trainer()
    trainer.state = TrainerState.FITTING
    trainer.save_checkpoint = mock_save_function
    for i, loss in enumerate(losses):
        trainer.current_epoch = i
        trainer.global_step = i
        trainer.logger_connector.callback_metrics = {"checkpoint_on": torch.tensor(loss)}
        checkpoint_callback.on_validation_end(trainer, trainer.get_model())
    assert {Path(p).name for p in os.listdir(tmpdir)} == expected_files


def test_model_checkpoint_only_weights(tmpdir):
    model = BoringModel()
    trainer = Trainer(
        max_epochs=1,
        default_root_dir=tmpdir,
        checkpoint_callback=ModelCheckpoint(dirpath=tmpdir, save_weights_only=True),
    )
    assert trainer.fit(model)
    path = list(
        trainer.checkpoint_callback.best_k_models.keys()
        or [trainer.checkpoint_callback.best_model_path]
    )[0]
    checkpoint = torch.load(path)
    for key in ("optimizer_states", "lr_schedulers"):
        assert key not in checkpoint
    new = os.path.join(tmpdir, "save_test.ckpt")
    trainer.save_checkpoint(new, weights_only=True)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        Trainer(max_epochs=1, default_root_dir=tmpdir, resume_from_checkpoint=new).fit(model)


def test_dont_restore_when_none(tmpdir):
    model = BoringModel()
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        default_root_dir=tmpdir,
        progress_bar_refresh_rate=0,
    )
    trainer.fit(model)
    path = trainer.checkpoint_callback.best_model_path
    assert Path(path).name == "epoch=1-step=3.ckpt"
    checkpoint = pl_load(path, map_location="cpu")
    assert checkpoint["epoch"] == 2
    assert checkpoint["global_step"] == 4
    trainer = Trainer(
        resume_from_checkpoint=path,
        max_epochs=4,
        limit_train_batches=2,
        limit_val_batches=1,
        default_root_dir=tmpdir,
    )
    trainer.fit(model)
    assert trainer.current_epoch == 3 and trainer.global_step == 8


def test_trainer_max_steps_and_epochs(tmpdir):
    model = BoringModel()
    num_train_samples = 64
    opts = dict(
        default_root_dir=tmpdir,
        max_epochs=3,
        max_steps=num_train_samples + 10,
        logger=False,
        weights_summary=None,
        progress_bar_refresh_rate=0,
    )
    trainer = Trainer(**opts)
    trainer.fit(model)
    assert trainer.state == TrainerState.FINISHED
    assert trainer.global_step == num_train_samples + 10
    opts.update(max_epochs=2, max_steps=3 * 2 * num_train_samples)
    trainer = Trainer(**opts)
    trainer.fit(model)
    assert trainer.global_step == num_train_samples * trainer.max_epochs
    assert trainer.current_epoch == trainer.max_epochs - 1


@pytest.mark.parametrize("max_epochs,max_steps,incomplete", [(3, None, False), (None, 20, True)])
def test_trainer_max_steps_accumulate_batches(tmpdir, max_epochs, max_steps, incomplete):
    model = BoringModel()
    trainer = Trainer(
        max_epochs=max_epochs,
        max_steps=max_steps,
        limit_train_batches=0.5,
        accumulate_grad_batches=10,
        default_root_dir=tmpdir,
        weights_summary=None,
    )
    trainer.fit(model)
    assert trainer.state == TrainerState.FINISHED
    assert trainer.global_step == (max_steps if incomplete else 12)


def test_disabled_training(tmpdir):
    class Current(BoringModel):
        training_step_invoked = False
        training_epoch_end_invoked = False

        def training_step(self, *args, **kwargs):
            self.training_step_invoked = True
            return super().training_step(*args, **kwargs)

        def training_epoch_end(self, *args, **kwargs):
            self.training_epoch_end_invoked = True
            return super().training_epoch_end(*args, **kwargs)

    model = Current()
    before = deepcopy(model.state_dict())
    trainer = Trainer(
        default_root_dir=tmpdir,
        progress_bar_refresh_rate=0,
        max_epochs=2,
        limit_train_batches=0.0,
        limit_val_batches=0.2,
        fast_dev_run=False,
    )
    result = trainer.fit(model)
    for key in before:
        assert torch.all(torch.eq(before[key], model.state_dict()[key]))
    assert result == 1
    assert trainer.state == TrainerState.FINISHED
    assert trainer.current_epoch == 0
    assert not model.training_step_invoked and not model.training_epoch_end_invoked


def test_disabled_validation(tmpdir):
    class Current(BoringModel):
        invoked = False

        def validation_step(self, *args, **kwargs):
            self.invoked = True
            return super().validation_step(*args, **kwargs)

    model = Current()
    trainer = Trainer(
        default_root_dir=tmpdir, max_epochs=2, limit_train_batches=0.4, limit_val_batches=0.0
    )
    trainer.fit(model)
    assert trainer.state == TrainerState.FINISHED
    assert not model.invoked
    trainer = Trainer(
        default_root_dir=tmpdir,
        max_epochs=2,
        limit_train_batches=0.4,
        limit_val_batches=0.0,
        fast_dev_run=True,
    )
    trainer.fit(model)
    assert trainer.current_epoch == 0
    assert model.invoked, "fast_dev_run validates"


def test_nan_loss_detection(tmpdir):
    class Current(BoringModel):
        test_batch_inf = 3

        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            if batch_idx == self.test_batch_inf:
                output["loss"] *= torch.tensor(float("inf"))
            return output

    model = Current()
    trainer = Trainer(default_root_dir=tmpdir, max_steps=4, terminate_on_nan=True)
    with pytest.raises(ValueError, match=r".*The loss returned in `training_step` is nan or inf.*"):
        trainer.fit(model)
    assert trainer.global_step == 3
    for param in model.parameters():
        assert torch.isfinite(param).all()


def test_nan_params_detection(tmpdir):
    class Current(BoringModel):
        def on_after_backward(self):
            if self.global_step == 3:
                torch.nn.init.constant_(self.layer.bias, float("nan"))

    trainer = Trainer(default_root_dir=tmpdir, max_steps=4, terminate_on_nan=True)
    with pytest.raises(ValueError, match=r".*Detected nan and/or inf values in `layer.bias`.*"):
        trainer.fit(Current())
    assert trainer.global_step == 3


def test_trainer_interrupted_flag(tmpdir):
    class InterruptCallback(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx):
            raise KeyboardInterrupt

    class HandleInterruptCallback(Callback):
        exc_info = None

        def on_keyboard_interrupt(self, trainer, pl_module):
            self.exc_info = True

    handler = HandleInterruptCallback()
    trainer = Trainer(
        callbacks=[InterruptCallback(), handler],
        max_epochs=1,
        limit_val_batches=0.1,
        limit_train_batches=0.2,
        progress_bar_refresh_rate=0,
        logger=False,
        default_root_dir=tmpdir,
    )
    assert not trainer.interrupted
    trainer.fit(BoringModel())
    assert trainer.interrupted and handler.exc_info
    assert trainer.state == TrainerState.INTERRUPTED


def test_gradient_clipping(tmpdir):
    class Current(BoringModel):
        def on_before_optimizer_step(self, optimizer, *args):
            pass

    model = Current()
    norms = []

    class Cb(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad.detach().norm(2) for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.stack(grads).norm(2).item())

    trainer = Trainer(
        max_steps=5, max_epochs=1, gradient_clip_val=0.05, default_root_dir=tmpdir, callbacks=[Cb()]
    )
    trainer.fit(model)
    assert norms and all(n <= 0.05 + 1e-6 for n in norms)


def test_gpu_choice(tmpdir):
    with pytest.raises(MisconfigurationException, match=r".*You requested GPUs.*"):
        Trainer(default_root_dir=tmpdir, gpus=torch.cuda.device_count() + 1, auto_select_gpus=False)
    with pytest.raises(MisconfigurationException):
        Trainer(gpus=torch.cuda.device_count() + 1, auto_select_gpus=True)


@pytest.mark.parametrize(["limit_val_batches"], [(0.0,), (1,), (1.0,), (0.5,), (5,)])
def test_num_sanity_val_steps(tmpdir, limit_val_batches):
    seen = []

    class Current(BoringModel):
        def validation_step(self, batch, batch_idx):
            seen.append(self.trainer.running_sanity_check)
            return super().validation_step(batch, batch_idx)

    trainer = Trainer(
        default_root_dir=tmpdir,
        num_sanity_val_steps=4,
        limit_train_batches=1,
        limit_val_batches=limit_val_batches,
        max_epochs=1,
    )
    assert trainer.num_sanity_val_steps == 4
    trainer.fit(Current())
    assert sum(seen) == min(4, sum(trainer.num_val_batches) if limit_val_batches else 0)


def test_num_sanity_neg_one(tmpdir):
    trainer = Trainer(
        default_root_dir=tmpdir,
        num_sanity_val_steps=-1,
        limit_val_batches=3,
        limit_train_batches=1,
        max_epochs=1,
    )
    assert trainer.num_sanity_val_steps == float("inf")
    trainer.fit(BoringModel())


@pytest.mark.parametrize(
    "trainer_params", [{"max_epochs": 1, "max_steps": 1, "fast_dev_run": True}]
)
def test_trainer_config(trainer_params):
    trainer = Trainer(**trainer_params)
    assert trainer.limit_train_batches == 1 and trainer.max_epochs == 1 and trainer.max_steps == 1
    assert trainer.logger is None
    assert trainer.num_gpus == 0 and not trainer.on_gpu


def test_trainer_subclassing():
    class TrainerSubclass(Trainer):
        def __init__(self, custom_arg, *args, custom_kwarg="test", **kwargs):
            super().__init__(*args, **kwargs)
            self.custom_arg = custom_arg
            self.custom_kwarg = custom_kwarg

    trainer = TrainerSubclass(123, custom_kwarg="custom", fast_dev_run=True)
    result = trainer.fit(BoringModel())
    assert result == 1
    assert trainer.custom_arg == 123 and trainer.custom_kwarg == "custom" and trainer.fast_dev_run


def test_trainer_omegaconf_style_args():
    args = dict(max_epochs=1, gpus=None)
    trainer = Trainer(**args)
    assert trainer.max_epochs == args["max_epochs"]


def test_argparse(tmpdir):
    parser = ArgumentParser()
    parser = Trainer.add_argparse_args(parser)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args(
        [
            "--max_epochs",
            "2",
            "--limit_train_batches",
            "0.5",
            "--lr",
            "0.2",
            "--fast_dev_run",
            "True",
            "--gpus",
            "0",
        ]
    )
    trainer = Trainer.from_argparse_args(args, default_root_dir=str(tmpdir))
    assert trainer.fast_dev_run and trainer.limit_train_batches == 1
    args = Trainer.parse_argparser(parser.parse_args([]))
    assert args.max_epochs is None or args.max_epochs == 1000
    assert {"logger", "gpus", "max_epochs"} <= set(Trainer.default_attributes())


def test_pickle(tmpdir):
    trainer = Trainer(max_epochs=1, default_root_dir=tmpdir)
    pickle.loads(pickle.dumps(trainer))
    trainer.fit(BoringModel())
    pickle.loads(pickle.dumps(trainer))


def test_test_and_predict(tmpdir):
    class Current(BoringModel):
        def validation_step(self, batch, batch_idx):
            self.log("foo", -batch_idx)
            return super().validation_step(batch, batch_idx)

        def test_step(self, *args):
            return self.validation_step(*args)

        def test_epoch_end(self, outputs):
            pass

    model = Current()
    trainer = Trainer(
        max_epochs=2,
        limit_val_batches=2,
        limit_test_batches=2,
        limit_train_batches=2,
        progress_bar_refresh_rate=0,
        default_root_dir=tmpdir,
        callbacks=[ModelCheckpoint(monitor="foo", save_top_k=-1)],
    )
    trainer.fit(model)
    with pytest.raises(Exception):  # noqa: B017,PT011
        trainer.test(ckpt_path="nowhere.ckpt")
    found = trainer.test(ckpt_path=None)
    assert found[0]["foo"] == -0.5
    assert trainer.state == TrainerState.FINISHED
    assert trainer.test(test_dataloaders=DataLoader(RandomDataset(32, 2)))
    found = trainer.predict(model, DataLoader(RandomDataset(32, 4), batch_size=2))
    assert len(found) == 2 and found[0].shape == (2, 2)
    found = trainer.predict(
        model, [DataLoader(RandomDataset(32, 4)), DataLoader(RandomDataset(32, 2))]
    )
    assert [len(x) for x in found] == [4, 2]


def test_overfit(tmpdir):
    trainer = Trainer(max_epochs=1, overfit_batches=2, default_root_dir=tmpdir)
    model = BoringModel()
    model.train_dataloader = lambda: DataLoader(RandomDataset(32, 64), shuffle=True)
    trainer.fit(model)
    assert isinstance(
        trainer.train_dataloader.sampler
        if hasattr(trainer.train_dataloader, "sampler")
        else trainer.train_dataloader.loaders.sampler,
        torch.utils.data.SequentialSampler,
    )
    assert trainer.num_training_batches == 2 and trainer.num_val_batches == [2]


@pytest.mark.parametrize(
    ["trainer_kwargs", "message"],
    [
        ({"val_check_interval": 1.5}, "val_check_interval"),
        ({"limit_val_batches": 1.2}, "limit_val_batches"),
        ({"limit_train_batches": -1}, "limit_train_batches"),
        ({"overfit_batches": 1.1}, "overfit_batches"),
        ({"fast_dev_run": -1}, "fast_dev_run"),
        ({"track_grad_norm": "nope"}, "track_grad_norm"),
    ],
)
def test_bad_values(trainer_kwargs, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        Trainer(**trainer_kwargs)


def test_iterable_without_len(tmpdir):
    class Stream(IterableDataset):
        def __iter__(self):
            for _ in range(10):
                yield torch.randn(32)

    model = BoringModel()
    trainer = Trainer(
        max_epochs=1, val_check_interval=3, limit_val_batches=1, default_root_dir=tmpdir
    )
    trainer.fit(
        model, train_dataloader=DataLoader(Stream()), val_dataloaders=DataLoader(RandomDataset())
    )
    assert trainer.global_step == 10
    with pytest.raises(MisconfigurationException, match="When using an IterableDataset"):
        Trainer(max_epochs=1, val_check_interval=0.5, default_root_dir=tmpdir).fit(
            model, DataLoader(Stream()), DataLoader(RandomDataset())
        )
    with pytest.raises(MisconfigurationException, match="IterableDataset"):
        Trainer(max_epochs=1, limit_train_batches=0.5, default_root_dir=tmpdir).fit(
            model, DataLoader(Stream())
        )


def test_both_loader_and_datamodule(tmpdir):
    from boring import BoringDataModule

    trainer = Trainer(default_root_dir=tmpdir, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="You cannot pass"):
        trainer.fit(BoringModel(), DataLoader(RandomDataset()), datamodule=BoringDataModule())


def test_running_stage(tmpdir):
    stages = []

    class Current(BoringModel):
        def training_step(self, batch, batch_idx):
            stages.append(
                self.trainer._running_stage
                if hasattr(self.trainer, "_running_stage")
                else RunningStage.TRAINING
            )
            assert self.trainer.training and not self.trainer.evaluating
            assert self.trainer.state == TrainerState.FITTING
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert self.trainer.sanity_checking or self.trainer.validating
            return super().validation_step(batch, batch_idx)

        def test_step(self, batch, batch_idx):
            assert self.trainer.testing and self.trainer.state == TrainerState.TESTING
            return super().test_step(batch, batch_idx)

    trainer = Trainer(default_root_dir=tmpdir, fast_dev_run=True)
    assert trainer.state == TrainerState.INITIALIZING
    trainer.fit(Current())
    trainer.test(Current())
    trainer.validate(Current())


def test_log_every_n_steps(tmpdir):
    class L(TensorBoardLogger):
        calls = 0

        def log_metrics(self, metrics, step=None):
            self.calls += 1
            return super().log_metrics(metrics, step)

    class Current(BoringModel):
        def training_step(self, *args, **kwargs):
            self.log("foo", -1)
            return super().training_step(*args, **kwargs)

    logger = L(str(tmpdir))
    trainer = Trainer(
        default_root_dir=tmpdir,
        log_every_n_steps=2,
        max_epochs=1,
        limit_train_batches=10,
        limit_val_batches=0,
        flush_logs_every_n_steps=1,
        logger=logger,
    )
    trainer.fit(Current())
    assert logger.calls >= 5


def test_early_stop_min_epochs(tmpdir):
    class Current(BoringModel):
        def training_step(self, *args, **kwargs):
            out = super().training_step(*args, **kwargs)
            self.log("foo", 1.0, on_epoch=True)
            return out

        def validation_epoch_end(self, outputs):
            self.log("val", 1.0)

    trainer = Trainer(
        default_root_dir=tmpdir,
        min_epochs=4,
        max_epochs=10,
        limit_train_batches=2,
        limit_val_batches=1,
        callbacks=[EarlyStopping("val", patience=1)],
    )
    trainer.fit(Current())
    assert trainer.current_epoch == 3


def test_check_val_every_n_epoch(tmpdir):
    class Current(BoringModel):
        def on_validation_epoch_start(self):
            if not self.trainer.sanity_checking:
                assert (self.current_epoch + 1) % 2 == 0

    Trainer(
        default_root_dir=tmpdir,
        max_epochs=4,
        check_val_every_n_epoch=2,
        limit_train_batches=1,
        limit_val_batches=1,
    ).fit(Current())
    assert pl.__version__
    assert isinstance(Current(), LightningModule)
    assert seed_everything(3) == 3
