"""States and batches over several devices, processes and machines.

A step stays the same function: what is divided is the batch (:func:`ddp`, :func:`dp`,
:func:`elastic`), and where a leaf of the state lives is said by a placement. Processes are started
by torchrun, or by ``puretrain fit --nproc``, and talk through ``torch.distributed``.
"""

from puretrain.sharding.batch_norm import sync_batch_norm
from puretrain.sharding.checkpoint import checkpoints, latest, load, save
from puretrain.sharding.data_parallel import all_reduce, ddp, divide, dp, elastic, eval_across
from puretrain.sharding.processes import agreement, device_of, everyone, on_rank_zero, processes
from puretrain.sharding.run import distribute
from puretrain.sharding.uneven import uneven

__all__ = [
    "agreement",
    "all_reduce",
    "checkpoints",
    "ddp",
    "device_of",
    "distribute",
    "divide",
    "dp",
    "elastic",
    "eval_across",
    "everyone",
    "latest",
    "load",
    "on_rank_zero",
    "processes",
    "save",
    "sync_batch_norm",
    "uneven",
]
