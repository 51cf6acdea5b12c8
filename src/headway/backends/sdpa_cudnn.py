"""sdpa-cudnn: cuDNN's fused attention as PyTorch calls it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway.backends.kernel import Attended, Extras, gate_sinks
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.terms import terms


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
    # Never bool: on a row that sees nothing cuDNN returns garbage for a bool mask, and 0 for one of -inf.
    bias = mask.to_additive(frame, dtype)
    # It loads rows as vectors: of one number spread over all keys it would read a misaligned address.
    return Lowered(bias=bias if bias.stride(-1) == 1 else bias.contiguous())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lowered, extras: Extras) -> Attended:
    # PyTorch lays the answer out as the query is. Of a query that is spread over batch or heads by a stride of 0, and
    # values of another size than keys, features would not lie side by side: an error, or the end of the process. From
    # 2.13 it is mended in eager mode (pytorch#175764), where the compiler still reckons with those strides.
    if q.shape[-1] != v.shape[-1] and 0 in q.stride():
        q = q.contiguous()
    wants_lse = extras.needs_grad or extras.lse or extras.sinks is not None
    out, lse = _cudnn(q, k, v, mask.bias, wants_lse, extras.dropout, mask.causal, extras.scale)
    # Nobody asked for lse: a view of it would cost a microsecond of every call.
    return gate_sinks(out, lse.squeeze(-1), extras.sinks) if extras.lse or extras.sinks is not None else (out, None)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    answer = torch._scaled_dot_product_cudnn_attention(q, k, v, bias, lse, dropout, causal, False, scale=scale)
    return answer[0], answer[1]


OPERATORS = (_cudnn,)
