"""Validation, test and prediction: a module's steps over loaders, without training."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from puretrain.lightning.trainer import loaders, splitting
from puretrain.lightning.trainer.calls import (
    ANY_NUMBER,
    call,
    call_module,
    counts_of,
    implements,
    profiled,
    takes,
)
from puretrain.lightning.trainer.reporting import keep_metrics, log_metrics
from puretrain.lightning.trainer.results import Results
from puretrain.lightning.trainer.signals import interrupt
from puretrain.lightning.trainer.states import RunningStage
from puretrain.lightning.trainer.transfer import moved
from puretrain.lightning.utilities.apply_func import move_data_to_device
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.warnings import WarningCache

__all__ = [
    "STAGES",
    "WORDS",
    "Prediction",
    "prepare_loaders",
    "run_evaluation",
    "run_prediction",
]

_warnings = WarningCache()

WORDS = {"val": "validation", "test": "test", "predict": "predict"}
STAGES = {
    "val": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}


def prepare_loaders(trainer: Any, kind: str) -> None:
    """Ask for the loaders of a stage and count their batches."""
    found = loaders.evaluation_loaders(trainer, kind)
    if kind == "predict":
        found = [_complete(loader) for loader in found]
    name = f"limit_{kind}_batches"
    limit = getattr(trainer, name)
    if trainer.overfit_batches > 0 and kind in {"val", "test"}:
        limit = trainer.overfit_batches
    counts = [loaders.limited(loaders.length_of(loader), limit, name) for loader in found]
    trainer._eval_loaders[kind] = found
    trainer._loaded_at[kind] = trainer.current_epoch
    trainer._eval_counts[kind] = counts


@contextmanager
def _not_training(module: Any, *, restore: bool = True) -> Iterator[None]:
    """Without gradients; afterwards each part trains or not as before."""
    modes = [(child, child.training) for child in module.modules()]
    with torch.no_grad():
        yield
    for child, training in modes if restore else ():
        child.training = training


def _read(
    trainer: Any, found: list[Iterable[Any]], counts: list[float]
) -> Iterator[tuple[Any, int, int]]:
    """The batches of the loaders where the module wants them, with their numbers and loaders."""
    for number, (loader, limit) in enumerate(zip(found, counts, strict=True)):
        trainer._eval_place = (number, limit)
        if limit == 0:
            continue
        for index, batch in enumerate(loader):
            yield moved(trainer, batch, number), index, number
            if index + 1 >= limit:
                break


def run_evaluation(
    trainer: Any,
    kind: str,
    *,
    most: float | None = None,
    on_end: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Run over the loaders for validation or test.

    Args:
        trainer: whose module and loaders.
        kind: ``val`` or ``test``.
        most: read at most so many batches of each loader.
        on_end: called when all has been computed, before the last hooks.

    Returns:
        For each loader the values that were logged of it.
    """
    module, word = trainer._module, WORDS[kind]
    if kind not in trainer._eval_loaders or loaders.are_due(trainer, kind):
        prepare_loaders(trainer, kind)
    found, counts = trainer._eval_loaders[kind], trainer._eval_counts[kind]
    if most is not None:
        counts = [min(count, most) for count in counts]
    if not found or not sum(counts):
        return []
    sanity = trainer._stage is RunningStage.SANITY_CHECKING
    trainer._stage = RunningStage.SANITY_CHECKING if sanity else STAGES[kind]
    results = trainer._results = Results(training=False, processes=trainer._processes)
    with _not_training(module, restore=not implements(module, f"on_{word}_model_train")):
        call_module(trainer, f"on_{word}_model_eval")
        call(trainer, f"on_{word}_start")
        call(trainer, f"on_{word}_epoch_start")
        outputs = _batches(trainer, kind, found, counts, results)
        results.batches_are_over = True
        results.begin_batch(None)
        results.synchronize()
        given = outputs[0] if len(found) == 1 else outputs
        if implements(module, f"{word}_epoch_end"):
            call_module(trainer, f"{word}_epoch_end", given)
        call(trainer, f"on_{word}_epoch_end", given)
        call(trainer, "on_epoch_end")
        logged: dict[str, Any] = {}
        if not sanity:
            keep_metrics(trainer)
            logged = results.collect()["log"]
            log_metrics(trainer, logged)
        if on_end is not None:
            on_end()
        call(trainer, f"on_{word}_end")
        call_module(trainer, f"on_{word}_model_train")
    trainer._results = None
    values = {} if sanity else {**logged, **results.collect()["callback"]}
    results.reset()  # metric objects begin anew
    return _by_loader(values, len(found))


