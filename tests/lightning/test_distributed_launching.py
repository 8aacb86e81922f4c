"""How the processes of a run come to be, what comes back from them, and how a failure ends all."""

import os
import pathlib

import forking
import torch

PROGRAMS = pathlib.Path(__file__).parent / "distributed_programs"


def run(*command):
    """Run a program; all its processes must end long before the time limit of a collective."""
    return forking.run(*command, timeout=200)


def by_hand(epochs):
    """The training of ``spawning.py`` in one process; the order does not matter to its batches."""
    from torch.utils.data import DistributedSampler

    torch.manual_seed(2)
    layer = torch.nn.Linear(2, 1)
    data = torch.arange(24.0).reshape(12, 2) / 24
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for epoch in range(epochs):
        orders = []
        for rank in (0, 1):
            sampler = DistributedSampler(data, 2, rank, shuffle=True, seed=2)
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        for first in (0, 3):
            optimizer.zero_grad()
            for order in orders:
                x = data[order[first : first + 3]]
                ((layer(x) - 1).pow(2).mean() * 0.5).backward()
            optimizer.step()
    return layer


def test_new_processes_bring_back_what_they_have_found(tmp_path):
    done = run("-m", "puretrain.lightning", PROGRAMS / "spawning.py", tmp_path, "ddp_cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found["module"] == "puretrain.lightning"
    assert found["trained"]
    expected = by_hand(2)
    assert torch.equal(found["weights"]["layer.weight"], expected.weight)
    assert torch.equal(found["weights"]["layer.bias"], expected.bias)
    assert os.path.exists(found["best"])
    assert found["score"] == found["metrics"]["loss"]
    assert (found["epoch"], found["step"]) == (1, 4)
    assert os.listdir(tmp_path / "lightning_logs")[0] == os.path.basename(found["log_dir"])
    assert found["failed"] == 1
    assert "ValueError: the second process is broken" in found["error"]
    assert "in training_step" in found["error"]


def test_a_script_that_was_started_plainly_ends_when_one_process_fails(tmp_path):
    done = run("-m", "puretrain.lightning", PROGRAMS / "spawning.py", tmp_path, "script")
    assert done.returncode == 1
    assert "ValueError: the second process is broken" in done.stderr


def test_processes_of_torchrun_are_recognised(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = run(*torchrun, PROGRAMS / "external.py", tmp_path)
    assert done.returncode == 1
    assert "ValueError: the second machine is broken" in done.stderr
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [each["ranks"] for each in found] == [(0, 2), (1, 2)]
    for each in found:
        assert each["sizes"] == [2, 2, 2, 2]
        assert torch.equal(each["weights"]["layer.weight"], found[0]["weights"]["layer.weight"])
    torch.manual_seed(0)
    assert not torch.equal(found[0]["weights"]["layer.weight"], torch.nn.Linear(2, 1).weight)
