"""Metrics of representations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["embedding_similarity"]


def embedding_similarity(
    batch: Tensor,
    similarity: str = "cosine",
    reduction: str = "none",
    zero_diagonal: bool = True,
) -> Tensor:
    """How similar the rows of a batch are to each other.

    Args:
        batch: ``(N, features)``.
        similarity: ``cosine`` of the angle, or ``dot`` product.
        reduction: ``none``, or over each row ``sum`` or ``mean``.
        zero_diagonal: whether the similarity of a row to itself is set to 0.

    Returns:
        ``(N, N)``, or ``(N,)`` with a reduction.

    >>> embedding_similarity(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[0.0000, 0.7071],
            [0.7071, 0.0000]])
    """
    if similarity == "cosine":
        batch = batch / batch.norm(p=2, dim=1, keepdim=True)
    matrix = batch @ batch.T
    if zero_diagonal:
        matrix = matrix * (1 - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    if reduction == "mean":
        return matrix.mean(dim=-1)
    if reduction == "sum":
        return matrix.sum(dim=-1)
    return matrix
