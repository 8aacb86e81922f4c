"""From and to other people's files: safetensors, torch.save, Lightning, numpy.

Nothing in a file is run or imported: pickles are read with torch's ``weights_only``, arrays without
objects.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from puretrain.checkpoint.file import load, read_index, save
from puretrain.checkpoint.format import MAGIC
from puretrain.checkpoint.lightning import TorchOptimizer, from_lightning, to_lightning
from puretrain.checkpoint.partial import renamed
from puretrain.checkpoint.places import Location, is_url, plain, reading, replacing, reported, shown
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import FrozenDict, match_paths, path_string, tree_cast, tree_leaves, tree_paths

__all__ = ["convert", "read_foreign", "stand_ins"]

_TORCH = (".pt", ".pth", ".bin")
_KNOWN = (".ckpt", ".safetensors", ".npz", *_TORCH)
# A state dict does not say which of its tensors are buffers. These names are BatchNorm's.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def convert(
    source: Location,
    target: Location,
    *,
    only: str | None = None,
    rename: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    compression: Literal["zstd"] | None = None,
    lightning: bool = False,
    optimizer: TorchOptimizer | None = None,
) -> None:
    """Write a checkpoint in another format; the names of the files say which.

    ``.ckpt`` is ours (as a source also Lightning's), ``.safetensors`` (needs
    ``puretrain[safetensors]``), ``.npz`` is numpy's, and ``.pt``, ``.pth``, ``.bin`` are state
    dicts of ``torch.save``.

    The other formats hold tensors by name. Out of a checkpoint with ``params`` they get these and
    the ``buffers``, named as the module names them. With ``only`` they get the leaves that match,
    by their full paths. Read back, such paths make a tree again; names without a path become
    ``params``, BatchNorm's running statistics and what is no floating-point tensor ``buffers``. A
    Lightning checkpoint gives its ``state_dict`` as these and, if its optimizer is one Adam, the
    state of that as ``opt_state``.

    From ``.ckpt`` to ``.ckpt`` the tree stays as it is, and shares nothing with other files; with
    ``lightning=True`` the target is a checkpoint of Lightning, from which its Trainer goes on.

    Args:
        source: what to read.
        target: what to write, atomically; an existing file is replaced.
        only: take the leaves whose paths in the source match this pattern.
        rename: other names for leaves, as for :func:`puretrain.load_part`; the patterns match the
            names in the file that is not ours, if one is.
        dtype: convert floating-point tensors to this one.
        compression: as for :func:`puretrain.save`, if the target is ours.
        lightning: write what Lightning writes: parameters and buffers as ``state_dict`` (give
            ``rename={"**": "model.**"}`` if the LightningModule has the model as ``self.model``),
            the epoch, the number of steps.
        optimizer: for Lightning, what makes the optimizer as ``configure_optimizers`` does, such as
            ``functools.partial(torch.optim.AdamW, lr=1e-3)``. It gets the state of the one in the
            checkpoint, which has to be of that kind, over all parameters in their order.

    Raises:
        CheckpointError: the source can't be read, is damaged, or holds what the target can't.
        ConfigurationError: a suffix is not known, or a package is missing.
        PatternError: a pattern matches nothing.

    Example:
        >>> import tempfile, puretrain as pt
        >>> directory = tempfile.TemporaryDirectory()
        >>> a, b = f"{directory.name}/a.ckpt", f"{directory.name}/b.npz"
        >>> save(a, {"params": {"layer.weight": torch.ones(2)}, "step": 7})
        >>> convert(a, b)
        >>> list(np.load(b))
        ['layer.weight']
        >>> directory.cleanup()
    """
    suffix = _suffix(target)
    if optimizer is not None and not lightning:
        raise ConfigurationError("optimizer= is for checkpoints of Lightning: lightning=True")
    if lightning and (suffix != ".ckpt" or only is not None or compression is not None):
        raise ConfigurationError(
            "a checkpoint of Lightning is a .ckpt, whole and not compressed: no only= or "
            "compression= with lightning=True"
        )
    ours = _is_ours(source)
    tree = load(source) if ours else read_foreign(source, rename)
    rename = rename if ours else None  # that is done
    if lightning:
        tree = tree if dtype is None else tree_cast(tree, dtype)
        _write_lightning(target, tree, shown(source), rename, optimizer)
        return
    if dtype is not None:
        tree = tree_cast(tree, dtype)
    if suffix == ".ckpt" and only is None and not rename:
        metadata = dict(read_index(source).metadata) if ours else {"source": shown(source)}
        save(target, tree, metadata=metadata, compression=compression)
        return
    paths = tree_paths(tree)
    leaves = {path_string(p): leaf for p, leaf in zip(paths, tree_leaves(tree), strict=True)}
    if only is not None:
        leaves = {path_string(p): leaves[path_string(p)] for p in match_paths(only, paths)}
    elif suffix != ".ckpt":
        leaves = _model(leaves, shown(source))
    leaves = _renamed(leaves, rename)
    if suffix == ".ckpt":
        save(target, _nested(leaves), metadata={"source": shown(source)}, compression=compression)
    else:
        _write_foreign(target, suffix, leaves)


def _suffix(path: Location) -> str:
    suffix = os.path.splitext(plain(path))[1].lower()
    if suffix not in _KNOWN:
        raise ConfigurationError(
            f"{shown(path)}: the suffix {suffix!r} is not known; there are {', '.join(_KNOWN)}"
        )
    return suffix


def _is_ours(path: Location) -> bool:
    with reported(path, "read"), reading(path) as (file, _):
        return bool(file.read(len(MAGIC)) == MAGIC)


def _model(leaves: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Parameters and buffers by the names that the module has for them."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        top, _, rest = path.partition("/")
        if top in {"params", "buffers"} and rest:
            if rest in found:
                raise CheckpointError(
                    f"{name}: {rest} is a parameter and a buffer; take one of them, as "
                    "with only='params/**'"
                )
            found[rest] = leaf
    if not found:
        raise CheckpointError(
            f"{name} has no params to convert; say with only= which leaves "
            "(`puretrain inspect` lists them)"
        )
    return found


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def read_foreign(path: Location, rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read a file of another format as a tree; see :func:`convert`.

    Raises:
        CheckpointError: the file can't be read, or holds something else than tensors by name.
        ConfigurationError: the suffix is not known, or a package is missing.
    """
    name, suffix = shown(path), _suffix(path)
    with reported(path, "read"):
        if suffix == ".safetensors":
            return _nested(_read_safetensors(path), rename)
        if suffix == ".npz":
            return _nested(_read_npz(path), rename)
        with reading(path) as (file, _):
            file = _seekable(file, path)
            try:
                with torch.serialization.safe_globals(stand_ins(file)):
                    content = torch.load(cast(Any, file), "cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                reason = str(error).strip().splitlines()
                told = next((line for line in reason if "Unsupported" in line), reason[0])
                raise CheckpointError(
                    f"{name} holds more than tensors and plain values, and reading that could run "
                    f"code: {told.strip()}. Save its state_dict() alone, where it was made"
                ) from None
            except (RuntimeError, EOFError, ValueError) as error:
                raise CheckpointError(f"{name} is no file of torch.save: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        return _from_lightning(content, name, rename)
    return _nested(_tensors(content, name), rename)


def stand_ins(file: Any) -> list[Any]:
    """Empty classes for all that a file of ``torch.save`` names and torch does not know.

    Lightning 1.x has the classes of callbacks as keys, for example. Nothing is imported: to name a
    class that stands for another is all that a file can do with it. To make an object of it fails.

    Args:
        file: an open file, left at its beginning.

    Returns:
        What :func:`torch.serialization.safe_globals` takes.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError):
        names = []  # it is no such file, which reading it will say
    file.seek(0)
    return [(_stand_in(name), name) for name in names]


def _stand_in(full_name: str) -> type:
    def refuse(cls: type, *arguments: Any) -> Any:
        raise pickle.UnpicklingError(f"Unsupported: an object of {full_name}")

    return type(full_name.rpartition(".")[2], (), {"__new__": refuse})


def _seekable(file: Any, path: Location) -> Any:
    return io.BytesIO(file.read()) if is_url(path) else file


def _tensors(content: Any, name: str) -> dict[str, Tensor]:
    found = {}
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{name} holds a {type(content).__name__}, not tensors by name as a "
            "state_dict() is; save that with torch.save"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: {key!r} is a {type(value).__name__}, not a tensor with a name; "
                "take the state_dict() of the model out of it"
            )
        found[key] = value.detach()
    return found


def _read_safetensors(path: Location) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        if not is_url(path):
            return dict(safetensors.torch.load_file(plain(path)))
        with reading(path) as (file, _):
            return dict(safetensors.torch.load(file.read()))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{shown(path)} can't be read: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigurationError(
            ".safetensors needs the package safetensors: pip install 'puretrain[safetensors]'"
        ) from error
    return safetensors


def _read_npz(path: Location) -> dict[str, Tensor]:
    found = {}
    with reading(path) as (file, _):
        try:
            with np.load(cast(Any, _seekable(file, path)), allow_pickle=False) as arrays:
                for key in arrays.files:
                    array = arrays[key]
                    found[key] = torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
        except (ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{shown(path)} can't be read: {error}") from error
    return found


def _renamed(leaves: Mapping[str, Any], rename: Mapping[str, str] | None) -> dict[str, Any]:
    return {new: leaves[old] for new, old in renamed(leaves, rename or {}).items()}


def _nested(leaves: Mapping[str, Any], rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A tree of dicts out of paths; names without a path become parameters and buffers."""
    leaves = _renamed(leaves, rename)
    if not any("/" in name for name in leaves):
        return _divided(leaves)
    top: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        node = top
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CheckpointError(
                    f"{name}: a leaf of that name is in the way at {key!r}; give it "
                    "another name with rename="
                )
        if last in node:
            raise CheckpointError(
                f"{name} is a leaf and has leaves below it; give it another name with rename="
            )
        node[last] = leaf
    return top


def _divided(leaves: Mapping[str, Any]) -> dict[str, Any]:
    def is_buffer(name: str, leaf: Any) -> bool:
        inexact = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        return not inexact or name.rpartition(".")[2] in _BUFFERS

    buffers = {name: leaf for name, leaf in leaves.items() if is_buffer(name, leaf)}
    params = {name: leaf for name, leaf in leaves.items() if name not in buffers}
    # these keep the module's order, which is that of an optimizer of torch
    return {"params": FrozenDict(params), "buffers": FrozenDict(buffers)}


# ── Lightning ─────────────────────────────────────────────────────────────────────────────────────


def _from_lightning(
    content: Mapping[str, Any], name: str, rename: Mapping[str, str] | None
) -> dict[str, Any]:
    tree = _divided(_renamed(_tensors(content["state_dict"], name), rename))
    return tree | from_lightning(content, name, tree["params"])


def _write_lightning(
    target: Location,
    tree: Mapping[str, Any],
    name: str,
    rename: Mapping[str, str] | None,
    optimizer: TorchOptimizer | None,
) -> None:
    paths = tree_paths(tree)
    leaves = {path_string(p): leaf for p, leaf in zip(paths, tree_leaves(tree), strict=True)}
    model = _renamed(_model(leaves, name), rename)
    params = dict(tree["params"])
    content = to_lightning(tree, _tensors(model, name), params, optimizer, name)
    with reported(target, "written"), replacing(target) as file:
        torch.save(content, file)


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def _write_foreign(path: Location, suffix: str, leaves: Mapping[str, Any]) -> None:
    name = shown(path)
    tensors: dict[str, Tensor] = {}
    for key, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise CheckpointError(
                f"{name}: {key} is a {type(leaf).__name__}; {suffix} holds tensors alone: choose "
                "others with only="
            )
        tensors[key] = leaf.detach().contiguous()
    with reported(path, "written"):
        if suffix == ".safetensors":
            safetensors = _safetensors()
            try:
                # tied tensors are written twice, as safetensors wants it
                content = safetensors.torch.save(
                    {key: tensor.clone() for key, tensor in tensors.items()}, {"format": "pt"}
                )
            except (safetensors.SafetensorError, KeyError, ValueError) as error:
                raise CheckpointError(f"{name} can't be written: {error}") from error
            with replacing(path) as file:
                file.write(content)
        elif suffix == ".npz":
            _write_npz(path, tensors)
        else:
            with replacing(path) as file:
                torch.save(tensors, file)


def _write_npz(path: Location, tensors: Mapping[str, Tensor]) -> None:
    arrays = {}
    for key, tensor in tensors.items():
        try:
            arrays[key] = tensor.resolve_conj().resolve_neg().numpy()
        except TypeError:
            raise CheckpointError(
                f"{shown(path)}: numpy has no {tensor.dtype}, as {key} is; convert it with dtype="
            ) from None
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(cast(Any, member), array, allow_pickle=False)
