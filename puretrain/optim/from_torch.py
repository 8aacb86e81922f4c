"""Any optimizer class of torch's interface as a pair of pure functions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from puretrain import random
from puretrain.errors import OptimizerError, TransformError
from puretrain.optim.base import Optimizer
from puretrain.optim.shards import cut_leaves, parts_are_given
from puretrain.tree import (
    FrozenDict,
    Record,
    field,
    match_paths,
    path_string,
    tree_flatten,
    tree_flatten_up_to,
    tree_map,
    tree_paths,
    tree_unflatten,
    under_transform,
)

__all__ = ["TorchOptimizerState", "from_torch"]

_PROBE_STEPS = 3
_REMEDY = (
    "what it keeps must have the keys, types and shapes of its first steps; keep it so, or write "
    "the optimizer as a pair of functions, a puretrain.optim.Optimizer"
)

_MISSING, _NONE, _VALUE = range(3)  # the forms of an optional slot


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a torch optimizer keeps for each parameter and once for all; found out by a trial."""

    optimizer: str
    groups: tuple[tuple[int, ...], ...]
    """The leaves of each parameter group."""
    leaves: tuple[tuple[_Slot, ...], ...]
    """What it keeps for each leaf."""
    shared: tuple[_Slot, ...]
    """What it keeps once for all."""

    @functools.cached_property
    def optional(self) -> tuple[str, ...]:
        """The keys of a leaf's slots that do not always have a value."""
        slots = (slot for leaf_slots in self.leaves for slot in leaf_slots)
        return tuple(dict.fromkeys(slot.key for slot in slots if slot.optional))

    @functools.cached_property
    def plain(self) -> tuple[bool, ...]:
        """For which leaves the slots are tensors under their own names, and always there."""
        return tuple(
            all(
                slot.kinds == ("Tensor",) and slot.structure.is_leaf() and not slot.optional
                for slot in slots
            )
            for slots in self.leaves
        )

    @functools.cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The names of each leaf's slots, without those that are always None."""
        return tuple(
            tuple(
                name
                for slot in slots
                for name, kind in zip(slot.names, slot.kinds, strict=True)
                if kind != "NoneType"
            )
            for slots in self.leaves
        )

    def __repr__(self) -> str:
        return f"<{self.optimizer}, {len(self.leaves)} parameters>"


class _Slot(NamedTuple):
    """One entry of a mapping in which a torch optimizer keeps its state."""

    key: str
    structure: optree.PyTreeSpec
    """That of the value, which may be a list or a dict; None is a leaf of it."""
    names: tuple[str, ...]
    """One for each leaf of the value."""
    kinds: tuple[str, ...]
    """Tensor, bool, int, float or NoneType, for each leaf of the value."""
    optional: bool
    """Whether it is missing or None at times."""


class TorchOptimizerState(Record):
    """The state of an optimizer made by :func:`from_torch`."""

    count: Tensor
    """The number of updates, int64 of shape ``()`` on the CPU."""
    initialised: Tensor
    """Which parameters the torch optimizer has a state for; the slots of the others are zeros. bool
    of shape ``(leaves,)`` on the CPU."""
    slots: FrozenDict[Any]
    """By the names that the torch optimizer uses, trees like the parameters; None for a parameter
    without this slot. Python's numbers are tensors of shape ``()``: int64, float64 or bool."""
    shared: FrozenDict[Tensor]
    """What the torch optimizer keeps once for all and changes: ``state.k`` for an entry of its
    state, ``groups.0.k`` for one of a parameter group, ``self.k`` for an attribute."""
    present: FrozenDict[Tensor]
    """For slots that do not always have a value, whether they have one now: 0 no entry, 1 the entry
    is None, 2 a value. int64 of shape ``(leaves,)``, or ``()`` for a shared one; on the CPU."""
    layout: _Layout = field(static=True)


class _Recipe(NamedTuple):
    """The arguments of :func:`from_torch`."""

    optimizer_class: type[torch.optim.Optimizer]
    hyperparameters: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    changing: frozenset[str]

    @property
    def name(self) -> str:
        name = self.optimizer_class.__qualname__
        module = self.optimizer_class.__module__
        return f"torch.optim.{name}" if _is_torchs_own(self.optimizer_class) else f"{module}.{name}"


