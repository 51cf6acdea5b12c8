"""Full: every query may attend to every key."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from headway.masks.base import Blocks, Mask, Rule, Tiles, Witness
from headway.masks.frame import Frame


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """No restriction.

    >>> print(Full().matrix(2, 3))
    ■ ■ ■
    ■ ■ ■
    """

    kind: ClassVar[str] = "full"

    def rule(self, frame: Frame) -> Rule:
        # A tensor, never Python's True: vmap over the rule refuses anything else.
        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= 0) & (k >= 0)

        return keep

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        yes = torch.ones_like(tiles.q_first + tiles.k_first, dtype=torch.bool)
        return Blocks(some=yes, every=yes)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return True
