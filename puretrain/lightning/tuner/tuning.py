"""Finding a learning rate and a batch size."""

from __future__ import annotations

from typing import Any

from puretrain.lightning.tuner import batch_size_scaling, lr_finder
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["Tuner"]


class Tuner:
    """What ``trainer.tuner`` is, and what 2.x makes of a trainer."""

    def __init__(self, trainer: Any, update_attr: bool = True) -> None:
        """Tune for a trainer.

        Args:
            trainer: the trainer.
            update_attr: whether ``lr_find`` sets the learning rate unless told otherwise, as in
                2.x; ``trainer.tuner`` of 1.x does not.
        """
        self.trainer = trainer
        self._update_attr = update_attr

    def tune(
        self,
        model: Any,
        train_dataloader: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        scale_batch_size_kwargs: dict[str, Any] | None = None,
        lr_find_kwargs: dict[str, Any] | None = None,
        *,
        train_dataloaders: Any = None,
    ) -> dict[str, Any]:
        """Do what ``auto_scale_batch_size`` and ``auto_lr_find`` ask.

        Args:
            model: the module.
            train_dataloader: as for ``trainer.fit``.
            val_dataloaders: as for ``trainer.fit``.
            datamodule: as for ``trainer.fit``.
            scale_batch_size_kwargs: further arguments of :meth:`scale_batch_size`.
            lr_find_kwargs: further arguments of :meth:`lr_find`.
            train_dataloaders: as 1.4 and later call the training loader.

        Returns:
            What was found, under ``scale_batch_size`` and ``lr_find``.
        """
        train = train_dataloaders if train_dataloaders is not None else train_dataloader
        given = {
            "train_dataloader": train,
            "val_dataloaders": val_dataloaders,
            "datamodule": datamodule,
        }
        found: dict[str, Any] = {}
        wanted = self.trainer.auto_scale_batch_size
        if wanted:
            options = {"mode": wanted if isinstance(wanted, str) else "power"}
            options |= scale_batch_size_kwargs or {}
            found["scale_batch_size"] = self.scale_batch_size(model, **given, **options)
        wanted = self.trainer.auto_lr_find
        if wanted:
            options = {"update_attr": True, "attr_name": wanted if isinstance(wanted, str) else ""}
            found["lr_find"] = self.lr_find(model, **given, **(options | (lr_find_kwargs or {})))
        return found

    def lr_find(
        self,
        model: Any,
        train_dataloader: Any = None,
        val_dataloaders: Any = None,
        *args: Any,
        train_dataloaders: Any = None,
        update_attr: bool | None = None,
        method: str = "fit",
        **options: Any,
    ) -> Any:
        """Find a learning rate; see :func:`puretrain.lightning.tuner.lr_finder.lr_find`."""
        _check_one_process(self.trainer)
        train = train_dataloaders if train_dataloaders is not None else train_dataloader
        if args and hasattr(args[0], "prepare_data"):  # where 1.3 has the data module
            options["datamodule"], args = args[0], args[1:]
        update = self._update_attr if update_attr is None else update_attr
        return lr_finder.lr_find(
            self.trainer, model, train, val_dataloaders, *args, update_attr=update, **options
        )

    def scale_batch_size(
        self, model: Any, *args: Any, train_dataloaders: Any = None, method: str = "fit",
        **options: Any,
    ) -> int | None:  # fmt: skip
        """Find a batch size.

        See :func:`puretrain.lightning.tuner.batch_size_scaling.scale_batch_size`.
        """
        _check_one_process(self.trainer)
        if train_dataloaders is not None:
            options["train_dataloader"] = train_dataloaders
        if args and not isinstance(args[0], str):  # where 1.3 has the training loader
            names = ("train_dataloader", "val_dataloaders", "datamodule", "mode",
                     "steps_per_trial", "init_val", "max_trials", "batch_arg_name")  # fmt: skip
            options |= dict(zip(names, args, strict=False))
            args = ()
        return batch_size_scaling.scale_batch_size(self.trainer, model, *args, **options)


def _check_one_process(trainer: Any) -> None:
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"the tuner looks in one process, and this trainer has {trainer.world_size}: tune with "
            "another Trainer, without num_processes, devices or gpus above 1"
        )