class _Family(NamedTuple):
    """A parameter group."""

    hyperparameters: dict[str, Any]
    members: tuple[int, ...]
    """The leaves that belong to it."""


class _Prototype(NamedTuple):
    """A constructed torch optimizer without its parameters."""

    families: list[_Family]
    attributes: dict[str, Any]
    groups: list[dict[str, Any]]
    portable: bool
    """Whether the attributes alone make an optimizer; if not, it is constructed for each update."""


# ── The pair ──────────────────────────────────────────────────────────────────────────────────────


def from_torch(
    optimizer_class: type[torch.optim.Optimizer],
    *,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    changing: Sequence[str] = (),
    **hyperparameters: Any,
) -> Optimizer:
    """Turn a class of ``torch.optim``, or one's own of that interface, into a pair of functions.

    The class itself computes the update, so the result equals it to the bit. What it keeps between
    two steps becomes an immutable state. To learn what that is, ``init`` tries three steps on
    copies of the parameters, which need memory for that time. Besides the state of each parameter,
    these are carried over as well: entries of ``self.state`` under other keys, and hyper-parameters
    in ``param_groups`` and attributes of the optimizer that changed during the trial.

    Where puretrain has the optimizer itself (:func:`puretrain.optim.adamw`, …), that one is faster,
    and it works under ``vmap``, ``grad`` and ``torch.compile``, which this one does not.

    Args:
        optimizer_class: a subclass of ``torch.optim.Optimizer`` whose ``step`` needs no closure.
        groups: hyper-parameters by a pattern of paths, see :func:`puretrain.tree.match_paths`:
            ``{"**.bias": {"weight_decay": 0.0}}``. A parameter that several patterns match belongs
            to the first; those that none matches have the general hyper-parameters.
        changing: hyper-parameters that the optimizer changes in its ``param_groups``, though not in
            its first three steps.
        **hyperparameters: for the class. ``lr`` may be a schedule, in ``groups`` too.

    Returns:
        The optimizer. Its state is a :class:`TorchOptimizerState`.

    Raises:
        OptimizerError: the class needs a closure (``LBFGS``) or sparse gradients (``SparseAdam``),
            or it is asked for a differentiable step. From ``init`` and ``update``: the class
            refuses its parameters, or keeps something that can't be carried over; says what.
        TransformError: from ``init`` and ``update``, under a transform.

    Example:
        >>> optimizer = from_torch(torch.optim.SGD, lr=0.5, momentum=0.9)
        >>> params = FrozenDict(w=torch.tensor([1.0, 2.0]))
        >>> state = optimizer.init(params)
        >>> state.slots["momentum_buffer"]["w"]
        tensor([0., 0.])
        >>> params, state = optimizer.update(FrozenDict(w=torch.ones(2)), state, params)
        >>> params["w"], state.slots["momentum_buffer"]["w"]
        (tensor([0.5000, 1.5000]), tensor([1., 1.]))
    """
    _check_class(optimizer_class, hyperparameters)
    recipe = _Recipe(
        optimizer_class,
        hyperparameters,
        {pattern: dict(overrides) for pattern, overrides in (groups or {}).items()},
        frozenset(changing),
    )
    # It follows from the layout and the recipe; remembered, because construction takes its time.
    prototypes: list[tuple[_Layout, _Prototype]] = []

    def init(params: Any) -> TorchOptimizerState:
        _refuse_transforms(recipe)
        _refuse_parts(recipe, params)
        with torch.no_grad(), random.scope(random.key(0)):
            return _initial_state(recipe, params)

    def update(
        grads: Any, opt_state: TorchOptimizerState, params: Any, *, donate: bool = False
    ) -> tuple[Any, TorchOptimizerState]:
        _refuse_transforms(recipe)
        _refuse_parts(recipe, params)
        leaves, structure = tree_flatten(params)
        gradients = tree_flatten_up_to(structure, grads)
        layout = opt_state.layout
        if layout.optimizer != recipe.name or len(layout.leaves) != len(leaves):
            raise OptimizerError(
                f"the state is one of {layout!r}, not of {recipe.name} with {len(leaves)} "
                "parameters; make one with init(params)"
            )
        with torch.no_grad():
            known = prototypes[0] if prototypes else None
            if known is None or known[0] != layout:
                known = layout, _prototype(recipe, layout, params, leaves)
                prototypes[:] = [known]
            if not donate:
                opt_state = tree_map(torch.clone, opt_state)
                if not _is_torchs_own(recipe.optimizer_class):
                    gradients = [None if g is None else g.clone() for g in gradients]
            # Aliases, so that the caller's tensors get no .grad
            weights = [_trainable(leaf if donate else leaf.clone()) for leaf in leaves]
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    _attach(weights[index], gradient, params, index)
            slots = {
                name: tree_flatten_up_to(structure, tree) for name, tree in opt_state.slots.items()
            }
            opt_state = _step(recipe, known[1], weights, slots, opt_state)
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)
        if donate:
            # an optimizer may have put other memory under a parameter: `p.data = …`
            weights = [
                leaf if leaf.data_ptr() == weight.data_ptr() else weight
                for leaf, weight in zip(leaves, weights, strict=True)
            ]
        trees = {name: tree_unflatten(structure, column) for name, column in slots.items()}
        return tree_unflatten(structure, weights), opt_state.replace(slots=FrozenDict(trees))

    return Optimizer(init, update)


