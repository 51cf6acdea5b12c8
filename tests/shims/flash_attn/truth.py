"""What flash_attn documents, derived again in plain PyTorch, sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    first_key: int = 0,
) -> tuple[Tensor, Tensor]:
    """(L, H, D) and (S, G, D): the result (L, H, D) and lse (H, L), inf where nothing is seen."""
    length, heads, head_dim = q.shape
    keys, shared = k.shape[:2]
    k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
    scores = torch.einsum("lhd,shd->hls", q, k) * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(length)[:, None] + keys - length  # the last query stands where the last key does
    step = torch.arange(keys)[None, :] - at
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * step.abs()
    left, right = window_size
    sees = torch.arange(keys)[None, :] >= first_key
    if left >= 0:
        sees = sees & (step >= -left)
    if causal:
        sees = sees & (step <= 0)
    elif right >= 0:
        sees = sees & (step <= right)
    sees = sees.expand(length, keys)
    weights = torch.where(sees, scores, -torch.inf).softmax(-1).masked_fill(~sees.any(-1, keepdim=True), 0.0)
    lse = torch.where(sees, scores, -torch.inf).logsumexp(-1)
    return torch.einsum("hls,shd->lhd", weights, v), lse.masked_fill(~sees.any(-1), torch.inf)


def rows(
    q: Tensor, k: Tensor, v: Tensor, *, alibi_slopes: Tensor | None = None, **how: object
) -> tuple[Tensor, Tensor]:
    """(B, L, H, D), entry by entry."""
    slopes = [None] * len(q) if alibi_slopes is None else list(alibi_slopes.expand(len(q), -1))
    each = [truth(*x, alibi_slopes=s, **how) for *x, s in zip(q, k, v, slopes, strict=True)]  # type: ignore[arg-type]
    return torch.stack([out for out, _ in each]), torch.stack([lse for _, lse in each])


def packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], kv_lengths: tuple[int, ...],
    *, alibi_slopes: Tensor | None = None, **how: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens, H, D), sequence by sequence; lse (H, tokens)."""
    parts = zip(q.split(lengths), k.split(kv_lengths), v.split(kv_lengths), strict=True)
    slopes = [None] * len(lengths) if alibi_slopes is None else list(alibi_slopes.expand(len(lengths), -1))
    each = [truth(*x, alibi_slopes=s, **how) for x, s in zip(parts, slopes, strict=True)]  # type: ignore[arg-type]
    return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each], -1)
