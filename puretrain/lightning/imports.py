"""Imports of ``pytorch_lightning`` and ``lightning`` that lead to :mod:`puretrain.lightning`."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["import_as_lightning"]

_HOME = "puretrain.lightning"
_ROOTS = ("lightning.pytorch", "pytorch_lightning", "lightning")  # longest first


def _home_of(name: str) -> str | None:
    """The module of puretrain behind a name of Lightning.

    >>> _home_of("pytorch_lightning.callbacks.base"), _home_of("lightning.pytorch")
    ('puretrain.lightning.callbacks.base', 'puretrain.lightning')
    >>> _home_of("lightning_utilities")
    """
    for root in _ROOTS:
        if name == root:
            return _HOME
        if name.startswith(root + "."):
            return _HOME + name[len(root) :]
    return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module of puretrain itself for a name of Lightning, so that there is only one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        home = _home_of(fullname)
        if home is None:
            return None
        try:
            found = importlib.util.find_spec(home)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return None
        package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, origin=home, is_package=package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        # the import system takes what stands here at the end as the imported module
        sys.modules[name] = importlib.import_module(str(_home_of(name)))


_FINDER = _Finder()


def import_as_lightning() -> None:
    """Let ``pytorch_lightning``, ``lightning.pytorch`` and ``lightning`` be puretrain's.

    From here on, and in the whole process, they and their modules are the modules of
    :mod:`puretrain.lightning`; an installed Lightning is not seen any more. Call it before
    anything imports Lightning, for example at the top of a ``conftest.py``.

    Raises:
        RuntimeError: a real Lightning is imported already, and would stay in use.

    Example:
        >>> import puretrain.lightning
        >>> puretrain.lightning.import_as_lightning()
        >>> from pytorch_lightning.utilities.exceptions import MisconfigurationException
        >>> MisconfigurationException.__module__
        'puretrain.lightning.utilities.exceptions'
    """
    for root in _ROOTS:
        loaded: Any = sys.modules.get(root)
        if loaded is not None and not loaded.__name__.startswith(_HOME):
            raise RuntimeError(
                f"{root} is imported already, from {getattr(loaded, '__file__', None)}; call "
                "import_as_lightning before anything imports it"
            )
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
