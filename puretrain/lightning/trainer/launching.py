"""Starting the processes of a run from a script that was started plainly.

With ``ddp`` the script starts itself again, once for each further process, with the variables that
torchrun would set. With ``ddp_spawn`` and its like what the trainer's method does runs in new
processes, all of them, and what it has found comes back to this one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessRaisedException

from puretrain.lightning import imports
from puretrain.lightning.trainer import distributed, loaders
from puretrain.lightning.utilities.apply_func import move_data_to_device
from puretrain.lightning.utilities.distributed import rank_zero_info
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["end_children", "launch"]

_PARENT = "PURETRAIN_LAUNCHED_BY"
_GRACE = 2.0  # seconds between asking a process to end and ending it
_PATIENCE = 60.0  # seconds that the other processes may need longer than this one
_children: list[Any] = []
_importing_main: list[bool] = []


def launch(
    trainer: Any, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> tuple[bool, Any]:
    """Start the processes of a run, unless they have been started.

    Args:
        trainer: whose run.
        function: what new processes are to call, with the trainer.
        arguments: its further arguments.

    Returns:
        Whether it is done, and what it returned. If not, this process is one of the run's.

    Raises:
        MisconfigurationException: processes can't be started from here.
        ProcessRaisedException: a new process failed; with its traceback.
    """
    plan = trainer._processes.plan
    if plan.world_size == 1:
        return False, None
    if _importing_main:
        raise MisconfigurationException(
            f"the new processes of {trainer._processes.plan.launch!r} import the script, and it "
            f"calls trainer.{function.__name__} while it is imported: put the program under "
            "`if __name__ == '__main__':`, or use accelerator='ddp'"
        )
    if "LOCAL_RANK" in os.environ:
        _end_with_parent()
        return False, None
    if plan.nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise MisconfigurationException(
            f"num_nodes={plan.nodes}: start the program on every machine with torchrun, or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )
    rank_zero_info(f"Starting {plan.per_node} processes ({plan.kind}, {plan.launch})")
    if plan.launch == "script":
        _start_scripts(plan)
        return False, None
    return True, _run_in_children(trainer, function, dict(arguments))


def _variables(plan: Any, local_rank: int) -> dict[str, str]:
    node = int(os.environ.get("NODE_RANK", "0"))
    return {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port()),
        "NODE_RANK": str(node),
        "LOCAL_RANK": str(local_rank),
        "RANK": str(node * plan.per_node + local_rank),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_WORLD_SIZE": str(plan.per_node),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _speaks_for_lightning() -> bool:
    """Whether ``pytorch_lightning`` is this package in this program."""
    return imports._FINDER in sys.meta_path


def _flags() -> list[str]:
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


# ── The script, once more ─────────────────────────────────────────────────────────────────────────


def _command() -> list[str]:
    main: Any = sys.modules["__main__"]
    if main.__spec__ is None and not hasattr(main, "__file__"):
        raise MisconfigurationException(
            "accelerator='ddp' starts the script again, but this program is no script; in a "
            "notebook use strategy='ddp_notebook'"
        )
    command = [sys.executable, *_flags()]
    if _speaks_for_lightning():
        command += ["-m", "puretrain.lightning"]
    if main.__spec__ is None:
        return [*command, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    return [*command, "-m", main.__spec__.name.removesuffix(".__main__"), *sys.argv[1:]]


def _start_scripts(plan: Any) -> None:
    command = _command()
    os.environ.update(_variables(plan, 0))
    for local_rank in range(1, plan.per_node):
        environment = {**os.environ, **_variables(plan, local_rank), _PARENT: str(os.getpid())}
        _children.append(subprocess.Popen(command, env=environment))
    atexit.register(_wait_for_children)
    distributed.before_leaving.append(_wait_for_children)
    threading.Thread(target=_watch_children, daemon=True).start()


def _watch_children() -> None:
    """End this process, and all others, soon after one of them has failed."""
    while _children:
        time.sleep(0.1)
        failed = [child for child in list(_children) if child.poll()]
        if failed:
            end_children()
            time.sleep(_GRACE)  # it may end by itself, with an error of its own
            print(
                f"puretrain: another process of the run (pid {failed[0].pid}) ended with status "
                f"{failed[0].returncode}; its traceback is above. This one ends, too",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
            os._exit(1)


def end_children(children: list[Any] = _children) -> None:
    """End the processes that this one has started: it has failed, and they would wait for it."""
    children, started = list(children), children
    started.clear()
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _GRACE
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_for_children() -> None:
    """At the end of the program: the others may still be at their last steps."""
    deadline = time.monotonic() + _PATIENCE
    while any(child.poll() is None for child in list(_children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if any(child.poll() for child in list(_children)):
        time.sleep(_GRACE + 1)  # the watching thread ends the program
    for child in _children:
        if child.poll() is None:
            print(
                f"puretrain: the process {child.pid} of the run has not ended {_PATIENCE:.0f} s "
                "after this one; it is ended",
                file=sys.stderr,
            )
    end_children()


def _end_with_parent() -> None:
    """Let this process end when the one that started it is gone."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ── New processes for one method ──────────────────────────────────────────────────────────────────


