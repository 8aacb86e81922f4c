"""Starting the processes of a run, watching over them, and starting them again: torchrun, inside.

The agent of torchrun (``torch.distributed.elastic``) does the work. What is added here is what is
shown: the traceback of the process that failed first, once, and nothing of those that failed
because it was gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from puretrain.errors import ConfigurationError, PuretrainError
from puretrain.observers.progress import folded

__all__ = ["is_worker", "launch", "telling_launcher"]

_PR_SET_PDEATHSIG, _SIOCGIFADDR = 1, 0x8915
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_ENDED_BY_SIGNAL = (128 + signal.SIGINT, 128 + signal.SIGTERM)


# ── In a process that was started ─────────────────────────────────────────────────────────────────


def is_worker() -> bool:
    """Whether this process was started by torchrun, by :func:`launch`, or by their like."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def telling_launcher() -> Iterator[None]:
    """Let an exception be told by what has started this process, which knows whose was the first.

    The exception becomes a ``SystemExit`` with the status 2. Without torchrun it passes. Use it
    inside of :func:`processes` too: what is told there comes before what the others say of a
    connection that was closed.

    A process that is ended because it hangs prints where. On Linux it gets SIGTERM when what has
    started it is killed, so that no process is left to write beside those of a later run.
    """
    file = os.environ.get(_ERROR_FILE)
    if file is not None:
        faulthandler.enable()
        _end_with_parent()
    try:
        yield
    except SystemExit as ended:  # of the program's own, or of a scope inside of this one
        if file is not None and ended.code not in (None, 0) and not os.path.exists(file):
            _tell_launcher(file, ended)
        raise
    except Exception as error:
        if file is None:
            raise
        _tell_launcher(file, error)
        raise SystemExit(2) from error


def _tell_launcher(file: str, error: BaseException) -> None:
    facts = {
        "py_callstack": traceback.format_exc(),
        "timestamp": str(int(time.time())),  # what torchrun reads
        "nanoseconds": time.time_ns(),
        "exit": _status(error) if isinstance(error, SystemExit) else None,
        "ours": str(error) if isinstance(error, PuretrainError) else None,
    }
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": facts}
    with open(file, "w", encoding="utf-8") as stream:
        json.dump({"message": message}, stream)


def _status(ended: SystemExit) -> int:
    return ended.code if isinstance(ended.code, int) else 1  # of a message, which Python prints


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


# ── In the process that starts them ───────────────────────────────────────────────────────────────


