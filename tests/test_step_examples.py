"""The examples of compiled, composed and explained steps, and that the examples' models compile."""

import re
import shutil
import sys
from pathlib import Path

import forking
import pytest
import torch

import puretrain as pt
from puretrain.explain import read_explanations

ROOT = Path(__file__).parents[1]


def run(name, *options, cwd=ROOT):
    done = forking.run(ROOT / f"examples/{name}.py", *options, cwd=cwd, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="the example compiles C++, and there is no C++ compiler on this machine",
)
def test_compiled_makes_one_graph():
    out = run("compiled")
    assert "1001 calls, 1 graphs, 0 breaks, 0 recompiles" in out
    assert float(re.search(r"apart by at most (\S+) after", out)[1]) < 1e-3
    assert float(re.search(r"test accuracy ([0-9.]+)%", out)[1]) > 85


def test_composition_trains_each_variant(tmp_path):
    out = run("composition", "--epochs", 4, "--picture", tmp_path / "bars.svg")
    rows = dict(re.findall(r"^([\w ]+?)  +([0-9.]+)% +[0-9.]+%$", out, flags=re.MULTILINE))
    assert len(rows) == 7
    assert all(float(accuracy) > 30 for accuracy in rows.values())
    assert float(rows["plain"]) > 75
    assert "EMA teacher" in (tmp_path / "bars.svg").read_text()


def test_explain_finds_the_dead_units(tmp_path):
    out = run("explain", "--picture", "history.svg", cwd=tmp_path)
    assert re.search(r"^3 \(ReLU\) +\S+ +6[0-9]/64$", out, flags=re.MULTILINE)
    assert "0.weight" in (tmp_path / "history.svg").read_text()
    bad = read_explanations(tmp_path / "runs/explain/explained.jsonl")["dead/3 (ReLU)"]
    run("explain", "--lr", 0.05, cwd=tmp_path)
    good = read_explanations(tmp_path / "runs/explain-2/explained.jsonl")["dead/3 (ReLU)"]
    assert bad[-1] > 0.9
    assert good[-1] < 0.6


@pytest.mark.parametrize("name", ["digits", "char_lm"])
def test_the_models_of_the_examples_compile_without_a_break(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = __import__(name)
    this = example.run(batch_size=4)
    batch = next(this.batches.read(this.state.cursor)).batch
    compiled = pt.compiled(this.step, backend="eager")
    found, expected = compiled(this.state, batch), this.step(this.state, batch)
    for path, leaf in expected.params.items():
        torch.testing.assert_close(found.params[path], leaf, rtol=1e-3, atol=1e-4)
    assert len(compiled.report().graphs) == 1
    sys.modules.pop(name)
