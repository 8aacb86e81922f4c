"""The utilities that programs import by name."""

import dataclasses
import logging
import os
import pickle
import random
from argparse import ArgumentParser, Namespace
from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import puretrain.lightning as pl
from puretrain.errors import CheckpointError
from puretrain.lightning.core.decorators import auto_move_data
from puretrain.lightning.core.step_result import Result, TrainResult
from puretrain.lightning.trainer.supporters import (
    CombinedDataset,
    CombinedLoader,
    CombinedLoaderIterator,
    CycleIterator,
    PredictionCollection,
    TensorRunningAccum,
)
from puretrain.lightning.utilities import argparse as arguments
from puretrain.lightning.utilities import parsing
from puretrain.lightning.utilities.apply_func import (
    apply_to_collection,
    apply_to_collections,
    convert_to_tensors,
    move_data_to_device,
)
from puretrain.lightning.utilities.cloud_io import atomic_save, get_filesystem
from puretrain.lightning.utilities.cloud_io import load as pl_load
from puretrain.lightning.utilities.data import (
    extract_batch_size,
    get_len,
    has_iterable_dataset,
    has_len,
)
from puretrain.lightning.utilities.distributed import (
    all_gather_ddp_if_available,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
    sync_ddp_if_available,
)
from puretrain.lightning.utilities.enums import DistributedType, LightningEnum
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.memory import is_oom_error, recursive_detach
from puretrain.lightning.utilities.model_helpers import is_overridden
from puretrain.lightning.utilities.parsing import AttributeDict
from puretrain.lightning.utilities.seed import isolate_rng, reset_seed, seed_everything
from puretrain.lightning.utilities.warnings import WarningCache

# ── Seeds ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def _environment(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        monkeypatch.delenv(name)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


@pytest.mark.usefixtures("_environment")
def test_seed_everything(caplog):
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        assert seed_everything(123) == 123
    assert "Global seed set to 123" in caplog.text
    assert os.environ["PL_GLOBAL_SEED"] == "123"
    first = draw()
    reset_seed()
    assert draw() == first
    assert seed_everything() == 123  # from the variable
    assert draw() == first
    torch.manual_seed(123)
    assert torch.rand(1).item() == first[2]


@pytest.mark.usefixtures("_environment")
def test_seed_everything_without_a_seed(monkeypatch):
    with pytest.warns(UserWarning, match="No seed found"):
        seed_everything()
    monkeypatch.setenv("PL_GLOBAL_SEED", "many")
    with pytest.warns(UserWarning, match="Invalid seed found: 'many'"):
        seed_everything()
    with pytest.warns(UserWarning, match="is not in bounds"):
        seed_everything(2**40)


def test_isolate_rng():
    before = torch.get_rng_state(), random.getstate()
    with isolate_rng():
        seed_everything(1, verbose=False)
        draw()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


# ── Ranks and messages ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def second_rank():
    rank = rank_zero_only.rank
    rank_zero_only.rank = 1
    yield
    rank_zero_only.rank = rank


def test_rank_zero_runs():
    assert rank_zero_only(lambda: 3)() == 3
    with pytest.warns(UserWarning, match="careful"):
        rank_zero_warn("careful")


@pytest.mark.usefixtures("second_rank")
def test_other_ranks_do_nothing(recwarn, caplog):
    assert rank_zero_only(lambda: 3)() is None
    rank_zero_warn("careful")
    rank_zero_info("hello")
    assert not recwarn
    assert not caplog.records


def test_a_warning_appears_once(recwarn):
    cache = WarningCache()
    cache.warn("one")
    cache.warn("one")
    cache.warn("two")
    assert [str(warning.message) for warning in recwarn] == ["one", "two"]


def test_one_process_needs_no_collective():
    x = torch.ones(2)
    assert sync_ddp_if_available(x) is x
    assert all_gather_ddp_if_available(x) is x