def _run_in_children(trainer: Any, function: Any, arguments: dict[str, Any]) -> Any:
    plan = trainer._processes.plan
    with tempfile.TemporaryDirectory(prefix="puretrain-") as name:
        folder = Path(name)
        shared = _variables(plan, 0)
        starter = _spawned if plan.launch == "spawn" else _forked
        children = starter(trainer, function, arguments, folder, shared)
        _wait_for(children, folder)
        found = torch.load(folder / "result", map_location="cpu", weights_only=False)
    _take_over(trainer, arguments, found)
    return found["returned"]


def _spawned(
    trainer: Any, function: Any, arguments: Any, folder: Path, shared: dict[str, str]
) -> list[Any]:
    preparation = spawn.get_preparation_data("puretrain")
    preparation.pop("authkey", None)
    header = {"as_lightning": _speaks_for_lightning(), "preparation": preparation}
    try:
        # By pickle itself: torch's own would let all processes write to the same parameters.
        task = pickle.dumps((trainer, function, arguments, loaders.capture()))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise MisconfigurationException(
            f"the new processes of {trainer._processes.plan.launch!r} are sent the trainer, the "
            f"module and the loaders, but: {error}. Define classes and functions at the top of a "
            "module, or use accelerator='ddp'"
        ) from error
    (folder / "header").write_bytes(pickle.dumps(header))
    (folder / "task").write_bytes(task)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from puretrain.lightning.trainer.launching import _spawned_main; _spawned_main()"
    )
    plan = trainer._processes.plan
    children = []
    for rank in range(plan.per_node):
        environment = {**os.environ, **_own(plan, rank, shared), _PARENT: str(os.getpid())}
        command = [sys.executable, *_flags(), "-c", code, str(folder)]
        children.append(subprocess.Popen(command, env=environment))
    return children


def _own(plan: Any, rank: int, shared: dict[str, str]) -> dict[str, str]:
    return {**_variables(plan, rank), "MASTER_PORT": shared["MASTER_PORT"]}


def _spawned_main() -> None:
    """What a new process runs."""
    folder = Path(sys.argv[1])
    with _reporting(folder):
        header = pickle.loads((folder / "header").read_bytes())
        if header["as_lightning"]:
            imports.import_as_lightning()
        _importing_main.append(True)
        spawn.prepare(header["preparation"])
        _importing_main.clear()
        trainer, function, arguments, generators = pickle.loads((folder / "task").read_bytes())
        loaders.put_back(generators)
        _work(trainer, function, arguments, folder)


class _Forked:
    """A forked process with the methods of ``subprocess.Popen``."""

    def __init__(self, process: Any) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("fork", timeout or 0.0)


