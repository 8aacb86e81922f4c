"""How the processes of a run find each other: read from the variables that launchers set."""

from __future__ import annotations

import os
import re
import socket

__all__ = [
    "ClusterEnvironment",
    "LightningEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]


def _number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name, default))


class ClusterEnvironment:
    """The base of an environment of one's own: override what differs."""

    @property
    def creates_processes_externally(self) -> bool:
        """Whether something else than the Trainer starts the processes."""
        return self.creates_children()

    def creates_children(self) -> bool:
        """The older name of :attr:`creates_processes_externally`."""
        return False

    @property
    def main_address(self) -> str:
        """Where the process of rank 0 is."""
        return self.master_address()

    @property
    def main_port(self) -> int:
        """Where the process of rank 0 listens."""
        return self.master_port()

    def master_address(self) -> str:
        """The older name of :attr:`main_address`."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    def master_port(self) -> int:
        """The older name of :attr:`main_port`."""
        return _number("MASTER_PORT", 12910)

    def world_size(self) -> int:
        """The number of processes."""
        return _number("WORLD_SIZE", 1)

    def set_world_size(self, size: int) -> None:
        """Leave the number of processes in the environment."""
        os.environ["WORLD_SIZE"] = str(size)

    def global_rank(self) -> int:
        """The number of this process."""
        return _number("RANK")

    def set_global_rank(self, rank: int) -> None:
        """Leave the number of this process in the environment."""
        os.environ["RANK"] = str(rank)

    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return _number("LOCAL_RANK")

    def node_rank(self) -> int:
        """The number of this machine."""
        return _number("NODE_RANK", _number("GROUP_RANK"))

    @staticmethod
    def detect() -> bool:
        """Whether this process runs in such an environment."""
        return False

    def teardown(self) -> None:
        """Take back what was left in the environment."""
        os.environ.pop("WORLD_SIZE", None)


class LightningEnvironment(ClusterEnvironment):
    """The Trainer starts the processes of this machine itself."""

    def creates_children(self) -> bool:
        """Whether a launcher has started this process."""
        return "LOCAL_RANK" in os.environ

    def master_port(self) -> int:
        """A free port, the same for the processes started from here."""
        if "MASTER_PORT" not in os.environ:
            with socket.socket() as free:
                free.bind(("", 0))
                os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        return _number("MASTER_PORT")


class TorchElasticEnvironment(ClusterEnvironment):
    """torchrun starts the processes."""

    def creates_children(self) -> bool:
        """True."""
        return True

    @staticmethod
    def detect() -> bool:
        """Whether torchrun started this process."""
        return {"RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= set(os.environ)

    @staticmethod
    def is_using_torchelastic() -> bool:
        """The older name of :meth:`detect`."""
        return TorchElasticEnvironment.detect()


class SLURMEnvironment(ClusterEnvironment):
    """Slurm starts the processes."""

    def __init__(self, auto_requeue: bool = True) -> None:
        """Keep the option.

        Args:
            auto_requeue: accepted because programs pass it; ask Slurm itself to requeue.
        """
        super().__init__()
        self.auto_requeue = auto_requeue

    def creates_children(self) -> bool:
        """True."""
        return True

    @staticmethod
    def detect() -> bool:
        """Whether Slurm started this process, as one of a batch job."""
        return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") != "bash"

    def master_address(self) -> str:
        """The first host of the job.

        >>> os.environ["SLURM_NODELIST"] = "node[05-08,12]"
        >>> SLURMEnvironment().master_address()
        'node05'
        >>> del os.environ["SLURM_NODELIST"]
        """
        hosts = os.environ.get("SLURM_NODELIST", "127.0.0.1")
        match = re.match(r"^(?P<name>[^,\[]+)(?:\[(?P<first>\d+)[^\]]*\])?", hosts)
        if match is None:
            return hosts
        return match["name"] + (match["first"] or "")

    def master_port(self) -> int:
        """A port that all processes of the job agree on."""
        if "MASTER_PORT" in os.environ:
            return _number("MASTER_PORT")
        return int(os.environ.get("SLURM_JOB_ID", "0")[-4:]) + 15000

    def world_size(self) -> int:
        """The number of tasks."""
        return _number("SLURM_NTASKS", 1)

    def global_rank(self) -> int:
        """The number of this task."""
        return _number("SLURM_PROCID")

    def local_rank(self) -> int:
        """The number of this task on its machine."""
        return _number("SLURM_LOCALID")

    def node_rank(self) -> int:
        """The number of this machine."""
        return _number("SLURM_NODEID")
