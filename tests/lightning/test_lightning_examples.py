"""The Lightning examples, run as a reader runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "options", "pattern", "least", "most"),
    [
        ("digits", ["--max_epochs", "3"], r"test accuracy ([0-9.]+)%", 85, 100),
        ("gan", [], r"mean radius ([0-9.]+)", 0.7, 1.3),
        ("finetuning", [], r"other digits ([0-9.]+)%", 90, 100),
        ("rl", [], r"goes right from (\d) of 6", 5, 6),
    ],
)
def test_an_example_learns(name, options, pattern, least, most, tmp_path):
    out = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"lightning_{name}.py"), *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    ).stdout
    assert least <= float(re.search(pattern, out)[1]) <= most
