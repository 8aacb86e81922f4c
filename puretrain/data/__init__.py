"""Batches of data as a function of a source and a cursor, resumable at any sample.

:func:`batches` makes :class:`Batches` of arrays, datasets, lists, streams and data loaders. What
comes next is decided by the source, the seed and a :class:`~puretrain.state.Cursor` alone, and the
cursor counts samples: a run that was interrupted reads on with the very next sample, also with
another batch size or another number of workers.

Where the pieces are:
    - ``batching``: :func:`batches` and the value it returns.
    - ``sources``: how arrays, datasets and streams are read, in this process or in workers.
    - ``parts``: what one process reads of a batch that several share.
    - ``collation``: :func:`collate`, which makes a batch of samples.
    - ``seeds``: the random generators that a dataset draws from.
    - ``plain``: the bytes in which the state of a foreign source is kept.
"""

from puretrain.data.batching import Batches, Read, batches
from puretrain.data.collation import collate
from puretrain.data.parts import Parts
from puretrain.data.sources import DataWarning

__all__ = ["Batches", "DataWarning", "Parts", "Read", "batches", "collate"]
