"""Run a program that imports ``pytorch_lightning`` on puretrain, as it is.

``python -m puretrain.lightning script.py [arguments]`` behaves like ``python script.py
[arguments]``, except that ``pytorch_lightning``, ``lightning.pytorch`` and ``lightning`` are
:mod:`puretrain.lightning`. ``python -m puretrain.lightning -m module [arguments]`` runs a module
so, for example ``-m pytest``.
"""

from __future__ import annotations

import importlib.machinery
import io
import os
import runpy
import signal
import sys
from types import ModuleType, TracebackType
from typing import Any

from puretrain.lightning.imports import import_as_lightning

__all__ = ["main"]

_USAGE = "usage: python -m puretrain.lightning (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    """Run a script or a module in place of this program.

    Args:
        arguments: the script, or ``-m`` and the module, and what follows.

    Returns:
        The status to exit with.
    """
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(_USAGE, file=sys.stdout if arguments[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    import_as_lightning()
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            return 0
        return _run_script(arguments)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - what the program leaves to the interpreter
        _show(error)
        if isinstance(error, KeyboardInterrupt):
            _end_by_interrupt()
        return 1


def _run_script(arguments: list[str]) -> int:
    path = os.path.abspath(arguments[0])
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"puretrain.lightning: can't open file {arguments[0]!r}: {reason}", file=sys.stderr)
        return 2
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    vars(module).update(
        __file__=path, __builtins__=__builtins__, __loader__=loader, __package__=None
    )
    # classes of the script are found here when they are pickled
    sys.modules["__main__"] = module
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    return 0


def _show(error: BaseException) -> None:
    """Print a traceback that begins in the program, as the interpreter would."""
    trace: TracebackType | None = error.__traceback__
    ours: Any = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    error.__traceback__ = trace
    sys.excepthook(type(error), error, trace)


def _end_by_interrupt() -> None:
    """End as a program does that Ctrl-C has ended: by the signal, so that a shell sees it."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
