"""Gradients: all of a model's in one tensor, which stays where it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        self.weights = [each for each in model.parameters() if each.requires_grad]
        (dtype,) = {each.dtype for each in self.weights}
        step = ALIGNED // dtype.itemsize
        sizes = [-(-each.numel() // step) * step for each in self.weights]
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=self.weights[0].device)
        for part, each in zip(self.flat.split(sizes), self.weights, strict=True):
            each.grad = part[: each.numel()].view_as(each)

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        """One for each of `weights`."""
        torch._foreach_add_([each.grad for each in self.weights if each.grad is not None], gradients)

    def zero(self) -> None:
        self.flat.zero_()

    def average(self) -> None:
        """Over all processes of torch.distributed."""
        torch.distributed.all_reduce(self.flat, torch.distributed.ReduceOp.AVG)
