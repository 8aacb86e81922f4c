"""The blocks of Python on the pages run, one after the other, each page in an empty folder."""

import os
import pathlib
import re

import pytest
import torch
from torch.nn.functional import mse_loss

import puretrain as pt

ROOT = pathlib.Path(__file__).parents[1]
ELSEWHERE = {"replay.md"}  # a program and its commands: tests/test_replay.py


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield "\n" * text[: found.start(1)].count("\n") + found[1]  # so that its lines are right


def run_page(page, **given):
    names = {"__name__": page.stem, **given}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    return names


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name not in ELSEWHERE and any(blocks(page))]


@pytest.fixture
def given():
    """What the line at the top of the README speaks of: a step, a state and a batch."""

    def loss(params, buffers, batch, key):
        return mse_loss(params["w"], batch)

    optimizer = pt.optim.sgd(0.1)
    params = {"w": torch.zeros(2)}
    return {
        "state": pt.TrainState.create(params, None, optimizer, key=pt.random.key(0)),
        "step": pt.train_step(loss, optimizer),
        "batch": torch.ones(2),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(page, **given)
    if page.name == "checkpoints.md":
        entries = [f"step_000000{step}.ckpt" for step in (10, 20, 30)]
        assert sorted(os.listdir("runs/a")) == ["LATEST", *entries]
    if page.name == "index.md":
        assert int(names["state"].step) == 1


def test_the_reader_of_the_format_page_reads(given, tmp_path):
    read = run_page(ROOT / "docs" / "checkpoint-format.md")["read"]
    path = tmp_path / "a.ckpt"
    params = {"w": torch.arange(6.0).reshape(2, 3), "deep": {"list": [torch.ones(2), 7, "x", None]}}
    pt.save(path, params)
    found = read(path)
    assert found["w"].tolist() == params["w"].tolist()
    assert found["deep"]["list"][0].tolist() == [1.0, 1.0]
    assert found["deep"]["list"][1:] == [7, "x", None]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read(path)
