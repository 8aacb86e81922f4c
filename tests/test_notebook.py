"""The notebook of the examples: it runs, and the outputs in it are what it gives today."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import puretrain as pt

ROOT = Path(__file__).parents[1]
REFRESH = "python -m jupyter execute --inplace --NotebookClient.record_timing=False {}"


class Client(nbclient.NotebookClient):
    """Executes a notebook, and keeps every text that a display showed, also one replaced later."""

    def __init__(self, notebook):
        super().__init__(notebook, timeout=240)
        self.displayed = []

    def process_message(self, message, cell, index):
        if message["msg_type"] in ("display_data", "update_display_data"):
            assert list(message["content"]["data"]) == ["text/plain"]
            self.displayed.append(message["content"]["data"]["text/plain"])
        return super().process_message(message, cell, index)


def outputs(notebook):
    """The text below each cell, without times and without numbers that depend on the processor."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = []
    for cell in cells:
        text = "".join(out.get("text") or out["data"]["text/plain"] for out in cell.outputs)
        text = re.sub(r"\d+:\d\d", "TIME", text)
        texts.append(re.sub(r"(loss|accuracy) [\d.e-]+", r"\1 NUMBER", text))
    return texts


@pytest.fixture(scope="module")
def executed():
    kept = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    fresh = nbformat.from_dict(kept)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(pt.__file__).parents[1]))
        patch.delenv("NO_COLOR", raising=False)
        client = Client(fresh)
        client.execute()
    return nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4), fresh, client.displayed


def test_the_outputs_in_the_notebook_are_current(executed):
    kept, fresh, _ = executed
    found = outputs(fresh)
    assert found == outputs(kept), "run " + REFRESH.format("examples/tour.ipynb")
    text = "\n".join(found)
    assert text.count("the same to the bit: True") == 2
    assert "False" not in text
    assert "identical for 40 steps; difference: None" in text


def test_the_progress_bar_in_a_notebook(executed):
    _, fresh, displayed = executed
    assert "\x1b" not in "".join([*displayed, *outputs(fresh)])  # the kernel has FORCE_COLOR set
    endings = [
        text for text in displayed if re.fullmatch(r"finished after step \d+, \d:\d\d", text)
    ]
    assert len(endings) == 3
    bars = [text for text in displayed if text not in endings]
    assert len(bars) >= 3
    assert all(re.match(r"epoch \d  [━─]{8,40}  .\d/20  ", bar) for bar in bars)
    assert max(map(len, bars)) < 80
    # Nothing of a bar is left behind: each run shows one line there, how it ended.
    shown = [out for cell in fresh.cells for out in cell.get("outputs", []) if "data" in out]
    assert [out["data"]["text/plain"] for out in shown] == endings
