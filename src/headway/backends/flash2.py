"""flash2: the package flash-attn, version 2."""

from __future__ import annotations

from torch import Tensor

from headway.backends.flash_layout import Lowered, lower, packed_arguments, through
from headway.backends.kernel import Attended, Extras, gate_sinks
from headway.packages import real

__all__ = ["attend", "lower"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lowered, extras: Extras) -> Attended:
    flash_attn = real("flash_attn")
    wants_lse = extras.lse or extras.sinks is not None
    left, right = mask.window

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        answer = (flash_attn.flash_attn_func if mask.packed is None else flash_attn.flash_attn_varlen_func)(
            q, k, v,
            **packed_arguments(mask.packed),
            dropout_p=extras.dropout,
            softmax_scale=extras.scale,
            causal=mask.causal,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            softcap=extras.softcap or 0.0,
            alibi_slopes=mask.alibi,
            deterministic=extras.deterministic,
            return_attn_probs=wants_lse,
        )  # fmt: skip
        return answer[:2] if wants_lse else (answer, None)

    out, lse = through(q, k, v, mask.packed, call)
    return (out, None) if lse is None else gate_sinks(out, lse, extras.sinks)
