"""Comet, on its own client."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from puretrain.lightning.loggers.base import LightningLoggerBase, rank_zero_experiment, require
from puretrain.lightning.utilities.distributed import rank_zero_only
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["CometLogger"]


class CometLogger(LightningLoggerBase):
    """Logs to Comet; needs ``pip install comet-ml``."""

    def __init__(
        self,
        api_key: str | None = None,
        save_dir: str | None = None,
        project_name: str | None = None,
        rest_api_key: str | None = None,
        experiment_name: str | None = None,
        experiment_key: str | None = None,
        offline: bool = False,
        prefix: str = "",
        workspace: str | None = None,
        **kwargs: Any,
    ) -> None:
        """The experiment starts on first use.

        Args:
            api_key: of the account; by default the variable ``COMET_API_KEY``.
            save_dir: where offline experiments go.
            project_name: that the experiment belongs to.
            rest_api_key: accepted because programs pass it.
            experiment_name: of the experiment.
            experiment_key: to go on with an experiment.
            offline: write files only, although there is an ``api_key``.
            prefix: stands in front of the names of all metrics.
            workspace: that the project belongs to.
            **kwargs: go to Comet's ``Experiment``.

        Raises:
            ImportError: the client is not installed.
            MisconfigurationException: there is neither a key nor a directory.
        """
        require("comet_ml")
        super().__init__()
        self.api_key = api_key or os.environ.get("COMET_API_KEY")
        self.rest_api_key = rest_api_key
        if self.api_key is None and save_dir is None:
            raise MisconfigurationException("CometLogger requires either api_key or save_dir.")
        self.mode = "offline" if self.api_key is None or (offline and save_dir) else "online"
        self._save_dir = save_dir
        self._project_name = project_name
        self._experiment_key = experiment_key or os.environ.get("COMET_EXPERIMENT_KEY")
        self._experiment_name = experiment_name
        self._prefix = prefix
        self._experiment: Any = None
        self._kwargs = kwargs if workspace is None else {"workspace": workspace, **kwargs}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Comet's experiment, started on first use."""
        if self._experiment is not None:
            return self._experiment
        import comet_ml

        settings = {"project_name": self._project_name, **self._kwargs}
        if self.mode == "offline":
            self._experiment = comet_ml.OfflineExperiment(
                offline_directory=self._save_dir, **settings
            )
        elif self._experiment_key is None:
            self._experiment = comet_ml.Experiment(api_key=self.api_key, **settings)
        else:
            self._experiment = comet_ml.ExistingExperiment(
                api_key=self.api_key, previous_experiment=self._experiment_key, **settings
            )
        self._experiment_key = self._experiment.get_key()
        if self._experiment_name:
            self._experiment.set_name(self._experiment_name)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Write hyper-parameters."""
        self.experiment.log_parameters(self._flatten_dict(self._convert_params(params)))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write metrics."""
        epoch = metrics.get("epoch")
        rest = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        self.experiment.log_metrics(self._add_prefix(rest), step=step, epoch=epoch)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the experiment; another one with the same key goes on with it."""
        self.save()
        if self._experiment is not None:
            self._experiment.end()
            self._experiment = None

    @property
    def save_dir(self) -> str | None:
        """Where offline experiments go."""
        return self._save_dir

    @property
    def name(self) -> str:
        """The name of the project."""
        return self._project_name or os.environ.get("COMET_PROJECT_NAME", "comet-default")

    @property
    def version(self) -> str:
        """The key of the experiment; starts it."""
        return str(self._experiment_key or self.experiment.get_key())
