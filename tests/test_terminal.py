"""What the commands print, in a real terminal of 80 columns and in a pipe; colours when wanted."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

import puretrain as pt

PROGRAM = """
import sys
from puretrain.cli import main
for line in sys.argv[1:]:
    print("$", line, flush=True)
    main(line.split())
"""
TRAIN = """
import torch
import puretrain as pt


def run(directory="runs/a", lr=0.1):
    def loss(params, buffers, batch, key):
        names = [f"a_rather_long_name_of_a_metric_{i}" for i in range(4)]
        return (params["w"] * batch).sum(), pt.Aux(metrics=dict.fromkeys(names, batch.sum()))

    optimizer = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=lr)
    params = {"w": torch.ones(3)}
    return pt.Run(
        state=pt.TrainState.create(params, None, optimizer, key=pt.random.key(0)),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches(torch.ones(6, 3), 2),
        epochs=2,
        observers=[pt.progress(), pt.journal(directory, every=1), pt.checkpoints(directory)],
        directory=directory,
    )
"""
LIGHTNING = """
import time
import torch
import puretrain.lightning as pl
from torch.utils.data import DataLoader


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("a_rather_long_name_of_a_metric", self.layer(batch).mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


loader = DataLoader(torch.ones(64, 2), 8)
trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, log_every_n_steps=1)
trainer.fit(Module(), loader, loader)
trainer.validate(Module(), loader)
"""
COMMANDS = [
    "fit train.py",
    "fit train.py --directory runs/b --set lr=0.2 --resume",
    "fit train.py",  # an error: there is a run
    "inspect runs/a --stats",
    "inspect deep.ckpt",
    "diff deep.ckpt other.ckpt",
    "verify damaged.ckpt deep.ckpt",
    "replay runs/a",
    "replay runs/a --file train.py --set lr=0.3",
    "bisect runs/a runs/b",
    "lr-find train.py --updates 10",
    "explain train.py",
    "inspect nowhere/in/a/directory/with/a/name/that/is/rather/long/for/a/name.ckpt",
]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    name = ".".join(["encoder", "layers", "11", "attention", "query", "projection", "weight"])
    pt.save(tmp_path / "deep.ckpt", {"params": {name: torch.ones(3, 1024)}})
    pt.save(tmp_path / "other.ckpt", {"params": {name: torch.zeros(3, 1024)}})
    content = bytearray((tmp_path / "deep.ckpt").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(content)
    return tmp_path


def environment(**given):
    unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    root = str(Path(pt.__file__).parents[1])
    return kept | {"PYTHONPATH": root, "TERM": "xterm-256color"} | given


def in_a_terminal(place, lines, program=PROGRAM, **given):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program, *lines],
        cwd=place,
        env=environment(**given),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def in_a_pipe(place, lines, **given):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines],
        cwd=place,
        env=environment(**given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def test_nothing_is_wider_than_a_terminal(place):
    written = in_a_terminal(place, COMMANDS)
    assert "Traceback" not in written
    assert "\x1b[1m" in written  # bold headers
    lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", written).split("\n")
    # A command to copy stays whole, and so does a word, however long: the name of a file, say.
    commands = ("$ ", "go on  ", "inspect  ", "command: ")
    ours = [line for line in lines if not line.startswith(commands)]
    wide = [line for line in ours if max(map(len, line.split("\r"))) > 80]
    assert wide == []
    assert len([line for line in lines if line.startswith("$ ")]) == len(COMMANDS)
    assert re.search(
        r"^puretrain: error: runs/a has the checkpoints .*\n  \S", written, re.MULTILINE
    )
    assert "first value that is not finite: none" in written  # explain goes beside an earlier run
    assert re.search(r"^DAMAGED  damaged.ckpt:.*\n  \S", written, re.MULTILINE)


def test_colours_are_off_when_asked(place):
    lines = ["fit train.py", "inspect deep.ckpt"]
    without = in_a_terminal(place, lines, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*[34]\d", without)
    dumb = in_a_terminal(place, [lines[0] + " --directory runs/b", lines[1]], TERM="dumb")
    assert "\x1b" not in dumb
    assert "\r" not in dumb
    assert "━" not in dumb


def test_a_pipe_gets_whole_lines_and_styles_only_when_forced(place):
    lines = ["fit train.py", "inspect runs/a", "diff deep.ckpt other.ckpt", "fit train.py"]
    plain = in_a_pipe(place, lines)
    assert "\x1b" not in plain
    (summary,) = re.findall(r"^step 6, epoch 2:  .*$", plain, re.MULTILINE)
    assert summary.count("a_rather_long_name") == 8
    assert re.search(
        r"^puretrain: error: .*--directory DIR \(--debug shows where\)$", plain, re.MULTILINE
    )
    (place / "runs").rename(place / "before")
    forced = in_a_pipe(place, lines, FORCE_COLOR="1")
    codes = set(re.findall(r"\x1b\[[?\d;]*[A-Za-z]", forced))
    assert codes == {"\x1b[1m", "\x1b[0m"}  # and no cursor that moves: there is none
    timeless = re.compile(r"\x1b\[\dm|\d\d:\d\d:\d\d|\d:\d\d\b")
    assert timeless.sub("", forced) == timeless.sub("", plain)


def test_a_bar_of_lightning_is_one_line(place):
    written = re.sub(r"\x1b\[\?\d+[lh]", "", in_a_terminal(place, [], program=LIGHTNING))
    left = [""]  # what stands in the terminal: a bar goes up a line and erases what is there
    for piece in re.split(r"(\n|\r|\x1b\[1A|\x1b\[2K)", written):
        if piece == "\n":
            left.append("")
        elif piece == "\x1b[1A":
            assert left.pop() == ""
        elif piece == "\x1b[2K":
            left[-1] = ""
        elif piece != "\r":
            left[-1] += piece
    assert max(map(len, left)) <= 80
    bars = [line.split(":")[0] for line in left if "it/s" in line]
    assert bars == ["Epoch 1", "Validating"]
    assert any("100%" in line and "8/8" in line and "…" not in line for line in left)
