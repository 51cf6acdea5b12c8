"""The lists of tiles that flex attention visits, written by one launch. The same lists as block_mask.py's, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.masks.tiles import Lists


def visits(judged: Tensor, q_len: int, kv_len: int, tile: int) -> tuple[Lists, Lists]:
    """By tile of queries the tiles of keys, and by tile of keys the tiles of queries.

    `judged` is (2, batch, heads, query tiles, key tiles), as in tiles.Blocks; its axes may be expanded.
    """
    kinds, batch, heads, rows, columns = judged.shape
    # Four tensors, not views of one: to make a tensor costs the host less than to cut one.
    (q_counts, q_indices), (k_counts, k_indices) = (
        (judged.new_empty(shape, dtype=torch.int32), judged.new_empty((*shape, width), dtype=torch.int32))
        for shape, width in (((kinds, batch, heads, rows), columns), ((kinds, batch, heads, columns), rows))
    )
    width: Any = triton.next_power_of_2(max(rows, columns))
    with torch.cuda.device_of(judged):
        _write[(rows + columns, batch * heads)](
            judged, q_counts, q_indices, k_counts, k_indices, *judged.stride(), heads, rows, columns,
            batch * heads, q_len, kv_len, tile, width
        )  # fmt: skip
    return (q_counts, q_indices), (k_counts, k_indices)


@triton.jit
def _write(
    judged, q_counts, q_indices, k_counts, k_indices, of_kind, of_batch, of_head, of_row, of_column,
    heads, rows, columns, entries, q_len, kv_len, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a list: the first `rows` programs list key tiles, the others query tiles."""
    line, entry = tl.program_id(0), tl.program_id(1)
    by_key = (line >= rows).to(tl.int32)
    line -= by_key * rows
    length, width = rows + by_key * (columns - rows), columns + by_key * (rows - columns)
    other = tl.arange(0, WIDTH)
    q = line + by_key * (other - line)
    k = other + by_key * (line - other)
    real = other < width
    at = judged + (entry // heads) * of_batch + (entry % heads) * of_head + q * of_row + k * of_column
    some = (tl.load(at, mask=real, other=0) != 0) & real
    every = (tl.load(at + of_kind, mask=real, other=0) != 0) & real
    # A tile that hangs over the edge is never full: kernels check bounds only where they check the rule.
    full = every & ((q + 1) * TILE <= q_len) & ((k + 1) * TILE <= kv_len)
    counts, indices = q_counts, q_indices
    if by_key:
        counts, indices = k_counts, k_indices
    counts += entry * length + line
    indices += (entry * length + line) * width
    _list(counts, indices, some & (full == 0), other, real)
    _list(counts + entries * length, indices + entries * rows * columns, full, other, real)


@triton.jit
def _list(count, index, visited, tiles, real):
    """The visited tiles in order, then the others in order."""
    before = tl.cumsum(visited.to(tl.int32), 0)
    total = tl.sum(visited.to(tl.int32), 0)
    tl.store(count, total)
    tl.store(index + tl.where(visited, before - 1, total + tiles - before), tiles, mask=real)
