"""What all tests share: reproducible examples, and no test that leaves torch changed."""

import gc
import os

import hypothesis
import pytest

# Results are compared to the bit, also with those of other processes, and a sum in two threads has
# other bits than in one. Torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# The same examples on each run: a failure can be repeated, and a slow machine is no failure.
hypothesis.settings.register_profile("puretrain", deadline=None, derandomize=True)
hypothesis.settings.load_profile("puretrain")


def pytest_collection_finish():
    """All that was imported and collected is there to the end; no collection looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_cache_of_inductor(tmp_path_factory):
    """What inductor has compiled is kept for all tests of a session, and nowhere else."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(base / "inductor"))
        yield


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """Put torch's generator and defaults back, so that no test depends on the ones before it."""
    generator = torch.get_rng_state()
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_rng_state(generator)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
