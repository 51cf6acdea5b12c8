"""xformers: memory_efficient_attention of the package xformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.backends.kernel import Attended, Extras, repeat_kv, shared_by_strides
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.xformers_bias import to_xformers
from headway.packages import real


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Any:
    return None if mask is None else to_xformers(mask, frame, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, extras: Extras) -> Attended:
    fmha = real("xformers.ops.fmha")
    k, v = repeat_kv(q, k, v)
    if shared_by_strides(k, v):
        v = v.clone(memory_format=torch.contiguous_format)
    if extras.needs_grad and not (q.requires_grad or k.requires_grad or v.requires_grad):
        q = q.detach().requires_grad_()  # it looks at these three alone, and would forget that the bias learns
    batch, _, length, _ = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, fmha.attn_bias.BlockDiagonalMask):
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    out = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, p=extras.dropout, scale=extras.scale)
    return out.reshape(batch, length, *out.shape[2:]).transpose(1, 2), None
