"""A mask as xFormers says it: one of its bias classes where it has one, else numbers to add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.masks.band import Band
from headway.masks.base import Mask
from headway.masks.documents import Documents, Packing
from headway.masks.frame import Frame
from headway.masks.terms import terms
from headway.packages import real

_ALIGN = 8
"""xFormers loads a tensor bias in vectors: every row must start on a multiple of this many elements."""


def to_xformers(mask: Mask, frame: Frame, dtype: torch.dtype) -> Any:
    """An `xformers.ops.fmha.attn_bias` object, a tensor (batch, heads, queries, keys), or None for no mask.

    Documents become a bias over all batch entries laid end to end, which is how xFormers takes packed sequences.
    """
    mask.check(frame)
    parts = terms(mask, frame)
    if not parts.kinds(frame):
        return None
    bias = None
    if not parts.rest and all(part is None for part in (parts.padding, parts.alibi, parts.bias)):
        packed = parts.documents
        bias = _banded(parts.band, frame, dtype) if packed is None else _packed(packed, parts.band, frame)
    return _aligned(mask.to_additive(frame, dtype), frame) if bias is None else bias


def _banded(band: Band | None, frame: Frame, dtype: torch.dtype) -> Any:
    attn_bias = real("xformers.ops.fmha").attn_bias
    assert band is not None
    if band.left is None and band.right == 0 and band.offset == 0:
        return attn_bias.LowerTriangularMask()
    # With more queries than keys the first rows see nothing, which its classes get wrong and a tensor gets right.
    if band.offset != frame.kv_len - frame.q_len or frame.q_len > frame.kv_len:
        return None
    if band.left is None and band.right == 0:
        return attn_bias.LowerTriangularFromBottomRightMask()
    if not _knows_windows(frame.device, dtype):
        return None
    left, right = (frame.kv_len if size is None else size for size in (band.left, band.right))
    return attn_bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)


def _knows_windows(device: torch.device, dtype: torch.dtype) -> bool:
    """Only xFormers' flash kernels know windows: they take half precision, on devices from Ampere on."""
    flash = real("xformers.ops.fmha").flash
    half = dtype in (torch.float16, torch.bfloat16)
    return half and flash.FwOp.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _packed(documents: Documents, band: Band | None, frame: Frame) -> Any:
    attn_bias = real("xformers.ops.fmha").attn_bias
    # A band over two different packings is not a band within each document.
    if band is not None and ((band.left, band.right) != (None, 0) or not documents.one_packing):
        return None
    q_lengths, k_lengths = (_lengths(packing) * frame.batch for packing in (documents.queries, documents.keys))
    blocks = attn_bias.BlockDiagonalMask.from_seqlens(q_lengths, k_lengths, device=frame.device)
    return blocks if band is None else blocks.make_causal()


def _lengths(packing: Packing) -> list[int]:
    """The documents' lengths on the host, where xFormers wants them; read back if only a device knows them."""
    return packing.starts.diff().tolist() if packing.lengths is None else list(packing.lengths)


def _aligned(bias: Tensor, frame: Frame) -> Tensor:
    padded = torch.nn.functional.pad(bias, (0, -frame.kv_len % _ALIGN)).contiguous()[..., : frame.kv_len]
    return padded.expand(frame.batch, frame.heads, frame.q_len, frame.kv_len)
