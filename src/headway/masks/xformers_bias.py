"""A mask as xFormers says it: one of its bias classes where it has one, else numbers to add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.terms import terms

_ALIGN = 8
"""xFormers loads a tensor bias in vectors: every row must start on a multiple of this many elements."""


def to_xformers(mask: Mask, frame: Frame, dtype: torch.dtype) -> Any:
    """An `xformers.ops.fmha.attn_bias` object, a tensor (batch, heads, queries, keys), or None for no mask."""
    from xformers.ops.fmha import attn_bias

    parts = terms(mask, frame)
    kinds = parts.kinds(frame)
    if not kinds:
        return None
    if kinds <= {"causal", "causal-upper-left"}:
        return attn_bias.LowerTriangularMask()
    # With more queries than keys the first rows see nothing, which its class gets wrong and a tensor gets right.
    if kinds == {"causal-lower-right"} and frame.q_len <= frame.kv_len:
        return attn_bias.LowerTriangularFromBottomRightMask()
    if parts.documents is not None and kinds <= {"documents", "documents-cross", "causal"}:
        packed = (parts.documents.queries, parts.documents.keys)
        q_lengths, k_lengths = (packing.starts.diff().tolist() * frame.batch for packing in packed)
        blocks = attn_bias.BlockDiagonalMask.from_seqlens(q_lengths, k_lengths, device=frame.device)
        return blocks.make_causal() if parts.band is not None else blocks
    return _aligned(mask.to_additive(frame, dtype), frame)


def _aligned(bias: Tensor, frame: Frame) -> Tensor:
    padded = torch.nn.functional.pad(bias, (0, -frame.kv_len % _ALIGN)).contiguous()[..., : frame.kv_len]
    return padded.expand(frame.batch, frame.heads, frame.q_len, frame.kv_len)
