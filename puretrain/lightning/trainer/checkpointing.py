"""What is in a checkpoint of a trainer, and how a run goes on from one."""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puretrain.checkpoint.lightning import loop_counters
from puretrain.errors import CheckpointError
from puretrain.lightning.trainer import loaders, training
from puretrain.lightning.trainer.calls import calling, implements, state_key_of, takes
from puretrain.lightning.trainer.checkpoint_file import Opaque, read, write
from puretrain.lightning.trainer.results import metric_states, restore_metric_states
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.version import __version__
from puretrain.state import Cursor, TrainState

__all__ = [
    "CallbackStates",
    "dump",
    "load",
    "load_module",
    "restore_fit",
    "restore_weights",
    "save",
]

_HPARAMS = "hyper_parameters"
_PLACE = "puretrain"
_SCALER = "native_amp_scaling_state"
_COUNTERS = (
    "due", "steps_done", "updates", "total_batches", "batches_of_epoch", "accumulating",
)  # fmt: skip


class CallbackStates(dict[str, Any]):
    """States of callbacks by their keys; a callback's class finds the first of its kind."""

    def _key(self, key: Any) -> Any:
        if isinstance(key, type):
            names = [k for k in self if k.split("{")[0] == key.__qualname__]
            return names[0] if names else key.__qualname__
        return key

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._key(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._key(key))

    def get(self, key: Any, default: Any = None) -> Any:
        """The state under a key or class."""
        return super().get(self._key(key), default)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


# ── Saving ────────────────────────────────────────────────────────────────────────────────────────


def dump(trainer: Any, *, weights_only: bool = False) -> dict[str, Any]:
    """The checkpoint of a trainer, as hooks may change it and as it is written."""
    module = trainer._module
    fitting = trainer._fold is not None
    in_epoch = trainer._due < training.EPOCH_ENDED and fitting and trainer._fold.cursor.offset > 0
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch + 1 if trainer._steps_done else trainer.current_epoch,
        "global_step": trainer._steps_done,
        "pytorch-lightning_version": __version__,
        "state_dict": dict(module.state_dict()),
    }
    if not weights_only:
        checkpoint["callbacks"] = _callback_states(trainer, checkpoint)
        checkpoint["optimizer_states"] = [o.state_dict() for o in trainer.optimizers]
        checkpoint["lr_schedulers"] = [c["scheduler"].state_dict() for c in trainer.lr_schedulers]
        if trainer._scaler is not None:
            checkpoint[_SCALER] = trainer._scaler.state_dict()
        if fitting:
            counters = loop_counters(
                trainer._steps_done, trainer._total_batches, checkpoint["epoch"]
            )
            checkpoint["loops"] = {"fit_loop": counters}
            checkpoint["puretrain"] = _position(trainer, in_epoch=bool(in_epoch))
    hparams = module.__dict__.get("_hparams")
    if hparams:
        name = module.__dict__.get("_hparams_name")
        if name is not None:
            checkpoint["hparams_name"] = name
        checkpoint[_HPARAMS] = _plain(hparams)
    if trainer.datamodule is not None:
        data_hparams = trainer.datamodule.__dict__.get("_hparams")
        if data_hparams:
            checkpoint["datamodule_hparams_name"] = trainer.datamodule.__dict__.get("_hparams_name")
            checkpoint["datamodule_hyper_parameters"] = _plain(data_hparams)
        if not weights_only and hasattr(trainer.datamodule, "state_dict"):
            state = trainer.datamodule.state_dict()
            if state:
                checkpoint[type(trainer.datamodule).__qualname__] = state
    with calling(trainer, "on_save_checkpoint"):
        if not weights_only and implements(trainer.datamodule, "on_save_checkpoint"):
            trainer.datamodule.on_save_checkpoint(checkpoint)
        if implements(module, "on_save_checkpoint"):
            module.on_save_checkpoint(checkpoint)
    return checkpoint


def _plain(hparams: Any) -> dict[str, Any]:
    return dict(hparams.items()) if isinstance(hparams, Mapping) else dict(vars(hparams))


