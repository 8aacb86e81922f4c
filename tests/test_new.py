"""``puretrain new``: each project is made, tested and trained as its reader would do it."""

import json
import re

import forking
import pytest

from puretrain.cli import main

FILES = {".gitignore", "README.md", "pyproject.toml", "tests/test_train.py", "train.py"}


def run_in(place, *arguments):
    done = forking.run(*arguments, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=["native", "lightning"])
def project(request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "My Spirals", "--style", request.param]) == 0
    return tmp_path / "My Spirals", request.param, capsys.readouterr().out


def test_a_project_passes_its_tests_and_does_what_its_readme_says(project):
    place, style, out = project
    assert {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} == FILES
    assert 'name = "my-spirals"' in (place / "pyproject.toml").read_text()
    assert "4 passed" in run_in(place, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    readme = (place / "README.md").read_text()
    train, tests = re.findall(r"^    (.*)$", readme, flags=re.MULTILINE)
    assert tests == "python -m pytest"
    assert readme.startswith("# my-spirals\n")
    assert "cd 'My Spirals'" in out
    for command in (train, tests):
        assert re.search(rf"^t\w+ +\S*{re.escape(command)}$", out, flags=re.MULTILINE)
    if style == "native":
        assert train == "puretrain fit train.py"
        trained = run_in(place, "-m", "puretrain", "fit", "train.py", "--epochs", "2")
        assert "go on  " in trained
        assert list(place.glob("runs/first/events.out.tfevents.*"))
        resumed = run_in(place, "-m", "puretrain", "fit", "train.py", "--epochs", "3", "--resume")
        assert "step 60, epoch 3" in resumed
        again = run_in(place, "-m", "puretrain", "replay", "runs/first")
        assert "identical   for 60 steps" in again
        options = ("lr-find", "train.py", "--updates", "20", "--json")
        assert 1e-6 < json.loads(run_in(place, "-m", "puretrain", *options))["suggestion"] < 1
    else:
        assert train == "python train.py"
        assert "test accuracy" in run_in(place, "train.py", "--epochs", "1")
        (path,) = (place / "lightning_logs").rglob("last.ckpt")
        resumed = run_in(place, "train.py", "--epochs", "2", "--resume", str(path))
        assert "test accuracy" in resumed


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["new", str(tmp_path)]) == 0
    (tmp_path / "train.py").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "README.md").unlink()
    del before[tmp_path / "README.md"]
    capsys.readouterr()
    assert main(["new", str(tmp_path), "--style", "lightning"]) == 2
    told = capsys.readouterr().err
    assert "train.py" in told
    assert "nothing is overwritten" in told
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert main(["new", str(tmp_path / "notes.txt")]) == 2
    assert "notes.txt" in capsys.readouterr().err


def test_what_was_made_as_json(tmp_path, capsys):
    assert main(["new", str(tmp_path / "a"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made["files"]) == FILES
    assert made["style"] == "native"