def _step(
    recipe: _Recipe,
    prototype: _Prototype,
    weights: list[Tensor],
    slots: dict[str, list[Tensor | None]],
    opt_state: TorchOptimizerState,
) -> TorchOptimizerState:
    """One step of the torch optimizer: changes ``weights``, ``slots`` and most of the state."""
    layout = opt_state.layout
    optimizer = _assemble(recipe, prototype, weights)
    initialised = opt_state.initialised.tolist()
    optional = {key: opt_state.present[key].tolist() for key in layout.optional}
    held = [
        {name: slots[name][index] for name in names} for index, names in enumerate(layout.names)
    ]
    for index, weight in enumerate(weights):
        if initialised[index]:
            if layout.plain[index]:  # the usual case, kept short
                optimizer.state[weight] = held[index].copy()
                continue
            forms = {key: form[index] for key, form in optional.items()}
            optimizer.state[weight] = _restored(layout.leaves[index], forms, held[index])
    forms = {slot.key: int(opt_state.present[slot.key]) for slot in layout.shared if slot.optional}
    shared = _restored(layout.shared, forms, opt_state.shared)
    for slot in layout.shared:
        place, key = _place(optimizer, slot.key)
        place.pop(key, None)
        if slot.key in shared:
            place[key] = shared[slot.key]
    for family, group in zip(prototype.families, optimizer.param_groups, strict=True):
        lr: Any = family.hyperparameters.get("lr")
        if _is_schedule(lr):
            group["lr"] = float(lr(int(opt_state.count)))

    before = _snapshot(optimizer)
    optimizer.step()
    _check_settings(recipe, layout, before, optimizer)

    known = {id(weight) for weight in weights}
    expected = {slot.key for slot in layout.shared}
    for other in optimizer.state:
        if id(other) not in known and f"state.{other}" not in expected:
            raise OptimizerError(
                f"{recipe.name} began to keep self.state[{other!r}] after its first "
                f"{_PROBE_STEPS} steps; it must do so from the first one, or from its constructor"
            )
    for index, weight in enumerate(weights):
        content = optimizer.state.get(weight)
        if not content:
            continue
        old = held[index]
        if (
            initialised[index]
            and layout.plain[index]
            and len(content) == len(old)
            and all(old.get(key) is value for key, value in content.items())
        ):
            continue  # all of it was changed in place
        new, forms = _captured(recipe, layout.leaves[index], content, old)
        for name, value in new.items():
            slots[name][index] = value
        for key, form in forms.items():
            optional[key][index] = form
        if not initialised[index]:
            opt_state.initialised[index] = True
    content = _shared(optimizer, expected)
    kept, forms = _captured(recipe, layout.shared, content, opt_state.shared)
    return opt_state.replace(
        count=opt_state.count.add_(1),
        shared=FrozenDict(kept),
        present=FrozenDict({key: torch.tensor(form) for key, form in (optional | forms).items()}),
    )


# ── Torch's optimizer object ──────────────────────────────────────────────────────────────────────


