"""Data as one object: how to get it, split it and load it."""

from __future__ import annotations

import functools
import inspect
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from puretrain.lightning.core.hooks import CheckpointHooks, DataHooks
from puretrain.lightning.utilities import argparse as arguments
from puretrain.lightning.utilities import parsing

__all__ = ["LightningDataModule"]

_STAGES = ("fit", "validate", "test", "predict")
_TRACKED = ("prepare_data", "setup", "teardown")


def _mark(data: Any, hook: str, stage: str | None) -> None:
    """Note that a hook ran; without a stage, for those that a run without stages has."""
    if hook == "prepare_data":
        data._has_prepared_data = True
        return
    for each in _STAGES if stage is None else (getattr(stage, "value", stage),):
        if each in _STAGES:
            setattr(data, f"_has_{hook}_{each}", True)


def _ran(hook: str, stage: str) -> property:
    """Whether a hook ran for a stage."""
    name, doc = f"_has_{hook}_{stage}", f'Whether ``{hook}("{stage}")`` ran.'
    return property(lambda self: getattr(self, name, False), doc=doc)


def _tracked(method: Callable[..., Any], hook: str) -> Callable[..., Any]:
    """A method that notes that it ran."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        _mark(self, hook, args[0] if args else kwargs.get("stage"))
        return method(self, *args, **kwargs)

    return wrapped


class LightningDataModule(CheckpointHooks, DataHooks):
    """Downloading, splitting and loading data, apart from any model.

    Example:
        >>> import torch
        >>> class Numbers(LightningDataModule):
        ...     def setup(self, stage=None):
        ...         self.numbers = torch.utils.data.TensorDataset(torch.arange(6.0))
        ...     def train_dataloader(self):
        ...         return DataLoader(self.numbers, batch_size=2)
        >>> data = Numbers()
        >>> data.setup("fit")
        >>> len(data.train_dataloader()), data.has_setup_fit, data.has_setup_test
        (3, True, False)
    """

    name: ClassVar[str | None] = None
    prepare_data_per_node: bool = True
    allow_zero_length_dataloader_with_multiple_devices: bool = False

    _has_prepared_data = False
    _log_hyperparams = True
    trainer: Any = None

    train_transforms: Any = None
    """What to do with the training samples."""
    val_transforms: Any = None
    """What to do with the validation samples."""
    test_transforms: Any = None
    """What to do with the test samples."""
    dims: Any = ()
    """The shape of a sample."""

    def __init__(
        self,
        train_transforms: Any = None,
        val_transforms: Any = None,
        test_transforms: Any = None,
        dims: Any = None,
    ) -> None:
        """Keep what the loaders may need.

        Args:
            train_transforms: of the training samples.
            val_transforms: of the validation samples.
            test_transforms: of the test samples.
            dims: the shape of a sample.
        """
        super().__init__()
        names = ("train_transforms", "val_transforms", "test_transforms", "dims")
        given = zip(names, (train_transforms, val_transforms, test_transforms, dims), strict=True)
        vars(self).update({name: value for name, value in given if value is not None})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for hook in _TRACKED:
            method = cls.__dict__.get(hook)
            if inspect.isfunction(method):
                setattr(cls, hook, _tracked(method, hook))

    # ── Hooks that note that they ran ─────────────────────────────────────────────────────────────

    def prepare_data(self) -> None:
        """Download and write files; runs once, so it should not set attributes."""
        _mark(self, "prepare_data", None)

    def setup(self, stage: str | None = None) -> None:
        """Make datasets; runs in every process.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or None for all.
        """
        _mark(self, "setup", stage)

    def teardown(self, stage: str | None = None) -> None:
        """Give up what :meth:`setup` made."""
        _mark(self, "teardown", stage)

    has_prepared_data = property(lambda self: self._has_prepared_data)
    """Whether ``prepare_data`` ran."""
    has_setup_fit, has_setup_validate, has_setup_test, has_setup_predict = map(
        partial(_ran, "setup"), _STAGES
    )
    has_teardown_fit, has_teardown_validate, has_teardown_test, has_teardown_predict = map(
        partial(_ran, "teardown"), _STAGES
    )

    def size(self, dim: int | None = None) -> Any:
        """The shape of a sample, or one of its lengths."""
        return self.dims if dim is None else self.dims[dim]

    # ── Making one ────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def _of(cls, given: Mapping[str, Any]) -> Self:
        """One made with those of some arguments that ``__init__`` takes."""
        accepted = inspect.signature(cls.__init__).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        return cls(**{k: v for k, v in given.items() if takes_all or k in accepted})

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> Self:
        """A data module that loads given datasets; the training data is shuffled.

        Args:
            train_dataset: a dataset, a sequence of them, or for training a mapping of them.
            val_dataset: a dataset or a sequence of them.
            test_dataset: a dataset or a sequence of them.
            predict_dataset: a dataset or a sequence of them.
            batch_size: samples in a batch.
            num_workers: processes of each loader.
            **kwargs: go to ``__init__``, as far as it takes them.
        """

        def loader(dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
            return DataLoader(
                dataset,
                batch_size=batch_size,
                shuffle=shuffle and not isinstance(dataset, IterableDataset),
                num_workers=num_workers,
                pin_memory=torch.cuda.is_available(),
            )

        def loaders(datasets: Any, shuffle: bool = False) -> Any:
            if isinstance(datasets, Mapping):
                return {key: loader(each, shuffle) for key, each in datasets.items()}
            if isinstance(datasets, Sequence) and not isinstance(datasets, Dataset):
                return [loader(each, shuffle) for each in datasets]
            return loader(datasets, shuffle)

        data = cls._of(kwargs)
        given = {"val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        if train_dataset is not None:
            data.train_dataloader = lambda: loaders(train_dataset, True)  # type: ignore[method-assign]
        for stage, datasets in given.items():
            if datasets is not None:
                setattr(data, f"{stage}_dataloader", partial(loaders, datasets))
        return data

    @classmethod
    def add_argparse_args(cls, parent_parser: ArgumentParser, **kwargs: Any) -> ArgumentParser:
        """Add an option for each argument of ``__init__`` to a parser."""
        return arguments.add_argparse_args(cls, parent_parser, **kwargs)

    @classmethod
    def from_argparse_args(cls, args: Namespace | ArgumentParser, **kwargs: Any) -> Self:
        """Make one with arguments from the command line; ``kwargs`` count before them."""
        return arguments.from_argparse_args(cls, args, **kwargs)

    @classmethod
    def parse_argparser(cls, arg_parser: ArgumentParser | Namespace) -> Namespace:
        """The arguments of the command line, with options without a value as True."""
        return arguments.parse_argparser(cls, arg_parser)

    @classmethod
    def get_init_arguments_and_types(cls) -> list[tuple[str, tuple[type, ...], Any]]:
        """The arguments of ``__init__``: names, types and defaults."""
        return arguments.get_init_arguments_and_types(cls)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Make one with the hyper-parameters that are in a checkpoint; ``kwargs`` override them.

        Args:
            checkpoint_path: a path, a URL or an open file.
            map_location: where tensors go.
            hparams_file: a YAML file of hyper-parameters that override those of the checkpoint.
            **kwargs: more arguments of ``__init__``.
        """
        from puretrain.lightning.core.saving import load_hparams_from_yaml
        from puretrain.lightning.utilities.cloud_io import load

        checkpoint = load(checkpoint_path, map_location=map_location)
        hparams = dict(checkpoint.get("datamodule_hyper_parameters", {}))
        if hparams_file is not None:
            hparams |= load_hparams_from_yaml(hparams_file)
        hparams |= kwargs
        data = cls._of(hparams)
        if cls.__qualname__ in checkpoint:
            data.load_state_dict(checkpoint[cls.__qualname__])
        data.on_load_checkpoint(checkpoint)
        return data

    # ── Hyper-parameters and state ────────────────────────────────────────────────────────────────

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: Any = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of ``__init__`` as hyper-parameters; see the module's method.

        Args:
            *args: names, or one dictionary or Namespace; by default all arguments.
            ignore: names to leave out.
            frame: of ``__init__``; by default that of the caller.
            logger: whether the Trainer gives them to its logger.
        """
        self._log_hyperparams = logger
        current = inspect.currentframe()
        frame = frame or (current.f_back if current is not None else None)
        parsing.save_hyperparameters(self, *args, ignore=ignore, frame=frame)

    hparams = property(parsing.hyperparameters, parsing.assign_hyperparameters)
    hparams_initial = property(parsing.initial_hyperparameters)

    @property
    def hparams_name(self) -> str | None:
        """The name of the ``__init__`` argument that held them, ``"kwargs"`` if several."""
        return self.__dict__.get("_hparams_name")

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def on_exception(self, exception: BaseException) -> None:
        """When an exception ends the run."""
