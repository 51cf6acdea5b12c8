"""What the packages flash2, flash3 and flash4 share: one layout, one way to say masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.backends.kernel import Attended
from headway.masks.alibi import Alibi
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.terms import terms


@dataclasses.dataclass(frozen=True)
class Packed:
    """Cumulative lengths and the longest document of queries and keys."""

    q_starts: Tensor
    k_starts: Tensor
    q_longest: int
    k_longest: int


@dataclasses.dataclass(frozen=True)
class Lowered:
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    packed: Packed | None = None
    alibi: Tensor | None = None


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Lowered:
    """Masks as flash attention says them. All its bands are aligned lower-right, as limits make sure of."""
    parts = terms(mask, frame)
    band, documents = parts.band, parts.documents
    window = (None, None) if band is None else (band.left, band.right)
    packed = None
    if documents is not None:
        starts = (documents.queries.on(frame.device), frame.q_len), (documents.keys.on(frame.device), frame.kv_len)
        q_starts, k_starts = (_batched(s, length, frame.batch) for s, length in starts)
        packed = Packed(q_starts, k_starts, documents.queries.longest, documents.keys.longest)
    causal = window == (None, 0)
    return Lowered(causal, (None, None) if causal else window, packed, _slopes(parts.alibi, frame))


def _slopes(alibi: Alibi | None, frame: Frame) -> Tensor | None:
    return None if alibi is None else alibi.slopes.to(frame.device, torch.float32)


def _batched(starts: Tensor, length: int, batch: int) -> Tensor:
    """Cumulative lengths of the same packing once per batch entry, laid end to end."""
    if batch == 1:
        return starts
    shifts = torch.arange(batch, device=starts.device, dtype=starts.dtype)[:, None] * length
    return torch.cat((starts[:1], (starts[1:] + shifts).flatten()))


Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def through(q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, call: Call) -> Attended:
    """Run a flash function that takes (B, L, H, D), or (tokens, H, D) when packed, on our (B, H, L, D)."""
    batch, _, length, _ = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if packed is None:
        out, lse = call(q, k, v)
        return out.transpose(1, 2), lse
    out, lse = call(*(x.flatten(0, 1) for x in (q, k, v)))
    if lse is not None:
        lse = lse.view(-1, batch, length).transpose(0, 1)
    return out.view(batch, length, *out.shape[1:]).transpose(1, 2), lse


def packed_arguments(packed: Packed | None) -> dict[str, Any]:
    if packed is None:
        return {}
    return {
        "cu_seqlens_q": packed.q_starts,
        "cu_seqlens_k": packed.k_starts,
        "max_seqlen_q": packed.q_longest,
        "max_seqlen_k": packed.k_longest,
    }
