"""Full: every query may attend to every key."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from headway.masks.base import Mask, Rule, Witness
from headway.masks.frame import Frame
from headway.masks.tiles import Blocks, Tiles


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
            return k >= 0

        return keep

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        return Blocks(torch.ones_like(tiles.k_ends, dtype=torch.bool))

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return True