# ── Collections ───────────────────────────────────────────────────────────────────────────────────

Pair = namedtuple("Pair", ["a", "b"])


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    name: str


def test_apply_to_collection():
    one = torch.tensor(1)
    data = {
        "list": [one, "text"],
        "tuple": (one, 2),
        "named": Pair(one, None),
        "sample": Sample(one, "n"),
        "ordered": OrderedDict(x=one),
        "default": defaultdict(list, x=one),
    }
    found = apply_to_collection(data, torch.Tensor, lambda x, by: x * by, 5)
    assert found["list"] == [5, "text"]
    assert found["tuple"] == (5, 2)
    assert found["named"] == Pair(5, None)
    assert found["sample"] == Sample(torch.tensor(5), "n")
    assert data["sample"].x == 1
    assert isinstance(found["ordered"], OrderedDict)
    assert found["default"].default_factory is list
    kept = apply_to_collection([1, True], int, str, wrong_dtype=bool)
    assert kept == ["1", True]


def test_apply_to_two_collections():
    found = apply_to_collections({"a": [1, 2]}, {"a": [3, 4]}, int, lambda x, y: x * y)
    assert found == {"a": [3, 8]}
    assert apply_to_collections([1], None, int, lambda x: x + 1) == [2]


class Batch:
    def __init__(self):
        self.devices = []

    def to(self, device):
        self.devices.append(str(device))


def test_move_data_to_device():
    batch = Batch()
    moved = move_data_to_device({"x": torch.ones(1), "own": batch, "n": 3}, "meta")
    assert moved["x"].device.type == "meta"
    assert moved["own"] is batch
    assert batch.devices == ["meta"]
    assert moved["n"] == 3


def test_convert_to_tensors():
    found = convert_to_tensors({"a": 1, "b": 0.5, "c": True, "d": np.ones(2)}, "cpu")
    assert [value.dtype for value in found.values()] == [
        torch.int32,
        torch.float32,
        torch.uint8,
        torch.float64,
    ]


# ── Parsing ───────────────────────────────────────────────────────────────────────────────────────


def test_attribute_dict():
    settings = AttributeDict({"a": 1, "long": "x"})
    settings.b = 2
    assert settings["b"] == settings.b == 2
    assert repr(settings) == '"a":    1\n"b":    2\n"long": x'
    with pytest.raises(AttributeError, match='Missing attribute "none"'):
        _ = settings.none
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert AttributeDict(settings).a == 1


class Keeps:
    """Anything that keeps hyper-parameters, as modules and data modules do."""

    def save(self, *args, **kwargs):
        import sys

        parsing.save_hyperparameters(self, *args, frame=sys._getframe(1), **kwargs)

    hparams = property(parsing.hyperparameters)


class Parent(Keeps):
    def __init__(self, arg1, arg2="two", *more, arg3=3, **rest):
        arg2 = arg2 + "!"
        self.save()


class Child(Parent):
    def __init__(self, own, *args, **kwargs):
        Parent.__init__(self, *args, **kwargs)  # there is no super() in its frame


class GrandChild(Child):
    def __init__(self, arg1=7, last="z"):
        super().__init__("own", arg1=arg1 + 1, extra=5)


def test_all_arguments():
    assert Parent(1, arg3=4, extra=5).hparams == {
        "arg1": 1,
        "arg2": "two!",
        "arg3": 4,
        "extra": 5,
    }


def test_arguments_of_subclasses():
    assert GrandChild().hparams == {
        "arg1": 7,  # as the caller would have to give it again
        "arg2": "two!",
        "arg3": 3,
        "extra": 5,
        "last": "z",
        "own": "own",
    }
    assert GrandChild()._hparams_name == "kwargs"


def keeping(*args, **kwargs):
    class Model(Keeps):
        def __init__(self, arg1, arg2, arg3):
            self.save(*args, **kwargs)

    return Model(1, "two", [3])