def _families(recipe: _Recipe, params: Any) -> list[_Family]:
    paths = tree_paths(params)
    number = {path: index for index, path in enumerate(paths)}
    free = set(number.values())
    families = []
    for pattern, overrides in recipe.groups.items():
        members = tuple(number[p] for p in match_paths(pattern, paths) if number[p] in free)
        if not members:
            raise OptimizerError(
                f"the group {pattern!r} is empty: earlier patterns match all of its parameters; "
                "name it before them, or leave it out"
            )
        free.difference_update(members)
        families.append(_Family(recipe.hyperparameters | overrides, members))
    if free:
        families.insert(0, _Family(recipe.hyperparameters, tuple(sorted(free))))
    return families


def _construct(
    recipe: _Recipe, families: list[_Family], weights: list[Tensor]
) -> torch.optim.Optimizer:
    def first(hyperparameters: dict[str, Any]) -> dict[str, Any]:
        lr: Any = hyperparameters.get("lr")
        return hyperparameters | ({"lr": float(lr(0))} if _is_schedule(lr) else {})

    groups = [
        {"params": [weights[i] for i in members], **first(hyperparameters)}
        for hyperparameters, members in families
    ]
    try:
        optimizer = recipe.optimizer_class(groups, **first(recipe.hyperparameters))
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptimizerError(f"{recipe.name} can't be constructed: {error}") from error
    for pattern, overrides in recipe.groups.items():
        # torch accepts any name in a group, and ignores one that it does not know
        unknown = sorted(set(overrides) - set(optimizer.defaults))
        if unknown:
            raise OptimizerError(
                f"the group {pattern!r} sets {', '.join(unknown)}, but the hyper-parameters of "
                f"{recipe.name} are {', '.join(optimizer.defaults)}"
            )
    return optimizer


def _prototype(recipe: _Recipe, layout: _Layout, params: Any, leaves: list[Tensor]) -> _Prototype:
    families = _families(recipe, params)
    if tuple(family.members for family in families) != layout.groups:
        raise OptimizerError(
            f"the state of {recipe.name} was made for other parameter groups; "
            "make one with init(params)"
        )
    optimizer = _construct(recipe, families, [_trainable(leaf) for leaf in leaves])
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    attributes = {
        key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups")
    }
    own = [value for key, value in attributes.items() if key not in _inherited_attributes()]
    values = [value for group in groups for value in group.values()]
    # A tensor among the attributes may be a parameter.
    portable = all(_is_plain(value) for value in own) and all(
        isinstance(value, Tensor) or _is_plain(value) for value in values
    )
    return _Prototype(families, attributes if portable else {}, groups, portable)


def _assemble(
    recipe: _Recipe, prototype: _Prototype, weights: list[Tensor]
) -> torch.optim.Optimizer:
    if not prototype.portable:
        optimizer = _construct(recipe, prototype.families, weights)
        optimizer.state.clear()
        return optimizer
    # As unpickling does it: several times faster than the constructor, which may allocate too
    optimizer = object.__new__(recipe.optimizer_class)
    optimizer.__dict__.update(prototype.attributes)
    optimizer.state = defaultdict(dict)
    optimizer.param_groups = [
        {
            "params": [weights[i] for i in family.members],
            **{k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()},
        }
        for family, group in zip(prototype.families, prototype.groups, strict=True)
    ]
    return optimizer


@functools.cache
def _inherited_attributes() -> frozenset[str]:
    return frozenset(vars(torch.optim.Optimizer([torch.zeros(1)], {})))


