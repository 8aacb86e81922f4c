"""The page about a run: complete, whole, and in need of nothing else."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import puretrain as pt
from puretrain.cli import main
from puretrain.errors import ConfigurationError

pytest.importorskip("matplotlib", reason="the report is drawn with matplotlib")

VOID = {"meta", "br", "hr", "img", "link"}


class Checker(HTMLParser):
    """Collects the text, and what does not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def make(directory, diverge=False, lr=0.1):
    def loss(params, buffers, batch, key):
        value = ((batch - params["w"]) ** 2).mean()
        spoiled = torch.where(batch.sum() > 200, math.nan, 1.0) if diverge else 1.0
        return value * spoiled, pt.Aux(metrics={"a<b>&": value.sqrt()})

    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=lr)
    return pt.Run(
        state=pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0)),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches(torch.arange(48.0).reshape(16, 3), 2),
        epochs=2,
        reducers=[pt.lr_monitor()],
        validation=pt.Validation(
            pt.eval_step(lambda params, buffers, batch, key: {"loss": params["w"].sum()}),
            pt.batches(torch.ones(2, 3), 2),
        ),
        observers=[pt.journal(directory, every=4), pt.checkpoints(directory, every=6, keep=None)],
        directory=directory,
    )


def page_of(directory, tmp_path):
    path = tmp_path / "page.html"
    pt.replay.write_report(pt.open_run(directory), path)
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    assert not checker.wrong
    return text, " ".join(" ".join(checker.text).split()), checker.attributes


def drawings(text):
    """The drawings of the page by their titles, parsed as XML."""
    found = re.findall(r"<figcaption>(.*?)</figcaption>\s*(<svg.*?</svg>)", text, flags=re.DOTALL)
    return {title: ElementTree.fromstring(svg) for title, svg in found}


def test_the_page_has_all_of_the_run(tmp_path):
    make(tmp_path / "run").fit()
    text, words, _ = page_of(tmp_path / "run", tmp_path)
    titles = [*drawings(text)]
    assert titles == [
        "loss", "a&lt;b&gt;&amp;", "learning rate", "Checkpoints and restarts, by step",
    ]  # fmt: skip
    for needed in ("train/loss", "val/loss", torch.__version__, "settings/threads", "finished"):
        assert needed in words
    assert "a<b>&" not in text
    assert "restarts 0" in words


def test_the_page_needs_nothing_else_and_follows_the_scheme(tmp_path):
    make(tmp_path / "run").fit()
    text, _, attributes = page_of(tmp_path / "run", tmp_path)
    assert "<script" not in text
    assert "@import" not in text
    names = {name for _, name, _ in attributes}
    assert "src" not in names
    links = [value for _, name, value in attributes if name in ("href", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    # every colour is one of the page's, which are defined for light and dark
    body = text.partition("</style>")[2]
    assert not re.search(r"(?:fill|stroke): ?#[0-9a-f]{6}", body)
    light, dark = (
        set(re.findall(r"(--[\w-]+):", part))
        for part in text.partition("</style>")[0].split("@media (prefers-color-scheme: dark)")
    )
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= light
    assert used <= dark
    ids = re.findall(r' id="([^"]+)"', body)
    assert {link[1:] for link in links} <= set(ids)


def test_restarts_and_what_was_taken_again(tmp_path):
    directory = tmp_path / "run"
    make(directory).fit()
    for path in directory.glob("*.ckpt"):
        if "00000006" not in path.name:
            path.unlink()
    make(directory).fit(resume=True)
    _, words, _ = page_of(directory, tmp_path)
    assert "restarts 1" in words
    assert "6 – 16 10" in words
    assert "came out differently" not in words


def test_a_restart_that_does_not_continue_is_told(tmp_path):
    directory = tmp_path / "run"
    make(directory).fit()
    for path in directory.glob("*.ckpt"):
        if "00000006" not in path.name:
            path.unlink()
    make(directory).replace(batches=pt.batches(torch.ones(16, 3), 2)).fit(resume=True)
    assert (
        "Step 7 was taken again after a restart and came out differently"
        in (page_of(directory, tmp_path)[1])
    )


def test_divergence_and_damage_are_told(tmp_path):
    directory = tmp_path / "run"
    make(directory, diverge=True).fit()
    path = directory / "run.journal"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    _, words, _ = page_of(directory, tmp_path)
    # the sums of the batches are 15, 51, 87, 123, 159, 195, 231, …; NaN stays in the parameters
    assert "The metric loss is not finite from step 7 on" in words
    assert "damaged bytes" in words


def test_a_long_run_gives_a_small_page_that_keeps_the_extremes(tmp_path):
    from puretrain.replay.report import _thinned

    steps = torch.arange(100_000).numpy()
    values = torch.zeros(100_000).numpy()
    values[77_777] = 5.0
    few, kept = _thinned(steps, values)
    assert len(few) <= 1200
    assert kept.max() == 5.0
    assert few[kept.argmax()] == 77_777


def test_the_command(tmp_path, capsys, monkeypatch):
    make(tmp_path / "run").fit()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert "report.html" in capsys.readouterr().out
    first = (tmp_path / "run" / "report.html").read_bytes()
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").read_bytes() == first
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    written = {"report": str(tmp_path / "run" / "report.html")}
    assert json.loads(capsys.readouterr().out) == written
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path)]) == 2


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    make(tmp_path / "run").fit()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'puretrain\[report\]'"):
        pt.replay.write_report(pt.open_run(tmp_path / "run"), Path(tmp_path, "page.html"))