def test_chosen_arguments():
    assert keeping("arg1", "arg3").hparams == {"arg1": 1, "arg3": [3]}
    assert keeping(ignore="arg2").hparams == {"arg1": 1, "arg3": [3]}
    assert keeping(ignore=["arg1", "arg2"]).hparams == {"arg3": [3]}
    with pytest.raises(MisconfigurationException, match="'arg4' is no argument"):
        keeping("arg4")


def test_a_namespace_or_a_dictionary():
    class Model(Keeps):
        def __init__(self, conf, other=1):
            self.save(conf)

    assert Model(Namespace(a=1)).hparams.a == 1
    model = Model({"a": 2})
    assert model.hparams == {"a": 2}
    assert model._hparams_name == "conf"
    with pytest.raises(ValueError, match="Primitives"):
        Model(3)


def test_changes_show_against_the_first():
    model = keeping()
    model.hparams.arg1 = 5
    model.hparams.arg3.append(4)
    assert parsing.initial_hyperparameters(model) == {"arg1": 1, "arg2": "two", "arg3": [3]}


def test_a_dataclass():
    @dataclasses.dataclass
    class Model(Keeps):
        width: int
        depth: int = 2

        def __post_init__(self):
            self.save()

    assert Model(3).hparams == {"width": 3, "depth": 2}


def test_a_module_among_the_arguments_is_warned_of():
    class Model(Keeps):
        def __init__(self, net):
            self.save()

    with pytest.warns(UserWarning, match=r"ignore=\['net'\]"):
        Model(nn.Linear(1, 1))


def test_pickles_and_namespaces():
    assert parsing.is_picklable({"a": 1})
    assert not parsing.is_picklable(lambda: 0)
    namespace = Namespace(a=1, b=lambda: 0)
    with pytest.warns(UserWarning, match="attribute 'b' removed"):
        parsing.clean_namespace(namespace)
    assert vars(namespace) == {"a": 1}
    assert parsing.flatten_dict({"a": {"b": 1}, "c": 2}) == {"b": 1, "c": 2}


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("OFF", False), ("1", True), ("maybe", "maybe")]
)
def test_text_to_bool(text, value):
    assert parsing.str_to_bool_or_str(text) == value
    if isinstance(value, str):
        with pytest.raises(ValueError, match="invalid truth value"):
            parsing.str_to_bool(text)


def test_attributes_of_model_hparams_and_data():
    model = nn.Module()
    model.hparams = {"lr": 1}
    model.trainer = Namespace(datamodule=Namespace(batch_size=4))
    assert parsing.lightning_getattr(model, "lr") == 1
    assert parsing.lightning_getattr(model, "batch_size") == 4
    parsing.lightning_setattr(model, "batch_size", 8)
    assert model.trainer.datamodule.batch_size == 8
    assert not parsing.lightning_hasattr(model, "width")
    with pytest.raises(AttributeError, match="neither stored"):
        parsing.lightning_setattr(model, "width", 1)


# ── Command lines ─────────────────────────────────────────────────────────────────────────────────


class Settings:
    def __init__(
        self, size: int = 2, rate: float | None = None, fast: bool = False, run: bool | int = False
    ):
        """Keep.

        Args:
            size: of it, in 100%
                of the cases.
            rate: of it.
            fast: or slow.
            run: so many.
        """
        self.values = size, rate, fast, run


def test_add_argparse_args():
    parser = ArgumentParser()
    parser.add_argument("--other", default=1)
    same = arguments.add_argparse_args(Settings, parser)
    assert same is parser
    assert "of it, in 100% of the cases." in parser.format_help()
    args = parser.parse_args(["--rate", "0.5", "--fast", "--run", "3"])
    assert vars(args) == {"other": 1, "size": 2, "rate": 0.5, "fast": True, "run": 3}
    made = arguments.from_argparse_args(Settings, args, size=7)
    assert made.values == (7, 0.5, True, 3)
    other = arguments.add_argparse_args(Settings, ArgumentParser(), use_argument_group=False)
    assert other.parse_args(["--fast", "no"]).fast is False
    with pytest.raises(RuntimeError, match="ArgumentParser"):
        arguments.add_argparse_args(Settings, parser.add_argument_group("x"))