def _is_plain(value: Any) -> bool:
    """Whether optimizers can share a value without one changing it for the other."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)
    )


def _trainable(tensor: Tensor) -> Tensor:
    """An alias that is to an optimizer what a parameter of a module is."""
    alias = tensor.detach()
    if alias.is_floating_point() or alias.is_complex():
        alias.requires_grad_()
    return alias


def _attach(weight: Tensor, gradient: Tensor, params: Any, index: int) -> None:
    try:
        weight.grad = gradient
    except RuntimeError as error:
        name = path_string(tree_paths(params)[index])
        raise OptimizerError(
            f"the gradient of {name} does not fit the parameter: {error}; it must have the shape, "
            "the dtype and the device of the parameter"
        ) from None


def _holders(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [vars(optimizer), *optimizer.param_groups]


def _snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in items.items()}
        for items in _holders(optimizer)
    ]


def _settings(snapshot: list[dict[str, Any]]) -> dict[str, Any]:
    """Hyper-parameters and attributes: what should not change in a step unless it is state."""
    attributes, *groups = snapshot
    inherited = _inherited_attributes()
    settings = {f"self.{k}": v for k, v in attributes.items() if k not in inherited}
    for index, group in enumerate(groups):
        settings |= {f"groups.{index}.{k}": v for k, v in group.items() if k != "params"}
    return settings


def _check_settings(
    recipe: _Recipe,
    layout: _Layout,
    snapshot: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
) -> None:
    now = _holders(optimizer)
    if len(now) == len(snapshot) and all(
        len(a) == len(b) and all(map(operator.is_, a.values(), b.values()))
        for a, b in zip(snapshot, now, strict=True)
    ):
        return
    before, after = _settings(snapshot), _settings(now)
    tracked = {slot.key for slot in layout.shared}
    for key in {**before, **after}:
        if key in tracked or (
            key in before and key in after and _same(_flat(before[key]), _flat(after[key]))
        ):
            continue
        where = _describe(key)
        remedy = (
            f"pass changing=[{key.split('.', 2)[2]!r}]"
            if key.startswith("groups.")
            else "keep it in self.state or param_groups"
        )
        raise OptimizerError(
            f"{recipe.name} changed {where}, which it did not in its first {_PROBE_STEPS} steps, "
            f"so that it is not part of the state; {remedy}"
        )


def _place(optimizer: torch.optim.Optimizer, key: str) -> tuple[Any, str]:
    kind, _, name = key.partition(".")
    if kind == "state":
        return optimizer.state, name
    if kind == "self":
        return vars(optimizer), name
    index, _, name = name.partition(".")
    return optimizer.param_groups[int(index)], name


def _describe(key: str) -> str:
    kind, _, name = key.partition(".")
    if kind == "state":
        return f"self.state[{name!r}]"
    if kind == "self":
        return key
    index, _, name = name.partition(".")
    return f"self.param_groups[{index}][{name!r}]"


def _shared(optimizer: torch.optim.Optimizer, keys: set[str]) -> dict[str, Any]:
    found = {}
    for key in keys:
        place, name = _place(optimizer, key)
        if name in place:
            found[key] = place[name]
    return found


# ── The trial ─────────────────────────────────────────────────────────────────────────────────────


class _Flat(NamedTuple):
    """A value split into its leaves, among which is None."""

    leaves: list[Any]
    structure: optree.PyTreeSpec
    paths: tuple[Any, ...]


def _flat(value: Any) -> _Flat:
    paths, leaves, structure = optree.tree_flatten_with_path(value, none_is_leaf=True)
    return _Flat(leaves, structure, tuple(paths))


def _copied(flat: _Flat) -> _Flat:
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in flat.leaves]
    return flat._replace(leaves=leaves)


def _same(a: _Flat, b: _Flat) -> bool:
    return a.structure == b.structure and all(
        x is y
        or (isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y))
        or (type(x) is type(y) and isinstance(x, (bool, int, float, complex, str)) and x == y)
        for x, y in zip(a.leaves, b.leaves, strict=True)
    )


def _initial_state(recipe: _Recipe, params: Any) -> TorchOptimizerState:
    leaves, structure = tree_flatten(params)
    families = _families(recipe, params)
    weights = [_trainable(leaf.clone()) for leaf in leaves]
    optimizer = _construct(recipe, families, weights)
    first, shared_first = _observe(recipe, optimizer, weights)
    # The steps will change in place what the constructor has left. Later only its shapes matter.
    first = [{key: _copied(flat) for key, flat in state.items()} for state in first]
    observed = [(first, shared_first)]
    for _ in range(_PROBE_STEPS):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        try:
            optimizer.step()
        except Exception as error:
            raise OptimizerError(
                f"a trial step of {recipe.name} on copies of the parameters, with gradients of "
                f"ones, failed: {error}; its step() must work with nothing but the gradients"
            ) from error
        observed.append(_observe(recipe, optimizer, weights))

    layouts, zeros = [], []
    for index, path in enumerate(tree_paths(params)):
        seen = [leaf_states[index] for leaf_states, _ in observed]
        where = f"self.state of {path_string(path)}"
        slots, empty = _slots(recipe, [state for state in seen if state], where)
        layouts.append(slots)
        zeros.append(empty)
    seen_shared = _changing(recipe, families, [shared for _, shared in observed])
    shared_slots, shared_zeros = _slots(recipe, seen_shared, "")
    layout = _Layout(
        recipe.name, tuple(family.members for family in families), tuple(layouts), shared_slots
    )

    present: dict[str, Any] = {key: [_MISSING] * len(leaves) for key in layout.optional}
    columns: dict[str, list[Tensor | None]] = {
        name: [None] * len(leaves) for empty in zeros for name in empty
    }
    for index, empty in enumerate(zeros):
        values = empty
        if first[index]:
            content = {key: _unflat(flat) for key, flat in first[index].items()}
            values, forms = _captured(recipe, layouts[index], content, empty)
            for key, form in forms.items():
                present[key][index] = form
        for name, value in values.items():
            columns[name][index] = value
    content = {key: _unflat(flat) for key, flat in seen_shared[0].items()}
    shared, forms = _captured(recipe, shared_slots, content, shared_zeros)
    return TorchOptimizerState(
        count=torch.zeros((), dtype=torch.int64),
        initialised=torch.tensor([bool(state) for state in first], dtype=torch.bool),
        slots=FrozenDict(
            {name: tree_unflatten(structure, column) for name, column in columns.items()}
        ),
        shared=FrozenDict(shared),
        present=FrozenDict({key: torch.tensor(form) for key, form in (present | forms).items()}),
        layout=layout,
    )


def _unflat(flat: _Flat) -> Any:
    return optree.tree_unflatten(flat.structure, flat.leaves)


def _observe(
    recipe: _Recipe, optimizer: torch.optim.Optimizer, weights: list[Tensor]
) -> tuple[list[dict[str, _Flat]], dict[str, _Flat]]:
    """What the optimizer holds now: for each parameter, and a copy of all the rest."""
    known = {id(weight) for weight in weights}
    shared: dict[str, _Flat] = {}
    states: dict[int, dict[str, _Flat]] = {}
    everything: dict[Any, Any] = dict(optimizer.state)
    for key, value in everything.items():
        if id(key) not in known:
            if not isinstance(key, str):
                raise OptimizerError(
                    f"{recipe.name} keeps self.state[…] under a {type(key).__name__} that is none "
                    "of its parameters; the keys must be parameters or strings"
                )
            shared[f"state.{key}"] = _copied(_flat(value))
        elif isinstance(value, dict) and all(isinstance(name, str) for name in value):
            states[id(key)] = {name: _flat(entry) for name, entry in value.items()}
        else:
            raise OptimizerError(
                f"{recipe.name} keeps {_brief(value)} as the state of a parameter; "
                "it must be a dict with string keys"
            )
    for key, value in _settings(_holders(optimizer)).items():
        flat = _flat(value)
        if not any(id(leaf) in known for leaf in flat.leaves):
            shared[key] = _copied(flat)
    return [states.get(id(weight), {}) for weight in weights], shared


def _changing(
    recipe: _Recipe, families: list[_Family], observed: list[dict[str, _Flat]]
) -> list[dict[str, _Flat]]:
    """Of all that is not a parameter's own: what the optimizer keeps or changes."""
    keys = dict.fromkeys(key for shared in observed for key in shared)
    chosen = [
        key
        for key in keys
        if key.startswith("state.")
        or (key.startswith("groups.") and key.split(".", 2)[2] in recipe.changing)
        or not all(key in shared and _same(shared[key], observed[0][key]) for shared in observed)
    ]
    for index, family in enumerate(families):
        if f"groups.{index}.lr" in chosen and _is_schedule(family.hyperparameters.get("lr")):
            raise OptimizerError(
                f"{recipe.name} changes lr in its param_groups itself; "
                "give it a number, not a schedule"
            )
    return [{key: shared[key] for key in chosen if key in shared} for shared in observed]


