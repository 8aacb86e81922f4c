"""Other people's files, written and read with their own libraries; and parts of checkpoints."""

import functools
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import puretrain as pt
from puretrain.checkpoint import store
from puretrain.cli import main
from puretrain.errors import CheckpointError, ConfigurationError, PatternError
from puretrain.tree import tree_digest


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model(torch.randn(5, 3))
    return model


def state_of(model, optimizer=None):
    _, params, buffers = pt.functional(model)
    optimizer = optimizer or pt.optim.adamw(0.01)
    return pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))


READ = {
    ".safetensors": safetensors.torch.load_file,
    ".npz": lambda path: {k: torch.from_numpy(v) for k, v in np.load(path).items()},
    ".pt": lambda path: torch.load(path, weights_only=True),
}
WRITE = {
    ".safetensors": safetensors.torch.save_file,
    ".npz": lambda state, path: np.savez(path, **{k: v.numpy() for k, v in state.items()}),
    ".pt": torch.save,
}


@pytest.mark.parametrize("suffix", READ)
def test_a_checkpoint_becomes_a_state_dict_that_the_module_loads(tmp_path, suffix):
    model = network()
    pt.save(tmp_path / "a.ckpt", state_of(model))
    target = tmp_path / f"b{suffix}"
    pt.convert(tmp_path / "a.ckpt", target)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    other.load_state_dict(READ[suffix](target))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("suffix", WRITE)
def test_a_state_dict_becomes_params_and_buffers(tmp_path, suffix):
    model = network()
    source, target = tmp_path / f"a{suffix}", tmp_path / "b.ckpt"
    WRITE[suffix](dict(model.state_dict()), source)
    pt.convert(source, target)
    tree = pt.load(target)
    expected = state_of(model)
    got = {"params": dict(tree["params"]), "buffers": dict(tree["buffers"])}
    assert tree_digest(got) == tree_digest(
        {"params": dict(expected.params), "buffers": dict(expected.buffers)}
    )


@pytest.mark.parametrize("suffix", READ)
def test_all_tensors_of_a_state_there_and_back(tmp_path, suffix):
    state = state_of(network())
    pt.save(tmp_path / "a.ckpt", state)
    pt.convert(tmp_path / "a.ckpt", tmp_path / f"b{suffix}", only="{params,opt_state}/**")
    pt.convert(tmp_path / f"b{suffix}", tmp_path / "c.ckpt")
    back = pt.load(tmp_path / "c.ckpt")
    assert set(back) == {"params", "opt_state"}
    moved = pt.load_part(tmp_path / "c.ckpt", state_of(network()), only="{params,opt_state}/**")
    assert tree_digest(moved) == tree_digest(state)


def test_ties_dtypes_and_names(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    tree = {"params": {"a": w, "b": w, "c": torch.ones(2, dtype=torch.bfloat16)}}
    pt.save(tmp_path / "a.ckpt", tree)
    pt.convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", rename={"?": "model.?"})
    found = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["model.a"], w)
    assert torch.equal(found["model.b"], w)
    assert found["model.c"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="numpy has no torch.bfloat16, as c is"):
        pt.convert(tmp_path / "a.ckpt", tmp_path / "b.npz")
    pt.convert(tmp_path / "a.ckpt", tmp_path / "b.npz", dtype=torch.float16)
    assert np.load(tmp_path / "b.npz")["a"].dtype == np.float16
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.npz", "b.safetensors"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")  # before torch refuses it
@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_is_never_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"w": Evil()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt"):
        pt.convert(tmp_path / "a.pt", tmp_path / "b.ckpt")
    np.savez(tmp_path / "a.npz", w=np.array([Evil()], dtype=object))
    with pytest.raises(CheckpointError, match="a.npz"):
        pt.convert(tmp_path / "a.npz", tmp_path / "b.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "a.pt"]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".ckpt"])
def test_what_is_no_such_file_is_a_clear_error(tmp_path, suffix):
    source = tmp_path / f"a{suffix}"
    for content in (b"", b"nonsense" * 100):
        source.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"a{suffix}"):
            pt.convert(source, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="No such file"):
        pt.convert(tmp_path / f"none{suffix}", tmp_path / "b.ckpt")
    with pytest.raises(ConfigurationError, match=".onnx"):
        pt.convert(source, tmp_path / "b.onnx")


