"""From and to the checkpoints of Lightning: a dict of ``torch.save``, read without running code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import FrozenDict

__all__ = ["LIGHTNING_VERSION", "TorchOptimizer", "from_lightning", "loop_counters", "to_lightning"]

LIGHTNING_VERSION = "1.2.10"
"""What a file says of itself. Later versions of Lightning bring files of it up to date."""

TorchOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
"""Makes an optimizer of torch out of parameters: ``partial(torch.optim.AdamW, lr=1e-3)``."""


# ── From ──────────────────────────────────────────────────────────────────────────────────────────


def from_lightning(
    content: Mapping[str, Any], name: str, params: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The step and, if the optimizer is one Adam, its state, in our names.

    Args:
        content: the checkpoint.
        name: the file, for warnings.
        params: the parameters, in the order of the module.
    """
    tree: dict[str, Any] = {"step": torch.tensor(int(content.get("global_step", 0)))}
    optimizers = content.get("optimizer_states") or []
    if optimizers:
        state = _optimizer_state(optimizers, params)
        if isinstance(state, str):
            warnings.warn(f"{name}: the optimizer's state is left out: {state}", stacklevel=5)
        else:
            tree["opt_state"] = state
    return tree


def _optimizer_state(
    optimizers: Sequence[Mapping[str, Any]], params: Mapping[str, Tensor]
) -> dict[str, Any] | str:
    """The state of torch's Adam or SGD in the names that ours have, or why that can't be."""
    if len(optimizers) != 1:
        return f"there are {len(optimizers)} optimizers"
    state, groups = optimizers[0].get("state", {}), optimizers[0].get("param_groups", [])
    numbers = [number for group in groups for number in group.get("params", [])]
    if len(numbers) != len(params) or sorted(numbers) != list(range(len(params))):
        return f"it has {len(numbers)} parameters, and the model {len(params)}"
    slots: dict[str, dict[str, Tensor]] = {}
    steps: list[float] = []
    for number, (name, param) in enumerate(params.items()):
        memory = dict(state.get(number, {}))
        steps.append(float(memory.pop("step", 0)))
        for slot, value in memory.items():
            if not isinstance(value, Tensor) or value.shape != param.shape:
                return f"{slot} of parameter {number} does not fit {name}"
            slots.setdefault(slot, {})[name] = value
    if any(len(slot) != len(params) for slot in slots.values()):
        return "some parameters have no state yet"
    if {"exp_avg", "exp_avg_sq"} <= slots.keys() <= {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}:
        count, step = torch.tensor(int(max(steps))), torch.tensor(steps, dtype=torch.float32)
        kept = {slot: FrozenDict(values) for slot, values in slots.items()}
        return {"count": count, "step": step, "max_exp_avg_sq": None, **kept}
    return f"it is of another kind than Adam: {', '.join(slots) or 'nothing'}"


# ── To ────────────────────────────────────────────────────────────────────────────────────────────


def to_lightning(
    tree: Mapping[str, Any],
    model: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    optimizer: TorchOptimizer | None,
    name: str,
) -> dict[str, Any]:
    """A checkpoint from which Lightning's Trainer goes on, out of the tree of one of ours.

    Args:
        tree: the whole.
        model: parameters and buffers as the LightningModule names them.
        params: the parameters by their names in the tree, in the order of the module.
        optimizer: makes the torch optimizer that the module makes; None leaves its state out.
        name: the file, for errors.

    Raises:
        CheckpointError: there is no state of such an optimizer in the tree.
    """
    step = int(tree.get("step", 0))
    updates = int(tree.get("updates", step))
    cursor = tree.get("cursor") or {}
    epoch = int(cursor.get("epoch", 0))
    if int(cursor.get("offset", 0)):
        warnings.warn(
            f"{name} was written in the middle of an epoch: Lightning does not keep that place, "
            f"and goes on with epoch {epoch} from its beginning",
            stacklevel=4,
        )
    states = []
    if optimizer is not None:
        states = [_torch_state(tree.get("opt_state"), params, optimizer, name)]
    elif tree.get("opt_state") is not None:
        warnings.warn(
            f"{name}: the optimizer's state is left out, since nothing says which optimizer of "
            "torch, with which learning rate, is to have it: give optimizer=",
            stacklevel=4,
        )
    return {
        "epoch": epoch,
        "global_step": updates,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": dict(model),
        "loops": {"fit_loop": loop_counters(updates, step, epoch)},
        "callbacks": {},
        "optimizer_states": states,
        "lr_schedulers": [],
    }


