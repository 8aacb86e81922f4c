"""A command line interface made from the arguments of a module, its data and the Trainer.

It needs jsonargparse, ``pip install "jsonargparse[signatures]"``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.core.lightning import LightningModule
from puretrain.lightning.trainer.trainer import Trainer
from puretrain.lightning.utilities.exceptions import MisconfigurationException
from puretrain.lightning.utilities.imports import _JSONARGPARSE_AVAILABLE
from puretrain.lightning.utilities.seed import seed_everything

if _JSONARGPARSE_AVAILABLE:
    from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
else:

    class ArgumentParser:  # type: ignore[no-redef]
        """Stands in for jsonargparse's."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ModuleNotFoundError(
                "LightningCLI needs jsonargparse: pip install 'jsonargparse[signatures]'"
            )

    Namespace = Any

__all__ = ["LightningArgumentParser", "LightningCLI", "SaveConfigCallback"]

_COMMANDS = ("fit", "validate", "test", "predict", "tune")


class LightningArgumentParser(ArgumentParser):
    """A parser that also takes the arguments of classes of Lightning."""

    def __init__(self, *args: Any, parse_as_dict: bool = False, **kwargs: Any) -> None:
        """Make a parser.

        Args:
            *args: of jsonargparse's parser.
            parse_as_dict: accepted because programs pass it.
            **kwargs: of jsonargparse's parser.
        """
        super().__init__(*args, **kwargs)
        if not _JSONARGPARSE_AVAILABLE:
            return
        self.add_argument("--config", action=ActionConfigFile, help="a YAML file of arguments")
        self.callback_keys: list[str] = []

    def add_lightning_class_args(
        self,
        lightning_class: Any,
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add the arguments of a class as ``--NESTED_KEY.ARGUMENT``.

        Args:
            lightning_class: a class, or a function that makes an object.
            nested_key: what stands in front.
            subclass_mode: whether a subclass may be named instead.
            required: whether the object must be made.

        Returns:
            The names of the arguments.
        """
        if isinstance(lightning_class, type) and issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            added = self.add_subclass_arguments(
                lightning_class, nested_key, required=required, fail_untyped=False
            )
            return list(added or [])
        return list(
            self.add_class_arguments(
                lightning_class,
                nested_key,
                fail_untyped=False,
                instantiate=lightning_class is not Trainer
                and not (
                    isinstance(lightning_class, type) and issubclass(lightning_class, Trainer)
                ),
            )
        )

    def add_optimizer_args(
        self, optimizer_class: Any, nested_key: str = "optimizer", link_to: str = "AUTOMATIC"
    ) -> None:
        """Add the arguments of an optimizer.

        Args:
            optimizer_class: the class.
            nested_key: what stands in front.
            link_to: an argument of the module that gets the class and its arguments.
        """
        self.add_class_arguments(
            optimizer_class, nested_key, skip={"params"}, fail_untyped=False, instantiate=False
        )
        self._link(optimizer_class, nested_key, link_to)

    def add_lr_scheduler_args(
        self, lr_scheduler_class: Any, nested_key: str = "lr_scheduler", link_to: str = "AUTOMATIC"
    ) -> None:
        """Add the arguments of a scheduler; see :meth:`add_optimizer_args`."""
        self.add_class_arguments(
            lr_scheduler_class,
            nested_key,
            skip={"optimizer"},
            fail_untyped=False,
            instantiate=False,
        )
        self._link(lr_scheduler_class, nested_key, link_to)

    def _link(self, cls: Any, nested_key: str, link_to: str) -> None:
        if link_to == "AUTOMATIC":
            self._automatic = {**getattr(self, "_automatic", {}), nested_key: cls}
            return
        path = f"{cls.__module__}.{cls.__qualname__}"
        self.link_arguments(
            nested_key,
            link_to,
            compute_fn=lambda values: {"class_path": path, "init_args": dict(vars(values))},
        )


class SaveConfigCallback(Callback):
    """Writes the arguments of a run to ``config.yaml`` in its directory."""

    def __init__(
        self,
        parser: Any,
        config: Any,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        """Keep the arguments.

        Args:
            parser: that read them.
            config: the arguments.
            config_filename: the name of the file.
            overwrite: whether it may replace another one.
            multifile: whether values from files of their own are written to such.
            save_to_log_dir: whether to write at all.
        """
        self.parser, self.config = parser, config
        self.config_filename, self.overwrite = config_filename, overwrite
        self.multifile, self.save_to_log_dir = multifile, save_to_log_dir
        self._written: str | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str | None = None) -> None:
        """Write the file."""
        if not self.save_to_log_dir or not trainer.is_global_zero:
            return
        folder = trainer.log_dir or trainer.default_root_dir
        path = os.path.join(folder, self.config_filename)
        if path == self._written:  # by an earlier stage of this run
            return
        if not self.overwrite and os.path.isfile(path):
            raise RuntimeError(
                f"{type(self).__name__} expected {path} to NOT exist. Aborting to avoid overwriting"
                " results of a previous run. Delete the file, or set overwrite to True."
            )
        os.makedirs(folder, exist_ok=True)
        self.parser.save(
            self.config, path, skip_validation=True, overwrite=True, multifile=self.multifile
        )
        self._written = path


class LightningCLI:
    """Reads arguments, makes the module, the data and the Trainer, and runs.

    ``script.py --model.width 3 --trainer.max_epochs 2`` fits; a first argument ``fit``,
    ``validate``, ``test`` or ``predict`` chooses what to run.
    """

    def __init__(
        self,
        model_class: Any = None,
        datamodule_class: Any = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_filename: str = "config.yaml",
        save_config_overwrite: bool = False,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: Any = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: int | bool | None = None,
        description: str = "pytorch-lightning trainer command line tool",
        env_prefix: str = "PL",
        env_parse: bool = False,
        parser_kwargs: dict[str, Any] | None = None,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        run: bool = True,
        args: list[str] | dict[str, Any] | None = None,
        auto_configure_optimizers: bool = True,
    ) -> None:
        """Read the arguments, make the objects, and run unless ``run=False``.

        Args:
            model_class: a LightningModule class, or a function that makes one; None to name it on
                the command line.
            datamodule_class: a LightningDataModule class; None if there is none.
            save_config_callback: writes the arguments beside the logs; None does not.
            save_config_filename: the name of that file.
            save_config_overwrite: whether it may replace another one.
            save_config_kwargs: more arguments of that callback.
            trainer_class: the Trainer.
            trainer_defaults: other defaults of its arguments; callbacks in it are always there.
            seed_everything_default: the default of ``--seed_everything``.
            description: of the program.
            env_prefix: of environment variables.
            env_parse: whether to read environment variables.
            parser_kwargs: more arguments of the parser.
            subclass_mode_model: whether to name a subclass of the module on the command line.
            subclass_mode_data: whether to name a subclass of the data on the command line.
            run: whether to run, or only to make the objects.
            args: in place of those of the command line.
            auto_configure_optimizers: whether ``add_optimizer_args`` decides the module's
                optimizer.
        """
        self.model_class = LightningModule if model_class is None else model_class
        self.datamodule_class = datamodule_class
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = {
            "config_filename": save_config_filename,
            "overwrite": save_config_overwrite,
            **(save_config_kwargs or {}),
        }
        self.trainer_class = trainer_class
        self.trainer_defaults = dict(trainer_defaults or {})
        self.seed_everything_default = seed_everything_default
        self.subclass_mode_model = subclass_mode_model or model_class is None
        self.subclass_mode_data = subclass_mode_data
        self.auto_configure_optimizers = auto_configure_optimizers
        self.parser_kwargs = {
            "description": description,
            "env_prefix": env_prefix,
            "default_env": env_parse,
            **(parser_kwargs or {}),
        }
        self.subcommand = "fit"
        self.init_parser()
        self.add_core_arguments_to_parser()
        self.add_arguments_to_parser(self.parser)
        self.parse_arguments(args)
        seed = self._get("seed_everything")
        if seed is not None and seed is not False:
            seed_everything(None if seed is True else int(seed), workers=True)
        self.before_instantiate_classes()
        self.instantiate_classes()
        if run:
            self.prepare_fit_kwargs()
            getattr(self, f"before_{self.subcommand}")()
            getattr(self, self.subcommand)()
            getattr(self, f"after_{self.subcommand}")()

    # ── Arguments ─────────────────────────────────────────────────────────────────────────────────

    def init_parser(self) -> None:
        """Make the parser."""
        self.parser: Any = LightningArgumentParser(**self.parser_kwargs)

    def add_core_arguments_to_parser(self) -> None:
        """Add the arguments of the seed, the Trainer, the module and the data."""
        self.parser.add_argument(
            "--seed_everything",
            type=bool | int | None,
            default=self.seed_everything_default,
            help="set to an int to seed all random generators with it",
        )
        self.parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {
            f"trainer.{name}": value
            for name, value in self.trainer_defaults.items()
            if name != "callbacks"
        }
        self.parser.set_defaults(defaults)
        self.parser.add_lightning_class_args(
            self.model_class, "model", subclass_mode=self.subclass_mode_model
        )
        if self.datamodule_class is not None:
            self.parser.add_lightning_class_args(
                self.datamodule_class, "data", subclass_mode=self.subclass_mode_data
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override to add more arguments, or to link some."""

    def parse_arguments(self, args: list[str] | dict[str, Any] | None = None) -> None:
        """Read the arguments."""
        if isinstance(args, dict):
            command = next((name for name in _COMMANDS if name in args), None)
            self.subcommand = args.get("subcommand") or command or "fit"
            values = args.get(self.subcommand, args)
            values = {name: value for name, value in values.items() if name != "subcommand"}
            self.config = self.parser.parse_object(values)
            return
        given = list(sys.argv[1:] if args is None else args)
        if given and given[0] in _COMMANDS:
            self.subcommand = given.pop(0)
        self.config = self.parser.parse_args(given)

    def _get(self, name: str, default: Any = None) -> Any:
        return self.config.get(name, default)

    # ── Objects ───────────────────────────────────────────────────────────────────────────────────

    def before_instantiate_classes(self) -> None:
        """Override to do something before the objects are made."""

    def instantiate_classes(self) -> None:
        """Make the objects."""
        # it has two names in the versions of jsonargparse
        make = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
        self.config_init = make(self.config)
        self.model = self.config_init.get("model")
        self.datamodule = self.config_init.get("data")
        self._choose_optimizer()
        self.instantiate_trainer()

    def instantiate_trainer(self) -> None:
        """Make the Trainer."""
        values = dict(vars(self.config_init["trainer"]))
        if isinstance(values.get("logger"), Namespace):
            raise MisconfigurationException("trainer.logger must be a bool or an object")
        extra = self.trainer_defaults.get("callbacks") or []
        extra = list(extra) if isinstance(extra, (list, tuple)) else [extra]
        extra += [self.config_init[key] for key in self.parser.callback_keys]
        chosen = values.get("callbacks") or []
        chosen = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
        callbacks = chosen + extra
        if self.save_config_callback is not None and not values.get("fast_dev_run"):
            callbacks.append(
                self.save_config_callback(self.parser, self.config, **self.save_config_kwargs)
            )
        values["callbacks"] = callbacks or None
        self.trainer = self.trainer_class(**values)

    def _choose_optimizer(self) -> None:
        """Let the module have the optimizer that ``add_optimizer_args`` asked for."""
        automatic = getattr(self.parser, "_automatic", {})
        if not automatic or not self.auto_configure_optimizers:
            return
        import torch

        values = {key: dict(vars(self.config_init[key])) for key in automatic}
        model = self.model

        def configure_optimizers() -> Any:
            optimizer: Any = None
            scheduler: Any = None
            for key, cls in automatic.items():
                if issubclass(cls, torch.optim.Optimizer):
                    optimizer = cls(model.parameters(), **values[key])
            for key, cls in automatic.items():
                if not issubclass(cls, torch.optim.Optimizer):
                    scheduler = cls(optimizer, **values[key])
            return optimizer if scheduler is None else ([optimizer], [scheduler])

        model.configure_optimizers = configure_optimizers

    def prepare_fit_kwargs(self) -> None:
        """Gather the arguments of the Trainer's method."""
        self.fit_kwargs: dict[str, Any] = {"model": self.model}
        if self.datamodule is not None:
            self.fit_kwargs["datamodule"] = self.datamodule

    # ── Running ───────────────────────────────────────────────────────────────────────────────────

    def fit(self) -> None:
        """Fit."""
        self.trainer.fit(**self.fit_kwargs)

    def validate(self) -> None:
        """Validate."""
        self.trainer.validate(**self.fit_kwargs)

    def test(self) -> None:
        """Test."""
        self.trainer.test(**self.fit_kwargs)

    def predict(self) -> None:
        """Predict."""
        self.trainer.predict(**self.fit_kwargs)

    def tune(self) -> None:
        """Tune."""
        self.trainer.tune(**self.fit_kwargs)

    def _nothing(self) -> None:
        """Override to do something here."""

    before_fit: Callable[..., None] = _nothing
    after_fit: Callable[..., None] = _nothing
    before_validate: Callable[..., None] = _nothing
    after_validate: Callable[..., None] = _nothing
    before_test: Callable[..., None] = _nothing
    after_test: Callable[..., None] = _nothing
    before_predict: Callable[..., None] = _nothing
    after_predict: Callable[..., None] = _nothing
    before_tune: Callable[..., None] = _nothing
    after_tune: Callable[..., None] = _nothing
