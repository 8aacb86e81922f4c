"""``puretrain completion``, in the shells themselves."""

import shutil
import subprocess

import pytest

from puretrain.cli import main


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Write the script of a shell, in a folder with two files and a directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "runs").mkdir()

    def script(shell):
        assert main(["completion", shell]) == 0
        path = tmp_path / "completion"
        path.write_text(capsys.readouterr().out)
        return path

    return script


WORDS = [
    (["verif"], {"verify"}),
    (["re"], {"replay", "report"}),
    (["lr-find", "--up"], {"--updates"}),
    (["new", "--style", ""], {"native", "lightning"}),
    (["fit", "tr"], {"train.py"}),
    (["replay", "r"], {"runs"}),
    (["completion", "z"], {"zsh"}),
]


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return {line.split("\t")[0].strip().rstrip("/") for line in done.stdout.splitlines()} - {""}


def test_bash_completes(script):
    path = script("bash")
    for words, expected in WORDS:
        found = ask(
            "bash",
            "--norc",
            "-c",
            'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            '$(complete -p puretrain | sed "s/.*-F \\([^ ]*\\).*/\\1/") puretrain; '
            'printf "%s\\n" "${COMPREPLY[@]}"',
            *("bash", path, "puretrain", *words),
        )
        assert found == expected, words


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(script):
    path = script("fish")
    for words, expected in WORDS:
        line = " ".join(["puretrain", *words])
        assert ask("fish", "-N", "-c", f"source {path}; complete -C '{line}'") == expected, words


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(script, tmp_path):
    script("zsh").rename(tmp_path / "_puretrain")
    read = "fpath+=$1; autoload -Uz compinit; compinit -D -u; autoload +X _puretrain; "
    found = ask("zsh", "-f", "-c", read + "echo ${_comps[puretrain]}", "zsh", tmp_path)
    assert found == {"_puretrain"}
