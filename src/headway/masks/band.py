"""The diagonal band that Causal and Window are made of."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway.masks.base import Rule, Witness
from headway.masks.frame import Frame
from headway.masks.tiles import Blocks, Tiles


@dataclasses.dataclass(frozen=True)
class Band:
    """Query q sees keys from q + offset - left to q + offset + right; None is no bound on that side."""

    left: int | None
    right: int | None
    offset: int

    def within(self, frame: Frame) -> Band:
        """The same band without the bounds that nothing in `frame` reaches: a wide window on a short text is causal."""
        left, right = self.left, self.right
        if left is not None and left >= frame.q_len - 1 + self.offset:
            left = None
        if right is not None and right >= frame.kv_len - 1 - self.offset:
            right = None
        return Band(left, right, self.offset)

    def rule(self, frame: Frame) -> Rule:
        low, high = self._bound(frame, self.left, -1), self._bound(frame, self.right, 1)

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            step = k - q
            if low is None:
                return step <= high if high is not None else k >= 0
            return step >= low if high is None else (step >= low) & (step <= high)

        return keep

    def _bound(self, frame: Frame, size: int | None, sign: int) -> Tensor | int | None:
        """The bound on k - q, as data: no other value is another compiled program, but for 0, which is very common."""
        if size is None:
            return None
        bound = self.offset + sign * size
        return frame.scalar(bound) if bound else 0

    def blocks(self, tiles: Tiles) -> Blocks:
        judged: Tensor | None = None
        if self.right is not None:
            # Some k - q is small enough if the first key and the last query's is; all are if the opposite corner's is.
            judged = tiles.k_ends <= _plus(tiles.q_back, self.offset + self.right)
        if self.left is not None:
            large = tiles.k_back >= _plus(tiles.q_ends, self.offset - self.left)
            judged = large if judged is None else judged & large
        return Blocks(torch.ones_like(tiles.k_ends, dtype=torch.bool) if judged is None else judged)

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


def _plus(index: Tensor, step: int) -> Tensor:
    return index + step if step else index