def _callback_states(trainer: Any, checkpoint: dict[str, Any]) -> CallbackStates:
    states = CallbackStates()
    with calling(trainer, "on_save_checkpoint"):
        for callback in trainer.callbacks:
            state = None
            if implements(callback, "state_dict"):
                state = callback.state_dict()
            if implements(callback, "on_save_checkpoint"):
                method = callback.on_save_checkpoint
                given = method(*(trainer, trainer._module, checkpoint)[: takes(method)])
                state = given or state
            if state:
                states[state_key_of(callback)] = state
    return states


def _position(trainer: Any, *, in_epoch: bool) -> dict[str, Any]:
    """All that the keys of Lightning have no place for."""
    state: TrainState = trainer._fold
    module = trainer._module
    accumulating = trainer._accumulating or not module.automatic_optimization
    grads: dict[str, Tensor] = {}
    if accumulating:
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    metrics = trainer.callback_metrics if trainer._stage == "train" else trainer._callback_metrics
    metrics = {k: v for k, v in metrics.items() if isinstance(v, Tensor)}
    generators = loaders.capture()
    if trainer._due in (training.VALIDATING, training.EPOCH_VALIDATING):
        generators = trainer._generators_of_validation
    found: dict[str, Any] = {
        "step": int(state.step),
        "cursor": {
            "epoch": int(state.cursor.epoch),
            "offset": int(state.cursor.offset),
            "source": state.cursor.source,
        },
        "generators": generators,
        **{name: getattr(trainer, f"_{name}") for name in _COUNTERS},
        "called": list(trainer._called) if trainer._due >= training.EPOCH_ENDED else [],
        "is_last": trainer._item_is_last,
        "grads": grads,
        "metrics": metrics,
        "results": trainer._train_results.dump(module) if in_epoch else [],
        "metric_states": metric_states(module) if in_epoch else {},
        "outputs": list(trainer._epoch_outputs) if in_epoch else [],
        "losses": list(trainer._losses),
        "eval_seen": dict(trainer._eval_seen),
        "training": {name: m.training for name, m in module.named_modules() if not m.training},
    }
    return found


def save(trainer: Any, path: Any, *, weights_only: bool = False, together: bool = False) -> None:
    """Write the checkpoint of a trainer; the first process does.

    Args:
        trainer: whose run.
        path: of the file.
        weights_only: leave out all that is needed to go on training.
        together: whether all processes are here: then the place of each of them is in the file, and
            none goes on before it is written.
    """
    checkpoint = dump(trainer, weights_only=weights_only)
    together = together and trainer._processes.connected
    if together and _PLACE in checkpoint:
        places = trainer._processes.gather(checkpoint[_PLACE])
        checkpoint[_PLACE] = {**checkpoint[_PLACE], "other_ranks": places[1:]}
    if trainer.is_global_zero:
        _write(path, checkpoint)
    if together:
        trainer._processes.barrier()


def _write(path: Any, checkpoint: dict[str, Any]) -> None:
    plain = dict(checkpoint)
    if "callbacks" in plain:
        plain["callbacks"] = dict(plain["callbacks"])
    write(path, plain)


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────