def test_a_whole_module_is_refused_with_advice(tmp_path):
    torch.save(network(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"Save its state_dict\(\) alone"):
        pt.convert(tmp_path / "a.pt", tmp_path / "b.ckpt")


# ── Lightning ─────────────────────────────────────────────────────────────────────────────────────


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_goes_on_from_a_lightning_checkpoint_bit_for_bit(tmp_path, amsgrad):
    model = network()
    torch_optimizer = torch.optim.AdamW(model.parameters(), 0.01, amsgrad=amsgrad, fused=True)
    batches = torch.randn(6, 5, 3).unbind()
    train(model, torch_optimizer, batches[:3])
    torch.save(  # the keys of a checkpoint of Lightning 2
        {
            "epoch": 1,
            "global_step": 3,
            "pytorch-lightning_version": "2.6.0",
            "state_dict": model.state_dict(),
            "loops": {},
            "callbacks": {},
            "optimizer_states": [torch_optimizer.state_dict()],
            "lr_schedulers": [],
            "hyper_parameters": {"lr": 0.01},
        },
        tmp_path / "lightning.ckpt",
    )
    pt.convert(tmp_path / "lightning.ckpt", tmp_path / "start.ckpt")
    optimizer = pt.optim.adamw(0.01, amsgrad=amsgrad)
    fresh = state_of(network(), optimizer)
    state = pt.load_part(tmp_path / "start.ckpt", fresh, only="{params,buffers,opt_state}/**")
    assert int(pt.load(tmp_path / "start.ckpt", only="step")["step"]) == 3
    apply, _, _ = pt.functional(network())

    def loss(params, buffers, x, key):
        out, buffers = apply(params, buffers, x)
        return out.pow(2).mean(), pt.Aux(buffers)

    step = pt.train_step(loss, optimizer)
    for x in batches[3:]:
        state = step(state, x)
    train(model, torch_optimizer, batches[3:])
    for name, value in model.state_dict().items():
        assert torch.equal({**state.params, **state.buffers}[name], value), name


OPTIMIZERS = {
    "AdamW": (pt.optim.adamw(0.01), torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "AMSGrad": (
        pt.optim.adam(0.01, amsgrad=True),
        torch.optim.Adam,
        {"lr": 0.01, "amsgrad": True, "fused": True},
    ),
    "in a chain": (
        pt.optim.chain(pt.optim.clip_by_global_norm(1e9), pt.optim.adamw(0.01)),
        torch.optim.AdamW,
        {"lr": 0.01, "fused": True},
    ),
    "momentum": (
        pt.optim.sgd(0.1, momentum=0.9),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "fused": True},
    ),
    "SGD": (pt.optim.sgd(0.1), torch.optim.SGD, {"lr": 0.1}),
    "RMSprop": (pt.optim.rmsprop(0.01), torch.optim.RMSprop, {"lr": 0.01}),
    "from torch": (
        pt.optim.from_torch(torch.optim.AdamW, lr=0.01),
        torch.optim.AdamW,
        {"lr": 0.01},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_torch_loop_goes_on_from_a_file_for_lightning_bit_for_bit(tmp_path, name):
    optimizer, kind, options = OPTIMIZERS[name]
    apply, _, _ = pt.functional(network())

    def loss(params, buffers, x, key):
        out, buffers = apply(params, buffers, x)
        return out.pow(2).mean(), pt.Aux(buffers)

    step, state = pt.train_step(loss, optimizer), state_of(network(), optimizer)
    batches = torch.randn(6, 5, 3).unbind()
    for x in batches[:3]:
        state = step(state, x)
    state = state.replace(cursor=state.cursor.replace(epoch=torch.tensor(2)))
    pt.save(tmp_path / "ours.ckpt", state)
    make = functools.partial(kind, **options)
    pt.convert(tmp_path / "ours.ckpt", tmp_path / "theirs.ckpt", lightning=True, optimizer=make)
    content = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (2, 3)
    model = network()
    model.load_state_dict(content["state_dict"])
    torch_optimizer = make(model.parameters())
    torch_optimizer.load_state_dict(content["optimizer_states"][0])
    train(model, torch_optimizer, batches[3:])
    for x in batches[3:]:
        state = step(state, x)
    for path, value in model.state_dict().items():
        assert torch.equal({**state.params, **state.buffers}[path], value), path


def test_to_lightning_with_other_names_and_back(tmp_path):
    optimizer = pt.optim.adamw(0.01)
    state = state_of(network(), optimizer)
    _, opt_state = optimizer.update(state.params, state.opt_state, state.params)
    state = state.replace(opt_state=opt_state)
    pt.save(tmp_path / "ours.ckpt", state)
    arguments = ["--rename", "**=model.**", "--optimizer", "AdamW(lr=0.02, betas=(0.5, 0.9))"]
    command = ["convert", str(tmp_path / "ours.ckpt"), str(tmp_path / "theirs.ckpt"), "--lightning"]
    assert main([*command, *arguments]) == 0
    content = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"model.{name}" for name in network().state_dict()}
    group = content["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["betas"]) == (0.02, (0.5, 0.9))
    back = {"model.**": "**"}
    pt.convert(tmp_path / "theirs.ckpt", tmp_path / "again.ckpt", rename=back)
    again = pt.load_part(tmp_path / "again.ckpt", state, only="{params,buffers,opt_state}/**")
    assert tree_digest(again) == tree_digest(state)


def test_what_a_file_for_lightning_cannot_have(tmp_path):
    state = state_of(network(), pt.optim.sgd(0.1, momentum=0.9))
    source, target = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    pt.save(source, state.replace(cursor=state.cursor.replace(offset=torch.tensor(5))))
    with (
        pytest.warns(UserWarning, match="middle of an epoch"),
        pytest.warns(UserWarning, match="optimizer's state is left out"),
    ):
        pt.convert(source, target, lightning=True)
    assert torch.load(target, weights_only=True)["optimizer_states"] == []
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    with (
        pytest.warns(UserWarning, match="middle of an epoch"),
        pytest.raises(CheckpointError, match="Adam remembers (step|exp_avg) of 0"),
    ):
        pt.convert(source, target, lightning=True, optimizer=adam)
    pt.save(source, {"params": dict(state.params)})
    with pytest.raises(CheckpointError, match="no optimizer states"):
        pt.convert(source, target, lightning=True, optimizer=adam)
    wrong = [
        {"optimizer": adam},
        {"lightning": True, "only": "params/**"},
        {"lightning": True, "compression": "zstd"},
        {"lightning": True, "optimizer": functools.partial(torch.optim.Adam, speed=1)},
    ]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            pt.convert(source, target, **options)
    with pytest.raises(ConfigurationError):
        pt.convert(source, tmp_path / "b.npz", lightning=True)
    command = ["convert", str(source), str(target), "--lightning", "--optimizer"]
    for text in ("Adam(0.1)", "Adam", "Adam(lr=", "Optimiser(lr=1)", "Adam(lr=print())"):
        assert main([*command, text]) == 2


def test_an_optimizer_that_cannot_be_mapped_is_left_out_with_a_warning(tmp_path):
    model = network()
    content = {"state_dict": model.state_dict(), "global_step": 1, "optimizer_states": [{}, {}]}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="there are 2 optimizers"):
        pt.convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert set(pt.load(tmp_path / "b.ckpt")) == {"params", "buffers", "step"}


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_of_another_model_by_patterns(tmp_path):
    pretrained = network()
    pt.save(tmp_path / "a.ckpt", state_of(pretrained))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = network()
            self.head = nn.Linear(2, 7)

    fresh = state_of(Model().bfloat16())
    before = tree_digest(fresh)
    state = pt.load_part(
        tmp_path / "a.ckpt",
        fresh,
        only="{params,buffers}/backbone.**",
        rename={"params/**": "params/backbone.**", "buffers/**": "buffers/backbone.**"},
    )
    assert tree_digest(fresh) == before
    assert tree_digest(state.replace(params=fresh.params, buffers=fresh.buffers)) == before
    for name, value in {**state.params, **state.buffers}.items():
        if name.startswith("backbone."):
            old = pretrained.state_dict()[name.removeprefix("backbone.")]
            assert torch.equal(value, old.to(value.dtype)), name
        else:
            assert value is fresh.params[name]
    with pytest.raises(CheckpointError, match="head.weight"):
        pt.load_part(
            tmp_path / "a.ckpt", fresh, only="params/**", rename={"params/**": "params/backbone.**"}
        )


def test_what_does_not_fit_is_refused():
    tree = {"w": torch.zeros(2), "n": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"w is float32\[3\], and w is float32\[2\]"):
        pt.load_part({"w": torch.zeros(3)}, tree)
    with pytest.raises(CheckpointError, match=r"n is float32\[2\], and n is int64\[2\]"):
        pt.load_part({"n": torch.zeros(2)}, tree)
    with pytest.raises(CheckpointError, match="it has a.w; the tree has"):
        pt.load_part({"a.w": torch.zeros(2)}, tree)
    with pytest.raises(PatternError, match="'b.*' of rename matches no leaf"):
        pt.load_part({"a.w": torch.zeros(2)}, tree, rename={"b.*": "*"})
    with pytest.raises(PatternError, match="same wildcards"):
        pt.load_part({"a.w": torch.zeros(2)}, tree, rename={"a.*": "w"})
    with pytest.raises(PatternError, match="both renamed to w"):
        pt.load_part({"a.w": torch.zeros(2), "w": torch.ones(2)}, tree, rename={"a.*": "*"})


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_one_leaf_is_read_without_the_others(tmp_path, compression):
    path = tmp_path / "a.ckpt"
    big = torch.zeros(1_000_000)
    tree = {"big": big, "w": torch.arange(3), "text": "ä", "none": None, "tied": big, "n": 5}
    pt.save(path, tree, metadata={"note": 1}, compression=compression)
    index = pt.read_index(path)
    with pt.open_checkpoint(path) as leaves:
        assert sorted(leaves) == ["big", "n", "text", "tied", "w"]
        assert leaves["text"] == "ä"
        assert leaves["n"] == 5
        assert torch.equal(leaves["tied"], big)
        assert leaves.metadata["note"] == 1
    entry = next(entry for entry in index.entries if entry.path == ("big",))
    content = bytearray(path.read_bytes())
    content[index.data_offset + entry.offset] ^= 1
    path.write_bytes(content)
    with pt.open_checkpoint(path) as leaves:
        assert torch.equal(leaves["w"], torch.arange(3))  # the damage elsewhere is not even read
        with pytest.raises(CheckpointError, match="big.*damaged"):
            leaves["tied"]
        with pytest.raises(KeyError):
            leaves["nothing"]
    with pytest.raises(CheckpointError, match="was closed"):
        leaves["w"]


def test_dtype_on_load(tmp_path):
    path = tmp_path / "a.ckpt"
    pt.save(path, {"w": torch.tensor([1.5, 2.5]), "n": torch.arange(3)})
    found = pt.load(path, dtype=torch.bfloat16)
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [1.5, 2.5]
    assert found["n"].dtype == torch.int64
    assert pt.load(path, device="meta")["w"].is_meta


# ── The command ───────────────────────────────────────────────────────────────────────────────────


def test_the_command(tmp_path, capsys):
    pt.save(tmp_path / "a.ckpt", state_of(network()))
    a, b, c = (str(tmp_path / name) for name in ("a.ckpt", "b.safetensors", "c.ckpt"))
    assert main(["convert", a, b, "--dtype", "float16"]) == 0
    assert safetensors.torch.load_file(b)["0.weight"].dtype == torch.float16
    assert main(["convert", b, c, "--rename", "0.*=encoder.*", "--rename", "1.*=norm.*"]) == 0
    assert "b.safetensors -> " in capsys.readouterr().out
    assert "encoder.weight" in pt.load(c)["params"]
    assert "norm.running_mean" in pt.load(c)["buffers"]
    pt.save(tmp_path / "run" / "step_00000007.ckpt", state_of(network()))
    assert main(["convert", str(tmp_path / "run"), b]) == 0
    assert "step_00000007.ckpt -> " in capsys.readouterr().out
    assert main(["convert", a, str(tmp_path / "x.onnx")]) == 2
    assert main(["convert", a, b, "--rename", "nonsense"]) == 2


def test_verify_repairs_a_directory(tmp_path, capsys):
    for step in (1, 2):
        store.add(tmp_path, step, {"w": torch.ones(3)}, metadata={})
    path = tmp_path / "step_00000002.ckpt"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    assert "set aside" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0
    assert (tmp_path / "LATEST").read_text() == "step_00000001.ckpt\n"