# ── Slots ─────────────────────────────────────────────────────────────────────────────────────────


class _Number(NamedTuple):
    python: Any
    dtype: torch.dtype
    accepts: tuple[type, ...]


_NUMBERS = {
    "bool": _Number(bool, torch.bool, (bool,)),
    "int": _Number(int, torch.int64, (bool, int)),
    "float": _Number(float, torch.float64, (bool, int, float)),
}


def _slots(
    recipe: _Recipe, observed: list[dict[str, _Flat]], where: str
) -> tuple[tuple[_Slot, ...], dict[str, Tensor]]:
    """The slots that mappings seen one after another have in common, and zeros for them."""
    slots, zeros = [], {}
    for key in dict.fromkeys(key for state in observed for key in state):
        place = f"{where}[{key!r}]" if where else _describe(key)
        seen = [state[key] for state in observed if key in state]
        values = [flat for flat in seen if flat.leaves != [None]]
        optional = len(values) not in (0, len(observed)) or len(seen) < len(observed)
        flats = values or seen
        if any(flat.structure != flats[0].structure for flat in flats):
            raise OptimizerError(
                f"{recipe.name} keeps {place}, which changes its structure; {_REMEDY}"
            )
        names, kinds = [], []
        for number, path in enumerate(flats[0].paths):
            kind, zero = _common_kind(recipe, [flat.leaves[number] for flat in flats], place)
            name = ".".join(map(str, (key, *path)))
            if name in zeros:
                raise OptimizerError(
                    f"{recipe.name} keeps two things called {name} in {place}, which would be one "
                    "leaf of the state; give one of them another key, without a dot"
                )
            names.append(name)
            kinds.append(kind)
            if zero is not None:
                zeros[name] = zero
        slots.append(_Slot(key, flats[0].structure, tuple(names), tuple(kinds), optional))
    return tuple(slots), zeros