def load(path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint from a path, a URL or an open file."""
    if isinstance(path, str) and urllib.parse.urlparse(path).scheme in {"http", "https", "file"}:
        with urllib.request.urlopen(path) as answer, tempfile.TemporaryFile() as file:
            file.write(answer.read())
            file.seek(0)
            return _typed(read(file, map_location, weights_only=weights_only))
    return _typed(read(path, map_location, weights_only=weights_only))


def _typed(checkpoint: Any) -> Any:
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("callbacks"), dict):
        states = CallbackStates()
        for key, state in checkpoint["callbacks"].items():
            states[key if isinstance(key, str) else getattr(key, "__qualname__", str(key))] = state
        checkpoint["callbacks"] = states
    return checkpoint


def restore_weights(trainer: Any, path: Any) -> None:
    """Read the parameters of a checkpoint into the trainer's module."""
    checkpoint = load(path, "cpu")
    _load_module_state(trainer, checkpoint)


def _load_module_state(trainer: Any, checkpoint: dict[str, Any]) -> None:
    module = trainer._module
    if implements(trainer.datamodule, "on_load_checkpoint"):
        trainer.datamodule.on_load_checkpoint(checkpoint)
    if implements(module, "on_load_checkpoint"):
        module.on_load_checkpoint(checkpoint)
    strict = getattr(module, "strict_loading", True)
    module.load_state_dict(checkpoint["state_dict"], strict=strict is not False)


def restore_fit(trainer: Any, path: Any, state: TrainState) -> TrainState:
    """Set a trainer to where a checkpoint was written; returns the state to go on from."""
    checkpoint = load(path, "cpu")
    module = trainer._module
    _load_module_state(trainer, checkpoint)
    if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
        raise KeyError(
            "Trying to restore training state but checkpoint contains only the model. This is "
            "probably due to `ModelCheckpoint.save_weights_only` being set to `True`."
        )
    _load_callbacks(trainer, checkpoint)
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        optimizer.load_state_dict(copy.deepcopy(saved))
    for config, saved in zip(trainer.lr_schedulers, checkpoint["lr_schedulers"], strict=True):
        config["scheduler"].load_state_dict(copy.deepcopy(saved))
    scale = checkpoint.get(_SCALER) or checkpoint.get("MixedPrecision")  # the latter in 2.x
    if scale and trainer._scaler is not None:
        trainer._scaler.load_state_dict(scale)
    elif bool(scale) != (trainer._scaler is not None):
        rank_zero_warn(
            "the checkpoint was written with precision=16 and the run goes on without, or the "
            "other way round: the loss scale begins anew"
        )
    place = _place_of(trainer, checkpoint.get(_PLACE))
    trainer._steps_done = trainer.global_step = int(checkpoint["global_step"])
    if place is None:
        return _from_lightning(trainer, checkpoint, state)
    vars(trainer).update({f"_{name}": place[name] for name in _COUNTERS})
    trainer._called = list(place.get("called", ()))
    trainer.global_step = trainer._steps_done
    trainer._item_is_last = place["is_last"]
    trainer._callback_metrics = dict(place["metrics"])
    trainer._train_results.restore(place["results"], module)
    restore_metric_states(module, place.get("metric_states", {}))
    trainer._epoch_outputs = list(place["outputs"])
    trainer._losses.extend(place["losses"])
    trainer._eval_seen = dict(place["eval_seen"])
    parameters = dict(module.named_parameters())
    for name, grad in place["grads"].items():
        parameters[name].grad = grad.to(parameters[name].device)
    trainer._generators_to_restore = place["generators"]
    cursor = Cursor(
        torch.tensor(place["cursor"]["epoch"]),
        torch.tensor(place["cursor"]["offset"]),
        place["cursor"]["source"],
    )
    return state.replace(step=torch.tensor(place["step"]), cursor=cursor)


def _place_of(trainer: Any, place: Any) -> Any:
    """What is this process's of the places in a checkpoint."""
    others = place.get("other_ranks", []) if place is not None else []
    if place is None or trainer.world_size == 1 + len(others):
        return ([place, *others])[trainer.global_rank]
    rank_zero_warn(
        f"the checkpoint was written by {1 + len(others)} processes and the run goes on with "
        f"{trainer.world_size}: what differs between processes, such as unfinished sums of "
        "logged values, is that of the first one"
    )
    return place


def _from_lightning(trainer: Any, checkpoint: dict[str, Any], state: TrainState) -> TrainState:
    """Go on from a checkpoint of Lightning, at the beginning of an epoch."""
    epoch = int(checkpoint["epoch"])
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    current = progress.get("current", {})
    if current:  # 2.x counts the epoch as over after its last hooks, and writes before
        epoch = int(current.get("processed", epoch))
    rank_zero_warn(
        "the checkpoint was written by Lightning, which does not keep the place in an epoch and "
        f"the random generators: the run goes on with epoch {epoch} from its beginning"
    )
    return state.replace(cursor=Cursor(epoch=torch.tensor(epoch)))


def _load_callbacks(trainer: Any, checkpoint: dict[str, Any]) -> None:
    states = checkpoint.get("callbacks") or CallbackStates()
    for callback in trainer.callbacks:
        if implements(callback, "on_load_checkpoint"):
            method = callback.on_load_checkpoint
            count = takes(method)
            state = states.get(state_key_of(callback), states.get(type(callback)))
            if count == 1:
                if state is not None:
                    method(copy.deepcopy(state))
            elif state is not None or _takes_checkpoint(method):
                given = checkpoint if _takes_checkpoint(method) else copy.deepcopy(state)
                method(trainer, trainer._module, given)
        if implements(callback, "load_state_dict") and not _delegates(callback):
            state = states.get(state_key_of(callback), states.get(type(callback)))
            if state is not None:
                callback.load_state_dict(copy.deepcopy(state))


def _delegates(callback: Any) -> bool:
    """Whether ``on_load_checkpoint`` is one of ours, which calls ``load_state_dict`` itself."""
    function = getattr(callback.on_load_checkpoint, "__func__", callback.on_load_checkpoint)
    place = str(getattr(function, "__module__", ""))
    return place.startswith("puretrain.") and implements(callback, "on_load_checkpoint")


def _takes_checkpoint(method: Any) -> bool:
    return "checkpoint" in inspect.signature(method).parameters


# ── A module from a checkpoint ────────────────────────────────────────────────────────────────────


def load_module(
    cls: type,
    path: Any,
    map_location: Any,
    hparams_file: Any,
    strict: bool,
    weights_only: bool | None,
    given: Mapping[str, Any],
) -> Any:
    """Make a module or data module with the arguments and parameters of a checkpoint."""
    checkpoint = load(path, map_location or "cpu", weights_only)
    if hparams_file is not None:
        checkpoint[_HPARAMS] = _hparams_of_file(hparams_file)
        checkpoint.pop("hparams_name", None)
    arguments = _arguments(cls, checkpoint, given)
    unread = [k for k, v in arguments.items() if isinstance(v, Opaque)]
    if unread:
        kinds = ", ".join(f"{name} ({arguments[name].kind})" for name in unread)
        raise CheckpointError(
            f"{path}: hyper-parameters that are no plain values are not read from a file: {kinds}. "
            "Give them to load_from_checkpoint as keyword arguments or, if you trust the file, "
            "weights_only=False"
        )
    module = cls(**arguments)
    if implements(module, "on_load_checkpoint"):
        module.on_load_checkpoint(checkpoint)
    if isinstance(module, torch.nn.Module):
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        device = next((t.device for t in checkpoint["state_dict"].values()), None)
        if map_location is not None and device is not None:
            module.to(device)
    return module


def _hparams_of_file(path: Any) -> dict[str, Any]:
    from puretrain.lightning.core import saving

    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix == ".csv":
        return dict(saving.load_hparams_from_tags_csv(path))
    if suffix in {".yml", ".yaml"}:
        return dict(saving.load_hparams_from_yaml(path))
    raise ValueError(".csv, .yml or .yaml is required for `hparams_file`")


def _arguments(cls: type, checkpoint: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``__init__``: those given, else those of the checkpoint."""
    from puretrain.lightning.utilities.parsing import AttributeDict

    is_data = not issubclass(cls, torch.nn.Module)
    prefix = "datamodule_" if is_data else ""
    saved = checkpoint.get(f"{prefix}{_HPARAMS}")
    saved = saved if saved is not None else checkpoint.get("hparams")
    saved = (
        {} if saved is None else dict(saved.items() if isinstance(saved, Mapping) else vars(saved))
    )
    name = checkpoint.get("datamodule_hparams_name" if is_data else "hparams_name")
    parameters = inspect.signature(cls.__init__).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if name in parameters and name not in {None, "kwargs"}:
        # __init__ takes all of them as one argument
        values = AttributeDict({**saved})
        values.update({k: v for k, v in given.items() if k not in parameters})
        return {name: values, **{k: v for k, v in given.items() if k in parameters}}
    arguments = {**saved, **given}
    if not anything:
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    return arguments
