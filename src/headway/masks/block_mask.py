"""A flex attention BlockMask built from a mask's structure, never by evaluating every query and key."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from headway.masks.base import Blocks, Mask, Tiles
from headway.masks.frame import Frame

TILE = 128


def block_mask(mask: Mask, frame: Frame) -> BlockMask:
    """The BlockMask of `mask`; masks without structure (dense, predicate, tree) are evaluated in full."""
    mask.check(frame)
    grid = _grid(frame.q_len, frame.kv_len, frame.device)
    blocks = mask.blocks(frame, grid.tiles)
    if blocks is None:
        blocks = _evaluated(mask.to_bool(frame))
    some, full = torch.broadcast_tensors(_four(blocks.some), _four(blocks.every & grid.inside))
    return _from_tiles(some ^ full, full, mask.rule(frame), frame)  # full tiles are among those with something in them


@dataclasses.dataclass(frozen=True)
class Grid:
    """What depends on the lengths alone. Launching a kernel costs more than running one at this size, so it is kept."""

    tiles: Tiles
    inside: Tensor
    """A tile that hangs over the edge is never full: kernels check bounds only where they check the rule."""


@functools.lru_cache(maxsize=64)
def _grid(q_len: int, kv_len: int, device: torch.device) -> Grid:
    def edges(length: int) -> tuple[Tensor, Tensor]:
        first = torch.arange(0, max(length, 1), TILE, device=device, dtype=torch.int32)
        return first, (first + (TILE - 1)).clamp_max(max(length - 1, 0))

    (q_first, q_last), (k_first, k_last) = edges(q_len), edges(kv_len)
    tiles = Tiles(q_first[:, None], q_last[:, None], k_first, k_last)
    return Grid(tiles, (tiles.q_first + TILE <= q_len) & (tiles.k_first + TILE <= kv_len))


@functools.lru_cache(maxsize=64)
def _order(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sort keys of a row's tiles: those to visit by index, the others behind them."""
    index = torch.arange(width, device=device, dtype=torch.int32)
    return index, index + width


def _evaluated(keep: Tensor) -> Blocks:
    """Tiles judged by looking at every element."""
    q_len, kv_len = keep.shape[-2:]
    room = (0, -kv_len % TILE, 0, -q_len % TILE)

    def tiled(fill: bool) -> Tensor:
        padded = torch.nn.functional.pad(keep, room, value=fill)
        *front, rows, columns = padded.shape
        return padded.view(*front, rows // TILE, TILE, columns // TILE, TILE)

    return Blocks(some=tiled(False).any(-1).any(-2), every=tiled(True).all(-1).all(-2))


def _four(tiles: Tensor) -> Tensor:
    return tiles.view((1,) * (4 - tiles.ndim) + tuple(tiles.shape))


def _from_tiles(partial: Tensor, full: Tensor, rule: Any, frame: Frame) -> BlockMask:
    """Lists of tiles to visit, by query and (for the backward pass) by key."""
    by_query = torch.stack((partial, full))
    by_key = by_query.transpose(-1, -2)
    if by_query.shape == by_key.shape:
        counts, visited = _lists(torch.cat((by_query, by_key)))
        (kv_counts, q_counts), (kv_tiles, q_tiles) = counts.split(2), visited.split(2)
    else:
        (kv_counts, kv_tiles), (q_counts, q_tiles) = _lists(by_query), _lists(by_key.contiguous())
    fields: dict[str, Any] = {
        "seq_lengths": (frame.q_len, frame.kv_len),
        "kv_num_blocks": kv_counts[0],
        "kv_indices": kv_tiles[0],
        "full_kv_num_blocks": kv_counts[1],
        "full_kv_indices": kv_tiles[1],
        "q_num_blocks": q_counts[0],
        "q_indices": q_tiles[0],
        "full_q_num_blocks": q_counts[1],
        "full_q_indices": q_tiles[1],
        "BLOCK_SIZE": (TILE, TILE),
        "mask_mod": rule,
    }
    return BlockMask(**fields | dict.fromkeys(_NEW_FIELDS))


# torch 2.13 added fields for an ordered backward pass; None leaves it off.
_KNOWN_FIELDS = 12
_NEW_FIELDS = tuple(
    name
    for name, p in list(inspect.signature(BlockMask.__init__).parameters.items())[_KNOWN_FIELDS:]
    if p.default is p.empty
)


def _lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row visits, and their indices with the visited ones first.

    Kernels walk these lists with strides of their own, so `tiles` must be contiguous, not a transposed view.
    """
    width = tiles.shape[-1]
    order = torch.where(tiles, *_order(width, tiles.device)).sort(dim=-1).values
    return tiles.sum(dim=-1, dtype=torch.int32), order.remainder_(width)
