"""The names, orders and defaults of arguments, and that each hook of a callback is called."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import puretrain.lightning as pl
from puretrain.lightning import callbacks
from puretrain.lightning.loggers import TensorBoardLogger

TRAINER = {
    "logger": True, "checkpoint_callback": True, "callbacks": None, "default_root_dir": None,
    "gradient_clip_val": 0, "process_position": 0, "num_nodes": 1, "num_processes": 1,
    "gpus": None, "auto_select_gpus": False, "tpu_cores": None, "log_gpu_memory": None,
    "progress_bar_refresh_rate": 1, "overfit_batches": 0.0, "track_grad_norm": -1,
    "check_val_every_n_epoch": 1, "fast_dev_run": False, "accumulate_grad_batches": 1,
    "max_epochs": 1000, "min_epochs": 1, "max_steps": None, "min_steps": None,
    "limit_train_batches": 1.0, "limit_val_batches": 1.0, "limit_test_batches": 1.0,
    "val_check_interval": 1.0, "flush_logs_every_n_steps": 100, "log_every_n_steps": 50,
    "accelerator": None, "sync_batchnorm": False, "precision": 32, "weights_summary": "top",
    "weights_save_path": None, "num_sanity_val_steps": 2, "truncated_bptt_steps": None,
    "resume_from_checkpoint": None, "profiler": None, "benchmark": False, "deterministic": False,
    "reload_dataloaders_every_epoch": False, "auto_lr_find": False, "replace_sampler_ddp": True,
    "terminate_on_nan": False, "auto_scale_batch_size": False, "prepare_data_per_node": True,
    "plugins": None, "amp_backend": "native", "amp_level": "O2", "distributed_backend": None,
    "automatic_optimization": None, "move_metrics_to_cpu": False, "enable_pl_optimizer": None,
}  # fmt: skip
LOG = {
    "prog_bar": False, "logger": True, "on_step": None, "on_epoch": None, "reduce_fx": torch.mean,
    "tbptt_reduce_fx": None, "tbptt_pad_token": None, "enable_graph": False, "sync_dist": False,
    "sync_dist_op": "mean", "sync_dist_group": None, "add_dataloader_idx": True,
    "batch_size": None, "rank_zero_only": False,
}  # fmt: skip
EARLY_STOPPING = {
    "monitor": "early_stop_on", "min_delta": 0.0, "patience": 3, "verbose": False, "mode": "min",
    "strict": True, "check_finite": True, "stopping_threshold": None,
    "divergence_threshold": None, "check_on_train_epoch_end": False,
}  # fmt: skip
MODEL_CHECKPOINT = {
    "dirpath": None, "filename": None, "monitor": None, "verbose": False, "save_last": None,
    "save_top_k": None, "save_weights_only": False, "mode": "min", "auto_insert_metric_name": True,
    "every_n_train_steps": None, "every_n_val_epochs": None, "period": 1,
}  # fmt: skip
TENSORBOARD = {
    "name": "default", "version": None, "log_graph": False, "default_hp_metric": True,
    "prefix": "", "sub_dir": None,
}  # fmt: skip
# None stands for the value on the right, as it does in later versions
STANDS_FOR = {"progress_bar_refresh_rate": 1, "max_epochs": 1000, "min_epochs": 1, "period": 1,
              "logger": True, "sync_dist_op": "mean"}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (pl.Trainer.__init__, TRAINER),
        (pl.LightningModule.log, LOG),
        (callbacks.EarlyStopping.__init__, EARLY_STOPPING),
        (callbacks.ModelCheckpoint.__init__, MODEL_CHECKPOINT),
        (
            callbacks.LearningRateMonitor.__init__,
            {"logging_interval": None, "log_momentum": False},
        ),
        (TensorBoardLogger.__init__, TENSORBOARD),
        (
            pl.LightningModule.load_from_checkpoint,
            {"map_location": None, "hparams_file": None, "strict": True},
        ),
    ],
)
def test_arguments(function, expected):
    found = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    assert [name for name in found if name in expected] == list(expected)
    for name, default in expected.items():
        assert found[name] == default or (found[name] is None and STANDS_FOR[name] == default), name


def test_arguments_that_are_none_stand_for_the_older_defaults(tmp_path):
    trainer = pl.Trainer(default_root_dir=str(tmp_path))
    assert (trainer.max_epochs, trainer.min_epochs) == (1000, 1)
    assert trainer.progress_bar_callback.refresh_rate == 1
    assert callbacks.ModelCheckpoint().period == 1


HOOKS = [
    "on_before_accelerator_backend_setup",
    "setup",
    "teardown",
    "on_init_start",
    "on_init_end",
    "on_fit_start",
    "on_fit_end",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "on_predict_start",
    "on_predict_end",
    "on_predict_epoch_start",
    "on_predict_epoch_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
    "on_epoch_start",
    "on_epoch_end",
    "on_batch_start",
    "on_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_test_batch_start",
    "on_test_batch_end",
    "on_train_start",
    "on_train_end",
    "on_pretrain_routine_start",
    "on_pretrain_routine_end",
    "on_validation_start",
    "on_validation_end",
    "on_test_start",
    "on_test_end",
    "on_keyboard_interrupt",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_after_backward",
    "on_before_zero_grad",
    "on_before_backward",
    "on_before_optimizer_step",
    "state_dict",
    "load_state_dict",
    "on_exception",
]


class Model(pl.LightningModule):
    def __init__(self, failure=None):
        super().__init__()
        self.layer, self.failure = nn.Linear(2, 1), failure

    def forward(self, batch):
        return self.layer(batch)

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1 and self.failure is not None:
            raise self.failure
        return self(batch).sum()

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_each_hook_of_a_callback_is_there_and_is_called(tmp_path):
    assert all(hasattr(pl.Callback(), name) for name in [*HOOKS, "state_key"])
    seen = set()

    def noting(name):
        def hook(self, *arguments):
            seen.add(name)
            return {"kept": 1} if name in ("state_dict", "on_save_checkpoint") else None

        return hook

    Notes = type("Notes", (pl.Callback,), {name: noting(name) for name in HOOKS})  # noqa: N806
    loader, path = DataLoader(torch.ones(4, 2)), str(tmp_path / "a.ckpt")

    def trainer(**arguments):
        return pl.Trainer(
            max_epochs=3, callbacks=[Notes()], logger=False, progress_bar_refresh_rate=0,
            weights_summary=None, default_root_dir=str(tmp_path), **arguments,
        )  # fmt: skip

    first = trainer()
    model = Model(KeyboardInterrupt())
    with pytest.warns(UserWarning, match="Detected KeyboardInterrupt"):
        first.fit(model, loader, loader)
    first.test(model, loader, verbose=False)
    first.predict(model, loader)
    first.save_checkpoint(path)
    with pytest.raises(ValueError, match="broken"):
        trainer(resume_from_checkpoint=path).fit(Model(ValueError("broken")), loader, loader)
    assert set(HOOKS) - seen == set()


TRAINER_ATTRIBUTES = [
    "callback_metrics",
    "logged_metrics",
    "progress_bar_metrics",
    "current_epoch",
    "global_step",
    "batch_idx",
    "is_global_zero",
    "log_dir",
    "logger",
    "checkpoint_callback",
    "checkpoint_callbacks",
    "early_stopping_callback",
    "early_stopping_callbacks",
    "optimizers",
    "lr_schedulers",
    "model",
    "lightning_module",
    "num_training_batches",
    "train_dataloader",
    "val_dataloaders",
    "should_stop",
    "interrupted",
    "state",
    "training",
    "validating",
    "testing",
    "predicting",
    "sanity_checking",
    "world_size",
    "global_rank",
    "local_rank",
    "node_rank",
    "fit",
    "validate",
    "test",
    "predict",
    "tune",
    "save_checkpoint",
    "add_argparse_args",
    "from_argparse_args",
]
MODULE_ATTRIBUTES = [
    "current_epoch",
    "global_step",
    "device",
    "dtype",
    "global_rank",
    "local_rank",
    "logger",
    "trainer",
    "hparams",
    "hparams_initial",
    "example_input_array",
    "automatic_optimization",
    "on_gpu",
    "datamodule",
    "truncated_bptt_steps",
    "training_step",
    "training_step_end",
    "training_epoch_end",
    "validation_step_end",
    "validation_epoch_end",
    "test_step_end",
    "test_epoch_end",
    "predict_step",
    "configure_callbacks",
    "optimizers",
    "lr_schedulers",
    "log",
    "log_dict",
    "print",
    "backward",
    "manual_backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "toggle_optimizer",
    "untoggle_optimizer",
    "tbptt_split_batch",
    "get_progress_bar_dict",
    "write_prediction",
    "write_prediction_dict",
    "all_gather",
    "summarize",
    "freeze",
    "unfreeze",
    "to_torchscript",
    "to_onnx",
    "prepare_data",
    "setup",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "transfer_batch_to_device",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "configure_model",
]


def test_attributes_are_there_before_and_after_a_run(tmp_path):
    trainer = pl.Trainer(default_root_dir=str(tmp_path), fast_dev_run=True)
    model = Model()
    for _ in range(2):
        assert [name for name in TRAINER_ATTRIBUTES if not hasattr(trainer, name)] == []
        assert [name for name in MODULE_ATTRIBUTES if not hasattr(model, name)] == []
        trainer.fit(model, DataLoader(torch.ones(4, 2)))
