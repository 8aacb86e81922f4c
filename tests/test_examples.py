"""The examples, run as a reader runs them, only shorter."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import forking

import puretrain as pt
from puretrain.cli import main

ROOT = Path(__file__).parents[1]


def start(name, *options):
    return forking.start(f"examples/{name}.py", *options, cwd=ROOT)


def output(process, status=0):
    done = process.finished(120)
    assert done.returncode == status, done.stderr
    return done.stdout


def found(pattern, text):
    return re.search(pattern, text)[1]


def test_digits_learns_and_resumes_after_ctrl_c(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    first = start("digits", "--epochs", 6, "--directory", stopped)
    while not list(stopped.glob("*.ckpt")):  # it writes one in the third epoch
        assert first.poll() is None, first.errors()
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    output(first, status=130)
    second = start("digits", "--epochs", 6, "--directory", straight)
    resumed = output(start("digits", "--epochs", 6, "--directory", stopped, "--resume"))
    out = output(second)
    assert float(found(r"test accuracy +([0-9.]+)%", out)) >= 97
    assert found(r"state +(\w{32})", out) == found(r"state +(\w{32})", resumed)
    assert list(straight.glob("events.out.tfevents.*"))


def test_digits_runs_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert (
        main(["fit", str(ROOT / "examples/digits.py"), "--epochs=1", f"--directory={tmp_path}"])
        == 0
    )
    assert re.search(r"step 24, epoch 1: .*val/accuracy", capsys.readouterr().out)
    sys.modules.pop("digits")


def test_the_learning_rate_of_digits_is_found(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = str(ROOT / "examples/digits.py")
    options = ["--updates", "30", "--min", "1e-4", "--max", "1", "--json"]
    assert main(["lr-find", path, *options]) == 0
    assert 1e-4 < json.loads(capsys.readouterr().out)["suggestion"] < 1
    sys.modules.pop("digits")


def test_char_lm_learns_and_resumes(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    first = start("char_lm", "--steps", 6, "--directory", stopped)
    second = start("char_lm", "--steps", 14, "--directory", straight)
    bits = float(found(r"([0-9.]+) bits per byte", output(first)))
    resumed = output(start("char_lm", "--steps", 14, "--directory", stopped, "--resume"))
    out = output(second)
    assert found(r"state (\w{32})", out) == found(r"state (\w{32})", resumed)
    # Uniform guessing takes 8 bits, and knowing how often each byte occurs 4.9.
    assert 3 < float(found(r"([0-9.]+) bits per byte", out)) < bits < 8
    params = pt.load(pt.latest(straight), only="params/**")["params"]
    assert params["embedding.weight"].shape == (256, 128)
    assert "head.weight" not in params  # it is tied to the embedding


def test_raw_step_learns_and_is_thirty_lines():
    assert len((ROOT / "examples/raw_step.py").read_text().splitlines()) <= 30
    out = output(start("raw_step"))
    assert float(found(r"test accuracy ([0-9.]+)%", out)) > 93


def assert_is_a_picture(path):
    assert "</svg>" in path.read_text(encoding="utf-8")


def test_maml_learns_to_learn(tmp_path):
    picture = tmp_path / "maml.svg"
    out = output(start("maml", "--iterations", 120, "--picture", picture))
    assert_is_a_picture(picture)
    plain, learned = (
        [float(x) for x in found(rf"{name} +(.*)", out).split()]
        for name in ("trained on all at once", "learned to learn")
    )
    assert learned[5] < 0.7 * learned[0]
    assert learned[5] < 0.7 * plain[5]


def test_private_digits_are_read_and_wrong_labels_found(tmp_path):
    picture = tmp_path / "private.svg"
    out = output(start("private", "--steps", 60, "--epsilons", 1.0, 8.0, "--picture", picture))
    plain = float(found(r"not private +test accuracy ([0-9.]+)%", out))
    strict, loose = (float(x) for x in re.findall(r"epsilon.*accuracy ([0-9.]+)%", out))
    assert strict < loose < plain
    assert loose > 80
    assert int(found(r"influence: (\d+) of 70", out)) > 40  # at random it would be 3 or 4
    assert_is_a_picture(picture)


def test_curvature_finds_the_edge_of_stability(tmp_path):
    picture = tmp_path / "curvature.svg"
    out = output(start("curvature", "--steps", 300, "--picture", picture))
    assert_is_a_picture(picture)
    values = re.findall(r"eigenvalue +([0-9.]+), 2 / rate +([0-9.]+)", out)
    assert len(values) == 3
    for value, edge in values[1:]:  # the two larger rates have come there
        assert 0.9 < float(value) / float(edge) < 1.3
    assert float(found(r"two first weights: ([0-9.]+)", out)) > 0.05


def test_ensemble_sweeps_and_draws(tmp_path):
    picture = tmp_path / "sweep.svg"
    short = ("--members", 6, "--epochs", 4)
    first = start("ensemble", *short, "--picture", picture)
    second = start("ensemble", *short, "--population")
    out = output(first)
    assert len(re.findall(r"^ +\d+ +[0-9.]+ +[0-9.]+ +(?:\d+|-) ", out, flags=re.MULTILINE)) == 6
    assert float(found(r"best member +\d+, test accuracy ([0-9.]+)%", out)) > 90
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert float(found(r"voting: ([0-9.]+)%", output(second))) > 90