def _common_kind(recipe: _Recipe, values: list[Any], place: str) -> tuple[str, Tensor | None]:
    kinds = {type(value).__name__ for value in values}
    if all(isinstance(value, Tensor) for value in values):
        if len({(value.shape, value.dtype, value.device) for value in values}) > 1:
            raise OptimizerError(
                f"{recipe.name} keeps a tensor in {place} whose shape, dtype or device changes; "
                f"{_REMEDY}"
            )
        return "Tensor", torch.zeros_like(values[0])
    if kinds == {"NoneType"}:
        return "NoneType", None
    for kind, number in _NUMBERS.items():  # a number that is an int at first may become a float
        if all(type(value) in number.accepts for value in values):
            return kind, torch.zeros((), dtype=number.dtype)
    raise OptimizerError(
        f"{recipe.name} keeps {' or '.join(sorted(kinds))} in {place}, which can't be carried "
        "over; tensors, int, float, bool and None can, and lists and dicts of them"
    )


def _restored(
    slots: tuple[_Slot, ...], forms: Mapping[str, int], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The mapping that a torch optimizer expects, out of the leaves by their names."""
    content: dict[str, Any] = {}
    for slot in slots:
        form = forms[slot.key] if slot.optional else _VALUE
        if form != _VALUE:
            if form == _NONE:
                content[slot.key] = None
            continue
        leaves = [
            values[name] if kind == "Tensor" else _NUMBERS[kind].python(values[name].item())
            for name, kind in zip(slot.names, slot.kinds, strict=True)
            if kind != "NoneType"
        ]
        if len(leaves) == 1 and slot.structure.is_leaf():
            content[slot.key] = leaves[0]
            continue
        remaining = iter(leaves)
        every = [None if kind == "NoneType" else next(remaining) for kind in slot.kinds]
        content[slot.key] = optree.tree_unflatten(slot.structure, every)
    return content


def _captured(
    recipe: _Recipe,
    slots: tuple[_Slot, ...],
    content: Mapping[str, Any],
    old: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The leaves of a mapping by their names, and the forms of the optional slots."""
    new: dict[str, Tensor] = {}
    forms: dict[str, int] = {}
    for slot in slots:
        value: Any = content.get(slot.key)
        if slot.optional:
            forms[slot.key] = _VALUE
            if value is None:
                forms[slot.key] = _NONE if slot.key in content else _MISSING
                new.update((name, old[name]) for name in slot.names if name in old)
                continue
        elif slot.key not in content:
            raise OptimizerError(f"{recipe.name} removed {slot.key} from its state; {_REMEDY}")
        if slot.structure.is_leaf():
            leaves = [value]
        else:
            leaves, structure = optree.tree_flatten(value, none_is_leaf=True)
            if structure != slot.structure:
                raise OptimizerError(
                    f"{recipe.name} changed the structure of {slot.key}; {_REMEDY}"
                )
        for name, kind, leaf in zip(slot.names, slot.kinds, leaves, strict=True):
            if kind == "Tensor":
                before = old[name]
                if leaf is not before and not (
                    isinstance(leaf, Tensor)
                    and leaf.shape == before.shape
                    and leaf.dtype == before.dtype
                ):
                    raise OptimizerError(
                        f"{recipe.name} changed {name} in its state from {_brief(before)} "
                        f"to {_brief(leaf)}; {_REMEDY}"
                    )
                new[name] = leaf
            elif kind == "NoneType":
                if leaf is not None:
                    raise OptimizerError(
                        f"{recipe.name} changed {name} in its state from None to {_brief(leaf)}, "
                        f"which it did not in its first {_PROBE_STEPS} steps; {_REMEDY}"
                    )
            elif type(leaf) in _NUMBERS[kind].accepts:
                new[name] = torch.tensor(leaf, dtype=_NUMBERS[kind].dtype)
            else:
                raise OptimizerError(
                    f"{recipe.name} changed {name} in its state from {kind} to {_brief(leaf)}; "
                    f"{_REMEDY}"
                )
    if len(content) > len(slots) or not content.keys() <= {slot.key for slot in slots}:
        extra = sorted(content.keys() - {slot.key for slot in slots})
        raise OptimizerError(
            f"{recipe.name} began to keep {', '.join(extra)} in its state after its first "
            f"{_PROBE_STEPS} steps; it must do so from the first one"
        )
    return new, forms


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return repr(value)


# ── What can't be done ────────────────────────────────────────────────────────────────────────────

_OURS = (
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "Muon",
)


def _check_class(optimizer_class: Any, hyperparameters: dict[str, Any]) -> None:
    if not (
        isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    ):
        raise OptimizerError(
            f"from_torch takes a subclass of torch.optim.Optimizer, not {optimizer_class!r}"
            + (
                "; give it the class and its hyper-parameters, not an instance"
                if isinstance(optimizer_class, torch.optim.Optimizer)
                else ""
            )
        )
    name = optimizer_class.__qualname__
    if issubclass(optimizer_class, torch.optim.SparseAdam):
        raise OptimizerError(
            "SparseAdam needs sparse gradients, and ours are dense; use puretrain.optim.adam"
        )
    arguments = list(inspect.signature(optimizer_class.step).parameters.values())[1:]
    if any(
        argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
        for argument in arguments
    ):
        raise OptimizerError(
            f"{name}.step needs a closure that evaluates the loss again, and an update has only "
            "the gradients of one evaluation; this optimizer can't be used"
        )
    if hyperparameters.get("differentiable"):
        raise OptimizerError(
            f"{name} with differentiable=True can't be a pure pair, because it changes its "
            "parameters in place; differentiate through an optimizer of puretrain.optim"
        )


def _refuse_transforms(recipe: _Recipe) -> None:
    if under_transform():
        cls = recipe.optimizer_class
        instead = (
            f"puretrain.optim.{cls.__name__.lower()}"
            if _is_torchs_own(cls) and cls.__name__ in _OURS
            else "an optimizer of puretrain.optim, or write the update as a pair of functions"
        )
        raise TransformError(
            f"{recipe.name} changes tensors in place, which vmap, grad and torch.compile can't "
            f"trace; use {instead}"
        )


_BY_ELEMENT = (
    *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"),
    *("RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD"),
)


def _refuse_parts(recipe: _Recipe, params: Any) -> None:
    cls = recipe.optimizer_class
    if not parts_are_given() or (_is_torchs_own(cls) and cls.__name__ in _BY_ELEMENT):
        return
    found = cut_leaves(tree_paths(params))
    if found is not None:
        cut = zip(tree_paths(params), found[1], strict=True)
        path = next(path for path, is_cut in cut if is_cut)
        raise OptimizerError(
            f"{recipe.name}: each process has only a part of {path_string(path)}, and it is not "
            "known whether the update works on each element by itself; leave the leaves whole "
            "(whole=… of puretrain.sharding.zero), or use an optimizer of puretrain.optim"
        )


def _is_torchs_own(optimizer_class: type) -> bool:
    return optimizer_class.__module__.startswith("torch.optim.")


def _is_schedule(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)
