"""How large a model is: its layers, their parameters, and the shapes that go in and out."""

from __future__ import annotations

import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from puretrain.lightning.utilities.apply_func import move_data_to_device
from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = [
    "PARAMETER_NUM_UNITS",
    "UNKNOWN_SIZE",
    "LayerSummary",
    "ModelSummary",
    "get_gpu_memory_map",
    "get_human_readable_count",
    "get_memory_profile",
    "parse_batch_shape",
]

PARAMETER_NUM_UNITS = [" ", "K", "M", "B", "T"]
UNKNOWN_SIZE = "?"


def get_human_readable_count(number: int) -> str:
    """A count in at most three digits and a unit; above trillions there is no further unit.

    >>> get_human_readable_count(123), get_human_readable_count(1234)
    ('123  ', '1.2 K')
    >>> get_human_readable_count(int(2e6)), get_human_readable_count(int(5e15))
    ('2.0 M', '5,000 T')
    """
    if number < 0:
        raise ValueError(f"a count is not negative, and this one is {number}")
    groups = max(0, (len(str(int(number))) - 1) // 3)
    index = min(groups, len(PARAMETER_NUM_UNITS) - 1)
    scaled = number / 1000**index
    if index == 0 or scaled >= 100:
        return f"{int(scaled):,d} {PARAMETER_NUM_UNITS[index]}"
    return f"{scaled:,.1f} {PARAMETER_NUM_UNITS[index]}"


def parse_batch_shape(batch: Any) -> str | list[Any]:
    """The shape of a tensor, or a list of those of several; ``"?"`` of anything else.

    >>> parse_batch_shape([torch.zeros(2, 3), "text"])
    [[2, 3], '?']
    """
    if hasattr(batch, "shape"):
        return list(batch.shape)
    if isinstance(batch, (list, tuple)):
        return [parse_batch_shape(each) for each in batch]
    return UNKNOWN_SIZE


def _is_lazy(parameter: Any) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedTensorMixin)


def _count(module: nn.Module, *, trainable_only: bool = False) -> int:
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if not _is_lazy(parameter) and (parameter.requires_grad or not trainable_only)
    )


class LayerSummary:
    """One layer; it learns its shapes when the layer runs.

    >>> layer = LayerSummary(nn.Linear(3, 4))
    >>> layer.layer_type, layer.num_parameters, layer.in_size
    ('Linear', 16, '?')
    """

    def __init__(self, module: nn.Module) -> None:
        """Watch a layer until :meth:`detach_hook`.

        Args:
            module: the layer.
        """
        super().__init__()
        self._module = module
        self._in_size: str | list[Any] | None = None
        self._out_size: str | list[Any] | None = None
        self._hook_handle: RemovableHandle | None = self._register_hook()

    def __del__(self) -> None:
        self.detach_hook()

    def _register_hook(self) -> RemovableHandle | None:
        if isinstance(self._module, torch.jit.ScriptModule):
            return None  # compiled modules have no hooks

        def keep_shapes(_module: nn.Module, inputs: Any, output: Any) -> None:
            inputs = inputs[0] if len(inputs) == 1 else inputs
            self._in_size = parse_batch_shape(inputs)
            self._out_size = parse_batch_shape(output)
            self.detach_hook()

        return self._module.register_forward_hook(keep_shapes)

    def detach_hook(self) -> None:
        """Stop watching the layer."""
        handle = self.__dict__.get("_hook_handle")
        if handle is not None:
            handle.remove()
            self._hook_handle = None

    @property
    def in_size(self) -> str | list[Any]:
        """The shape of the input, or a list of shapes; ``"?"`` if it is not known."""
        return self._in_size or UNKNOWN_SIZE

    @property
    def out_size(self) -> str | list[Any]:
        """The shape of the output, or a list of shapes; ``"?"`` if it is not known."""
        return self._out_size or UNKNOWN_SIZE

    @property
    def layer_type(self) -> str:
        """The name of the layer's class."""
        return type(self._module).__name__

    @property
    def num_parameters(self) -> int:
        """The number of parameters, without those that have no shape yet."""
        return _count(self._module)

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self._module.training


