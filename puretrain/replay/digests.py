"""Digests of tensors by tensor operations: the same number on every device, without waiting.

A checksum such as XXH3 needs the bytes on the host, so taking it of a state on an accelerator would
stop the run. The digest of a leaf is therefore made of integer products and sums, which give the
same 64 bits on every device and in every order of summation, and it stays a tensor on its device
until somebody reads it:

    The bytes of the leaf, zero-padded to whole 32-bit words, are read as int32 words ``x``, in
    blocks of 4096. A block's sum is ``s_b = Σ w_i x_i mod 2**64`` with fixed odd 64-bit weights
    ``w``. The digest is ``mix(bytes + Σ_b mix(s_b + (b + 1) φ))``, where ``mix`` is the finalizer
    of splitmix64 and ``φ = 0x9E3779B97F4A7C15``.

Its strength: a change within one word is always seen. Of two leaves that differ otherwise, at most
one choice of the weights in about 2**32 gives both the same digest (the sum is a multilinear hash:
Carter and Wegman, "Universal classes of hash functions", 1979, over 64-bit integers, of which words
that all differ in the sign bit alone leave 32). The weights are public, so it finds accidents and
does not withstand an adversary. XXH3 is better at both where the bytes are on the host anyway; it
is used for batches there.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from puretrain.errors import StructureError
from puretrain.tree import path_string, tensor_bytes, tree_digest, tree_leaves, tree_paths

__all__ = ["BatchDigest", "Digests", "batch_digest", "leaf_digests", "tensor_digest"]

_BLOCK = 4096
_CHUNK = 1024  # blocks that are widened to 64 bits at a time on a device: 32 MB each
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def tensor_digest(tensor: Tensor) -> Tensor:
    """Digest the bits of a tensor where it is; see the module for what it is and how strong.

    Args:
        tensor: dense, of any dtype, shape and device. Strides do not matter.

    Returns:
        The digest, int64 of shape ``()``, on the device of the tensor.

    Raises:
        StructureError: the tensor is not dense.

    >>> tensor_digest(torch.zeros(3)), tensor_digest(torch.tensor([0.0, -0.0, 0.0]))
    (tensor(5536347510207405730), tensor(4660660290782671777))
    """
    words, nbytes = _words(tensor)
    if words.device.type == "cpu":
        return torch.tensor(_signed(_digest_on_host(words.numpy(), nbytes)))
    return _digest_on_device(words, nbytes)


def _words(tensor: Tensor) -> tuple[Tensor, int]:
    """The bytes of a tensor as int32 words, zero-padded, and their number."""
    if tensor.layout != torch.strided:
        raise StructureError(f"a {tensor.layout} tensor can't be digested; use .to_dense()")
    dense = tensor.detach().resolve_conj().resolve_neg()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    dense = dense.contiguous().reshape(-1)
    nbytes = dense.numel() * dense.element_size()
    if dense.element_size() < 4:
        dense = dense.view(torch.uint8)
        if nbytes % 4:
            dense = torch.cat([dense, dense.new_zeros(-nbytes % 4)])
        elif dense.storage_offset() % 4:
            dense = dense.clone()  # a view of wider elements must begin at a multiple of them
    return dense.view(torch.int32), nbytes


def _digest_on_host(words: Any, nbytes: int) -> int:
    # numpy's einsum widens the words as it goes, without a second array
    weights = _weights()
    whole = len(words) // _BLOCK
    sums = np.empty(-(-len(words) // _BLOCK), np.int64)
    if whole:
        blocks = words[: whole * _BLOCK].reshape(whole, _BLOCK)
        np.einsum("ij,j->i", blocks, weights, out=sums[:whole])
    rest = words[whole * _BLOCK :]
    if len(rest):
        sums[whole] = np.dot(rest, weights[: len(rest)])
    if len(sums) <= 1:
        total = _mixed((int(sums[0]) + _GOLDEN) & _MASK) if len(sums) else 0
        return _mixed((total + nbytes) & _MASK)
    numbers = np.arange(1, len(sums) + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    mixed = _mixed_array(sums.view(np.uint64) + numbers)
    return _mixed((int(mixed.sum(dtype=np.uint64)) + nbytes) & _MASK)


def _digest_on_device(words: Tensor, nbytes: int) -> Tensor:
    weights = _weights_on(words.device)
    words = torch.nn.functional.pad(words, (0, -len(words) % _BLOCK)).view(-1, _BLOCK)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        sums = (words[start : start + _CHUNK] * weights).sum(dim=1)
        numbers = torch.arange(start + 1, start + 1 + len(sums), device=words.device)
        total = total + _mixed_tensor(sums + numbers * _signed(_GOLDEN)).sum()
    return _mixed_tensor(total + nbytes)


@functools.cache
def _weights() -> Any:
    counters = np.arange(1, _BLOCK + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mixed_array(counters) | np.uint64(1)).view(np.int64)


@functools.cache
def _weights_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_weights()).to(device)


# The same three lines for an integer, a numpy array of uint64, and a tensor of int64.


def _mixed(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def _mixed_array(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


def _mixed_tensor(x: Tensor) -> Tensor:
    # torch's shift of an int64 copies the sign, which the mask takes away
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


# ── Trees ─────────────────────────────────────────────────────────────────────────────────────────


class Digests(NamedTuple):
    """The digests of the leaves of a tree, perhaps still on their devices."""

    leaves: tuple[tuple[str, str], ...]
    """The path of each leaf, and what it is (``float32[3,4]``), in the order of the paths."""
    values: tuple[int | Tensor, ...]
    """The digest of each: 64 bits as an integer from 0, or a tensor that has yet to be read."""

    def read(self) -> tuple[int, ...]:
        """The digests as integers from 0 up to 2**64; waits for the devices that have them."""
        return tuple(read_all(self.values))


def leaf_digests(tree: Any) -> Digests:
    """Digest every leaf of a tree where it is.

    Raises:
        StructureError: a leaf is neither a dense tensor, a numpy array, nor a plain value.

    >>> digests = leaf_digests({"w": torch.ones(2, 3), "name": "a"})
    >>> digests.leaves
    (('name', 'str'), ('w', 'float32[2,3]'))
    >>> digests.read() == leaf_digests({"w": torch.ones(3, 2).T, "name": "a"}).read()
    True
    """
    found = []
    for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
        if isinstance(leaf, (np.ndarray, np.generic)):
            leaf = torch.as_tensor(np.asarray(leaf))
        if not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            value: int | Tensor = _plain_digest(leaf)
        else:
            words, nbytes = _words(leaf)
            shape = ",".join(map(str, leaf.shape))
            kind = f"{str(leaf.dtype).removeprefix('torch.')}[{shape}]"
            if words.device.type == "cpu":
                value = _digest_on_host(words.numpy(), nbytes)
            else:
                value = _digest_on_device(words, nbytes)
        found.append((path_string(path), kind, value))
    found.sort(key=lambda entry: entry[0])
    return Digests(
        tuple((path, kind) for path, kind, _ in found), tuple(value for _, _, value in found)
    )


def read_all(values: Any) -> list[int]:
    """Turn digests into integers, with one transfer from each device."""
    read: list[Any] = list(values)
    waiting: dict[torch.device, list[int]] = {}
    for place, value in enumerate(read):
        if isinstance(value, Tensor):
            waiting.setdefault(value.device, []).append(place)
    for places in waiting.values():
        fetched = torch.stack([read[place] for place in places]).tolist()
        for place, value in zip(places, fetched, strict=True):
            read[place] = value & _MASK
    return read


def _plain_digest(leaf: Any) -> int:
    return int(tree_digest(leaf)[:16], 16)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


class BatchDigest(NamedTuple):
    """The digest of a batch, perhaps still on its device."""

    kind: Literal["host", "device"]
    """XXH3-64 of bytes in the host's memory, or :func:`tensor_digest` of each tensor."""
    value: int | Tensor
    """64 bits as an integer from 0, or a tensor that has yet to be read."""


