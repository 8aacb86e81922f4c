"""Functions from a loss to a loss and from a step to a step.

A loss is a pure function, ``loss(params, buffers, batch, key)``, and what changes the batch, the
parameters or the value of a loss is a function around it:

- targets: :func:`label_smoothing`, :func:`mixup`;
- what the parameters do: :func:`sam`;
- what the inputs do: :func:`fgsm`, :func:`pgd`;
- several tasks: :func:`pcgrad`;
- a teacher: :func:`distillation`, and :func:`ema_teacher` around the step.

What comes out is a loss (a step) again, so any of them may stand around any other; the outermost
sees the batch first. What they remember is in the state. What they draw comes from torch's
generators, which a step has seeded from its key: a function of the key and the step. They work in
compiled and vmapped steps as well. :func:`puretrain.optim.lookahead` does the same for optimizers,
and :func:`puretrain.rematerialize` for the memory of a part of a loss.
"""

from puretrain.compose.adversarial import fgsm, pgd
from puretrain.compose.multitask import pcgrad
from puretrain.compose.sharpness import sam
from puretrain.compose.targets import label_smoothing, mixup
from puretrain.compose.teaching import distillation, ema_teacher, with_teacher

__all__ = [
    "distillation",
    "ema_teacher",
    "fgsm",
    "label_smoothing",
    "mixup",
    "pcgrad",
    "pgd",
    "sam",
    "with_teacher",
]
