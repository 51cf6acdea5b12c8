"""Copies to look at, so that the model itself is left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def deep_copy(module: M, memo: dict[int, Any] | None = None) -> M:
    """A copy; what PyTorch does not copy, tensors that belong to a graph, is copied without it.

    Modules keep such: the attention weights of their last run, or what torch.nn.utils.weight_norm has computed.
    """
    memo = {} if memo is None else memo
    looked: set[int] = set()
    for each in module.modules():
        for tensor in _tensors(vars(each), looked):
            if not tensor.is_leaf:
                memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(module, memo)


def _tensors(value: Any, looked: set[int]) -> Iterator[Tensor]:
    """All in lists and dicts, which may hold each other."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in looked:
        looked.add(id(value))
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each, looked)
