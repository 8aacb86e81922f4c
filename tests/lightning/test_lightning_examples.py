"""The Lightning examples, run as a reader runs them."""

import re
from pathlib import Path

import forking
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
    done = forking.run(ROOT / "examples" / f"lightning_{name}.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert least <= float(re.search(pattern, done.stdout)[1]) <= most
