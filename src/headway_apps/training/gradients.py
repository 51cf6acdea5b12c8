"""Gradients: all of a model's in one tensor, which stays where it is."""

from __future__ import annotations

import torch
from torch import nn

ALIGNED = 128
"""Bytes; kernels that read several numbers at once ask for it."""


class Gradients:
    """Each weight's `.grad` is a part of `flat`: zeroed, and averaged over processes, in one piece.

    >>> model = torch.nn.Linear(2, 1)
    >>> gradients = Gradients(model)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> float(gradients.flat.sum())
    3.0
    """

    def __init__(self, model: nn.Module) -> None:
        weights = [each for each in model.parameters() if each.requires_grad]
        (dtype,) = {each.dtype for each in weights}
        step = ALIGNED // dtype.itemsize
        places = [0]
        for each in weights:
            places.append(places[-1] + -(-each.numel() // step) * step)
        self.flat = torch.zeros(places[-1], dtype=dtype, device=weights[0].device)
        for place, each in zip(places, weights, strict=False):
            each.grad = self.flat[place : place + each.numel()].view_as(each)

    def zero(self) -> None:
        self.flat.zero_()

    def average(self) -> None:
        """Over all processes of torch.distributed."""
        torch.distributed.all_reduce(self.flat, torch.distributed.ReduceOp.AVG)
