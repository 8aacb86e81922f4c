"""``puretrain convert``: from and to other people's files."""

from __future__ import annotations

import argparse
import ast
import functools
from typing import Any

import torch

from puretrain.checkpoint import convert
from puretrain.checkpoint.lightning import TorchOptimizer
from puretrain.checkpoint.places import is_url, shown
from puretrain.cli.checkpoints import checkpoint_at
from puretrain.cli.output import printable, write, write_json
from puretrain.cli.parsing import add_command
from puretrain.errors import ConfigurationError

__all__ = ["add_commands"]

_CONVERT = """\
Write a checkpoint in another format. The suffixes say which: .ckpt (ours; also Lightning's, to
read), .safetensors, .npz, and .pt, .pth or .bin for state dicts of torch.save. The other formats
get params and buffers, or with --only the leaves that match. With --lightning B is a checkpoint
from which Lightning goes on. Nothing in a file is run or imported.
"""
_CONVERT_EXAMPLES = """\
examples:
  puretrain convert runs/digits/step_00000100.ckpt digits.safetensors
  puretrain convert lightning.ckpt start.ckpt
  puretrain convert a.ckpt b.ckpt --lightning --optimizer 'AdamW(lr=3e-4)'
  puretrain convert m.safetensors a.ckpt --rename 'enc.**=params/backbone.**'
"""
_DTYPES = {"float16", "bfloat16", "float32", "float64"}


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "convert",
        _convert,
        "from and to safetensors, torch, Lightning and numpy",
        _CONVERT,
        _CONVERT_EXAMPLES,
    )
    parser.add_argument(
        "source", metavar="A", help="what to read; a directory: its newest good one"
    )
    parser.add_argument("target", metavar="B", help="what to write")
    parser.add_argument("--only", metavar="PATTERN", help="only the leaves whose paths match")
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="PATTERN=PATTERN",
        help="other names for the leaves that match; may be repeated",
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="of floating-point tensors")
    parser.add_argument("--compression", choices=["zstd"], help="compress B, a .ckpt")
    parser.add_argument("--lightning", action="store_true", help="write B, a .ckpt, for Lightning")
    parser.add_argument(
        "--optimizer",
        metavar="NAME(lr=…)",
        help="for Lightning: the optimizer of torch that its module makes",
    )


def _optimizer(text: str | None) -> TorchOptimizer | None:
    """What makes the optimizer that a call such as ``AdamW(lr=3e-4)`` names; nothing is run."""
    if text is None:
        return None
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("it is no call with named arguments")
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigurationError(
            f"--optimizer takes a call such as 'AdamW(lr=3e-4)', not {text!r}: {error}"
        ) from None
    found = getattr(torch.optim, call.func.id, None)
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise ConfigurationError(
            f"torch.optim has no optimizer of the name {call.func.id!r}; give "
            "one of its classes, such as AdamW"
        )
    return functools.partial(found, **named)


def _convert(options: argparse.Namespace) -> int:
    rename = {}
    for text in options.rename:
        pattern, equals, target = text.partition("=")
        if not equals:
            raise ConfigurationError(
                f"--rename takes PATTERN=PATTERN, such as 'encoder.**=params/**', not {text!r}"
            )
        rename[pattern] = target
    given = options.source
    source = given if is_url(given) else checkpoint_at(given)
    convert(
        source,
        options.target,
        only=options.only,
        rename=rename,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        compression=options.compression,
        lightning=options.lightning,
        optimizer=_optimizer(options.optimizer),
    )
    if options.json:
        write_json({"source": source, "target": options.target})
    else:
        write(printable(f"{shown(source)} -> {options.target}"))
    return 0
