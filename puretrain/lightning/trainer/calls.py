"""Calling the hooks of callbacks and modules: who has one, and which arguments it takes.

A hook that nobody overrides costs one look into a dictionary. What a user's method takes is read
from its signature once; arguments that it has no room for are left out, from the right, so methods
written for different versions of the interface all work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

__all__ = [
    "ANY_NUMBER",
    "call",
    "call_module",
    "call_the_rest",
    "calling",
    "counts_of",
    "hooks_of",
    "implements",
    "is_late",
    "is_of_lightning",
    "keys_of",
    "profiled",
    "state_key_of",
    "takes",
]

_BASES = {
    "Callback",
    "LightningModule",
    "LightningDataModule",
    "ModelHooks",
    "DataHooks",
    "CheckpointHooks",
    "DataModuleHooks",
}
_PACKAGES = {"puretrain", "pytorch_lightning", "lightning"}
ANY_NUMBER = 1 << 10  # of arguments
_NOTHING = nullcontext()


class Hooks(NamedTuple):
    """Who wants to hear of one kind of event."""

    callbacks: tuple[tuple[Callable[..., Any], int], ...]
    """Methods of callbacks and how many arguments each takes after trainer and module."""
    last: tuple[tuple[Callable[..., Any], int], ...]
    """The same of callbacks that come after the module: they look at what it has logged."""
    module: tuple[Callable[..., Any], int] | None


def implements(owner: Any, name: str) -> bool:
    """Whether a module, data module or callback has a method of its own for a hook."""
    method = getattr(owner, name, None)
    if method is None:
        return False
    function = inspect.unwrap(getattr(method, "__func__", method))
    place = getattr(function, "__qualname__", "").rpartition(".")[0]
    package = str(getattr(function, "__module__", "")).partition(".")[0]
    return not (place in _BASES and package in _PACKAGES)


def takes(function: Callable[..., Any]) -> int:
    """How many positional arguments a function takes at most."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin or a mock
        return ANY_NUMBER
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ANY_NUMBER
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def is_of_lightning(cls: type, name: str) -> bool:
    """Whether a class is, or inherits from, the real Lightning's of a name."""
    roots = ("pytorch_lightning", "lightning")
    return any(
        base.__name__ == name and base.__module__.partition(".")[0] in roots for base in cls.__mro__
    )


def is_late(trainer: Any, owner: Any) -> bool:
    """Whether ``on_train_epoch_end`` of a callback or module counts on 2.x's order.

    There validation is part of the epoch, and its metrics are known in that hook. So it is for
    what is made with the real Lightning, and for what users write for a trainer of 2.x.
    """
    if any(is_of_lightning(type(owner), name) for name in ("Callback", "LightningModule")):
        return True
    method = getattr(owner, "on_train_epoch_end", None)
    place = str(getattr(inspect.unwrap(getattr(method, "__func__", method)), "__module__", ""))
    return trainer._speaks_2 and place.partition(".")[0] != "puretrain"


def _looks_at_metrics(callback: Any) -> bool:
    known = getattr(callback, "_looks_at_metrics", None)
    if known is not None:
        return bool(known)
    names = ("EarlyStopping", "Checkpoint")
    return any(is_of_lightning(type(callback), name) for name in names)


def hooks_of(trainer: Any, name: str) -> Hooks | None:
    """Who has a hook of a name: found once, then remembered until the callbacks change."""
    known = trainer._hooks
    if name in known:
        return known[name]
    first, last = [], []
    kind, _, moment = name.partition(":")
    for callback in trainer.callbacks:
        if not implements(callback, kind):
            continue
        if kind != "on_train_epoch_end" or is_late(trainer, callback) is (moment == "late"):
            method = getattr(callback, kind)
            late = kind in _AFTER_MODULE and _looks_at_metrics(callback)
            (last if late else first).append((method, max(takes(method) - 2, 0)))
    module = trainer._module
    own = None
    has = module is not None and kind not in _CALLBACKS_ONLY and implements(module, kind)
    if has and (kind != "on_train_epoch_end" or is_late(trainer, module) is (moment == "late")):
        own = (getattr(module, kind), takes(getattr(module, kind)))
    found = Hooks(tuple(first), tuple(last), own) if first or last or own else None
    known[name] = found
    return found


