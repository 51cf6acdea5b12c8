"""The tensors inside what a module or an operator returns, each with a name: tuples, dicts, dataclasses, nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_DEEPEST = 6
_LONGEST = 64
"""Containers are followed so far and no farther: what is beyond is data, not an output with a name."""


def leaves(value: Any, name: str = "", deep: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each.

    >>> import torch
    >>> [name for name, _ in leaves({"x": torch.ones(1), "y": (torch.ones(1), None)})]
    ['x', 'y[0]']
    """
    if isinstance(value, Tensor):
        yield name, value
    elif deep >= _DEEPEST:
        return
    elif isinstance(value, Mapping):
        for key, item in list(value.items())[:_LONGEST]:
            yield from leaves(item, f"{name}.{key}" if name else str(key), deep + 1)
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", None)  # a named tuple
        for at, item in enumerate(value[:_LONGEST]):
            yield from leaves(item, _join(name, fields[at]) if fields else f"{name}[{at}]", deep + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name, None), _join(name, field.name), deep + 1)


def _join(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field
