"""torch-varlen: packed documents through `torch.nn.attention.varlen`, torch 2.10 and newer."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from headway.backends.flash_layout import Lowered, lower, through
from headway.backends.kernel import Attended, Extras

__all__ = ["attend", "lower"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Lowered, extras: Extras) -> Attended:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    packed = mask.packed
    assert packed is not None
    options: dict[str, Any] = {"scale": extras.scale, **_band(mask), **_gqa(q, k)}
    if extras.lse:
        options["return_aux"] = AuxRequest(lse=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        answer: Any = varlen_attn(
            q, k, v, packed.q_starts, packed.k_starts, packed.q_longest, packed.k_longest, **options
        )
        return answer if extras.lse else (answer, None)

    return through(q, k, v, packed, call)


@functools.cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _band(mask: Lowered) -> dict[str, Any]:
    left, right = (None, 0) if mask.causal else mask.window
    if (left, right) == (None, None):
        return {}
    return {"window_size": (-1 if left is None else left, -1 if right is None else right)}


def _gqa(q: Tensor, k: Tensor) -> dict[str, Any]:
    # The kernel always could; torch 2.12 asks for the word.
    return {"enable_gqa": True} if q.shape[1] != k.shape[1] and "enable_gqa" in _parameters() else {}