class ModelSummary:
    """The layers of a model as a table, with parameters and, given an example input, shapes.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512))
        >>> ModelSummary(Model())
          | Name | Type       | Params
        ---------------------------------
        0 | body | Sequential | 132 K
        ---------------------------------
        132 K     Trainable params
        0         Non-trainable params
        132 K     Total params
        0.530     Total estimated model params size (MB)
    """

    MODE_TOP = "top"
    MODE_FULL = "full"
    MODE_DEFAULT = MODE_TOP
    MODES = (MODE_FULL, MODE_TOP)

    def __init__(
        self, model: nn.Module, mode: str | int | None = None, max_depth: int | None = None
    ) -> None:
        """Look at a model, and run it once if it has an ``example_input_array``.

        Args:
            model: any module; a LightningModule also tells an example and its precision.
            mode: ``"top"`` for the model's children, ``"full"`` for all modules inside.
            max_depth: how many levels of modules to show, -1 for all; in place of ``mode``.

        Raises:
            MisconfigurationException: the mode is none of these.
        """
        if isinstance(mode, int) and not isinstance(mode, bool) and max_depth is None:
            mode, max_depth = None, mode  # the second argument of later versions
        mode = self.MODE_DEFAULT if mode is None and max_depth is None else mode
        if max_depth is None:
            if mode not in self.MODES:
                known = ", ".join(self.MODES)
                raise MisconfigurationException(f"`mode` can be {known}, got {mode}.")
            max_depth = 1 if mode == self.MODE_TOP else -1
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"`max_depth` can be -1, 0 or > 0, got {max_depth}.")
        self._model = model
        self._mode = mode or (self.MODE_TOP if max_depth == 1 else self.MODE_FULL)
        self._max_depth = max_depth
        self._layer_summary = self.summarize()

    @property
    def mode(self) -> str:
        """``"top"`` or ``"full"``."""
        return str(self._mode)

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules of the table, by name."""
        if self._max_depth == 0:
            return []
        if self._mode == self.MODE_TOP:
            return list(self._model.named_children())
        every = list(self._model.named_modules())[1:]
        if self._max_depth < 0:
            return every
        return [(name, module) for name, module in every if name.count(".") < self._max_depth]

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers."""
        return list(self._layer_summary)

    @property
    def layer_types(self) -> list[str]:
        """The classes of the layers."""
        return [layer.layer_type for layer in self._layer_summary.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """The shapes of the layers' inputs."""
        return [layer.in_size for layer in self._layer_summary.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """The shapes of the layers' outputs."""
        return [layer.out_size for layer in self._layer_summary.values()]

    @property
    def param_nums(self) -> list[int]:
        """The numbers of parameters of the layers."""
        return [layer.num_parameters for layer in self._layer_summary.values()]

    @property
    def total_parameters(self) -> int:
        """The number of parameters of the model; shared ones count once."""
        return _count(self._model)

    @property
    def trainable_parameters(self) -> int:
        """The number of parameters that get gradients."""
        return _count(self._model, trainable_only=True)

    @property
    def model_size(self) -> float:
        """The size of the parameters in megabytes (10⁶ bytes), in the precision of the run."""
        trainer = getattr(self._model, "trainer", None)
        bits = _bits(getattr(trainer or self._model, "precision", None))
        if bits is not None:
            return self.total_parameters * bits / 8 * 1e-6
        parameters = (p for p in self._model.parameters() if not _is_lazy(p))
        return sum(p.numel() * p.element_size() for p in parameters) * 1e-6

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at the layers, and run the model if it has an example."""
        summary = OrderedDict((name, LayerSummary(module)) for name, module in self.named_modules)
        try:
            if getattr(self._model, "example_input_array", None) is not None:
                self._run_example()
        finally:
            for layer in summary.values():
                layer.detach_hook()
        if any(_is_lazy(parameter) for parameter in self._model.parameters()):
            rank_zero_warn(
                "A layer with UninitializedParameter was found. "
                "Thus, the total number of params detected may be inaccurate."
            )
        return summary

    def _run_example(self) -> None:
        model: Any = self._model
        example = model.example_input_array
        transfer = getattr(model, "_apply_batch_transfer_handler", None)
        if transfer is not None:
            example = transfer(example)
        else:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            example = move_data_to_device(example, device)
        with _evaluating(model), torch.no_grad():
            if isinstance(example, (list, tuple)):
                model(*example)
            elif isinstance(example, dict):
                model(**example)
            else:
                model(example)

    def __str__(self) -> str:
        rows = list(self._layer_summary.items())
        columns: list[tuple[str, list[str]]] = [
            (" ", [str(number) for number in range(len(rows))]),
            ("Name", [name for name, _ in rows]),
            ("Type", [layer.layer_type for _, layer in rows]),
            ("Params", [get_human_readable_count(layer.num_parameters) for _, layer in rows]),
        ]
        if getattr(self._model, "example_input_array", None) is not None:
            columns.append(("In sizes", [str(layer.in_size) for _, layer in rows]))
            columns.append(("Out sizes", [str(layer.out_size) for _, layer in rows]))
        return _table(columns, self._totals())

    def __repr__(self) -> str:
        return str(self)

    def _totals(self) -> list[tuple[str, str]]:
        total, trainable = self.total_parameters, self.trainable_parameters
        return [
            (get_human_readable_count(trainable), "Trainable params"),
            (get_human_readable_count(total - trainable), "Non-trainable params"),
            (get_human_readable_count(total), "Total params"),
            (f"{self.model_size:,.3f}", "Total estimated model params size (MB)"),
        ]


def _bits(precision: Any) -> int | None:
    """The bits of a number in a precision such as 32, ``"bf16"`` or ``"16-mixed"``."""
    digits = "".join(c for c in str(precision).split("-")[0] if c.isdigit())
    return int(digits) if digits in ("8", "16", "32", "64") else None


def _table(columns: list[tuple[str, list[str]]], totals: list[tuple[str, str]]) -> str:
    widths = [max(map(len, [title, *cells])) for title, cells in columns]
    rule = "-" * (sum(widths) + 3 * len(widths))
    titles = [title for title, _ in columns]
    rows = zip(*(cells for _, cells in columns), strict=True)

    def line(cells: Any) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return " | ".join(padded).rstrip()

    lines = [line(titles), rule, *map(line, rows), rule]
    lines += [f"{value:<10}{meaning}" for value, meaning in totals]
    return "\n".join(lines)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and each back into its own at the end."""
    modes = [(module, module.training) for module in model.modules()]
    generator = torch.get_rng_state()
    model.eval()
    try:
        yield
    finally:
        torch.set_rng_state(generator)
        for module, mode in modes:
            module.training = mode


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """The summary of a module down to a depth; -1 for all levels."""
    return ModelSummary(lightning_module, max_depth=max_depth)


# ── Memory of GPUs ────────────────────────────────────────────────────────────────────────────────


def get_memory_profile(mode: str) -> dict[str, float]:
    """The used memory of the GPUs in megabytes.

    Args:
        mode: ``"all"`` for one value a GPU, ``"min_max"`` for the smallest and the largest.
    """
    used = get_gpu_memory_map()
    if mode == "min_max":
        return {"min_gpu_mem": min(used.values()), "max_gpu_mem": max(used.values())}
    return used


def get_gpu_memory_map() -> dict[str, float]:
    """The used memory of each GPU in megabytes, as ``nvidia-smi`` tells it.

    Raises:
        FileNotFoundError: there is no ``nvidia-smi``.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise FileNotFoundError("nvidia-smi: command not found")
    query = [program, "--query-gpu=memory.used", "--format=csv,nounits,noheader"]
    output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    numbers = [float(line) for line in output.split()]
    return {f"gpu_id: {gpu}/memory.used (MB)": used for gpu, used in enumerate(numbers)}
