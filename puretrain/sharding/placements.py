"""Where each leaf of a state lives: whole in every process, or cut into shards.

A sharded state is an ordinary state whose leaves are plain tensors, of some leaves only the own
shard. Which leaves these are, and along which dimension they are cut, is said by a value beside it,
:class:`Placements`. Leaves are cut over the dimension ``shard`` of the mesh, as :func:`torch.chunk`
cuts: into shards of ``ceil(size / processes)``, of which the last may be smaller or empty. Over the
dimension ``data`` everything is held in copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from puretrain.errors import ConfigurationError, StructureError
from puretrain.sharding.processes import SHARD, all_gather, device_of
from puretrain.tree import (
    FrozenDict,
    Path,
    Record,
    match_paths,
    path_string,
    tree_flatten,
    tree_leaves,
    tree_map_with_path,
    tree_paths,
    tree_unflatten,
)

if TYPE_CHECKING:  # it takes half as long to import as torch
    from torch.distributed.tensor import Placement

__all__ = ["Placements", "gather", "local", "place", "shard", "table"]

T = TypeVar("T")


class Placements(Record):
    """Which leaves of a tree are cut, and along which dimension; the others are whole everywhere.

    Made by :func:`place`, or for a run by :func:`puretrain.sharding.zero`.

    Example:
        >>> placements = Placements(FrozenDict({"params/weight": 0}))
        >>> placements.of("params/weight"), placements.of("params/bias")
        (Shard(dim=0), Replicate())
    """

    dims: FrozenDict[int]
    """The dimension of each leaf that is cut, from 0, by its path, as ``params/weight``."""

    def of(self, path: str | Path) -> Placement:
        """``Shard(dim)`` or ``Replicate()`` of :mod:`torch.distributed.tensor`."""
        from torch.distributed.tensor import Replicate, Shard

        dim = self.dim(path)
        return Replicate() if dim is None else Shard(dim)

    def dim(self, path: str | Path) -> int | None:
        """The dimension along which a leaf is cut; None if it is not."""
        return self.dims.get(path if isinstance(path, str) else path_string(path))


def place(tree: Any, rules: Mapping[str, Placement]) -> Placements:
    """Say by patterns which leaves of a tree are cut.

    Args:
        tree: whole (not sharded) tensors; only the shapes matter, so they may be on the device
            ``meta``.
        rules: ``Shard(dim)`` or ``Replicate()`` of :mod:`torch.distributed.tensor` by patterns of
            paths, see :func:`puretrain.tree.match_paths`. Of several patterns that match a leaf the
            first counts. A leaf that none matches is whole everywhere. A negative ``dim`` counts
            from the end.

    Raises:
        ConfigurationError: a rule is no such placement, cuts what is no tensor, or along a
            dimension that the leaf does not have.
        PatternError: a pattern matches no leaf.

    Example:
        >>> from torch.distributed.tensor import Replicate, Shard
        >>> params = {"a": torch.zeros(4, 2), "b": torch.zeros(4), "c": torch.zeros(())}
        >>> place(params, {"c": Replicate(), "a": Shard(-1), "b": Shard(0)})
        Placements(dims={'a': 1, 'b': 0})
    """
    from torch.distributed.tensor import Replicate, Shard

    paths, leaves = tree_paths(tree), tree_leaves(tree)
    chosen: dict[Path, tuple[str, Placement]] = {}
    for pattern, rule in rules.items():
        if type(rule) not in (Replicate, Shard):
            raise ConfigurationError(
                f"the placement of {pattern!r} is {rule!r}; it is Shard(dim) or Replicate() of "
                "torch.distributed.tensor"
            )
        for path in match_paths(pattern, paths):
            chosen.setdefault(path, (pattern, rule))
    dims = {}
    for path, leaf in zip(paths, leaves, strict=True):
        pattern, rule = chosen.get(path, ("", Replicate()))
        if not isinstance(rule, Shard):
            continue
        ndim = leaf.dim() if isinstance(leaf, Tensor) else 0
        if not -ndim <= rule.dim < ndim:
            what = f"has {ndim} dimensions" if isinstance(leaf, Tensor) else "is no tensor"
            raise ConfigurationError(
                f"{pattern!r}: {path_string(path)} {what} and can't be cut along {rule.dim}; put a "
                "rule with Replicate() for it in front"
            )
        dims[path_string(path)] = rule.dim % ndim
    return Placements(FrozenDict(dims))


def chunk(size: int, count: int, number: int) -> tuple[int, int]:
    """Where one of the chunks of :func:`torch.chunk` begins, and how long it is.

    >>> [chunk(5, 4, number) for number in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    length = -(-size // count)
    start = min(number * length, size)
    return start, min(length, size - start)


def piece(leaf: Tensor, dim: int, count: int, number: int) -> Tensor:
    """A view of one of the shards of a leaf."""
    return leaf.narrow(dim, *chunk(leaf.shape[dim], count, number))


def local(tree: T, placements: Placements, count: int, number: int) -> T:
    """The part of a whole tree that one of several processes holds.

    Args:
        tree: whole tensors.
        placements: which leaves are cut.
        count: over how many processes.
        number: which of them, from 0.

    Returns:
        The tree with the shards in the place of the leaves that are cut. They are copies, so that
        the whole can be let go of; the other leaves are the ones given.

    Raises:
        ConfigurationError: a leaf does not have the dimension along which it is to be cut.

    Example:
        >>> weights = {"w": torch.arange(5)}
        >>> [local(weights, Placements(FrozenDict(w=0)), 2, i)["w"].tolist() for i in range(2)]
        [[0, 1, 2], [3, 4]]
    """
    _check_all_there(tree, placements)

    def cut(path: Path, leaf: Any) -> Any:
        dim = placements.dim(path)
        if dim is None:
            return leaf
        _check_dim(path, leaf, dim)
        return piece(leaf, dim, count, number).clone(memory_format=torch.contiguous_format)

    return tree_map_with_path(cut, tree)


def shard(tree: T, mesh: DeviceMesh, placements: Placements) -> T:
    """The part of a whole tree that this process holds; see :func:`local`.

    Every process calls it with the same whole tree. To never hold the whole of an optimizer's
    state anywhere, shard the parameters first and make the state out of the shards.

    >>> from puretrain.sharding import processes
    >>> with processes() as mesh:
    ...     shard({"w": torch.arange(5)}, mesh, Placements(FrozenDict(w=0)))
    {'w': tensor([0, 1, 2, 3, 4])}
    """
    return local(tree, placements, _count(mesh), mesh.get_local_rank(SHARD))


def gather(tree: T, mesh: DeviceMesh, placements: Placements, *, to: int | None = None) -> T | None:
    """A whole tree out of what the processes hold; all of them call this.

    Args:
        tree: what this process holds.
        mesh: the processes.
        placements: which leaves are cut.
        to: the rank of the only process that gets the whole, on its CPU, leaf by leaf; by default
            all get it, where the shards are.

    Returns:
        The whole tree, in processes other than ``to`` None. A leaf that is not cut is the one
        given, but for ``to``, which gets it on its CPU.

    Raises:
        ConfigurationError: there is no process ``to``, or a leaf lacks its dimension.
        StructureError: the shards of the processes do not make a whole; in every process.

    >>> from puretrain.sharding import processes
    >>> with processes() as mesh:
    ...     gather({"w": torch.arange(5)}, mesh, Placements(FrozenDict(w=0)), to=0)
    {'w': tensor([0, 1, 2, 3, 4])}
    """
    _check_all_there(tree, placements)
    if to is not None and not 0 <= to < mesh.size():
        raise ConfigurationError(f"to={to!r} is no rank: there are {mesh.size()} processes")
    leaves, structure = tree_flatten(tree)
    paths, group = tree_paths(tree), mesh.get_group(SHARD)
    sizes = _whole_sizes(tree, mesh, placements)
    wanted = to is None or to in dist.get_process_group_ranks(group)
    whole = []
    for path, leaf in zip(paths, leaves, strict=True):
        dim = placements.dim(path)
        if dim is not None and wanted:
            leaf = _joined(leaf, dim, sizes[path], group, to)
        elif to is not None and isinstance(leaf, Tensor):
            leaf = leaf.cpu()
        whole.append(leaf)
    return tree_unflatten(structure, whole) if to in (None, mesh.get_rank()) else None


def _joined(leaf: Tensor, dim: int, size: int, group: dist.ProcessGroup, to: int | None) -> Any:
    """The whole of a leaf out of the shards of a group; for others than ``to``, nothing."""
    count = dist.get_world_size(group)
    mine = padded(leaf, dim, chunk(size, count, 0)[1])
    if to is None:
        rows = list(all_gather(mine.reshape(-1), group).view(count, *mine.shape).unbind())
        return torch.cat(rows, dim).narrow(dim, 0, size)
    rows = [torch.empty_like(mine) for _ in range(count)] if dist.get_rank() == to else []
    dist.gather(mine, rows or None, dst=to, group=group)
    return torch.cat([row.cpu() for row in rows], dim).narrow(dim, 0, size) if rows else None


def padded(shard: Tensor, dim: int, length: int) -> Tensor:
    """A shard with zeros at its end, contiguous, so that all shards have one shape."""
    if shard.shape[dim] == length:
        return shard.contiguous()
    shape = [*shard.shape]
    shape[dim] = length
    full = shard.new_zeros(shape)
    full.narrow(dim, 0, shard.shape[dim]).copy_(shard)
    return full


def _whole_sizes(tree: Any, mesh: DeviceMesh, placements: Placements) -> dict[Path, int]:
    """How long each leaf that is cut is as a whole; compares what the processes have."""
    cut = []
    for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
        dim = placements.dim(path)
        if dim is not None:
            _check_dim(path, leaf, dim)
            cut.append((path, leaf.shape[dim]))
    if not cut:
        return {}
    count, mine = _count(mesh), torch.tensor([length for _, length in cut], device=device_of(mesh))
    lengths = all_gather(mine, mesh.get_group(SHARD)).view(count, -1).t().tolist()
    sizes = {}
    for (path, _), found in zip(cut, lengths, strict=True):
        sizes[path] = sum(found)
        if found != [chunk(sum(found), count, number)[1] for number in range(count)]:
            raise StructureError(
                f"{path_string(path)} is placed as cut along {placements.dim(path)}, but its "
                f"lengths in the processes, {found}, are not those of torch.chunk; is the tree "
                "sharded, and with these placements?"
            )
    return sizes


def table(tree: Any, mesh: DeviceMesh, placements: Placements) -> str:
    """Where each leaf of a sharded tree lives, as a table to print; all processes call this.

    The bytes are those of this process; in the last line those of the whole tree as well.

    >>> from puretrain.sharding import processes
    >>> with processes() as mesh:
    ...     print(table({"w": torch.zeros(5, 2)}, mesh, Placements(FrozenDict(w=0))))
    leaf   shape  placement  bytes here
    w      5,2    Shard(0)           40
    total                      40 of 40
    """
    sizes = _whole_sizes(tree, mesh, placements)
    rows = [("leaf", "shape", "placement", "bytes here")]
    here = everywhere = 0
    for path, leaf in zip(tree_paths(tree), tree_leaves(tree), strict=True):
        if not isinstance(leaf, Tensor):
            continue
        shape, dim = [*leaf.shape], placements.dim(path)
        mine = leaf.numel() * leaf.element_size()
        if dim is not None:
            shape[dim] = sizes[path]
        here += mine
        everywhere += torch.Size(shape).numel() * leaf.element_size()
        where = "Replicate()" if dim is None else f"Shard({dim})"
        rows.append((path_string(path), ",".join(map(str, shape)), where, f"{mine:,}"))
    rows.append(("total", "", "", f"{here:,} of {everywhere:,}"))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with even columns, the last one to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]).rstrip())
    return "\n".join(lines)


def _count(mesh: DeviceMesh) -> int:
    return dist.get_world_size(mesh.get_group(SHARD))


def _check_all_there(tree: Any, placements: Placements) -> None:
    missing = placements.dims.keys() - {path_string(path) for path in tree_paths(tree)}
    if missing:
        raise StructureError(
            f"the placements name {', '.join(sorted(missing)[:4])}, which the tree does not have; "
            "make them of a tree with the same leaves"
        )


def _check_dim(path: Path, leaf: Any, dim: int) -> None:
    if not isinstance(leaf, Tensor) or dim >= leaf.dim():
        what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
        raise ConfigurationError(
            f"{path_string(path)} is placed as cut along dimension {dim}, but it is {what}"
        )
