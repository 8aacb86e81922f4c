"""The trainer.

``trainer`` is what its users see. What the arguments mean is in ``arguments``, ``devices``,
``precision`` and ``connecting``; what the methods do in order in ``stages``, and around it in
``running`` and ``signals``. The batches are worked on in ``training`` (an epoch), ``steps`` (a
training batch) and ``evaluation``; they come by ``loaders``, ``transfer`` and ``splitting``. Logged
values go into ``results`` and out by ``reporting``, and a run into a file by ``checkpointing``.
"""

from puretrain.lightning.trainer.trainer import Trainer
from puretrain.lightning.utilities.seed import seed_everything

__all__ = ["Trainer", "seed_everything"]
