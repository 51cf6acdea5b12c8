"""The diagonal band that Causal and Window are made of."""

from __future__ import annotations

import dataclasses

import torch
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
        low, high = self._bound(frame, self.left, -1), self._bound(frame, self.right, 1)

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            step = k - q
            if low is None:
                return step <= high if high is not None else (q >= 0) & (k >= 0)
            return step >= low if high is None else (step >= low) & (step <= high)

        return keep

    def _bound(self, frame: Frame, size: int | None, sign: int) -> Tensor | int | None:
        """The bound on k - q, as data: no other value is another compiled program, but for 0, which is very common."""
        if size is None:
            return None
        bound = self.offset + sign * size
        return frame.scalar(bound) if bound else 0

    def blocks(self, tiles: Tiles) -> Blocks:
        # k - q over a tile runs from k_first - q_last to k_last - q_first.
        smallest, largest = tiles.k_first - tiles.q_last, tiles.k_last - tiles.q_first
        bounds = []
        if self.left is not None:
            low = self.offset - self.left
            bounds.append((largest >= low, smallest >= low))
        if self.right is not None:
            high = self.offset + self.right
            bounds.append((smallest <= high, largest <= high))
        if not bounds:
            anything = torch.ones_like(smallest, dtype=torch.bool)
            return Blocks(anything, anything)
        (some, every), *others = bounds
        for more, always in others:
            some, every = some & more, every & always
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
