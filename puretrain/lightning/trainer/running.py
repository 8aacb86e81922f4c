"""What is done around the batches of any run: its module and data come and go.

:mod:`~puretrain.lightning.trainer.stages` says in which order.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from puretrain.lightning.trainer import connecting, distributed, launching
from puretrain.lightning.trainer.calls import call, implements, takes
from puretrain.lightning.trainer.evaluation import Prediction
from puretrain.lightning.trainer.foreign import adopt
from puretrain.lightning.trainer.results import Results
from puretrain.lightning.trainer.states import TrainerFn, TrainerState
from puretrain.lightning.trainer.supporters import PredictionCollection
from puretrain.lightning.trainer.training import NOTHING_DUE
from puretrain.lightning.trainer.transfer import find_transfer
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = [
    "attach",
    "begin",
    "prepare_data",
    "setup",
    "teardown_callbacks",
    "to_device",
    "under_way",
]


def begin(trainer: Any) -> None:
    """Set all that one run remembers to what it is before the first batch."""
    trainer.current_epoch = trainer.global_step = trainer.batch_idx = trainer.eval_batch_idx = 0
    trainer.optimizers, trainer.lr_schedulers, trainer.optimizer_frequencies = [], [], []
    trainer.num_training_batches = 0
    trainer.should_stop = trainer.interrupted = False
    trainer._fold = None
    # what was logged
    trainer._train_results = Results(training=True, processes=vars(trainer).get("_processes"))
    trainer._callback_metrics, trainer._logged_metrics, trainer._bar_metrics = {}, {}, {}
    trainer._losses = deque(maxlen=20)
    trainer._grad_norms = {}
    # loaders, by stage
    trainer._given_loaders, trainer._loaded_at, trainer._train_loader = {}, {}, None
    trainer._eval_loaders, trainer._eval_counts, trainer._eval_seen = {}, {}, {}
    trainer._eval_place = (0, 0)
    trainer._predictions = PredictionCollection(trainer.global_rank, trainer.world_size)
    trainer.predict_loop = Prediction(0)
    # where the fit stands
    trainer._steps_done = trainer._updates = trainer._total_batches = 0
    trainer._batches_of_epoch = 0
    trainer._due = NOTHING_DUE
    trainer._epoch_over = trainer._epoch_cut = False
    trainer._validates = trainer._validation_follows = trainer._late_follows = False
    trainer._postponed, trainer._called, trainer._signals = [], [], []
    trainer._epoch_measured = contextlib.ExitStack()
    trainer._generators_to_restore = None
    # the batch
    trainer._item = trainer._batch = trainer._hiddens = None
    trainer._item_is_last = trainer._accumulating = False
    trainer._batch_outputs, trainer._epoch_outputs = {}, []
    # what the module does itself
    trainer._wrapped, trainer._own, trainer._lr_scheduler_step = [], {}, None
    trainer._monitored = {"step": False, "epoch": False}
    trainer._unmonitored = {"step": False, "epoch": False}


def attach(
    trainer: Any,
    model: Any,
    state: TrainerState,
    fn: TrainerFn,
    datamodule: Any,
    *,
    keep: bool,
    **given: Any,
) -> None:
    """Take a module and its data for a run.

    Args:
        trainer: who takes them.
        model: the module.
        state: what the trainer does from now on.
        fn: the method that was called.
        datamodule: where the loaders come from that are not given.
        keep: whether to go on with what the last run remembers.
        **given: the loaders by kind, of which the first may be a data module instead.

    Raises:
        MisconfigurationException: there are both loaders and a data module.
        TypeError: the module is none.
    """
    first = next(iter(given.values()))
    if not isinstance(first, (list, tuple, dict)) and callable(
        getattr(first, "prepare_data", None)
    ):
        datamodule = first
        given = {kind: value for kind, value in given.items() if value is not first}
    given = {kind: value for kind, value in given.items() if value is not None}
    if datamodule is not None and given:
        raise MisconfigurationException(
            "You cannot pass both a loader and a datamodule to one method of the trainer"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"`model` must be a `LightningModule`, got `{type(model).__qualname__}`")
    if not keep:
        begin(trainer)
    trainer._state, trainer._fn = state, fn
    trainer._module = model
    adopt(model)
    model.trainer = trainer
    if datamodule is None and (fn is not TrainerFn.FITTING or not given):
        datamodule = getattr(model, "datamodule", None)  # of the model's last run
    trainer.datamodule = datamodule
    if datamodule is not None:
        datamodule.trainer = trainer
        model.datamodule = datamodule
    before = trainer._given_loaders
    if keep and "train" in before and fn is not TrainerFn.FITTING:
        given["train"] = before["train"]
    trainer._given_loaders = given
    trainer._hooks, trainer._fx = {}, None
    model.precision = trainer.precision
    connecting.add_module_callbacks(trainer)
    find_transfer(trainer)


@contextlib.contextmanager
def under_way(trainer: Any, stage: str) -> Iterator[None]:
    """A run: connected with the other processes, torn down at its end, told of what goes wrong."""
    try:
        trainer._processes.connect(trainer)
        yield
    except BaseException as error:
        trainer._processes.disconnect()
        launching.end_children()
        trainer._fx = trainer._results = None
        trainer._state = TrainerState.INTERRUPTED
        call(trainer, "on_exception", error)
        raise
    trainer._processes.release()
    _teardown(trainer, stage)
    if not trainer.interrupted:
        trainer._state = TrainerState.FINISHED
    trainer._stage = trainer._fx = None


def prepare_data(trainer: Any) -> None:
    """Let the data module and the module prepare their data, in the processes that are to."""
    for owner in (trainer.datamodule, trainer._module):
        if owner is not None and implements(owner, "prepare_data"):
            is_data = owner is trainer.datamodule
            done = is_data and _was_done(trainer, owner, "has_prepared_data")
            if not done and distributed.prepares_data(trainer, owner):
                owner.prepare_data()
            trainer._processes.barrier()  # also where it was done: not all know of that


def _was_done(trainer: Any, data: Any, flag: str) -> bool:
    """Whether a data module has done this already: 1.x asks, 2.x calls it for each run."""
    return not trainer._speaks_2 and getattr(data, flag, False) is True


def setup(trainer: Any, stage: str) -> None:
    """Call ``setup`` of all that have it."""
    if trainer._profiles and hasattr(trainer.profiler, "setup"):
        rank = trainer.local_rank if trainer.world_size > 1 else None
        trainer.profiler.setup(stage=stage, local_rank=rank, log_dir=trainer.log_dir)
    data, module = trainer.datamodule, trainer._module
    if not _was_done(trainer, data, f"has_setup_{stage}"):
        _call_with_stage(data, "setup", stage)
    for callback in trainer.callbacks:
        if implements(callback, "setup"):
            _call_with_stage(callback, "setup", trainer, module, stage)
    for name in ("configure_sharded_model", "configure_model"):
        if implements(module, name):
            getattr(module, name)()
    if implements(module, "setup"):
        _call_with_stage(module, "setup", stage)


def _teardown(trainer: Any, stage: str) -> None:
    _call_with_stage(trainer.datamodule, "teardown", stage)
    teardown_callbacks(trainer, stage)
    if implements(trainer._module, "teardown"):
        _call_with_stage(trainer._module, "teardown", stage)


def teardown_callbacks(trainer: Any, stage: str) -> None:
    """Call ``teardown`` of the callbacks."""
    for callback in trainer.callbacks:
        if implements(callback, "teardown"):
            _call_with_stage(callback, "teardown", trainer, trainer._module, stage)


def _call_with_stage(owner: Any, name: str, *arguments: Any) -> None:
    method = getattr(owner, name, None)
    if callable(method):
        method(*arguments[: takes(method)])


def to_device(trainer: Any) -> None:
    """Convert and move the module, and give it the parameters of the first process."""
    module, dtype = trainer._module, trainer._dtype
    if dtype is torch.float64:
        module.double()  # which leaves complex numbers alone
    elif dtype is not None:
        module.to(dtype)
    if trainer._device.type != "cpu":
        module.to(trainer._device)
    fits = trainer._fn is TrainerFn.FITTING
    if trainer.sync_batchnorm and fits:
        trainer._processes.synchronize_norms(module)
    trainer._processes.begin(module, training=fits)
