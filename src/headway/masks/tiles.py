"""The grid of tiles that flex attention skips by, and what a mask says of each tile."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway.masks.frame import Frame
from headway.masks.memo import Bounded, kept

TILE = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """First and last index of each tile of queries and of keys.

    All of them broadcast as (2, batch, heads, query tiles, key tiles). Of the two, `ends` hold first and last, `back`
    hold last and first: what may be seen in a tile depends on one corner of it, and what surely is on the other.
    """

    size: int
    q_corners: Tensor
    """First, last, last and first query of each tile, (4, query tiles); `q_ends` and `q_back` are views of it."""
    k_corners: Tensor
    q_ends: Tensor
    q_back: Tensor
    k_ends: Tensor
    k_back: Tensor
    inside: Tensor | None = None
    """Tiles that do not hang over the edge; None if none does."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """For each tile of the grid: may something in it be seen, and is all of it surely seen.

    The first may say yes too often and the second no too often: a tile of yes and no is checked element by element.
    """

    judged: Tensor
    """The two answers, (2, batch, heads, query tiles, key tiles); any axis but the first may be 1."""

    @classmethod
    def of(cls, some: Tensor, every: Tensor) -> Blocks:
        return cls(torch.stack((some, every)))

    @property
    def some(self) -> Tensor:
        return self.judged[0]

    @property
    def every(self) -> Tensor:
        return self.judged[1]


Lists = tuple[Tensor, Tensor]
"""How many tiles each row visits, (2, batch, heads, rows), and their indices with the visited ones first, which has one
more axis. Of the two, the first is of partial tiles and the second of full ones."""

_KEPT = Bounded(64)


def tiles_of(frame: Frame, size: int) -> Tiles:
    """The tiles of a frame. To launch a kernel costs more than to run one of this size, so they are kept."""

    def make() -> tuple[Tensor, ...]:
        q = k = _corners(frame.q_len, size, frame.device)
        if frame.q_len != frame.kv_len:
            k = _corners(frame.kv_len, size, frame.device)
        (q_ends, q_back), (k_ends, k_back) = q.view(2, 2, 1, 1, -1, 1), k.view(2, 2, 1, 1, 1, -1)
        tiles = q, k, q_ends, q_back, k_ends, k_back
        if frame.q_len % size == 0 and frame.kv_len % size == 0:
            return tiles
        return *tiles, (q_ends[0] + size <= frame.q_len) & (k_ends[0] + size <= frame.kv_len)

    return Tiles(size, *kept(_KEPT, (frame.q_len, frame.kv_len, size), frame.device, make))


def _corners(length: int, size: int, device: torch.device) -> Tensor:
    """Those of one axis."""
    first = torch.arange(0, length, size, device=device, dtype=torch.int32)
    # 0, 2, 2, 0 and not a stack: inductor cannot bound the index of what is stacked from one tile (torch 2.11).
    twice = torch.arange(1, 5, device=device, dtype=torch.int32).bitwise_and_(2)
    return (first + (twice * (size - 1)).div_(2, rounding_mode="floor")[:, None]).clamp_max_(length - 1)


def per_tile(values: Tensor, size: int) -> Tensor:
    """The last axis cut into tiles (..., tiles, size); the last tile is filled up with its last value."""
    *front, length = values.shape
    count = -(-length // size)
    if length % size:
        values = values[..., torch.arange(count * size, device=values.device).clamp_max(length - 1)]
    return values.reshape(*front, count, size)
