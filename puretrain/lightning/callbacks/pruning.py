"""Set weights to zero and keep them there, by ``torch.nn.utils.prune``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from puretrain.lightning.callbacks.base import Callback
from puretrain.lightning.trainer.states import TrainerFn
from puretrain.lightning.utilities.distributed import rank_zero_info
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["ModelPruning"]

_FUNCTIONS = {
    "ln_structured": prune.ln_structured,
    "l1_unstructured": prune.l1_unstructured,
    "random_structured": prune.random_structured,
    "random_unstructured": prune.random_unstructured,
}
_METHODS = {
    "ln_structured": prune.LnStructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}


class ModelPruning(Callback):
    """Prunes the module's parameters at the end of epochs."""

    PARAMETER_NAMES = ("weight", "bias")

    def __init__(
        self,
        pruning_fn: Any,
        parameters_to_prune: Sequence[tuple[nn.Module, str]] | None = (),
        parameter_names: Sequence[str] | None = None,
        use_global_unstructured: bool = True,
        amount: Any = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        """Take the method and what to prune.

        Args:
            pruning_fn: the name of a function of ``torch.nn.utils.prune``, or a class of a method.
            parameters_to_prune: pairs of a module and the name of its parameter; none: all.
            parameter_names: of which names, if they are not given in pairs.
            use_global_unstructured: compare the weights of all layers with each other.
            amount: a fraction or a number, or a function of the epoch that returns one.
            apply_pruning: whether to prune, or a function of the epoch that says so.
            make_pruning_permanent: leave plain parameters behind, in checkpoints and at the end.
            use_lottery_ticket_hypothesis: set the weights that stay back to those of the
                beginning (Frankle and Carbin, "The lottery ticket hypothesis", ICLR 2019); or a
                function of the epoch that says so.
            resample_parameters: draw them anew instead.
            pruning_dim: along which dimension to prune by structure.
            pruning_norm: the norm for ``ln_structured``.
            verbose: 1 prints how much is zero, 2 for each parameter as well.
            prune_on_train_epoch_end: or else at the end of validation.

        Raises:
            MisconfigurationException: the arguments do not fit together.
        """
        super().__init__()
        self._global, self._permanent = use_global_unstructured, make_pruning_permanent
        self._names = parameter_names or self.PARAMETER_NAMES
        self._parameters_to_prune: Any = parameters_to_prune
        self._lottery, self._resample = use_lottery_ticket_hypothesis, resample_parameters
        self._at_train_end = prune_on_train_epoch_end
        self._original: list[Any] = []
        for name in self._names:
            if name not in self.PARAMETER_NAMES:
                raise MisconfigurationException(
                    f"The provided `parameter_names` name: {name} isn't in {self.PARAMETER_NAMES}"
                )
        self._options: dict[str, Any] = {}
        if isinstance(pruning_fn, str):
            pruning_fn = self._named(pruning_fn.lower(), pruning_dim, pruning_norm)
        elif not (inspect.isclass(pruning_fn) and issubclass(pruning_fn, prune.BasePruningMethod)):
            raise MisconfigurationException(
                f"`pruning_fn` is expected to be a str in {list(_FUNCTIONS)} or a PyTorch "
                f"`BasePruningMethod`. Found: {pruning_fn}. HINT: if passing a "
                "`BasePruningMethod`, pass the class, not an instance"
            )
        elif not use_global_unstructured:
            raise MisconfigurationException(
                "PyTorch `BasePruningMethod` is currently only supported with "
                "`use_global_unstructured=True`."
            )
        if use_global_unstructured and pruning_fn.PRUNING_TYPE != "unstructured":
            raise MisconfigurationException(
                'Only the "unstructured" PRUNING_TYPE is supported with '
                f"`use_global_unstructured=True`. Found method {pruning_fn} of type "
                f"{pruning_fn.PRUNING_TYPE}. "
            )
        self.pruning_fn, self._apply = pruning_fn, apply_pruning
        if not (isinstance(amount, (int, float)) or callable(amount)):
            raise MisconfigurationException(
                "`amount` should be provided and be either an int, a float or Callable function."
            )
        self.amount = amount
        if verbose not in (0, 1, 2):
            raise MisconfigurationException("`verbose` must be any of (0, 1, 2)")
        self._verbose = verbose

    def _named(self, name: str, dim: int | None, norm: int | None) -> Any:
        if name not in _FUNCTIONS:
            raise MisconfigurationException(
                f"The provided `pruning_fn` {name} isn't available in PyTorch's built-in "
                f"functions: {list(_FUNCTIONS)} "
            )
        if name.endswith("_structured"):
            if dim is None:
                raise MisconfigurationException(
                    "When requesting `structured` pruning, the `pruning_dim` should be provided."
                )
            self._options["dim"] = dim
            if name == "ln_structured":
                if norm is None:
                    raise MisconfigurationException(
                        "When requesting `ln_structured` pruning, the `pruning_norm` should be "
                        "provided."
                    )
                self._options["n"] = norm
        return _METHODS[name] if self._global else partial(_FUNCTIONS[name], **self._options)

    # ── What is pruned ────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: nn.Module,
        parameters_to_prune: Any = (),
        parameter_names: Sequence[str] | None = None,
    ) -> Any:
        """The pairs of module and name to prune.

        Raises:
            MisconfigurationException: they are no pairs, or not of this module.
        """
        from puretrain.lightning.core.lightning import LightningModule

        containers = (LightningModule, nn.Sequential, nn.ModuleList, nn.ModuleDict)
        modules = [m for m in pl_module.modules() if not isinstance(m, containers)]
        if not parameters_to_prune:
            return [
                (module, name)
                for name in parameter_names or ModelPruning.PARAMETER_NAMES
                for module in modules
                if isinstance(getattr(module, name, None), nn.Parameter)
            ]
        if not isinstance(parameters_to_prune, (list, tuple)) or not all(
            len(pair) == 2 and isinstance(pair[0], nn.Module) and isinstance(pair[1], str)
            for pair in parameters_to_prune
        ):
            raise MisconfigurationException(
                "The provided `parameters_to_prune` should either be list of tuple with 2 "
                "elements: (nn.Module, parameter_name_to_prune) or None"
            )
        strangers = [m for m, _ in parameters_to_prune if all(m is not each for each in modules)]
        missing = [name for m, name in parameters_to_prune if not hasattr(m, name)]
        if strangers or missing:
            raise MisconfigurationException(
                "Some provided `parameters_to_prune` don't exist in the model. Found missing "
                f"modules: {strangers} and missing parameters: {missing}"
            )
        return parameters_to_prune

    def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
        """Override this to choose among the pairs."""
        return parameters_to_prune

    # ── Pruning ───────────────────────────────────────────────────────────────────────────────────

    def apply_pruning(self, amount: float | int) -> None:
        """Prune so much of what there is."""
        before = [_zeros(*pair) for pair in self._parameters_to_prune]
        if self._global:
            prune.global_unstructured(
                self._parameters_to_prune, pruning_method=self.pruning_fn, amount=amount
            )
        else:
            for module, name in self._parameters_to_prune:
                self.pruning_fn(module, name=name, amount=amount)
        if self._verbose:
            self._report(before, amount)

    def _report(self, before: list[int], amount: float | int) -> None:
        pairs = self._parameters_to_prune
        after = [_zeros(*pair) for pair in pairs]
        sizes = [getattr(*pair).numel() for pair in pairs]
        rank_zero_info(
            f"Applied pruning. Pruned: {sum(before)}/{sum(sizes)} "
            f"({sum(before) / sum(sizes):.2%}) -> {sum(after)}/{sum(sizes)} "
            f"({sum(after) / sum(sizes):.2%})"
        )
        if self._verbose == 2:
            for pair, old, new, size in zip(pairs, before, after, sizes, strict=True):
                rank_zero_info(
                    f"Applied pruning to `{pair[0]!r}.{pair[1]}` with amount={amount}. Pruned: "
                    f"{old} ({old / size:.2%}) -> {new} ({new / size:.2%})"
                )

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Set the weights back to those of the beginning, under the mask."""
        for original, (module, name) in zip(self._original, self._parameters_to_prune, strict=True):
            source = original
            if self._resample and callable(getattr(original, "reset_parameters", None)):
                source = copy.deepcopy(original)
                source.reset_parameters()
            target = getattr(module, f"{name}_orig", None)
            target = getattr(module, name) if target is None else target
            target.data.copy_(getattr(source, name).data)

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Let the pruned weights be plain parameters again."""
        for each in module.modules():
            hooks = each._forward_pre_hooks
            for key, hook in list(hooks.items()):
                if isinstance(hook, prune.BasePruningMethod):
                    hook.remove(each)
                    del hooks[key]

    def _run(self, epoch: int) -> None:
        wanted = self._apply(epoch) if callable(self._apply) else self._apply
        amount = self.amount(epoch) if callable(self.amount) else self.amount
        if not wanted or not amount:
            return
        self.apply_pruning(amount)
        if self._lottery(epoch) if callable(self._lottery) else self._lottery:
            self.apply_lottery_ticket_hypothesis()

    # ── Hooks ─────────────────────────────────────────────────────────────────────────────────────

    def setup(self, trainer, pl_module, stage=None):
        if stage not in (None, "fit"):
            return
        self._parameters_to_prune = self.filter_parameters_to_prune(
            self.sanitize_parameters_to_prune(pl_module, self._parameters_to_prune, self._names)
        )
        if self._lottery:
            copies: dict[int, nn.Module] = {}
            for module, _ in self._parameters_to_prune:
                if id(module) not in copies:
                    copies[id(module)] = copy.deepcopy(module)
            self._original = [copies[id(module)] for module, _ in self._parameters_to_prune]

    def on_train_epoch_end(self, trainer, pl_module):
        if self._at_train_end:
            self._run(trainer.current_epoch)

    def on_validation_epoch_end(self, trainer, pl_module):
        fitting = trainer._fn is TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not self._at_train_end:
            self._run(trainer.current_epoch)

    def on_train_end(self, trainer, pl_module):
        if self._permanent:
            self.make_pruning_permanent(pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if not self._permanent:
            return
        state = dict(checkpoint["state_dict"])
        for name in [key[: -len("_mask")] for key in state if key.endswith("_mask")]:
            if f"{name}_orig" in state:
                original, mask = state.pop(f"{name}_orig"), state.pop(f"{name}_mask")
                state[name] = mask.to(original.dtype) * original
        checkpoint["state_dict"] = state


def _zeros(module: nn.Module, name: str) -> int:
    mask = getattr(module, f"{name}_mask", None)
    return int((mask == 0).sum()) if isinstance(mask, Tensor) else 0