def _by_loader(metrics: dict[str, Any], count: int) -> list[dict[str, Any]]:
    values = {
        name: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        for name, value in metrics.items()
    }
    if count <= 1:
        return [values]
    found = []
    for number in range(count):
        suffix = f"/dataloader_idx_{number}"
        found.append(
            {k: v for k, v in values.items() if "/dataloader_idx_" not in k or k.endswith(suffix)}
        )
    return found


def _batches(
    trainer: Any, kind: str, found: list[Any], counts: list[float], results: Results
) -> list[list[Any]]:
    module, word = trainer._module, WORDS[kind]
    name = f"{word}_step"
    method = getattr(module, name)
    several = len(found) > 1
    takes_loader = several or (takes(method) < ANY_NUMBER and _requires(method) >= 3)
    count = min(3 if takes_loader else 2, takes(method))
    own_end = getattr(module, f"{name}_end") if implements(module, f"{name}_end") else None
    keep = implements(module, f"{word}_epoch_end")
    keep = keep or any(counts_of(trainer, f"on_{word}_epoch_end"))
    outputs: list[list[Any]] = [[] for _ in found]
    for batch, index, number in _read(trainer, found, counts):
        trainer.eval_batch_idx = index
        results.begin_batch(batch, number if several else None)
        call(trainer, f"on_{word}_batch_start", batch, index, number)
        trainer._fx = name
        casting = trainer._casting
        with (
            profiled(trainer, "evaluation_step_and_end"),
            profiled(trainer, name),
            nullcontext() if casting is None else casting(),
        ):
            arguments = (batch, index, number)[:count]
            trainer._processes.before_step()
            if trainer._splits:
                output = splitting.call_parts(trainer, name, arguments, {})
            else:
                output = method(*arguments)
            if own_end is not None:
                trainer._fx = f"{name}_end"
                ended = own_end(output)
                output = output if ended is None else ended
        trainer._fx = None
        call(trainer, f"on_{word}_batch_end", output, batch, index, number)
        if keep and output is not None:
            outputs[number].append(output)
        if not trainer.sanity_checking:
            _log_step(trainer, results, kind)
        if trainer._signals and not trainer._processes.connected:
            interrupt(trainer)  # several processes must leave at the same place: later
    results.loader = None
    return outputs


def _requires(method: Any) -> int:
    parameters = inspect.signature(method).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def _log_step(trainer: Any, results: Results, kind: str) -> None:
    """Values of single evaluation steps count in all evaluation batches of the run."""
    seen = trainer._eval_seen[kind] = trainer._eval_seen.get(kind, 0) + 1
    if any(entry.options[0] for entry in results.entries.values()):
        metrics = {
            entry.forked("step"): entry.step
            for entry in results.entries.values()
            if entry.options[0]
            and entry.options[3]
            and entry.step is not None
            and entry.loader == results.loader
        }
        log_metrics(trainer, metrics, step=seen - 1)


# ── Prediction ────────────────────────────────────────────────────────────────────────────────────


class Prediction:
    """What a prediction has given so far; writers ask ``trainer.predict_loop`` for it."""

    def __init__(self, count: int) -> None:
        """Begin with so many loaders."""
        self.outputs: list[list[Any]] = [[] for _ in range(count)]
        self.epoch_batch_indices: list[list[list[int]]] = [[] for _ in range(count)]
        self.current_batch_indices: list[int] = []

    @property
    def predictions(self) -> list[Any]:
        """The outputs of all batches; by loader if there are several."""
        return self.outputs[0] if len(self.outputs) == 1 else self.outputs


