"""Random keys as tensors, and the scoped use of torch's generators.

A key is an int64 tensor of shape ``(2,)`` that holds two 32-bit words. New keys are derived with
the Threefry-2x32 block cipher of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011), in the same way as JAX derives them: equal seeds give equal keys in both libraries.

Keys live on the CPU: deriving one never waits for an accelerator.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from puretrain.errors import ConfigurationError, StructureError, TransformError
from puretrain.tree import under_transform

__all__ = ["fold_in", "key", "scope", "split", "stream"]

T = TypeVar("T")
_Word = TypeVar("_Word", int, Tensor)

_MASK = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def key(seed: int) -> Tensor:
    """Make a key from a seed.

    Args:
        seed: an integer of at most 64 bits; a negative one is read as its two's complement.

    Returns:
        The high and the low 32 bits of the seed, int64 of shape ``(2,)``.

    >>> key(42)
    tensor([ 0, 42])
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ConfigurationError(f"a seed is an integer of at most 64 bits, not {seed!r}")
    return torch.tensor([(seed >> 32) & _MASK, seed & _MASK])


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Derive a new key from a key and a number, such as the number of a step.

    Args:
        key: int64 of shape ``(..., 2)``.
        data: an integer, or an integer tensor that broadcasts against ``key[..., 0]``.

    Returns:
        The new key, int64, of shape ``(2,)`` with the broadcast dimensions in front.

    >>> fold_in(key(0), 1)
    tensor([ 928981903, 3453687069])
    """
    _check(key)
    if isinstance(data, int):
        # numbers of up to 32 bits fold in as JAX does it; larger ones use the upper word too
        high, low = (data >> 32) & _MASK, data & _MASK
        if key.dim() == 1 and not under_transform():
            first, second = key.tolist()
            return torch.tensor(_threefry(first, second, high, low))
        counter_high = torch.full_like(key[..., 0], high)
        counter_low = torch.full_like(key[..., 0], low)
    else:
        data = data.to(device=key.device, dtype=torch.int64)
        counter_high, counter_low = (data >> 32) & _MASK, data & _MASK
    words = _threefry(key[..., 0], key[..., 1], counter_high, counter_low)
    # the words have one shape, that of the key and the data broadcast
    return torch.stack(words, dim=-1)


def step_scope(key: Tensor, step: int) -> scope:
    """The same as ``scope(fold_in(key, step))``, for one step after the other of a run.

    It computes the keys of some steps and their seeds together and remembers them, which makes each
    cheaper.
    """
    high, low = key.tolist()
    found, seed = _block(high, low, step // _BLOCK)[step % _BLOCK]
    # A loss that changes its key in place must not change that of a later run of the same step.
    return scope(found if found._version == 0 else fold_in(key, step), seed)


def member_step_keys(keys: Tensor, step: int) -> Tensor:
    """The same as ``fold_in(keys, step)`` for the keys of an ensemble, int64 of shape ``(N, 2)``.

    As :func:`step_scope` it computes the keys of some steps together, and remembers them.
    """
    words = tuple(keys.reshape(-1).tolist())
    found = _member_block(words, step // _BLOCK)[step % _BLOCK]
    return found if found._version == 0 else fold_in(keys, step)


_BLOCK = 512


@functools.lru_cache(maxsize=2)
def _member_block(words: tuple[int, ...], number: int) -> tuple[Tensor, ...]:
    steps = torch.arange(number * _BLOCK, (number + 1) * _BLOCK)
    return fold_in(torch.tensor(words).reshape(1, -1, 2), steps.unsqueeze(1)).unbind()


@functools.lru_cache(maxsize=4)
def _block(high: int, low: int, number: int) -> tuple[tuple[Tensor, int], ...]:
    steps = torch.arange(number * _BLOCK, (number + 1) * _BLOCK)
    keys = fold_in(torch.tensor([high, low]), steps)
    seeds = [first << 32 | second for first, second in keys.tolist()]
    return tuple(zip(keys.unbind(), seeds, strict=True))


def split(key: Tensor, number: int = 2) -> Tensor:
    """Derive several independent keys from one.

    Args:
        key: int64 of shape ``(..., 2)``.
        number: how many.

    Returns:
        The keys, int64 of shape ``(number, ..., 2)``; iterate over them or index the first
        dimension. Key ``i`` equals ``fold_in(key, i)``.

    >>> split(key(0), 3).shape
    torch.Size([3, 2])
    """
    _check(key)
    if number < 1:
        raise ConfigurationError(f"split makes at least one key, not {number}")
    counters = torch.arange(number, device=key.device)
    return fold_in(key, counters.reshape(number, *[1] * (key.dim() - 1)))


def stream(key: Tensor, name: str) -> Tensor:
    """Derive the key of a named stream: ``stream(key, "dropout")``.

    Two names give independent keys, whatever other streams there are and in whatever order they
    are asked for.
    """
    return fold_in(key, zlib.crc32(name.encode()))


class scope:  # noqa: N801  # to its callers a function; a class is the quickest context manager
    """Seed torch's global generators from a key, and put them back at the end, come what may.

    Everything that draws inside (dropout, ``torch.randn``) becomes a function of the key. Covers
    the CPU's generator and those of all CUDA devices, if CUDA is in use. The CPU's generator keeps
    32 bits of a seed, so two keys out of a million may give the same stream.

    Under ``vmap`` the keys of all members are folded into one seed: the draws are a function of
    the keys, and ``randomness=`` of ``vmap`` says whether the members share them.

    >>> with scope(key(1)):
    ...     a = torch.rand(3)
    >>> with scope(key(1)):
    ...     b = torch.rand(3)
    >>> torch.equal(a, b)
    True
    """

    __slots__ = ("_before", "_key", "_members", "_seed")

    def __init__(self, key: Tensor, _seed: int | None = None) -> None:
        self._before: list[tuple[torch.Generator, Tensor]] = []
        self._members: Any = None
        self._key = key
        self._seed = _seed

    def __enter__(self) -> Tensor:
        if _seeded and torch.compiler.is_compiling():
            return self._key
        seed = _seed(self._key) if self._seed is None else self._seed
        drawing = _local.drawing
        if drawing is not None:
            self._members = drawing, drawing.enter(self._key)
        self._before = [(generator, generator.get_state()) for generator in generators()]
        for generator, _ in self._before:
            generator.manual_seed(seed)
        return self._key

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for generator, state in self._before:
            generator.set_state(state)
        if self._members is not None:
            drawing, before = self._members
            drawing.leave(before)


# ── The members of an ensemble ────────────────────────────────────────────────────────────────────
#
# Under vmap all members draw from one generator, so what a member gets depends on the others. In a
# scope of members each has a stream of its own, which begins where `scope` with its key would begin
# it: below vmap, where the members are rows of one tensor, each drawing operation is done for one
# member after the other.


class _Local(threading.local):
    drawing: Any = None
    """The innermost scope of members of this thread."""


_local = _Local()


class _Watch:
    """Notes whether anything was drawn."""

    drew = False

    def enter(self, key: Tensor) -> None:
        self.drew = True  # or is about to

    def leave(self, before: None) -> None:
        pass


@contextmanager
def watch() -> Iterator[_Watch]:
    """Run a function of members as if it drew nothing, and say afterwards in ``drew`` if it did.

    Torch's generators are as before at the end. It is much quicker than :func:`member_scope`.
    """
    found = _Watch()
    there = generators()
    before = [generator.get_state() for generator in there]
    outer, _local.drawing = _local.drawing, found
    try:
        yield found
    finally:
        _local.drawing = outer
        for generator, state in zip(there, before, strict=True):
            if not torch.equal(generator.get_state(), state):
                found.drew = True
                generator.set_state(state)


@contextmanager
def member_scope(keys: Tensor) -> Iterator[None]:
    """Let each member of a ``vmap`` draw what ``scope`` with its own key would let it draw.

    Args:
        keys: of the members, int64 of shape ``(N, 2)``. The ``vmap`` inside is over N members,
            with ``randomness='different'``.

    Raises:
        TransformError: (inside) an operation draws in a way that does not come apart by members.
    """
    _check(keys)
    with scope(keys[0]):
        drawing = _MemberDraws(keys)
        outer, _local.drawing = _local.drawing, drawing
        try:
            with drawing:
                yield
        finally:
            _local.drawing = outer


_States = list[list[Tensor]]
"""For each member the states of the generators."""


class _MemberDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does each drawing operation for one member after the other, each from its own stream."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = len(keys)
        self._turn = 0  # of what vmap itself does member by member
        self._states = self._started([_seed(key) for key in keys])

    def enter(self, key: Tensor) -> _States:
        """Begin the streams of a scope inside of the vmap; returns those before."""
        before, inside = self._states, key
        while torch._C._functorch.is_functorch_wrapped_tensor(inside):
            inside = torch._C._functorch.get_unwrapped(inside)
        rows = inside if inside.dim() > 1 else inside.expand(self._count, 2)
        self._states = self._started([_seed(row) for row in rows.reshape(self._count, -1, 2)])
        return before

    def leave(self, before: _States) -> None:
        self._states = before

    def _started(self, seeds: Sequence[int]) -> _States:
        there = generators()
        held = [generator.get_state() for generator in there]
        states = [[g.manual_seed(seed).get_state() for g in there] for seed in seeds]
        for generator, state in zip(there, held, strict=True):
            generator.set_state(state)
        return states

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in function.tags
        if not draws or kwargs.get("generator") is not None:
            return function(*args, **kwargs)
        if function.overloadpacket is torch.ops.aten.randperm:
            member, self._turn = self._turn, (self._turn + 1) % self._count
            return self._as_member(member, function, args, kwargs)
        parts = [
            self._as_member(i, function, *self._part(i, function, args, kwargs))
            for i in range(self._count)
        ]
        if function._schema.is_mutable:
            return args[0]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return torch.cat(parts)

    def _as_member(self, member: int, function: Any, args: Any, kwargs: Any) -> Any:
        there, states = generators(), self._states[member]
        for generator, state in zip(there, states, strict=True):
            generator.set_state(state)
        result = function(*args, **kwargs)
        self._states[member] = [generator.get_state() for generator in there]
        return result

    def _part(self, member: int, function: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a member's own call: its rows, or a shape of so many rows."""

        def rows(length: int) -> int:
            if length % self._count:
                raise TransformError(
                    f"{function} draws a tensor of {length} rows, which do not come apart by the "
                    f"{self._count} members; draw with torch.rand, torch.randn or dropout, or run "
                    "the members one after the other (vectorize=False)"
                )
            return length // self._count

        def own(name: str, value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim():
                each = rows(value.shape[0])
                return value.narrow(0, member * each, each)
            if name == "size":
                return [rows(value[0]), *value[1:]]
            return value

        named = zip((a.name for a in function._schema.arguments), args, strict=False)
        return [own(name, x) for name, x in named], {k: own(k, x) for k, x in kwargs.items()}


_seeded = False


def is_seeded() -> bool:
    """Whether a function that is being compiled is called by :func:`seeded`."""
    return _seeded


def seeded(function: Callable[..., T], *args: Any) -> T:
    """Call a function that is being compiled, whose caller seeds torch's generators.

    A graph can't seed them. So each :class:`scope` inside of the call leaves them as they are.
    """
    global _seeded  # noqa: PLW0603  # while a compiler traces it, this is a note of the compiler's
    _seeded = True
    try:
        return function(*args)
    finally:
        _seeded = False


def generators() -> list[torch.Generator]:
    """The global generators of torch: the CPU's, and those of all CUDA devices if CUDA is used."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [torch.default_generator, *torch.cuda.default_generators]
    return [torch.default_generator]


def generator(key: Tensor, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a new torch generator, seeded from a key."""
    return torch.Generator(device).manual_seed(_seed(key))


def _seed(key: Tensor) -> int:
    _check(key)
    while torch._C._functorch.is_functorch_wrapped_tensor(key):
        key = torch._C._functorch.get_unwrapped(key)
    words: list[int] = (key if key.dim() == 1 else key.reshape(-1)).tolist()
    high, low = words[0], words[1]
    for i in range(2, len(words), 2):
        high, low = _threefry(high, low, words[i], words[i + 1])
    return (high << 32) | low


def _threefry(key0: _Word, key1: _Word, counter0: _Word, counter1: _Word) -> tuple[_Word, _Word]:
    # The same lines serve Python integers (about 5 µs a block) and int64 tensors (any shape, also
    # under a transform). The words stay below 2**32, so that a shift to the right needs no mask.
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    x, y = (counter0 + key0) & _MASK, (counter1 + key1) & _MASK
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x = (x + y) & _MASK
            y = (((y << r) & _MASK) | (y >> (32 - r))) ^ x
        x = (x + keys[(i + 1) % 3]) & _MASK
        y = (y + keys[(i + 2) % 3] + i + 1) & _MASK
    return x, y


def _check(key: Tensor) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape[-1:] != (2,):
        what = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise StructureError(f"a key is int64 of shape (..., 2), made by key(seed); not {what}")
