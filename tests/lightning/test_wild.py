"""Tests and programs in the manner of Lightning's own, under ``python -m puretrain.lightning``.

They import ``pytorch_lightning`` and know nothing of us. They run in a process of their own, since
there ``pytorch_lightning`` is puretrain's.
"""

import pathlib

import forking
import pytest

HERE = pathlib.Path(__file__).parent / "programs"


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("pl_*.py")))
def test_all_of_a_file_pass(name):
    command = ["-m", "puretrain.lightning", "-m", "pytest", "-q", "--tb=short"]
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "-W", "ignore", "--rootdir", HERE]
    done = forking.run(
        *command, *options, "-o", "python_files=pl_*.py", HERE / name, cwd=HERE, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