def batch_digest(batch: Any, kind: Literal["host", "device"] | None = None) -> BatchDigest | None:
    """Digest a batch, as cheaply as the place of its tensors allows.

    Args:
        batch: a tree of tensors, arrays and plain values.
        kind: how; by default ``'device'`` if one of its tensors is on an accelerator. A digest of
            either kind can be made of a batch anywhere, to compare it with one made elsewhere.

    Returns:
        The digest; None if the batch holds something whose content is not known to us.

    >>> batch_digest((torch.ones(2), [1, 2])) == batch_digest((torch.ones(2), [1, 2]), "host")
    True
    >>> print(batch_digest([object()]))
    None
    """
    # After a step no code is in the processor's cache: the fewer different things are done, the
    # better. So the usual batch, a tuple of tensors, does not go through the functions for trees.
    if type(batch) is tuple and all(type(leaf) is Tensor for leaf in batch):
        leaves: Sequence[Any] = batch
    else:
        leaves = [
            torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
            for leaf in tree_leaves(batch)
        ]
    if kind is None:
        away = any(isinstance(leaf, Tensor) and not leaf.is_cpu for leaf in leaves)
        kind = "device" if away else "host"
    try:
        if kind == "host":
            return BatchDigest(kind, _host_batch(leaves))
        return BatchDigest(kind, _device_batch(leaves))
    except StructureError:  # a leaf of some foreign type: there is nothing to compare
        return None


