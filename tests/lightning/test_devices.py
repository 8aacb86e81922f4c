"""Arguments about devices and processes: they work, or say what they do not do."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning import plugins, strategies
from puretrain.lightning.utilities.exceptions import MisconfigurationException


def trainer_of(tmp_path, **arguments):
    return pl.Trainer(default_root_dir=str(tmp_path), **arguments)


def test_what_has_no_effect_says_so(tmp_path):
    with pytest.warns(UserWarning, match="SLURMEnvironment has no effect"):
        trainer_of(tmp_path, plugins=plugins.SLURMEnvironment())


@pytest.mark.parametrize(
    ("arguments", "processes", "launch"),
    [
        ({"num_processes": 2, "accelerator": "ddp_cpu"}, 2, "spawn"),
        ({"num_processes": 2, "accelerator": "ddp"}, 2, "script"),
        ({"num_processes": 2}, 2, "script"),
        ({"num_processes": 3, "distributed_backend": "ddp_spawn"}, 3, "spawn"),
        ({"num_processes": 2, "plugins": "ddp_spawn"}, 2, "spawn"),
        ({"num_processes": 2, "num_nodes": 3, "accelerator": "ddp"}, 6, "script"),
        ({"accelerator": "cpu", "devices": 2}, 2, "script"),
        ({"accelerator": "cpu", "devices": "2", "strategy": "ddp_spawn"}, 2, "spawn"),
        ({"accelerator": "cpu", "devices": 2, "strategy": "ddp_notebook"}, 2, "fork"),
        ({"accelerator": "cpu", "devices": 2,
          "strategy": "ddp_find_unused_parameters_true"}, 2, "script"),
        ({"accelerator": "cpu", "devices": 2, "strategy": strategies.DDPStrategy()}, 2, "script"),
        ({"accelerator": "cpu", "devices": 2,
          "strategy": strategies.DDPStrategy(start_method="spawn")}, 2, "spawn"),
        ({"num_processes": 2, "accelerator": "dp"}, 1, "none"),
        ({"num_processes": 2, "num_nodes": 2, "accelerator": "ddp2"}, 2, "script"),
        ({"num_processes": 1, "accelerator": "ddp_cpu"}, 1, "none"),
        ({"accelerator": "cpu", "devices": "auto", "strategy": "ddp"}, 1, "none"),
    ],
)  # fmt: skip
def test_how_many_processes_are_started_and_how(arguments, processes, launch, tmp_path):
    trainer = trainer_of(tmp_path, **arguments)
    assert trainer.world_size == processes
    assert trainer.strategy.plan.launch == launch
    assert (trainer.global_rank, trainer.local_rank, trainer.node_rank) == (0, 0, 0)
    assert trainer.is_global_zero


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_gpu_memory": "all"}, "log_gpu_memory='all' has no effect"),
    ],
)
def test_what_has_no_effect_without_a_gpu_says_so(arguments, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        trainer_of(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accelerator": "horovod"}, "Horovod"),
        ({"strategy": "deepspeed_stage_2"}, "DeepSpeed"),
        ({"strategy": "fsdp"}, "not sharded"),
        ({"plugins": "ddp_sharded"}, "FairScale"),
        ({"accelerator": "gpus"}, "is none of"),
        ({"accelerator": "dp", "num_nodes": 2}, "one machine"),
        ({"accelerator": "cpu", "devices": 0}, "no number of processes"),
        ({"log_gpu_memory": "max"}, "'all' or 'min_max'"),
        ({"precision": 64, "plugins": plugins.NativeMixedPrecisionPlugin()}, "go together"),
        ({"gpus": 2, "auto_select_gpus": True}, "No GPUs available"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, tmp_path):
    if "gpus" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MisconfigurationException, match=message):
        trainer_of(tmp_path, **arguments)


def test_what_works_on_one_device_is_quiet(tmp_path):
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).mean()
            self.log("loss", loss)
            self.log("dtype", float(self.layer.weight.dtype == torch.float64))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = TensorDataset(torch.arange(4.0).unsqueeze(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = trainer_of(
            tmp_path, accelerator="ddp", strategy="auto", move_metrics_to_cpu=True, max_epochs=1,
            replace_sampler_ddp=False, plugins=[plugins.DoublePrecisionPlugin()], logger=False,
            checkpoint_callback=False, progress_bar_refresh_rate=0, weights_summary=None,
            num_nodes=1, num_processes=1,
        )  # fmt: skip
        trainer.fit(Model(), DataLoader(data, 1))
    assert trainer.callback_metrics["dtype"] == 1
    assert trainer.callback_metrics["loss"].device.type == "cpu"


def test_the_tuner_wants_one_process(tmp_path):
    trainer = trainer_of(tmp_path, accelerator="ddp", num_processes=2, auto_lr_find=True)
    with pytest.raises(MisconfigurationException, match="looks in one process"):
        trainer.tune(pl.LightningModule())
