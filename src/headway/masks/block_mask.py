"""A flex attention BlockMask built from a mask's structure, never by evaluating every query and key."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.nn.attention.flex_attention import BlockMask

from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.memo import Bounded, kept
from headway.masks.tiles import TILE, Blocks, Lists, tiles_of


def block_mask(mask: Mask, frame: Frame, tile: int = TILE) -> BlockMask:
    """The BlockMask of `mask`; masks without structure (dense, predicate) are evaluated in full."""
    mask.check(frame)
    tiles = tiles_of(frame, tile)
    blocks = mask.blocks(frame, tiles) or _evaluated(mask.to_bool(frame), tile)
    judged = blocks.judged.expand(*blocks.judged.shape[:3], tiles.q_ends.shape[-2], tiles.k_ends.shape[-1])
    if _one_launch(judged):
        from headway.masks.visits import visits

        by_query, by_key = visits(judged, frame.q_len, frame.kv_len, tile)
    else:
        by_query, by_key = _sorted(judged, tiles.inside)
    (kv_counts, full_kv_counts), (kv_indices, full_kv_indices) = (both.unbind() for both in by_query)
    (q_counts, full_q_counts), (q_indices, full_q_indices) = (both.unbind() for both in by_key)
    fields: dict[str, Any] = {
        "seq_lengths": (frame.q_len, frame.kv_len),
        "kv_num_blocks": kv_counts,
        "kv_indices": kv_indices,
        "full_kv_num_blocks": full_kv_counts,
        "full_kv_indices": full_kv_indices,
        "q_num_blocks": q_counts,
        "q_indices": q_indices,
        "full_q_num_blocks": full_q_counts,
        "full_q_indices": full_q_indices,
        "BLOCK_SIZE": (tile, tile),
        "mask_mod": mask.rule(frame),
    }
    return BlockMask(**fields | dict.fromkeys(_NEW_FIELDS))


# torch 2.13 added fields for an ordered backward pass; None leaves it off.
_KNOWN_FIELDS = 12
_NEW_FIELDS = tuple(
    name
    for name, p in list(inspect.signature(BlockMask.__init__).parameters.items())[_KNOWN_FIELDS:]
    if p.default is p.empty
)


def _evaluated(keep: Tensor, tile: int) -> Blocks:
    """Tiles judged by looking at every element."""
    q_len, kv_len = keep.shape[-2:]

    def any_in_tile(cells: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(cells, (0, -kv_len % tile, 0, -q_len % tile))
        *front, rows, columns = padded.shape
        return padded.view(*front, rows // tile, tile, columns // tile, tile).any(-1).any(-2)

    return Blocks.of(some=any_in_tile(keep), every=~any_in_tile(~keep))


def _one_launch(judged: Tensor) -> bool:
    """Whether visits.py can write the lists: on a GPU, of real tensors that nothing traces."""
    real = type(judged) is Tensor and not torch.compiler.is_compiling() and maybe_current_level() is None
    return judged.device.type == "cuda" and real and judged.numel() > 0 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _sorted(judged: Tensor, inside: Tensor | None) -> tuple[Lists, Lists]:
    """By tile of queries the tiles of keys, and by tile of keys the tiles of queries."""
    some, every = judged
    # A tile that hangs over the edge is never full: kernels check bounds only where they check the rule.
    full = every if inside is None else every & inside
    partial = some ^ full  # full tiles are among those of something
    by_query, by_key = (partial, full), (partial.mT, full.mT)
    if judged.shape[-1] != judged.shape[-2]:
        return _lists(torch.stack(by_query)), _lists(torch.stack(by_key))
    counts, visited = _lists(torch.stack(by_query + by_key))
    return (counts[:2], visited[:2]), (counts[2:], visited[2:])


_KEPT = Bounded(64)


def _lists(tiles: Tensor) -> Lists:
    """Kernels walk these lists with strides of their own, so `tiles` must be contiguous, not a transposed view."""
    width, device = tiles.shape[-1], tiles.device

    def keys() -> tuple[Tensor, ...]:
        index = torch.arange(width, device=device, dtype=torch.int32)
        return index, index + width

    # Sorting the visited by index, and the others behind them, beats a stable argsort of the flags.
    first, behind = kept(_KEPT, width, device, keys)
    order = torch.where(tiles, first, behind).sort(dim=-1).values
    return tiles.sum(dim=-1, dtype=torch.int32), order.remainder_(width) if width else order