def counts_of(trainer: Any, name: str) -> list[int]:
    """How many arguments, after trainer and module, each of those takes who have a hook."""
    hooks = hooks_of(trainer, name)
    if hooks is None:
        return []
    own = [] if hooks.module is None else [hooks.module]
    return [count for _, count in (*hooks.callbacks, *hooks.last, *own)]


_AFTER_MODULE = {"on_train_epoch_end", "on_train_batch_end", "on_validation_epoch_end"}
# the module's methods of these names take other arguments, and are called where they are due
_CALLBACKS_ONLY = {"on_init_start", "on_init_end", "setup", "teardown"}


def call(trainer: Any, name: str, *arguments: Any) -> Any:
    """Call the hook of the callbacks in their order, then the module's, and return the latter's."""
    hooks = hooks_of(trainer, name)
    if hooks is None:
        return None
    module, before = trainer._module, trainer._fx
    name = name.partition(":")[0]
    trainer._fx = name
    answer = None
    if trainer._profiles:
        trainer.profiler.start(name)
    try:
        for method, count in hooks.callbacks:
            method(trainer, module, *arguments[:count])
        if hooks.module is not None:
            method, count = hooks.module
            answer = method(*arguments[:count])
        for method, count in hooks.last:
            method(trainer, module, *arguments[:count])
    finally:
        trainer._fx = before
        if trainer._profiles:
            trainer.profiler.stop(name)
    return answer


def profiled(trainer: Any, action: str) -> Any:
    """Measure what happens in a block, if there is a profiler."""
    return trainer.profiler.profile(action) if trainer._profiles else _NOTHING


def state_key_of(callback: Any) -> str:
    """Under which name a callback is in a checkpoint."""
    key = getattr(callback, "state_key", None)
    return key if isinstance(key, str) else type(callback).__qualname__


def keys_of(methods: list[Any]) -> list[str]:
    """A name for each of some methods: of whom it is, its own, and which of that name."""
    found: list[str] = []
    for method in methods:
        owner = getattr(method, "__self__", None)
        place = "" if owner is None else state_key_of(owner)
        key = f"{place}.{getattr(method, '__name__', '')}"
        found.append(f"{key}#{sum(each.startswith(f'{key}#') for each in found)}")
    return found


def call_the_rest(trainer: Any, name: str, *arguments: Any) -> None:
    """Call a hook of all that ``trainer._called`` does not name, and write down whom.

    So a run that goes on from a checkpoint of one of them calls the others, and nobody twice.
    """
    hooks = hooks_of(trainer, name)
    if hooks is None:
        return
    module, before = trainer._module, trainer._fx
    trainer._fx = name = name.partition(":")[0]
    calls = [(method, (trainer, module), count) for method, count in hooks.callbacks]
    calls += [] if hooks.module is None else [(hooks.module[0], (), hooks.module[1])]
    calls += [(method, (trainer, module), count) for method, count in hooks.last]
    keys = keys_of([method for method, _, _ in calls])
    with profiled(trainer, name):
        for key, (method, given, count) in zip(keys, calls, strict=True):
            if key in trainer._called:
                continue
            trainer._called.append(key)
            method(*given, *arguments[:count])
    trainer._fx = before


@contextmanager
def calling(trainer: Any, name: str) -> Iterator[None]:
    """Let what is logged in a block be that of a hook."""
    before, trainer._fx = trainer._fx, name
    try:
        yield
    finally:
        trainer._fx = before


def call_module(trainer: Any, name: str, *arguments: Any) -> Any:
    """Call a method of the module alone, as the hook of its name."""
    with calling(trainer, name):
        method = getattr(trainer._module, name)
        return method(*arguments[: takes(method)])
