"""Metrics as a table in a file, hyper-parameters beside it."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from typing import Any

from torch import Tensor

from puretrain.lightning.core.saving import save_hparams_to_yaml
from puretrain.lightning.loggers.base import (
    FolderLogger,
    rank_zero_experiment,
)
from puretrain.lightning.utilities.distributed import rank_zero_only, rank_zero_warn

__all__ = ["CSVLogger", "ExperimentWriter"]


class ExperimentWriter:
    """Keeps metrics and hyper-parameters, and writes them to a directory on :meth:`save`."""

    NAME_HPARAMS_FILE = "hparams.yaml"
    NAME_METRICS_FILE = "metrics.csv"

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        """Make the directory.

        Args:
            log_dir: the directory; earlier files in it will be overwritten, with a warning now.
        """
        self.hparams: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.log_dir = os.fspath(log_dir)
        if os.path.isdir(self.log_dir) and os.listdir(self.log_dir):
            rank_zero_warn(
                f"Experiment logs directory {self.log_dir} exists and is not empty."
                " Previous log files in this directory will be deleted when the new ones are saved!"
            )
        os.makedirs(self.log_dir, exist_ok=True)
        self.metrics_file_path = os.path.join(self.log_dir, self.NAME_METRICS_FILE)
        self._written = 0
        self._columns: list[str] = []

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Keep hyper-parameters."""
        self.hparams.update(params)

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Keep a row of metrics.

        Args:
            metrics_dict: values by name.
            step: of the row; by default the number of rows before it.
        """
        row = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in metrics_dict.items()
        }
        row["step"] = len(self.metrics) if step is None else step
        self.metrics.append(row)

    def save(self) -> None:
        """Write ``hparams.yaml`` and ``metrics.csv``."""
        save_hparams_to_yaml(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)
        new = self.metrics[self._written :]
        if not new:
            return
        columns = list(dict.fromkeys([*self._columns, *(name for row in new for name in row)]))
        # rows are added to the file, unless there is a new column, which the header must name
        grows = columns == self._columns and os.path.isfile(self.metrics_file_path)
        with open(self.metrics_file_path, "a" if grows else "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            if not grows:
                writer.writeheader()
            writer.writerows(new if grows else self.metrics)
        self._written, self._columns = len(self.metrics), columns


class CSVLogger(FolderLogger):
    """Writes ``metrics.csv`` and ``hparams.yaml`` to ``save_dir/name/version_N/``."""

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "default",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        """Nothing is written before the first use.

        Args:
            save_dir: where the experiments are.
            name: of the experiment, a directory; empty or None for none.
            version: a number N, for ``version_N``, or the directory's name; by default the next
                number that is not there yet.
            prefix: stands in front of the names of all metrics.
            flush_logs_every_n_steps: accepted because programs pass it; the Trainer decides when
                to save.
        """
        super().__init__(save_dir, name, version, prefix)
        self._flush_logs_every_n_steps = flush_logs_every_n_steps

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, made on first use."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = ExperimentWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Keep hyper-parameters for ``hparams.yaml``."""
        self.experiment.log_hparams(self._convert_params(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep a row of ``metrics.csv``."""
        self.experiment.log_metrics(self._add_prefix(metrics), step)

    @rank_zero_only
    def save(self) -> None:
        """Write both files."""
        super().save()
        self.experiment.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write both files."""
        self.save()
