"""What a run depends on outside of its state: versions, threads, devices, flags, code."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from puretrain.tree import tree_leaves

__all__ = ["FactDifference", "code_facts", "compare_facts", "environment_facts", "settings"]

Facts = dict[str, Any]


class FactDifference(NamedTuple):
    """A fact that is another one now than when the run was recorded."""

    name: str
    """Which, for example ``settings/threads``."""
    recorded: Any
    """What it was; None if it was not recorded."""
    now: Any
    """What it is; None if it is not known here."""


def environment_facts(state: Any = None) -> Facts:
    """The facts of this process that can decide bits, in groups.

    ``environment`` has versions and hardware, ``settings`` what this process can change,
    ``process`` what is only good to know (time, host, command), and ``division`` how many processes
    there are that have joined (torch.distributed); it is empty in a process that is alone.

    >>> facts = environment_facts()
    >>> facts["settings"]["threads"] == torch.get_num_threads()
    True
    """
    from puretrain import __version__

    environment: Facts = {
        "puretrain": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": _blas(),
        "interop_threads": torch.get_num_interop_threads(),
    }
    for name in ("numpy", "optree"):
        environment[name] = importlib.metadata.version(name)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG"):
        if name in os.environ:
            environment[name] = os.environ[name]
    devices = {leaf.device for leaf in tree_leaves(state) if isinstance(leaf, Tensor)}
    environment["devices"] = ", ".join(sorted(map(_device, devices))) or "none"
    if any(device.type == "cuda" for device in devices):
        environment["cuda"] = str(torch.version.cuda)
        environment["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return {
        "environment": environment,
        "settings": _settings(),
        "process": {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "directory": os.getcwd(),
            "command": [str(word) for word in sys.argv],
        },
        "division": {"processes": dist.get_world_size()} if _joined() else {},
    }


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform's own word for it will do
    return platform.processor() or platform.machine()


def _blas() -> str:
    words = torch.__config__.show().split("\n")
    kept = [word.strip(" -") for word in words if "Math Kernel" in word or "MKL-DNN" in word]
    if kept:
        return "; ".join(kept)
    found = [w for w in ",".join(words).split(",") if w.strip().startswith("BLAS_INFO")]
    return found[0].strip() if found else "unknown"


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} {torch.cuda.get_device_name(device)}"


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


def _settings() -> Facts:
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


@contextmanager
def settings(recorded: Mapping[str, Any]) -> Iterator[None]:
    """Use the settings of a recorded run in a scope: threads, deterministic algorithms, ….

    What is not recorded stays as it is.

    >>> before = torch.get_num_threads()
    >>> with settings({"threads": before + 1}):
    ...     torch.get_num_threads() == before + 1
    True
    >>> torch.get_num_threads() == before
    True
    """
    before = _settings()
    try:
        _apply({**before, **{name: recorded[name] for name in before if name in recorded}}, before)
        yield
    finally:
        _apply(before, _settings())


def _apply(wanted: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if current[name] == value:
            continue
        if name == "threads":
            torch.set_num_threads(value)
        elif name == "deterministic":
            torch.use_deterministic_algorithms(value)
        elif name == "matmul_precision":
            torch.set_float32_matmul_precision(value)
        elif name == "default_dtype":
            torch.set_default_dtype(getattr(torch, value))
        else:
            setattr(torch.backends.cudnn, name.removeprefix("cudnn_"), value)


# ── Code ──────────────────────────────────────────────────────────────────────────────────────────


def code_facts(file: str | None) -> Facts:
    """What is known of the code of a run: its file's digest, and the state of its git repository.

    ``git_diff`` is the digest of what differs from the commit, so that two runs with the same
    changes in the working tree count as the same code.
    """
    facts: Facts = {}
    place = Path.cwd() if file is None else Path(file).parent
    if file is not None:
        try:
            facts["file"] = xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
        except OSError:
            facts["file"] = "unreadable"
    commit = _git(place, "rev-parse", "HEAD")
    if commit is not None:
        facts["git_commit"] = commit.decode(errors="replace").strip()
        changes = _git(place, "diff", "HEAD", "--no-ext-diff", "--no-color")
        if changes is None:
            facts["git_diff"] = "unknown"
        else:
            facts["git_diff"] = xxhash.xxh3_128_hexdigest(changes) if changes else "clean"
    return facts


def _git(place: Path, *arguments: str) -> bytes | None:
    """What git prints; None without git, outside of a repository, or if it takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments],
            capture_output=True,
            check=False,
            timeout=10,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def compare_facts(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[FactDifference]:
    """The facts of the groups ``environment``, ``settings``, ``division`` and ``code`` that differ.

    >>> compare_facts({"settings": {"threads": 2}}, {"settings": {"threads": 1}})
    [FactDifference(name='settings/threads', recorded=2, now=1)]
    """
    found = []
    for group in ("environment", "settings", "division", "code"):
        then, here = recorded.get(group, {}), now.get(group, {})
        found += [
            FactDifference(f"{group}/{name}", then.get(name), here.get(name))
            for name in dict.fromkeys([*then, *here])
            if then.get(name) != here.get(name)
        ]
    return found