class _Recorded:
    """A batch sampler that writes down which samples it has put into its batches."""

    def __init__(self, batches: Any, seen: list[list[int]]) -> None:
        self.batches, self.seen = batches, seen

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.seen.append(list(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)


def _recorded(loader: Any) -> tuple[Any, list[list[int]]]:
    """A copy of a loader, and a list that gets the samples of each of its batches."""
    seen: list[list[int]] = []
    batches = getattr(loader, "batch_sampler", None)
    if (
        not isinstance(loader, DataLoader)
        or batches is None
        or isinstance(loader.dataset, IterableDataset)
    ):
        _warnings.warn(
            f"Couldn't infer the batch indices fetched from your dataloader: "
            f"`{type(loader).__name__}`"
        )
        return loader, seen
    found = copy.copy(loader)
    # a DataLoader refuses to have its sampler exchanged, since its iterators may be under way
    found.__dict__["batch_sampler"] = _Recorded(batches, seen)
    return found, seen


def _complete(loader: Any) -> Any:
    """A loader with its last, shorter batch: a prediction leaves no sample out."""
    batches = getattr(loader, "batch_sampler", None)
    if type(loader) is not DataLoader or type(batches) is not BatchSampler or not batches.drop_last:
        return loader
    found = copy.copy(loader)
    found.__dict__["batch_sampler"] = BatchSampler(batches.sampler, batches.batch_size, False)
    found.__dict__["drop_last"] = False
    return found


def run_prediction(trainer: Any, *, keep: bool = True) -> Any:
    """Run ``predict_step`` over the loaders; the outputs come by loader if there are several."""
    module = trainer._module
    prepare_loaders(trainer, "predict")
    found, counts = trainer._eval_loaders["predict"], trainer._eval_counts["predict"]
    if not found:
        raise MisconfigurationException(
            "No `predict_dataloader()` method defined, and no loader given to `predict`"
        )
    method = module.predict_step
    if not implements(module, "predict_step") and implements(module, "predict"):
        method = module.predict  # its name in 1.2
    count = min(takes(method), 3)
    done = trainer.predict_loop = Prediction(len(found))
    writers = [c for c in trainer.callbacks if hasattr(c, "write_on_epoch_end")]
    kept = keep or any("epoch" in writer.interval for writer in writers)
    read = [_recorded(loader) if writers and limit else (loader, [])
            for loader, limit in zip(found, counts, strict=True)]  # fmt: skip
    with _not_training(module):
        call_module(trainer, "on_predict_model_eval")
        call(trainer, "on_predict_start")
        call(trainer, "on_predict_epoch_start")
        for batch, index, number in _read(trainer, [loader for loader, _ in read], counts):
            seen = read[number][1]
            done.current_batch_indices = seen[index] if index < len(seen) else []
            if index < len(seen):
                done.epoch_batch_indices[number].append(seen[index])
            output = _predict_batch(trainer, method, (batch, index, number), count)
            if kept:
                done.outputs[number].append(
                    move_data_to_device(output, "cpu") if trainer.on_gpu else output
                )
            if trainer._signals:
                interrupt(trainer)
        call(trainer, "on_predict_epoch_end", done.outputs)
        call(trainer, "on_predict_end")
    return done.predictions if keep else None


def _predict_batch(trainer: Any, method: Any, batch: tuple[Any, int, int], count: int) -> Any:
    call(trainer, "on_predict_batch_start", *batch)
    trainer._fx = "predict_step"
    casting = trainer._casting
    with profiled(trainer, "predict_step"), nullcontext() if casting is None else casting():
        output = method(*batch[:count])
    trainer._fx = None
    call(trainer, "on_predict_batch_end", output, *batch)
    return output