def _host_batch(leaves: Sequence[Any]) -> int:
    hasher = xxhash.xxh3_64()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            head, memory = _form(leaf.dtype, leaf.shape)
            hasher.update(head)
            if memory is not None and type(leaf) is Tensor and leaf.is_cpu and _is_bare(leaf):
                # Not by way of numpy, which takes longer and forbids resizing the tensor.
                hasher.update(memory.from_address(leaf.data_ptr()))
            else:
                hasher.update(_bytes(leaf))
        else:
            hasher.update(_plain_digest(leaf).to_bytes(8, "little"))
    return hasher.intdigest()


def _is_bare(leaf: Tensor) -> bool:
    """Whether the memory of a tensor of real numbers is its content, element by element."""
    return leaf.layout is torch.strided and leaf.is_contiguous() and not leaf.is_neg()


def _bytes(leaf: Tensor) -> memoryview:
    if leaf.layout != torch.strided:
        raise StructureError(f"a {leaf.layout} tensor can't be digested; use .to_dense()")
    return tensor_bytes(leaf)


@functools.lru_cache(maxsize=1024)
def _form(
    dtype: torch.dtype, shape: torch.Size
) -> tuple[bytes, type[ctypes.Array[ctypes.c_char]] | None]:
    """What the digest says of dtype and shape, and the memory of usual tensors as ctypes has it."""
    usual = dtype in _USUAL and sys.byteorder == "little"
    nbytes = math.prod(shape) * dtype.itemsize
    return _head(dtype, shape), ctypes.c_char * nbytes if usual else None


_USUAL = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)


@functools.lru_cache(maxsize=1024)
def _head(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}".encode()


def _device_batch(leaves: Sequence[Any]) -> int | Tensor:
    total: int | Tensor = 0
    for number, leaf in enumerate(leaves, start=1):
        if isinstance(leaf, Tensor):
            head = xxhash.xxh3_64_intdigest(_head(leaf.dtype, leaf.shape))
            value: int | Tensor = tensor_digest(leaf)
            value = value if leaf.device.type != "cpu" else int(value)
        else:
            head, value = 0, _plain_digest(leaf)
        offset = (number * _GOLDEN + head) & _MASK
        if isinstance(value, Tensor):
            value = _mixed_tensor(value + _signed(offset))
        else:
            value = _signed(_mixed((value + offset) & _MASK))
        if isinstance(total, Tensor) and isinstance(value, Tensor):
            value = value.to(total.device, non_blocking=True)
        total = total + value
    return total if isinstance(total, Tensor) else total & _MASK