def _forked(
    trainer: Any, function: Any, arguments: Any, folder: Path, shared: dict[str, str]
) -> list[Any]:
    if torch.cuda.is_initialized():
        raise MisconfigurationException(
            "processes can't be forked after CUDA was used; use 'ddp_spawn', or call nothing of "
            "torch.cuda before"
        )
    plan = trainer._processes.plan

    def run(rank: int) -> None:
        os.environ.update(_own(plan, rank, shared))
        with _reporting(folder):
            _work(trainer, function, arguments, folder)

    children = []
    for rank in range(plan.per_node):
        process = multiprocessing.get_context("fork").Process(target=run, args=(rank,))
        process.start()
        children.append(_Forked(process))
    return children


class _reporting:  # noqa: N801 - used like a function
    """A context that leaves the traceback of an exception for the first process, and ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            return
        rank = os.environ["LOCAL_RANK"]
        text = "".join(traceback.format_exception(kind, error, trace))
        written = self.folder / f"writing-{rank}"
        written.write_text(text, encoding="utf-8")
        written.replace(self.folder / f"error-{rank}")
        distributed.leave(failed=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _work(trainer: Any, function: Any, arguments: dict[str, Any], folder: Path) -> None:
    """Do in this new process what was asked; the first leaves what has come of it."""
    _end_with_parent()
    distributed.take_ranks(trainer)
    returned = function(trainer, **arguments)
    if trainer.is_global_zero:
        module = trainer._module
        found = {
            "returned": returned,
            "state_dict": dict(module.state_dict()),
            "callbacks": [(type(c).__qualname__, _state_of(c)) for c in trainer.callbacks],
            "versions": [vars(logger).get("_version") for logger in trainer.loggers],
            "trainer": {name: getattr(trainer, name) for name in _TAKEN},
        }
        torch.save(move_data_to_device(found, torch.device("cpu")), folder / "result")
    trainer._processes.barrier()
    distributed.leave()


_TAKEN = (
    "current_epoch",
    "global_step",
    "should_stop",
    "interrupted",
    "num_training_batches",
    "_callback_metrics",
    "_logged_metrics",
    "_bar_metrics",
    "_steps_done",
    "_total_batches",
    "_state",
    "_fn",
)


def _state_of(callback: Any) -> Any:
    method = getattr(callback, "state_dict", None)
    return method() if callable(method) else None


def _take_over(trainer: Any, arguments: dict[str, Any], found: dict[str, Any]) -> None:
    module = arguments.get("model")
    module = trainer._module if module is None else module
    module.load_state_dict(found["state_dict"], strict=False)
    trainer._module = module
    module.trainer = trainer
    vars(trainer).update(found["trainer"])
    for logger, version in zip(trainer.loggers, found["versions"], strict=True):
        if version is not None:
            logger._version = version
    for callback in trainer.callbacks:  # there may be more of them there: those of the module
        kind = type(callback).__qualname__
        place = next((i for i, (name, _) in enumerate(found["callbacks"]) if name == kind), None)
        if place is None:
            continue
        _, state = found["callbacks"].pop(place)
        if state and callable(getattr(callback, "load_state_dict", None)):
            if "dirpath" in state and hasattr(callback, "dirpath"):
                callback.dirpath = state["dirpath"]  # found out when the run began
            callback.load_state_dict(state)


def _wait_for(children: list[Any], folder: Path) -> None:
    interrupted = False
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            break
        try:
            time.sleep(0.02)
        except KeyboardInterrupt:  # they have it, too, and end by themselves
            if interrupted:
                end_children(children)
                raise
            interrupted = True
    codes = [child.poll() for child in children]
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return
    # The others fail soon, since they miss the first one; what it said counts.
    end_children(list(children))
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        rank = int(errors[0].name.removeprefix("error-"))
        text = errors[0].read_text(encoding="utf-8")
        raise ProcessRaisedException(
            f"\n\n-- Process {rank} terminated with the following error:\n{text}",
            rank,
            children[rank].pid,
        )
    code = codes[failed[0]] or 1
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    raise ProcessRaisedException(
        f"process {failed[0]} ended {how}", failed[0], children[failed[0]].pid
    )
