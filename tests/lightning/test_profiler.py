"""Profilers: what they record, and where the report goes."""

import logging
import time

import pytest
import torch

import puretrain.lightning as pl
from puretrain.lightning.profiler import (
    AdvancedProfiler,
    BaseProfiler,
    PassThroughProfiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from puretrain.lightning.utilities.exceptions import MisconfigurationException


def test_simple_records_durations():
    profiler = SimpleProfiler()
    for duration in (0.02, 0.04):
        with profiler.profile("sleep"):
            time.sleep(duration)
    first, second = profiler.recorded_durations["sleep"]
    assert first >= 0.02
    assert second >= 0.04
    items = list(profiler.profile_iterable(range(3), "read"))
    assert items == [0, 1, 2]
    assert len(profiler.recorded_durations["read"]) == 4  # the last finds the end


def test_simple_refuses_a_wrong_order():
    profiler = SimpleProfiler()
    profiler.start("a")
    with pytest.raises(ValueError, match="already started"):
        profiler.start("a")
    profiler.stop("a")
    with pytest.raises(ValueError, match="never started"):
        profiler.stop("a")


def test_an_exception_ends_the_action():
    profiler = SimpleProfiler()
    with pytest.raises(KeyError), profiler.profile("a"):
        raise KeyError
    assert len(profiler.recorded_durations["a"]) == 1


@pytest.mark.parametrize("extended", [True, False])
def test_simple_report(extended):
    profiler = SimpleProfiler(extended=extended)
    with profiler.profile("run_training_batch"):
        pass
    profiler.setup("fit")
    report = profiler.summary()
    assert "FIT Profiler Report" in report
    assert "run_training_batch" in report
    assert "Mean duration (s)" in report
    assert ("Percentage %" in report) is extended
    widths = {len(line) for line in report.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_report_goes_to_the_log(caplog):
    profiler = SimpleProfiler()
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        profiler.describe()
    assert "Profiler Report" in caplog.text


@pytest.mark.parametrize("cls", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_report_goes_to_a_file(tmp_path, cls):
    profiler = cls(dirpath=tmp_path / "new", filename="profile")
    profiler.setup("fit")
    with profiler.profile("training_step"):
        torch.ones(3).sum()
    profiler.describe()
    assert "FIT Profiler Report" in (tmp_path / "new" / "fit-profile.txt").read_text()
    profiler = cls(output_filename=tmp_path / "older.txt")
    with profiler.profile("training_step"):
        torch.ones(3).sum()
    profiler.describe()
    assert "training_step" in (tmp_path / "older.txt").read_text()


def slow():
    return sum(range(10_000))


def test_advanced_names_functions():
    profiler = AdvancedProfiler()
    with profiler.profile("outer"), profiler.profile("inner"):
        slow()
    with profiler.profile("outer"):
        slow()
    report = profiler.summary()
    assert "Profile stats for: outer" in report
    assert "Profile stats for: inner" in report
    assert report.count("(slow)") == 2
    profiler.teardown()
    assert profiler.profiled_actions == {}
    with pytest.raises(ValueError, match="never started"):
        profiler.stop("outer")


def test_pytorch_names_operators(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="t", row_limit=50)
    for _ in range(2):
        with profiler.profile("training_step"):
            torch.ones(3, 3) @ torch.ones(3, 3)
    report = profiler.summary()
    assert "aten::mm" in report
    assert sum(event.name == "training_step" for event in profiler.function_events) == 2
    assert list(tmp_path.glob("*.pt.trace.json"))
    profiler.teardown()
    assert profiler.summary() == ""


def test_pytorch_stops_after_some_steps():
    profiler = PyTorchProfiler(steps=2)
    for _ in range(5):
        with profiler.profile("training_step"):
            torch.ones(3).sum()
        with profiler.profile("training_step_and_backward"):
            torch.ones(3).sum()
    names = [event.name for event in profiler.function_events]
    assert names.count("training_step_and_backward") == 2


def test_pytorch_refuses_unknown_arguments():
    with pytest.raises(MisconfigurationException, match="Found sort_by_key: a. Should be within"):
        PyTorchProfiler(sort_by_key="a")
    with pytest.raises(MisconfigurationException, match="Please use only the later"):
        PyTorchProfiler(profiled_functions=["a"], record_functions=["b"])


def test_pass_through():
    profiler = PassThroughProfiler()
    with profiler.profile("a"):
        pass
    assert profiler.summary() == ""


class Names(BaseProfiler):
    """As a user writes one, without the base's ``__init__``."""

    def __init__(self):
        self.names = []

    def start(self, action_name):
        self.names.append(action_name)

    def stop(self, action_name):
        pass

    def summary(self):
        return "names: " + ", ".join(self.names)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("given", ["simple", "advanced", "pytorch", Names()])
def test_in_a_run(tmp_path, caplog, given):
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            profiler=given,
            max_epochs=1,
            logger=False,
            checkpoint_callback=False,
            progress_bar_refresh_rate=0,
            weights_summary=None,
        )
        trainer.fit(Model(), torch.utils.data.DataLoader(torch.rand(4, 2), batch_size=2))
    assert isinstance(trainer.profiler, BaseProfiler)
    expected = "names: " if isinstance(given, Names) else "FIT Profiler Report"
    assert expected in caplog.text


def test_a_run_measures_the_actions_that_1x_names(tmp_path):
    profiler = pl.profiler.SimpleProfiler()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, profiler=profiler, max_epochs=2, logger=False,
        checkpoint_callback=False, progress_bar_refresh_rate=0, weights_summary=None,
    )  # fmt: skip
    model = Validates()
    loader = torch.utils.data.DataLoader(torch.rand(6, 2), batch_size=2)
    trainer.fit(model, loader, loader)
    trainer.test(model, loader, verbose=False)
    trainer.predict(model, loader)
    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    batches = dict.fromkeys(
        ("run_training_batch", "optimizer_step_and_closure_0", "training_step_and_backward",
         "model_forward", "training_step", "model_backward", "backward"), 6
    )  # fmt: skip
    expected = {**batches, "run_training_epoch": 2, "validation_step": 2 + 6, "test_step": 3}
    expected |= {"evaluation_step_and_end": 2 + 6 + 3, "predict_step": 3, "get_train_batch": 6}
    expected |= {"on_train_epoch_start": 2, "on_validation_end": 3}
    assert {name: counts.get(name) for name in expected} == expected
    # what is inside another action takes no longer than that
    total = {name: sum(times) for name, times in profiler.recorded_durations.items()}
    nested = ("run_training_epoch", "run_training_batch", "optimizer_step_and_closure_0",
              "training_step_and_backward", "model_forward", "training_step")  # fmt: skip
    assert sorted(nested, key=total.get, reverse=True) == list(nested)


class Validates(Model):
    def validation_step(self, batch, batch_idx):
        self.log("x", 1.0)

    test_step = validation_step

    def forward(self, batch):
        return self.layer(batch)

    def on_train_epoch_start(self):
        pass

    def on_validation_end(self):
        pass
