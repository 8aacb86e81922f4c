"""States and batches over several devices, processes and machines.

A step stays the same function: what is divided is the batch (:func:`ddp`, :func:`dp`,
:func:`elastic`), and where a leaf of the state lives is said by a placement (:func:`place`,
:func:`shard`, :func:`gather`; chosen to save memory by :func:`zero`). Processes are started by
torchrun, or by ``puretrain fit --nproc``, and talk through ``torch.distributed``.
"""

from puretrain.sharding.batch_norm import sync_batch_norm
from puretrain.sharding.checkpoint import checkpoints, latest, load, save
from puretrain.sharding.data_parallel import all_reduce, ddp, divide, dp, elastic, eval_across
from puretrain.sharding.placements import Placements, gather, local, place, shard, table
from puretrain.sharding.processes import agreement, device_of, everyone, on_rank_zero, processes
from puretrain.sharding.run import distribute
from puretrain.sharding.uneven import uneven
from puretrain.sharding.zero import Zero, zero

__all__ = [
    "Placements",
    "Zero",
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
    "gather",
    "latest",
    "load",
    "local",
    "on_rank_zero",
    "place",
    "processes",
    "save",
    "shard",
    "sync_batch_norm",
    "table",
    "uneven",
    "zero",
]
