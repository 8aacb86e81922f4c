"""Which GPUs are free."""

from __future__ import annotations

import torch

from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = ["pick_multiple_gpus", "pick_single_gpu"]


def pick_multiple_gpus(nb: int) -> list[int]:
    """The numbers of so many GPUs that can be used; with -1 of all that there are.

    Raises:
        MisconfigurationException: there are not so many.
    """
    if nb == 0:
        raise MisconfigurationException(
            "auto_select_gpus=True, gpus=0 is not a valid configuration. Please select a valid "
            "number of GPU resources when using auto_select_gpus."
        )
    number = torch.cuda.device_count() if nb == -1 else nb
    picked: list[int] = []
    for _ in range(number):
        picked.append(pick_single_gpu(exclude_gpus=picked))
    return picked


def pick_single_gpu(exclude_gpus: list[int]) -> int:
    """The number of the first GPU that lets a tensor be made on it.

    Raises:
        MisconfigurationException: there is none.
    """
    for number in range(torch.cuda.device_count()):
        if number in exclude_gpus:
            continue
        try:
            torch.ones(1, device=torch.device(f"cuda:{number}"))
        except RuntimeError:
            continue  # somebody else has it for himself
        return number
    raise MisconfigurationException("No GPUs available.")
