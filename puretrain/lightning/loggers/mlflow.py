"""MLflow, on its own client."""

from __future__ import annotations

import os
import re
import time
from argparse import Namespace
from typing import Any

from puretrain.lightning.loggers.base import LightningLoggerBase, rank_zero_experiment, require
from puretrain.lightning.utilities.distributed import rank_zero_only, rank_zero_warn

__all__ = ["MLFlowLogger"]

_LOCAL = "file:"
_STATUS = {"success": "FINISHED", "failed": "FAILED", "aborted": "KILLED", "finished": "FINISHED"}


class MLFlowLogger(LightningLoggerBase):
    """Logs to MLflow; needs ``pip install mlflow``."""

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        experiment_name: str = "default",
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | None = "./mlruns",
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        run_name: str | None = None,
    ) -> None:
        """The run starts on first use.

        Args:
            experiment_name: the experiment, made if needed.
            tracking_uri: of the server; by default the variable ``MLFLOW_TRACKING_URI``, else
                files in ``save_dir``.
            tags: of the run.
            save_dir: where files go without a server.
            prefix: stands in front of the names of all metrics.
            artifact_location: of a new experiment.
            run_id: to go on with a run.
            run_name: of a new run.

        Raises:
            ImportError: the client is not installed.
        """
        require("mlflow")
        super().__init__()
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._experiment_name = experiment_name
        self._tracking_uri = tracking_uri or f"{_LOCAL}{save_dir}"
        self._experiment_id: str | None = None
        self._run_id = run_id
        self._run_name = run_name
        self.tags = dict(tags or {})
        self._prefix = prefix
        self._artifact_location = artifact_location
        self._client: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``MlflowClient``; on first use the experiment and the run are made."""
        if self._client is None:
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(self._tracking_uri)
        if self._run_id is not None and self._experiment_id is None:
            self._experiment_id = self._client.get_run(self._run_id).info.experiment_id
        if self._experiment_id is None:
            known = self._client.get_experiment_by_name(self._experiment_name)
            if known is not None:
                self._experiment_id = known.experiment_id
            else:
                self._experiment_id = self._client.create_experiment(
                    name=self._experiment_name, artifact_location=self._artifact_location
                )
        if self._run_id is None:
            tags = dict(self.tags)
            if self._run_name is not None:
                tags["mlflow.runName"] = self._run_name
            run = self._client.create_run(experiment_id=self._experiment_id, tags=tags)
            self._run_id = run.info.run_id
        return self._client

    @property
    def run_id(self) -> str | None:
        """The id of the run; starts it."""
        _ = self.experiment
        return self._run_id

    @property
    def experiment_id(self) -> str | None:
        """The id of the experiment; starts the run."""
        _ = self.experiment
        return self._experiment_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Write hyper-parameters; values of more than 250 characters are left out."""
        experiment = self.experiment
        for name, value in self._flatten_dict(self._convert_params(params)).items():
            if len(str(value)) > 250:
                rank_zero_warn(
                    f"Mlflow only allows parameters with up to 250 characters. Discard {name}"
                )
                continue
            experiment.log_param(self._run_id, name, value)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write numbers; text is left out with a warning."""
        experiment, now = self.experiment, int(time.time() * 1000)
        for name, value in self._add_prefix(metrics).items():
            if isinstance(value, str):
                rank_zero_warn(f"Discarding metric with string value {name}={value}.")
                continue
            allowed = re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)
            if allowed != name:
                rank_zero_warn(
                    "MLFlow only allows '_', '/', '.' and ' ' special characters in metric name."
                    f" Replacing {name} with {allowed}."
                )
            experiment.log_metric(self._run_id, allowed, float(value), now, step or 0)

    @rank_zero_only
    def finalize(self, status: str = "FINISHED") -> None:
        """End the run."""
        self.save()
        if self._run_id is not None:
            self.experiment.set_terminated(self._run_id, _STATUS.get(status, status))

    @property
    def save_dir(self) -> str | None:
        """The directory of local files, None with a server."""
        if self._tracking_uri.startswith(_LOCAL):
            return self._tracking_uri.removeprefix(_LOCAL)
        return None

    @property
    def name(self) -> str | None:
        """The id of the experiment."""
        return self.experiment_id

    @property
    def version(self) -> str | None:
        """The id of the run."""
        return self.run_id
