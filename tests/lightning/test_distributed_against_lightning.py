"""The same program in two processes, by this package and by the real one: the same bits."""

import pathlib
import subprocess
import sys

import pytest
import torch

real = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
if not int(real.__version__.split(".")[0]) >= 2:
    pytest.skip("pytorch-lightning 2 is compared with", allow_module_level=True)

PROGRAM = pathlib.Path(__file__).parent / "distributed_programs" / "compared.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    found = {}
    for package in ("ours", "real"):
        folder = tmp_path_factory.mktemp(package)
        done = subprocess.run(
            [sys.executable, str(PROGRAM), package, str(folder)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found[package] = [
            torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)
        ]
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["accumulated", "by hand", "with a sampler", "overfitted"])
def test_the_same_bits_in_each_process(name, rank, both):
    mine, theirs = (both[package][rank][name] for package in ("ours", "real"))
    assert mine["ranks"] == theirs["ranks"] == (rank, rank, 2)
    assert mine["seen"] == theirs["seen"]
    for path, value in theirs["state"].items():
        assert torch.equal(mine["state"][path], value), path
    if name == "overfitted":  # in 2.x the validation has its own data, as in no version before
        return
    for what in ("metrics", "tested", "score", "best"):
        assert mine[what] == theirs[what], what
    if rank == 0:  # the other one may look before the first has removed a file
        assert mine["files"] == theirs["files"]
