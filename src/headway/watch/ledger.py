"""What a recording holds, in bytes, and the bound that it may not pass."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import Tensor

SLOT = 128
"""A dictionary's entry and its share of the table, rounded up."""


@dataclasses.dataclass(slots=True)
class Ledger:
    """Admits what fits.

    >>> ledger = Ledger(bound=1000)
    >>> ledger.admit("x" * 500), ledger.admit("x" * 500), ledger.refused
    (True, False, 1)
    """

    bound: int
    held: int = 0
    refused: int = 0

    def admit(self, thing: Any, share: float = 1.0) -> bool:
        """True, and counted, if with `thing` no more than this share of the bound is held."""
        size = weight(thing) + SLOT
        if self.held + size > self.bound * share:
            self.refused += 1
            return False
        self.held += size
        return True


def weight(thing: Any) -> int:
    """Bytes of a value and of all that it holds; what two hold is counted twice."""
    size = sys.getsizeof(thing)
    if isinstance(thing, Tensor):
        return size + thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return size + sum(weight(key) + weight(value) for key, value in thing.items())
    if isinstance(thing, list | tuple | set):
        return size + sum(map(weight, thing))
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return size + sum(weight(getattr(thing, field.name)) for field in dataclasses.fields(thing))
    return size
