"""What a backend's file offers, and the few steps that several of them share."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from headway.masks.base import Mask
from headway.masks.frame import Frame


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a call asks for beside q, k, v and the mask."""

    scale: float | None = None
    """None is 1 / sqrt(head_dim), the default of every kernel: to a compiled call each argument costs time."""
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    """One logit per query head that takes part in the softmax and has no value."""
    lse: bool = False
    """Return the log of each row's softmax denominator too."""
    needs_grad: bool = False
    deterministic: bool = False


Attended: TypeAlias = tuple[Tensor, Tensor | None]
"""A backend's answer: the result, and the log of each row's denominator where it was asked for."""


class Kernel(Protocol):
    """A backend's file. It may list OPERATORS: functions torch.compile must take whole, as their operators return more
    than a tracer can hold.

    Shapes: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E), out (B, H, L, E), lse (B, H, L)."""

    def lower(self, mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Any:
        """The mask as `attend` takes it, exactly; kept between calls while the mask does not change."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, extras: Extras) -> Attended:
        """Attention; only called for requests that the backend's limits accept."""


def repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as q, for kernels that cannot share them."""
    ratio = q.shape[1] // k.shape[1]
    if ratio == 1:
        return k, v
    return k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)


def shared_by_strides(k: Tensor, v: Tensor) -> bool:
    """Whether all heads have one and the same keys and values in memory.

    CUTLASS's forward pass, of PyTorch and of xformers, then walks heads as if they were queries wherever one query is
    left to a block, unless it returns lse: without the causal mask, past the last head (pytorch#192138), and before
    torch 2.13 with wrong rows of a bias (pytorch#191937)."""
    return k.stride(1) == 0 == v.stride(1)


def gate_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Attended:
    """The sink's share taken off the result: softmax with one more logit is the old one times a sigmoid."""
    if sinks is None:
        return out, lse
    logit = sinks.view(-1, 1).to(lse.dtype)
    share = torch.sigmoid(lse - logit)
    return out * share.unsqueeze(-1).to(out.dtype), torch.logaddexp(lse, logit)
