"""sdpa-efficient: the memory-efficient attention that ships inside PyTorch, on any CUDA device, with dense biases."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway.backends.kernel import Attended, Extras, gate_sinks, repeat_kv, shared_by_strides
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.terms import terms

_ALIGN = 16
"""The kernel loads a bias in vectors: every row must start on a multiple of this many elements."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    causal: bool = False
    bias: Tensor | None = None


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Lowered:
    if mask is None:
        return Lowered()
    kinds = terms(mask, frame).kinds(frame)
    if not kinds:
        return Lowered()
    if kinds <= {"causal", "causal-upper-left"}:
        return Lowered(causal=True)
    bias = mask.to_additive(frame, dtype)
    padded = torch.nn.functional.pad(bias, (0, -frame.kv_len % _ALIGN)).contiguous()[..., : frame.kv_len]
    return Lowered(bias=padded.expand(frame.batch, frame.heads, frame.q_len, frame.kv_len))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lowered, extras: Extras) -> Attended:
    k, v = repeat_kv(q, k, v)
    wants_lse = extras.needs_grad or extras.lse or extras.sinks is not None or shared_by_strides(k, v)
    out, lse = _efficient(q, k, v, mask.bias, wants_lse, extras.dropout, mask.causal, extras.scale)
    if not extras.lse and extras.sinks is None:
        return out, None
    return gate_sinks(out, lse[:, :, : q.shape[2]], extras.sinks)  # its rows are padded to 32


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    answer = torch._scaled_dot_product_efficient_attention(q, k, v, bias, lse, dropout, causal, scale=scale)
    return answer[0], answer[1]


OPERATORS = (_efficient,)
