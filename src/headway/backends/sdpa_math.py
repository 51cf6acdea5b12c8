"""sdpa-math: PyTorch's own composite attention; differentiable twice, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.backends.kernel import Attended, Extras
from headway.masks.base import Mask
from headway.masks.frame import Frame


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Tensor | None:
    # The operator adds its mask as numbers, a bool one too: only F.scaled_dot_product_attention turns that into -inf.
    return None if mask is None else mask.to_additive(frame, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extras: Extras) -> Attended:
    if extras.sinks is not None:
        # A sink is one more key whose score is the sink and whose value is 0.
        bias = q.new_zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        bias = bias if mask is None else bias + mask
        sink = extras.sinks.to(bias.dtype).view(1, -1, 1, 1).expand(*bias.shape[:3], 1)
        mask = torch.cat((bias, sink), dim=-1)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    out, _ = torch._scaled_dot_product_attention_math(
        q, k, v, mask, extras.dropout, False, None, scale=extras.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out, None
