"""The programs are run by tests, where ``pytorch_lightning`` is puretrain's."""

import sys

import pytest

collect_ignore = ["programs", "distributed_programs"]


@pytest.fixture(autouse=True)
def _warnings_appear_again():
    """What is warned of once in a process may be waited for in several tests."""
    for name, module in list(sys.modules.items()):
        if name.startswith("puretrain.lightning."):
            getattr(module, "_warnings", set()).clear()
