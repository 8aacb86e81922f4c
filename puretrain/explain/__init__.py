"""Looking into a step, and into the history of what was seen.

:func:`explain` takes one step and says what went on in it: norms of gradients, parameters and
updates by leaf, units that are dead, the first value that is not finite. :func:`explanations` is an
observer that does so every n steps and writes it to a file, which :func:`read_explanations` reads
and :func:`draw_explanations` draws.
"""

from puretrain.explain.explanation import ActivationNorms, Explanation, LeafNorms, explain
from puretrain.explain.history import draw_explanations, explanations, read_explanations

__all__ = [
    "ActivationNorms",
    "Explanation",
    "LeafNorms",
    "draw_explanations",
    "explain",
    "explanations",
    "read_explanations",
]
