"""flash4: the package flash-attn-4, which installs as flash_attn.cute."""

from __future__ import annotations

from torch import Tensor

from headway.backends.flash_layout import Lowered, lower, packed_arguments, through
from headway.backends.kernel import Attended, Extras

__all__ = ["attend", "lower"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lowered, extras: Extras) -> Attended:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = (flash_attn_func if mask.packed is None else flash_attn_varlen_func)(
            q, k, v,
            **packed_arguments(mask.packed),
            softmax_scale=extras.scale,
            causal=mask.causal,
            window_size=mask.window,
            learnable_sink=None if extras.sinks is None else extras.sinks.to(q.dtype),
            softcap=extras.softcap or 0.0,
            deterministic=extras.deterministic,
            return_lse=extras.lse,
        )  # fmt: skip
        return out, lse if extras.lse else None

    return through(q, k, v, mask.packed, call)
