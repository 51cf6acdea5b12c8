"""unbind and stack: views of one storage, taken apart and put together without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def get_stack_strides(tensors: Sequence[Tensor], dim: int) -> tuple[int | torch.SymInt, ...] | None:
    """The strides of the stack along `dim` that the tensors are already views of; None if they are not."""
    first = tensors[0]
    if len(tensors) <= 1 or dim > first.ndim:
        return None
    step = tensors[1].storage_offset() - first.storage_offset()
    for i, x in enumerate(tensors):
        if (x.shape, x.stride(), x.storage_offset()) != (
            first.shape,
            first.stride(),
            first.storage_offset() + i * step,
        ):
            return None
        if x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
    return (*first.stride()[:dim], step, *first.stride()[dim:])


class _StackOrNone(torch.autograd.Function):
    """The stack as a view, with a gradient for each of the views it is made of."""

    @staticmethod
    def forward(ctx: Any, dim: int, strides: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.dim = dim
        shape = (*tensors[0].shape[:dim], len(tensors), *tensors[0].shape[dim:])
        return tensors[0].as_strided(shape, strides)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *grads[0].unbind(ctx.dim)


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """torch.unbind."""
    return x.unbind(dim)


def stack_or_none(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """torch.stack where it needs no copy, else None.

    >>> q, k = unbind(torch.arange(6.0).view(2, 3), 0)
    >>> stack_or_none((q, k), 0).shape, stack_or_none((k, q.clone()), 0)
    (torch.Size([2, 3]), None)
    """
    strides = get_stack_strides(tensors, dim)
    return None if strides is None else _StackOrNone.apply(dim, strides, *tensors)  # type: ignore[no-untyped-call]
