"""sdpa-flash: the FlashAttention that ships inside PyTorch, for CPU and for CUDA.

The operators are called by name rather than through `F.scaled_dot_product_attention`, so that no process-wide flag
and no selector can put another kernel in their place.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from headway.backends.kernel import Attended, Extras, gate_sinks, repeat_kv
from headway.masks.base import Mask
from headway.masks.frame import Frame
from headway.masks.terms import terms


@dataclasses.dataclass(frozen=True)
class Lowered:
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    """Bounds of a band aligned lower-right, for the inner operator."""
    dense: Tensor | None = None


def lower(mask: Mask | None, frame: Frame, dtype: torch.dtype) -> Lowered:
    if mask is None:
        return Lowered()
    parts = terms(mask, frame)
    kinds = parts.kinds(frame)
    if not kinds:
        return Lowered()
    if kinds == {"causal"}:
        return Lowered(causal=True)
    if frame.device.type == "cpu":
        return Lowered(dense=mask.to_additive(frame, dtype))
    assert parts.band is not None
    return Lowered(window=(parts.band.left, parts.band.right))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lowered, extras: Extras) -> Attended:
    if q.device.type == "cpu":
        out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask.causal, attn_mask=mask.dense, scale=extras.scale
        )
        if mask.dense is None:
            out, lse = _with_nan(q, k, out, lse)
    elif mask.window is None:
        out, lse = _flash(q, k, v, extras.dropout, mask.causal, extras.scale)
    else:
        out, lse = _banded(q, k, v, extras.dropout, *mask.window, extras.scale)
    return gate_sinks(out, lse, extras.sinks)


def _with_nan(q: Tensor, k: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The CPU's kernel takes a row of NaN scores for one that sees nothing, and says 0 for both (pytorch#141128).

    Every row sees the first key here, so its score tells. A look at lse is cheap, and spares the rest nearly always.
    """
    if type(lse) is Tensor and not is_compiling() and not torch._C._len_torch_dispatch_stack() and lse.all():
        return out, lse
    first, _ = repeat_kv(q, k[:, :, :1], k[:, :, :1])
    lost = (q @ first.mT).isnan()
    return out.masked_fill(lost, math.nan), lse.masked_fill(lost.squeeze(-1), math.nan)


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    answer = torch._scaled_dot_product_flash_attention(q, k, v, dropout, causal, False, scale=scale)
    return answer[0], answer[1]


def _banded(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, left: int | None, right: int | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    # The operator below the public one: it knows windows, and aligns them lower-right.
    answer = torch.ops.aten._flash_attention_forward.default(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[2], k.shape[2],
        dropout, False, False, scale=scale,
        window_size_left=-1 if left is None else left, window_size_right=-1 if right is None else right,
    )  # fmt: skip
    return answer[0].transpose(1, 2), answer[1]


OPERATORS = (_flash, _banded)