def test_the_trainer_on_a_command_line():
    parser = pl.Trainer.add_argparse_args(ArgumentParser(add_help=False))
    line = "--max_epochs 3 --limit_train_batches 0.5 --limit_val_batches 2 --deterministic"
    args = parser.parse_args([*line.split(), "--logger", "False", "--gpus", "0"])
    trainer = pl.Trainer.from_argparse_args(args, checkpoint_callback=False, max_epochs=4)
    assert trainer.max_epochs == 4
    assert trainer.limit_train_batches == 0.5
    assert trainer.limit_val_batches == 2
    assert trainer.logger is None


def test_the_trainer_in_the_environment(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_TRAINER_LOGGER", "false")
    trainer = pl.Trainer(checkpoint_callback=False)
    assert trainer.max_epochs == 7
    assert trainer.logger is None
    assert pl.Trainer(max_epochs=2).max_epochs == 2


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


def test_load(tmp_path):
    path = tmp_path / "deep" / "a.ckpt"
    saved = {
        "w": torch.ones(2),
        "hparams": AttributeDict(a=1),
        "args": Namespace(b=2),
        "net": nn.Sequential(nn.Linear(2, 1)),
    }
    atomic_save(saved, path)
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]
    for source in (path, str(path), f"file://{path}"):
        loaded = pl_load(source)
        assert torch.equal(loaded["w"], saved["w"])
        assert loaded["hparams"].a == 1
        assert loaded["args"] == Namespace(b=2)
        assert torch.equal(loaded["net"][0].weight, saved["net"][0].weight)
    with path.open("rb") as file:
        assert pl_load(file, map_location="meta")["w"].is_meta
    with pytest.raises(FileNotFoundError):
        pl_load(tmp_path / "none.ckpt")
    assert get_filesystem(path).exists(str(path))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_load_never_runs_what_a_file_names(tmp_path):
    torch.save({"a": Evil(str(tmp_path / "made"))}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="mkdir"):
        pl_load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "made").exists()


# ── Loaders ───────────────────────────────────────────────────────────────────────────────────────


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Sized(Stream):
    def __len__(self):
        return 3


def test_lengths():
    assert has_len(DataLoader([1, 2]))
    assert not has_len(DataLoader(Stream()))
    assert get_len(DataLoader(Stream())) == float("inf")
    assert has_iterable_dataset(DataLoader(Stream()))
    with pytest.warns(UserWarning, match="`IterableDataset` has `__len__` defined"):
        assert has_len(DataLoader(Sized()))
    with pytest.raises(ValueError, match="returned 0 length"):
        has_len(DataLoader([]))


def test_batch_size():
    assert extract_batch_size([torch.zeros(3, 2), {"a": torch.zeros(3)}]) == 3
    assert extract_batch_size(torch.tensor(1)) == 1
    with pytest.warns(UserWarning, match="ambiguous collection"):
        assert extract_batch_size([torch.zeros(3), torch.zeros(2)]) == 3
    with pytest.raises(RuntimeError, match="could not infer"):
        extract_batch_size({"a": 1})


