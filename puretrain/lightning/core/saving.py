"""Hyper-parameters as files: YAML, and the CSV of old versions."""

from __future__ import annotations

import ast
import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import yaml

from puretrain.lightning.utilities.cloud_io import get_filesystem
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.parsing import AttributeDict

__all__ = [
    "ALLOWED_CONFIG_TYPES",
    "CHECKPOINT_HYPER_PARAMS_KEY",
    "CHECKPOINT_HYPER_PARAMS_NAME",
    "CHECKPOINT_HYPER_PARAMS_TYPE",
    "PRIMITIVE_TYPES",
    "convert",
    "load_hparams_from_tags_csv",
    "load_hparams_from_yaml",
    "save_hparams_to_tags_csv",
    "save_hparams_to_yaml",
    "update_hparams",
]

PRIMITIVE_TYPES = (bool, int, float, str)
ALLOWED_CONFIG_TYPES = (AttributeDict, Mapping, Namespace)

CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

_TUPLE = "tag:yaml.org,2002:python/tuple"


class _Loader(yaml.SafeLoader):
    """Plain values and tuples; it never makes an object that a file names."""


class _Dumper(yaml.SafeDumper):
    """Plain values and tuples."""


def _load_tuple(loader: yaml.SafeLoader, node: Any) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _dump_tuple(dumper: yaml.SafeDumper, data: tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_sequence(_TUPLE, data)


_Loader.add_constructor(_TUPLE, _load_tuple)
_Dumper.add_representer(tuple, _dump_tuple)


def _plain(value: Any) -> Any:
    """Values that YAML has no word for, as those that it has."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, (list, set)):
        return type(value)(map(_plain, value))
    if type(value) not in PRIMITIVE_TYPES and isinstance(value, PRIMITIVE_TYPES):
        kind: Any = next(kind for kind in PRIMITIVE_TYPES if isinstance(value, kind))
        return kind(value)
    return value


def _place(file: str | os.PathLike[str]) -> tuple[str, Any]:
    """A file's path and file system; its folder must be there."""
    path = os.fspath(file)
    system = get_filesystem(path)
    folder = os.path.dirname(path) or "."
    if not system.isdir(folder):
        raise RuntimeError(f"Missing folder: {folder}.")
    return path, system


def save_hparams_to_yaml(
    config_yaml: str | os.PathLike[str],
    hparams: dict[str, Any] | Namespace | Any,
    use_omegaconf: bool = True,
) -> None:
    """Write hyper-parameters as YAML. A value that YAML can't say becomes the name of its type.

    Args:
        config_yaml: the file; its directory must exist.
        hparams: a dictionary, a Namespace or an OmegaConf container.
        use_omegaconf: whether to let OmegaConf, if installed, write its own containers.

    Raises:
        RuntimeError: the directory does not exist.
        TypeError: the hyper-parameters have no names.
    """
    path, system = _place(config_yaml)
    if use_omegaconf and (text := _omegaconf_text(hparams)) is not None:
        with system.open(path, "w", newline="") as file:
            file.write(text)
        return
    if isinstance(hparams, Namespace):
        hparams = vars(hparams)
    if not isinstance(hparams, Mapping):
        raise TypeError(f"hyper-parameters are a dictionary or a Namespace, not {type(hparams)}")
    allowed = {}
    for name, value in hparams.items():
        value = _plain(value)
        try:
            yaml.dump(value, Dumper=_Dumper)
        except yaml.YAMLError:
            rank_zero_warn(
                f"Skipping '{name}' parameter because it is not possible to safely dump to YAML."
            )
            value = type(value).__name__
        allowed[name] = value
    with system.open(path, "w", newline="") as file:
        yaml.dump(allowed, file, Dumper=_Dumper)


def _omegaconf_text(hparams: Any) -> str | None:
    """What OmegaConf writes for its own containers, None for anything else."""
    if not type(hparams).__module__.startswith("omegaconf"):
        return None
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(hparams, resolve=True))


def load_hparams_from_yaml(
    config_yaml: str | os.PathLike[str], use_omegaconf: bool = True
) -> dict[str, Any]:
    """Read hyper-parameters; none, and a warning, if there is no such file.

    Args:
        config_yaml: the file.
        use_omegaconf: accepted because programs pass it; the result is a dictionary.

    Raises:
        MisconfigurationException: the file is no YAML, or asks for objects of Python.
    """
    path = os.fspath(config_yaml)
    system = get_filesystem(path)
    if not system.exists(path):
        rank_zero_warn(f"Missing Tags: {path}.", category=RuntimeWarning)
        return {}
    with system.open(path, "r") as file:
        try:
            return yaml.load(file, Loader=_Loader) or {}
        except yaml.YAMLError as error:
            raise MisconfigurationException(
                f"{path} can't be read as plain YAML: {error}. Objects of Python are not "
                "restored from a file; write their values, and make the objects in __init__"
            ) from None


def save_hparams_to_tags_csv(
    tags_csv: str | os.PathLike[str], hparams: dict[str, Any] | Namespace
) -> None:
    """Write hyper-parameters as a table of key and value.

    Raises:
        RuntimeError: the directory does not exist.
    """
    path, system = _place(tags_csv)
    if isinstance(hparams, Namespace):
        hparams = vars(hparams)
    with system.open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["key", "value"])
        writer.writeheader()
        writer.writerows({"key": key, "value": value} for key, value in hparams.items())


def load_hparams_from_tags_csv(tags_csv: str | os.PathLike[str]) -> dict[str, Any]:
    """Read hyper-parameters from a table; none, and a warning, if there is no such file."""
    path = os.fspath(tags_csv)
    system = get_filesystem(path)
    if not system.exists(path):
        rank_zero_warn(f"Missing Tags: {path}.", category=RuntimeWarning)
        return {}
    with system.open(path, "r", newline="") as file:
        return {row["key"]: convert(row["value"]) for row in csv.DictReader(file)}


def convert(val: str) -> Any:
    """The value of a Python literal, or the text itself.

    >>> convert("[1, 2]"), convert("adam")
    ([1, 2], 'adam')
    """
    try:
        return ast.literal_eval(val)
    except (ValueError, SyntaxError):
        return val


def update_hparams(hparams: dict[str, Any], updates: Mapping[str, Any]) -> None:
    """Overwrite entries, inside nested dictionaries as well, without losing the others.

    >>> settings = {"a": 1, "b": {"c": 2, "d": 3}}
    >>> update_hparams(settings, {"b": {"c": 5}})
    >>> settings
    {'a': 1, 'b': {'c': 5, 'd': 3}}
    """
    for key, value in updates.items():
        if key in hparams and isinstance(hparams[key], dict) and isinstance(value, Mapping):
            update_hparams(hparams[key], value)
        else:
            hparams[key] = value
