"""Weights & Biases, on its own client."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import nn

from puretrain.lightning.loggers.base import LightningLoggerBase, rank_zero_experiment, require
from puretrain.lightning.utilities.distributed import rank_zero_only
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["WandbLogger"]


class WandbLogger(LightningLoggerBase):
    """Logs to Weights & Biases; needs ``pip install wandb``."""

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        offline: bool = False,
        id: str | None = None,
        anonymous: bool | None = None,
        version: str | None = None,
        project: str | None = None,
        log_model: bool | str = False,
        experiment: Any = None,
        prefix: str = "",
        sync_step: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """The run starts on first use.

        Args:
            name: of the run.
            save_dir: where the client keeps its files.
            offline: write files only; ``wandb sync`` sends them later.
            id: of the run, to go on with one.
            anonymous: whether to log without an account.
            version: the same as ``id``.
            project: that the run belongs to.
            log_model: whether to upload checkpoints: at the end, or with ``"all"`` each.
            experiment: a run that was started already.
            prefix: stands in front of the names of all metrics.
            sync_step: accepted because programs pass it; steps are always logged as a metric.
            **kwargs: go to ``wandb.init``.

        Raises:
            ImportError: the client is not installed.
            MisconfigurationException: offline runs can't upload checkpoints.
        """
        require("wandb")
        if offline and log_model:
            raise MisconfigurationException(
                f"Providing log_model={log_model} and offline={offline} is an invalid configuration"
                " since model checkpoints cannot be uploaded in offline mode."
                " Hint: Set `offline=False` to log your model."
            )
        super().__init__()
        self._log_model = log_model
        self._prefix = prefix
        self._experiment = experiment
        self._name, self._id, self._project = name, version or id, project
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        self._checkpoint_callback: Any = None
        self._uploaded: dict[str, float] = {}
        self._init = {
            "name": name,
            "project": project,
            "id": self._id,
            "dir": self._save_dir,
            "resume": "allow",
            "anonymous": "allow" if anonymous else None,
            "mode": "offline" if offline else None,
            **kwargs,
        }

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb, started on first use."""
        if self._experiment is None:
            import wandb

            settings = {name: value for name, value in self._init.items() if value is not None}
            if self._save_dir:
                os.makedirs(self._save_dir, exist_ok=True)
            self._experiment = wandb.run if wandb.run is not None else wandb.init(**settings)
            if hasattr(self._experiment, "define_metric"):
                self._experiment.define_metric("trainer/global_step")
                self._experiment.define_metric("*", step_metric="trainer/global_step")
        return self._experiment

    def watch(
        self, model: nn.Module, log: str | None = "gradients", log_freq: int = 100, **kwargs: Any
    ) -> None:
        """Log gradients or parameters of a model as it trains."""
        self.experiment.watch(model, log=log, log_freq=log_freq, **kwargs)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Write hyper-parameters into the run's configuration."""
        values = self._sanitize_callable_params(self._flatten_dict(self._convert_params(params)))
        self.experiment.config.update(values, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write metrics; the step is the metric ``trainer/global_step``."""
        metrics = self._add_prefix(metrics)
        at = {} if step is None else {"trainer/global_step": step}
        self.experiment.log({**metrics, **at})

    @rank_zero_only
    def log_text(self, key: str, columns: Any = None, data: Any = None, **kwargs: Any) -> None:
        """Write text as a table."""
        import wandb

        self.experiment.log({key: wandb.Table(columns=columns, data=data)}, **kwargs)

    log_table = log_text

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], **kwargs: Any) -> None:
        """Write images: arrays, PIL images or tensors."""
        import wandb

        captions = kwargs.pop("caption", [None] * len(images))
        pairs = zip(images, captions, strict=True)
        self.experiment.log(
            {key: [wandb.Image(img, caption=text) for img, text in pairs]}, **kwargs
        )

    @property
    def save_dir(self) -> str | None:
        """Where the client keeps its files."""
        return self._save_dir

    @property
    def name(self) -> str | None:
        """The name of the project."""
        return self._project if self._experiment is None else self._experiment.project

    @property
    def version(self) -> str | None:
        """The id of the run."""
        return self._experiment.id if self._experiment is not None else self._id

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload now with ``log_model="all"``, else remember to at the end."""
        self._checkpoint_callback = checkpoint_callback
        every = self._log_model == "all" or getattr(checkpoint_callback, "save_top_k", 1) == -1
        if self._log_model and every:
            self._upload(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload the checkpoints if asked to."""
        self.save()
        if self._log_model and self._checkpoint_callback is not None:
            self._upload(self._checkpoint_callback)

    def _upload(self, callback: Any) -> None:
        import wandb

        paths = {*getattr(callback, "best_k_models", {}), getattr(callback, "best_model_path", "")}
        paths.add(getattr(callback, "last_model_path", ""))
        for path in sorted(p for p in paths if p and Path(p).is_file()):
            changed = Path(path).stat().st_mtime
            if self._uploaded.get(path) == changed:
                continue
            artifact = wandb.Artifact(name=f"model-{self.experiment.id}", type="model")
            artifact.add_file(path, name="model.ckpt")
            best = path == getattr(callback, "best_model_path", "")
            aliases = ["latest", "best"] if best else ["latest"]
            self.experiment.log_artifact(artifact, aliases=aliases)
            self._uploaded[path] = changed

    def __getstate__(self) -> dict[str, Any]:
        # another process attaches to the run by its id
        state = {**self.__dict__, "_experiment": None}
        if self._experiment is not None:
            state["_id"] = self._experiment.id
        return state
