"""``puretrain completion``: what lets a shell complete the commands and options."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from puretrain.cli.output import write
from puretrain.cli.parsing import add_command

__all__ = ["add_commands"]

_COMPLETION = """\
Print a script with which a shell completes the commands, options and files of puretrain. Make it
again after an update of puretrain.
"""
_EXAMPLES = """\
examples:
  puretrain completion bash > ~/.puretrain.bash
  puretrain completion zsh > ~/.zfunc/_puretrain
  puretrain completion fish > ~/.config/fish/completions/puretrain.fish

For bash, add the line `source ~/.puretrain.bash` to ~/.bashrc; for zsh, `mkdir -p ~/.zfunc` first
and add `fpath+=~/.zfunc; autoload -Uz compinit; compinit` to ~/.zshrc; fish finds it by itself.
"""
_FILES = {"A", "B", "CKPT", "FILE", "FILE[:NAME]"}  # metavars of arguments that are files
_DIRECTORIES = {"DIR", "RUN", "RUN_A", "RUN_B"}


def add_commands(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the command to the parser of the whole command line, which it prints a script of."""
    completion = add_command(
        commands,
        "completion",
        functools.partial(_completion, parser, commands),
        "print what completes commands in a shell",
        _COMPLETION,
        _EXAMPLES,
        json=None,
    )
    completion.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="which")


def _completion(parser: argparse.ArgumentParser, commands: Any, options: argparse.Namespace) -> int:
    import shtab

    summaries = {action.dest: action.help for action in commands._get_subactions()}
    for name, command in commands.choices.items():
        command.description = summaries[name]  # the whole one is too long for a list
        for action in command._actions:
            if action.metavar in _FILES:
                action.complete = shtab.FILE
            elif action.metavar in _DIRECTORIES:
                action.complete = shtab.DIRECTORY
    write(shtab.complete(parser, shell=options.shell))
    return 0