def test_combined_loader():
    loaders = {"a": DataLoader(range(10), batch_size=4), "b": [DataLoader(range(20), batch_size=5)]}
    short = CombinedLoader(loaders, "min_size")
    batches = list(short)
    assert len(batches) == len(short) == 3
    assert batches[2]["a"].tolist() == [8, 9]
    assert batches[2]["b"][0].tolist() == [10, 11, 12, 13, 14]
    long = CombinedLoader(loaders, "max_size_cycle")
    batches = list(long)
    assert len(batches) == len(long) == 4
    assert batches[3]["a"].tolist() == [0, 1, 2, 3]
    assert len(list(long)) == 4
    assert list(CombinedLoader([range(2), range(1)], "sequential")) == [0, 1, 0]
    assert list(CombinedLoader([range(2), range(1)], "max_size")) == [[0, 0], [1, None]]
    assert len(list(CombinedLoaderIterator({"a": range(3), "b": range(5)}))) == 3
    with pytest.raises(MisconfigurationException, match="Invalid Mode"):
        CombinedLoader(loaders, "longest")
    assert len(CombinedDataset([range(10), range(20)], "max_size_cycle")) == 20
    with pytest.raises(MisconfigurationException, match="Expected one of"):
        CombinedDataset._calc_num_data([range(10)], mode="test")


def test_cycle_iterator():
    cycle = CycleIterator(range(100), 1000)
    assert len(cycle) == 1000
    found = list(cycle)
    assert len(found) == 1000
    assert max(found) == 99
    assert CycleIterator(range(3)).__len__() == float("inf")


def test_running_mean():
    accumulated = TensorRunningAccum(3)
    assert accumulated.last() is None
    assert accumulated.mean() is None
    for value in (1.0, 2.0, 3.0, 6.0):
        accumulated.append(torch.tensor(value, requires_grad=True))
    assert accumulated.mean() == 11 / 3
    assert accumulated.max() == accumulated.last() == 6
    assert accumulated.min() == 2
    accumulated.reset()
    assert accumulated.window_length == 3
    assert accumulated.memory is None


def test_predictions(tmp_path):
    collection = PredictionCollection(0, 2)
    path = tmp_path / "p.pt"
    collection.add({str(path): {"id": [1, 2], "y": torch.tensor([0.5, 0.25])}})
    collection.add({str(path): {"id": 3, "y": torch.tensor([0.75])}})
    collection.to_disk()
    rows = torch.load(tmp_path / "p_rank_0.pt")
    assert rows == [{"id": 1, "y": 0.5}, {"id": 2, "y": 0.25}, {"id": 3, "y": 0.75}]
    collection.add({str(path): {"id": 4}})
    with pytest.raises(ValueError, match="Mismatching feature column"):
        collection.to_disk()


# ── The rest ──────────────────────────────────────────────────────────────────────────────────────


def test_is_overridden():
    class Model(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

    assert is_overridden("training_step", Model())
    assert not is_overridden("validation_step", Model())
    assert is_overridden("training_step", Model(), pl.LightningModule())
    with pytest.raises(ValueError, match="Expected a parent"):
        is_overridden("x", object())


def test_enums_do_not_mind_case():
    assert DistributedType.DDP == "DDP"
    assert DistributedType.from_str("ddp2") is DistributedType.DDP2
    assert DistributedType.from_str("x") is None
    assert {DistributedType.DP: 1}["dp"] == 1
    assert issubclass(DistributedType, LightningEnum)


def test_memory():
    assert is_oom_error(RuntimeError("CUDA error: out of memory"))
    assert is_oom_error(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_oom_error(RuntimeError("other"))
    x = torch.ones(1, requires_grad=True)
    detached = recursive_detach({"a": {"b": x}, "c": 1})
    assert not detached["a"]["b"].requires_grad
    assert detached["c"] == 1


def test_auto_move_data():
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1, dtype=torch.float32, device="meta")

        @auto_move_data
        def forward(self, batch, more=None):
            return batch["x"].device.type, more.device.type

    model = Model().to("meta")
    assert model({"x": torch.ones(1)}, more=torch.ones(1)) == ("meta", "meta")


def test_results():
    result = Result(torch.tensor(1.0))
    result.more = 2
    assert result.minimize == 1
    assert result["more"] == 2
    with pytest.raises(MisconfigurationException, match="self.log"):
        TrainResult(minimize=1)
