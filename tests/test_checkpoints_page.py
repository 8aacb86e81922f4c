"""The blocks of Python in docs/checkpoints.md run, one after the other."""

import os
import pathlib
import re

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    names = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(PAGE), "exec"), names)
    entries = [f"step_000000{step}.ckpt" for step in (10, 20, 30)]
    assert sorted(os.listdir("runs/a")) == ["LATEST", *entries]