def launch(
    command: Sequence[str],
    *,
    nproc: int,
    nnodes: str = "1",
    rdzv_endpoint: str | None = None,
    rdzv_id: str | None = None,
    max_restarts: int = 0,
    patience: float = 630.0,
    debug: bool = False,
    answers: Sequence[int] = (),
) -> int:
    """Run a Python program in several processes, on this host and perhaps on others.

    If one of them fails, the others are ended within seconds, and what the first one has said of
    its exception (see :func:`telling_launcher`) is printed to stderr. Ctrl-C and SIGTERM are handed
    to all of them; a second one kills them.

    ``OMP_NUM_THREADS`` is 1 in them unless it is set, if there are several. On several hosts gloo
    talks through the interface that leads to ``rdzv_endpoint``, unless ``GLOO_SOCKET_IFNAME`` names
    another.

    Args:
        command: the arguments of the Python interpreter: ``["-m", "puretrain", "fit", …]``.
        nproc: processes on this host.
        nnodes: the number of hosts, or its bounds as ``"MIN:MAX"``. The same command is given on
            each of them.
        rdzv_endpoint: ``HOST:PORT`` of one of the hosts, where all meet.
        rdzv_id: the name of the run there, the same on all hosts.
        max_restarts: how often all processes are started again after one has failed.
        patience: for how many seconds to wait for the processes after a signal.
        debug: show tracebacks of errors of ours, and what torchrun logs.
        answers: exit statuses besides 0 by which a process says something else than a failure.

    Returns:
        The exit status: 0 or an answer, or 130 and 143 after Ctrl-C and SIGTERM, or 2.

    Raises:
        ConfigurationError: an argument is out of its range, or the hosts could not meet.
    """
    low, high = _bounds(nnodes)
    if nproc < 1:
        raise ConfigurationError(f"nproc={nproc}: give a number of processes from 1")
    if max_restarts < 0:
        raise ConfigurationError(f"max_restarts={max_restarts}: give a number of restarts from 0")
    if high > 1 and rdzv_endpoint is None:
        raise ConfigurationError(
            f"{nnodes} hosts need a place to meet: give --rdzv-endpoint HOST:PORT, one of the "
            "hosts and a free port on it, the same on all hosts"
        )
    if high == 1 and rdzv_endpoint is None:
        rdzv_endpoint, rdzv_id = "localhost:0", str(uuid.uuid4())
    defaults = {}
    if nproc > 1 or high > 1:
        defaults["OMP_NUM_THREADS"] = "1"
    address, is_meeting_place = None, True
    if high > 1:
        # The store in which processes leave their addresses would be that of the ones before, when
        # they are started again (it is reused in torch 2.13).
        defaults["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        address, is_meeting_place = _own_address(rdzv_endpoint or "")
        interface = _interface_of(address)
        if interface is not None:
            defaults["GLOO_SOCKET_IFNAME"] = interface
    if not debug:
        _silence()
    with _environment(defaults):
        return _run(
            command,
            nproc=nproc,
            nodes=(low, high),
            endpoint=rdzv_endpoint or "",
            # The agents of all hosts must have the same name for the run.
            run_id=rdzv_id or "puretrain",
            address=address,
            is_meeting_place=is_meeting_place,
            max_restarts=max_restarts,
            patience=int(patience),
            debug=debug,
            answers=answers,
        )


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes, as far as they are not set."""
    new = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def _bounds(nnodes: str) -> tuple[int, int]:
    low, colon, high = str(nnodes).partition(":")
    try:
        bounds = int(low), int(high if colon else low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigurationError(f"nnodes is a number of hosts, or MIN:MAX; not {nnodes!r}")
    return bounds


def _silence() -> None:
    """What torchrun logs about ends of processes is said here, more briefly."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _run(
    command: Sequence[str],
    *,
    nproc: int,
    nodes: tuple[int, int],
    endpoint: str,
    run_id: str,
    address: str | None,
    is_meeting_place: bool,
    max_restarts: int,
    patience: int,
    debug: bool,
    answers: Sequence[int],
) -> int:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from puretrain.sharding.agent import Agent

    def meet(is_host: bool) -> Any:
        parameters = RendezvousParameters(
            "c10d",
            endpoint,
            run_id,
            *nodes,
            local_addr=address,
            timeout=900,
            keep_alive_interval=2,
            is_host=is_host,
        )
        return get_rendezvous_handler(parameters)

    try:
        try:
            handler = meet(is_meeting_place)
        except RendezvousError:
            if nodes[1] == 1 or not is_meeting_place:
                raise
            handler = meet(False)  # another launcher on this host has made the place
    except (RendezvousError, ValueError) as error:  # a port that can't be is a ValueError
        raise ConfigurationError(_not_met(endpoint, error)) from error
    spec = WorkerSpec(
        role="puretrain",
        local_world_size=nproc,
        entrypoint=sys.executable,
        args=tuple(command),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        local_addr=address,
    )

    def is_known(failure: Any) -> bool:
        answered = failure.exitcode in answers and _facts(failure) is None
        return answered or failure.exitcode in _ENDED_BY_SIGNAL

    def tell(failures: Mapping[int, Any], first: int) -> None:
        if not is_known(failures[first]):
            _tell(failures, first, debug)

    agent = Agent(spec, DefaultLogsSpecs(), patience, tell)
    try:
        result = agent.run()
    except SignalException as ended:
        # The hosts that are left may go on, so the place where they meet stays open.
        return 0 if agent.all_succeeded() else 128 + int(ended.sigval)
    except RendezvousError as error:
        raise ConfigurationError(_not_met(endpoint, error)) from error
    handler.shutdown()
    if result is None:
        raise ConfigurationError(
            f"the run {run_id!r} has ended on the hosts that met at {endpoint}"
        )
    if not result.is_failed():
        return 0
    failure = agent.first_failure(result.failures)[1]
    return int(failure.exitcode) if is_known(failure) else 2


def _own_address(endpoint: str) -> tuple[str, bool]:
    """The address under which this host is seen from where the hosts meet, and whether it is there.

    Its name may stand for another one, or for none, in the network that the hosts share.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        (family, kind, _, _, place), *_ = socket.getaddrinfo(
            host.strip("[]") or endpoint, int(port or 0), type=socket.SOCK_DGRAM
        )
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            address = str(probe.getsockname()[0])
            return address, address == place[0]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--rdzv-endpoint {endpoint} is no HOST:PORT: {error}") from error


def _interface_of(address: str) -> str | None:
    """The name of the network interface with an IPv4 address, where Linux tells it."""
    if sys.platform != "linux" or ":" in address:
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _not_met(endpoint: str, error: Exception) -> str:
    return f"the hosts could not meet at {endpoint}: {error}"


def _tell(failures: Mapping[int, Any], first: int, debug: bool) -> None:
    """Say on stderr what has happened to the process that failed first."""
    failure = failures[first]
    name = f"the process of rank {first}"
    facts = _facts(failure)
    if facts is None and failure.exitcode < 0:
        text = f"{name} (pid {failure.pid}) was killed by {failure.signal_name()}"
    elif facts is None or facts.get("exit") is not None:
        status = failure.exitcode if facts is None else facts["exit"]
        text = f"{name} ended with status {status}"
    elif facts.get("ours") is not None and not debug:
        text = f"{name}: {facts['ours']} (--debug shows where)"
    else:
        text = f"{name}:\n{facts['py_callstack'].rstrip()}"
    columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else sys.maxsize
    told, newline, calls = f"puretrain: error: {text}".partition("\n")
    told = folded(told.split(" "), columns, " ")
    print(told + newline + calls, file=sys.stderr, flush=True)


def _facts(failure: Any) -> dict[str, Any] | None:
    message = failure.error_file_data.get("message")
    return message.get("extraInfo") if isinstance(message, dict) else None
