"""Training in PyTorch as a pure function of one immutable state.

A run is a fold, ``state' = step(state, batch)``; :class:`TrainState` holds all that decides what
happens next.
"""

import gc

# Nothing that an import makes is garbage, but a full collection would walk over all that torch has
# made: that took longer than all of these modules together.
_collects = gc.isenabled()
gc.disable()
try:
    from puretrain import (
        compose,
        curvature,
        errors,
        metrics,
        optim,
        per_example,
        random,
        replay,
        sharding,
        tree,
    )
    from puretrain.checkpoint import (
        convert,
        latest,
        load,
        load_part,
        open_checkpoint,
        read_index,
        read_slice,
        save,
        verify,
    )
    from puretrain.compiled import compiled
    from puretrain.data import batches
    from puretrain.ensemble import (
        EnsembleState,
        ensemble,
        ensemble_eval_step,
        ensemble_step,
        mean_probabilities,
        member,
        per_member,
        population,
        ranking,
        select_members,
    )
    from puretrain.explain import explain, explanations
    from puretrain.functional import functional, load_into, rematerialize
    from puretrain.gradients import Aux
    from puretrain.loop import (
        Event,
        Interrupted,
        Reducer,
        Validation,
        evaluate,
        fit,
        predict,
        prepare,
    )
    from puretrain.observers import checkpoints, csv_log, jsonl_log, profiler, progress, tensorboard
    from puretrain.reducers import (
        averaged,
        best_k,
        early_stopping,
        ema,
        lr_monitor,
        nan_guard,
        reduce_on_plateau,
        swa,
    )
    from puretrain.replay import journal, open_run
    from puretrain.run import Run, command_line, new_directory
    from puretrain.scan import scan
    from puretrain.state import Cursor, TrainState, lease
    from puretrain.step import eval_step, train_step
    from puretrain.tree import FrozenDict, Record, field
    from puretrain.tuning import RangeTest, lr_find
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "Cursor",
    "EnsembleState",
    "Event",
    "FrozenDict",
    "Interrupted",
    "RangeTest",
    "Record",
    "Reducer",
    "Run",
    "TrainState",
    "Validation",
    "averaged",
    "batches",
    "best_k",
    "checkpoints",
    "command_line",
    "compiled",
    "compose",
    "convert",
    "csv_log",
    "curvature",
    "early_stopping",
    "ema",
    "ensemble",
    "ensemble_eval_step",
    "ensemble_step",
    "errors",
    "eval_step",
    "evaluate",
    "explain",
    "explanations",
    "field",
    "fit",
    "functional",
    "journal",
    "jsonl_log",
    "latest",
    "lease",
    "load",
    "load_into",
    "load_part",
    "lr_find",
    "lr_monitor",
    "mean_probabilities",
    "member",
    "metrics",
    "nan_guard",
    "new_directory",
    "open_checkpoint",
    "open_run",
    "optim",
    "per_example",
    "per_member",
    "population",
    "predict",
    "prepare",
    "profiler",
    "progress",
    "random",
    "ranking",
    "read_index",
    "read_slice",
    "reduce_on_plateau",
    "rematerialize",
    "replay",
    "save",
    "scan",
    "select_members",
    "sharding",
    "swa",
    "tensorboard",
    "train_step",
    "tree",
    "verify",
]
