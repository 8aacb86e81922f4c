"""Tests and programs in the manner of Lightning's own, under ``python -m puretrain.lightning``.

They import ``pytorch_lightning`` and know nothing of us. They run in a process of their own, since
there ``pytorch_lightning`` is puretrain's.
"""

import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent / "programs"


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("pl_*.py")))
def test_all_of_a_file_pass(name):
    command = [sys.executable, "-m", "puretrain.lightning", "-m", "pytest", "-q", "--tb=short"]
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "-W", "ignore", "--rootdir", str(HERE)]
    process = subprocess.run(
        [*command, *options, "-o", "python_files=pl_*.py", str(HERE / name)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=HERE,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout
    assert " skipped" not in process.stdout
