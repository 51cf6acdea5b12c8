"""reference: plain PyTorch, every option, every dtype; in float64 it is the truth others are judged by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headway.backends.kernel import Attended, Extras, repeat_kv
from headway.masks.base import Mask
from headway.masks.frame import Frame


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What may be seen as bool, and what is added to scores; None where the mask says nothing of the kind."""
    if mask is None:
        return None, None
    score = mask.score(frame)
    # Four axes, as a tensor of none would not lift the biases added to it to its own precision.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    zero = torch.zeros((1, 1, 1, 1), dtype=wide, device=frame.device)
    return mask.to_bool(frame), None if score is None else score(zero, *frame.indices())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor | None, Tensor | None], extras: Extras) -> Attended:
    weights, lse = weigh(q, k, mask, extras)
    _, v = repeat_kv(q, k, v)
    return (weights @ v.to(weights.dtype)).to(q.dtype), lse


def weigh(
    q: Tensor, k: Tensor, mask: tuple[Tensor | None, Tensor | None], extras: Extras
) -> tuple[Tensor, Tensor | None]:
    """The weights themselves, (B, H, L, S), after dropout and without what sinks take."""
    keep, bias = mask
    # Scores and weights in float32 at least, as in every kernel.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide), repeat_kv(q, k, k)[0].to(wide)
    scale = 1 / math.sqrt(q.shape[-1]) if extras.scale is None else extras.scale
    scores = (q * scale) @ k.transpose(-1, -2)
    if extras.softcap is not None:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    logits = scores
    if extras.sinks is not None:
        sink = extras.sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        logits = torch.cat((scores, sink), dim=-1)
    highest = logits.detach().amax(-1, keepdim=True)
    # A row that sees nothing has only -inf; its weights must become 0, not -inf - -inf.
    highest = torch.where(highest == float("-inf"), 0.0, highest)
    weights = (logits - highest).exp()
    total = weights.sum(-1, keepdim=True)
    sees = total != 0  # a NaN is no row that sees nothing
    total = torch.where(sees, total, 1.0)
    weights = weights / total
    if extras.sinks is not None:
        weights = weights[..., :-1]
    if extras.dropout > 0:
        weights = torch.nn.functional.dropout(weights, extras.dropout)
    lse = torch.where(sees, total.log() + highest, float("-inf")).squeeze(-1) if extras.lse else None
    return weights, lse


def in_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in full, for callers that want its weights; as PyTorch has them, those that dropout left."""
    _, v = repeat_kv(q, k, v)
    if not k.shape[2]:
        weights = q @ repeat_kv(q, k, k)[0].transpose(-1, -2)
        return weights @ v, weights
    frame = Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1], q.device)
    extras = Extras(scale, dropout, softcap, sinks)
    weights, _ = weigh(q, k, lower(mask, frame, q.dtype), extras)
    return (weights @ v.to(weights.dtype)).to(v.dtype), weights.to(q.dtype)
