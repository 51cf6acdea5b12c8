"""The diagonal band that Causal and Window are made of."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from headway.masks.base import Blocks, Rule, Tiles, Witness
from headway.masks.frame import Frame


@dataclasses.dataclass(frozen=True)
class Band:
    """Query q sees keys from q + offset - left to q + offset + right; None is no bound on that side."""

    left: int | None
    right: int | None
    offset: int

    def rule(self, frame: Frame) -> Rule:
        left, right, offset = self.left, self.right, self.offset
        # Zero is by far the commonest number here, and needs no captured tensor.
        low = None if left is None else frame.scalar(offset - left) if offset != left else 0
        high = None if right is None else frame.scalar(offset + right) if offset + right else 0

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if low is None and high is None:
                return (q >= 0) & (k >= 0)
            if low is None:
                return k - q <= high
            if high is None:
                return k - q >= low
            return (k - q >= low) & (k - q <= high)

        return keep

    def blocks(self, tiles: Tiles) -> Blocks:
        # k - q over a tile runs from k_first - q_last to k_last - q_first.
        smallest, largest = tiles.k_first - tiles.q_last, tiles.k_last - tiles.q_first
        some, every = largest == largest, largest == largest
        if self.left is not None:
            some, every = some & (largest >= self.offset - self.left), every & (smallest >= self.offset - self.left)
        if self.right is not None:
            some, every = some & (smallest <= self.offset + self.right), every & (largest <= self.offset + self.right)
        return Blocks(some, every)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        if witness is Witness.FIRST_KEY:
            # k - q = -q, from 0 down to 1 - q_len.
            return (self.left is None or 1 - frame.q_len >= self.offset - self.left) and (
                self.right is None or self.offset + self.right >= 0
            )
        step = 0 if witness is Witness.UPPER_DIAGONAL else frame.kv_len - frame.q_len
        inside = step >= 0 and frame.q_len + step <= frame.kv_len
        after_left = self.left is None or step >= self.offset - self.left
        before_right = self.right is None or step <= self.offset + self.right
        return inside and after_left and before_right