def _torch_state(
    state: Any, params: Mapping[str, Tensor], optimizer: TorchOptimizer, name: str
) -> dict[str, Any]:
    """The ``state_dict`` that the torch optimizer would have."""
    leaves = [value.detach().clone().requires_grad_() for value in params.values()]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    try:
        made = optimizer(leaves)
        made.step()  # shows what it remembers; the values come from the tree
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"optimizer= must make an optimizer of torch out of parameters: {error}"
        ) from error
    shown = made.state_dict()
    kind, wanted = type(made).__name__, shown["state"]
    if not any(isinstance(v, Tensor) for slots in wanted.values() for v in slots.values()):
        return shown
    found = list(_memories(state, list(params)))
    if len(found) != 1:
        raise CheckpointError(
            f"{name} has {len(found) or 'no'} optimizer states of tensors like the parameters, and "
            f"{kind} needs one; give optimizer= the optimizer that the state was made with"
        )
    (memory,) = found
    for number, (path, param) in enumerate(params.items()):
        for slot, value in wanted.get(number, {}).items():
            if not isinstance(value, Tensor):
                continue
            own = memory(slot, number, path)
            if own is None or own.numel() != value.numel():
                raise CheckpointError(
                    f"{name}: {kind} remembers {slot} of {path}, with the shape "
                    f"{tuple(value.shape)}, and the checkpoint has no such thing; is it another "
                    "optimizer?"
                )
            like = param if value.shape == param.shape else value
            wanted[number][slot] = own.detach().to(like.dtype).reshape(value.shape).clone()
    return shown


_Memory = Callable[[str, int, str], Tensor | None]


def _memories(node: Any, paths: list[str]) -> Iterator[_Memory]:
    """Places in an optimizer's state that remember something of each parameter."""
    if isinstance(node, Mapping):
        if any(_is_slot(value, paths) for value in node.values()):
            yield lambda slot, number, path: _by_slot(node, slot, number, path)
            return
        if paths and set(node) == {str(number) for number in range(len(paths))}:
            yield lambda slot, number, path: node[str(number)].get(slot)
            return
        children: Iterable[Any] = node.values()
    elif isinstance(node, (list, tuple)):
        children = node
    else:
        return
    for child in children:
        yield from _memories(child, paths)


def _is_slot(value: Any, paths: list[str]) -> bool:
    return isinstance(value, Mapping) and bool(paths) and set(value) == set(paths)


def _by_slot(node: Mapping[str, Any], slot: str, number: int, path: str) -> Tensor | None:
    found = node.get(slot)
    if isinstance(found, Mapping):
        return found.get(path)
    if isinstance(found, Tensor):  # the steps of all parameters in one
        return found[number] if found.dim() else found
    return node.get("count") if slot == "step" else None


def loop_counters(updates: int, batches: int, epochs: int) -> dict[str, Any]:
    """The counters by which later versions of Lightning go on with the next epoch.

    Args:
        updates: steps that the optimizer has made.
        batches: batches that were read.
        epochs: epochs that are over.
    """

    def counts(number: int, *names: str) -> dict[str, dict[str, int]]:
        return {part: dict.fromkeys(names, number) for part in ("current", "total")}

    every = ("ready", "started", "processed", "completed")
    step = {
        "current": {"ready": 0, "completed": 0},
        "total": {"ready": updates, "completed": updates},
    }
    none = {"current": dict.fromkeys(every, 0), "is_last_batch": False}
    optimizer = {"step": step, "zero_grad": counts(0, "ready", "started", "completed")}
    names = ("", "batch_loop.", "batch_loop.manual_loop.", "batch_loop.optimizer_loop.")
    inner = (*names, "val_loop.", "val_loop.epoch_loop.")
    return {
        "state_dict": {},
        **{f"epoch_loop.{name}state_dict": {} for name in inner},
        "epoch_loop.state_dict": {"_batches_that_stepped": updates},
        "epoch_loop.batch_loop.manual_loop.optim_step_progress": step,
        "epoch_loop.batch_loop.optimizer_loop.optim_progress": {
            "optimizer": optimizer,
            "optimizer_position": 0,
        },
        "epoch_loop.batch_progress": {**none, "total": dict.fromkeys(every, batches)},
        "epoch_loop.scheduler_progress": counts(0, "ready", "completed"),
        "epoch_loop.val_loop.dataloader_progress": counts(0, "ready", "completed"),
        "epoch_loop.val_loop.epoch_loop.batch_progress": {
            **none,
            "total": dict.fromkeys(every, 0),
        },
        "epoch_progress": counts(epochs, *every),
    }
