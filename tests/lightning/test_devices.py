"""Arguments about devices and processes: they work, or say what they do not do."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import puretrain.lightning as pl
from puretrain.lightning import plugins
from puretrain.lightning.utilities.exceptions import MisconfigurationException


def trainer_of(tmp_path, **arguments):
    return pl.Trainer(default_root_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nodes": 2}, "num_nodes=2: several processes are not supported yet"),
        ({"num_processes": 2, "accelerator": "ddp_cpu"}, "num_processes=2: several"),
        ({"sync_batchnorm": True}, "sync_batchnorm=True has no effect"),
        ({"plugins": plugins.SLURMEnvironment()}, "SLURMEnvironment has no effect"),
    ],
)
def test_what_has_no_effect_says_so(arguments, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        trainer_of(tmp_path, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_gpu_memory": "all"}, "log_gpu_memory='all' has no effect"),
        ({"accelerator": "cpu", "devices": 2}, "devices=2: several"),
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
