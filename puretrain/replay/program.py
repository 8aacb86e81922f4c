"""The program of a run: the Python file, what in it makes the run, and with which arguments.

A journal records it, so that a replay can make the run again. :func:`load_run` is also what the
command line makes runs with.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import sys
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

from puretrain.errors import ConfigurationError
from puretrain.run import Run

__all__ = ["Program", "caller_program", "load_run"]


class Program(NamedTuple):
    """What makes a run."""

    file: str
    """The absolute path of the Python file."""
    name: str | None = None
    """The function in it, or the variable; None: whatever is a run there."""
    arguments: Mapping[str, Any] = {}
    """What the function was called with."""
    left_out: tuple[str, ...] = ()
    """Arguments that are no plain values, and so are not recorded."""


def caller_program(frame: FrameType | None) -> Program | None:
    """The function at the top of a file that a frame is in, or called from, with its arguments.

    Args:
        frame: where to begin to look, from the inside out.

    Returns:
        None if no file is in sight, as in a notebook.
    """
    while frame is not None:
        file = frame.f_globals.get("__file__")
        if file is not None and frame.f_code.co_filename == file:
            path = str(Path(file).resolve())
            if frame.f_code.co_name == "<module>":
                return Program(path)
            function = frame.f_globals.get(frame.f_code.co_name)
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, FunctionType) and function.__code__ is frame.f_code:
                return _program_of(path, function.__name__, inspect.signature(function), frame)
        frame = frame.f_back
    return None


def _program_of(file: str, name: str, signature: inspect.Signature, frame: FrameType) -> Program:
    arguments, left_out = {}, []
    for key, parameter in signature.parameters.items():
        value = frame.f_locals.get(key)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and _is_plain(value):
            arguments[key] = value
        elif named and value is parameter.default:
            continue
        elif named or value:
            left_out.append(key)
    return Program(file, name, arguments, tuple(left_out))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return all(map(_is_plain, items))
    return (
        value is None
        or type(value) in (bool, float, str)
        or (type(value) is int and -(2**63) <= value < 2**63)
    )


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────


def load_run(
    target: str,
    given: Mapping[str, Any] | None = None,
    offered: Mapping[str, Any] | None = None,
) -> Run:
    """Make the run that a Python file describes.

    Args:
        target: ``FILE`` or ``FILE:NAME``: the file, and the variable or function in it; by default
            ``run``, or else the only variable that is a run.
        given: arguments for the function. Strings are read in the type of the parameter's default.
            ``epochs`` and ``steps`` replace the run's own if the function has no such parameter.
        offered: further arguments, for those parameters that the function has.

    Raises:
        ConfigurationError: there is no such file or name, or the arguments do not fit.
    """
    path, name = split_target(target)
    return make_run(path, name, given or {}, offered=offered)


def make_run(
    path: Path,
    name: str | None,
    given: Mapping[str, Any],
    recorded: Mapping[str, Any] | None = None,
    offered: Mapping[str, Any] | None = None,
) -> Run:
    """As :func:`load_run`, with the file and the name apart.

    ``recorded`` are further arguments, which have their types already.
    """
    made, given = _find(_execute(path), name, path), dict(given)
    parameters: Mapping[str, inspect.Parameter] = {}
    if not isinstance(made, Run):
        parameters = inspect.signature(made).parameters
        own = {key: given.pop(key) for key in [*given] if key in parameters}
        own = {key: _convert(key, own[key], parameters[key].default) for key in own}
        taken = {key: value for key, value in (offered or {}).items() if key in parameters}
        made = _call(made, {**(recorded or {}), **taken, **own}, path)
    fields: dict[str, Any] = {key: given.pop(key) for key in ("epochs", "steps") if key in given}
    if given:
        raise ConfigurationError(
            f"{path} can't take {', '.join(given)}: give its function a parameter of that name "
            f"(it has: {', '.join(parameters) or 'none'})"
        )
    return made.replace(**fields)


def split_target(target: str) -> tuple[Path, str | None]:
    """Split ``FILE:NAME`` or ``FILE``; the file must exist."""
    file, colon, name = target.rpartition(":")
    if colon and name.isidentifier() and not os.path.exists(target):
        return _existing_file(file), name
    return _existing_file(target), None


def _existing_file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"there is no file {name!r}; give a Python file that makes a Run")
    return path


def _execute(path: Path) -> ModuleType:
    """Execute a file as a module; workers import it by its name to unpickle what it defines."""
    sys.path.insert(0, str(path.resolve().parent))
    name = path.stem
    if name in sys.modules:
        name = f"puretrain_{name}"
    loader = SourceFileLoader(name, str(path))
    module = ModuleType(name)
    module.__file__, module.__loader__ = str(path), loader
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def _find(module: ModuleType, name: str | None, path: Path) -> Any:
    if name is None and not hasattr(module, "run"):
        runs = [key for key, value in vars(module).items() if isinstance(value, Run)]
        if len(runs) != 1:
            raise ConfigurationError(
                f"{path} has no `run`, and {len(runs) or 'no'} variables that are a Run: write a "
                "function `run()` that returns a puretrain.Run, or name another as FILE:NAME"
            )
        name = runs[0]
    name = name or "run"
    found = getattr(module, name, None)
    if not (isinstance(found, Run) or callable(found)):
        what = "has no" if found is None else f"has a {type(found).__name__} as"
        raise ConfigurationError(
            f"{path} {what} {name!r}; that must be a puretrain.Run or a function that returns one"
        )
    return found


def _call(function: Any, arguments: dict[str, Any], path: Path) -> Run:
    where = f"{function.__name__}() of {path}"
    parameters = inspect.signature(function).parameters
    for key, parameter in parameters.items():
        if (
            key not in arguments
            and parameter.default is parameter.empty
            and parameter.kind
            not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
        ):
            advice = "start it with --nproc N" if key == "mesh" else f"give --set {key}=VALUE"
            raise ConfigurationError(f"{where} needs a value for {key}: {advice}")
    unknown = [key for key in arguments if key not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigurationError(
            f"{where} has no {', '.join(unknown)} any more, which the run was made with: "
            "give the file as it was then, with --file"
        )
    made = function(**arguments)
    if not isinstance(made, Run):
        raise ConfigurationError(
            f"{where} must return a puretrain.Run, not a value of type {type(made).__name__}"
        )
    return made


def _convert(name: str, text: Any, default: Any) -> Any:
    """Read a value in the type of the parameter's default."""
    if not isinstance(text, str) or isinstance(default, (str, os.PathLike)):
        return text
    value: Any = text
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (bool, int, float)) and type(value) is not type(default):
        raise ConfigurationError(f"{name} is of type {type(default).__name__}, not {text!r}")
    return value
