"""TensorBoard."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from torch import Tensor

from puretrain.lightning.core.saving import save_hparams_to_yaml
from puretrain.lightning.loggers.base import (
    FolderLogger,
    next_version,
    rank_zero_experiment,
)
from puretrain.lightning.utilities.cloud_io import get_filesystem
from puretrain.lightning.utilities.distributed import rank_zero_only, rank_zero_warn

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(FolderLogger):
    """Writes event files to ``save_dir/name/version_N/``, and the hyper-parameters beside them."""

    NAME_HPARAMS_FILE = "hparams.yaml"
    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "default",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Nothing is written before the first use.

        Args:
            save_dir: where the experiments are.
            name: of the experiment, a directory; empty or None for none.
            version: a number N, for ``version_N``, or the directory's name; by default the next
                number that is not there yet.
            log_graph: whether the Trainer logs the model's graph, if it has an
                ``example_input_array``.
            default_hp_metric: whether hyper-parameters without a metric get ``hp_metric`` = -1,
                without which TensorBoard does not show them.
            prefix: stands in front of the names of all metrics.
            sub_dir: a directory below that of the version, for the event files.
            **kwargs: go to :class:`torch.utils.tensorboard.SummaryWriter`.
        """
        super().__init__(save_dir, name, version, prefix)
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self.hparams: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        self._kwargs = kwargs

    @property
    def log_dir(self) -> str:
        """The directory of this version, or ``sub_dir`` in it."""
        path = super().log_dir
        if isinstance(self.sub_dir, str):
            path = os.path.join(path, self.sub_dir)
        return os.path.expanduser(os.path.expandvars(path))

    @property
    def sub_dir(self) -> str | None:
        """The directory below that of the version."""
        return self._sub_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The :class:`torch.utils.tensorboard.SummaryWriter`, made on first use."""
        if self._experiment is None:
            from torch.utils.tensorboard import SummaryWriter

            get_filesystem(self.root_dir).makedirs(self.root_dir, exist_ok=True)
            self._experiment = SummaryWriter(log_dir=self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | float | None = None,
        step: int | None = None,
    ) -> None:
        """Write hyper-parameters, for TensorBoard's tab of them and for ``hparams.yaml``.

        Args:
            params: a dictionary or Namespace; nested entries get names with slashes.
            metrics: the metrics to show beside them, or the value of ``hp_metric``.
            step: of these metrics.
        """
        params = self._convert_params(params)
        self.hparams.update(params)
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, dict):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, 0 if step is None else step)
        from torch.utils.tensorboard.summary import hparams

        flat = self._sanitize_params(self._flatten_dict(params))
        writer = self.experiment._get_file_writer()
        for summary in hparams(flat, metrics):
            writer.add_summary(summary)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write scalars; an inner dictionary becomes several curves in one diagram.

        Raises:
            ValueError: a value is neither a number nor a dictionary of numbers.
        """
        experiment = self.experiment
        for name, value in self._add_prefix(metrics).items():
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(value, dict):
                experiment.add_scalars(name, value, step)
                continue
            try:
                experiment.add_scalar(name, value, step)
            except Exception as error:
                raise ValueError(
                    f"\n you tried to log {value} which is not currently supported."
                    " Try a dict or a scalar/tensor."
                ) from error

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Write the model's graph if the logger was made with ``log_graph=True``.

        Args:
            model: the module.
            input_array: an example; by default the model's ``example_input_array``.
        """
        if not self._log_graph:
            return
        if input_array is None:
            input_array = getattr(model, "example_input_array", None)
        if input_array is None:
            rank_zero_warn(
                "Could not log computational graph since the `model.example_input_array`"
                " attribute is not set or `input_array` was not given"
            )
            return
        transfer = getattr(model, "_apply_batch_transfer_handler", None)
        if transfer is not None:
            input_array = transfer(input_array)
        if isinstance(input_array, list):
            input_array = tuple(input_array)
        self.experiment.add_graph(model, input_array)

    @rank_zero_only
    def save(self) -> None:
        """Write what was kept back, and ``hparams.yaml`` unless an earlier run has written it."""
        super().save()
        folder = self.log_dir
        system = get_filesystem(folder)
        if self.hparams:
            system.makedirs(folder, exist_ok=True)
        elif not system.isdir(folder):
            return
        path = os.path.join(folder, self.NAME_HPARAMS_FILE)
        if self._saved is None and system.isfile(path):
            return
        if self._saved != self.hparams:
            save_hparams_to_yaml(path, self.hparams)
            self._saved = dict(self.hparams)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write everything to disk and close the event file."""
        if self._experiment is not None:
            self.save()
            self._experiment.flush()
            self._experiment.close()
        else:
            self.save()

    def _get_next_version(self) -> int:
        return next_version(os.path.expanduser(os.path.expandvars(self.root_dir)))

    def __getstate__(self) -> dict[str, Any]:
        # an open file does not travel to another process
        return {**self.__dict__, "_experiment": None}
