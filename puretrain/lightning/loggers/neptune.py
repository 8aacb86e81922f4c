"""Neptune, on its own client."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from puretrain.lightning.loggers.base import LightningLoggerBase, rank_zero_experiment, require
from puretrain.lightning.utilities.distributed import rank_zero_only

__all__ = ["NeptuneLogger"]


class NeptuneLogger(LightningLoggerBase):
    """Logs to Neptune; needs ``pip install neptune``."""

    LOGGER_JOIN_CHAR = "/"

    def __init__(
        self,
        api_key: str | None = None,
        project: str | None = None,
        name: str | None = None,
        run: Any = None,
        prefix: str = "training",
        *,
        project_name: str | None = None,
        experiment_name: str | None = None,
        offline_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """The run starts on first use.

        Args:
            api_key: of the account; by default the variable ``NEPTUNE_API_TOKEN``.
            project: that the run belongs to.
            name: of the run.
            run: a run that was started already.
            prefix: stands in front of the names of all metrics.
            project_name: the older name of ``project``.
            experiment_name: the older name of ``name``.
            offline_mode: write files only.
            **kwargs: go to ``neptune.init_run``.

        Raises:
            ImportError: the client is not installed.
        """
        require("neptune")
        super().__init__()
        self._run = run
        self._prefix = prefix
        self._settings = {
            "api_token": api_key,
            "project": project or project_name,
            "name": name or experiment_name,
            "mode": "offline" if offline_mode else None,
            **kwargs,
        }

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of neptune, started on first use."""
        if self._run is None:
            import neptune

            settings = {name: value for name, value in self._settings.items() if value is not None}
            self._run = neptune.init_run(**settings)
        return self._run

    run = experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Write hyper-parameters under ``hyperparams``."""
        values = self._sanitize_params(self._flatten_dict(self._convert_params(params)))
        self.experiment[f"{self._prefix}/hyperparams"] = values

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add a point to the series of each metric."""
        for name, value in self._add_prefix(metrics).items():
            self.experiment[name].append(float(value), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write how the run ended."""
        self.save()
        if self._run is not None:
            self._run[f"{self._prefix}/status"] = status

    @property
    def name(self) -> str | None:
        """The name of the run."""
        return self._settings["name"]

    @property
    def version(self) -> str | None:
        """The id of the run; starts it."""
        return str(self.experiment["sys/id"].fetch())
