"""Where a shim's attention is computed: no model's site, but `headway.attention` itself, in a dtype this device has."""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from headway.attention import attention, casts, constant_to_tracers, explain
from headway.choice.choose import Decision
from headway.masks.base import Mask

BFLOAT16_SINCE = (8, 0)
"""The first NVIDIA GPUs that compute in bfloat16; before them it is emulated, slowly, and no fused kernel takes it."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """It answers with the result, or if `lse` with the log of each row's denominator too.

    That gets no gradient unless `lse_learns`, as fused kernels tell it only where nothing learns.
    """

    require: tuple[str, ...] = ()
    lse: bool = False
    lse_learns: bool = False

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, scale: float | None, dropout: float,
        softcap: float | None, sinks: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        given = q.dtype
        q, k, v = _as_computed(q), _as_computed(k), _as_computed(v)

        def run(return_lse: bool) -> Any:
            return attention(
                q, k, v, mask, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks, require=self.require,
                return_lse=return_lse,
            )  # type: ignore[call-overload]  # fmt: skip

        with _as_given(q):
            if not self.lse:
                out: Tensor = run(False)
                return out.to(given)
            with nullcontext() if self.lse_learns else torch.no_grad():
                out, lse = run(True)
            if not self.lse_learns and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
                out = run(False)
        return out.to(given), lse


def decision(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, **options: Any) -> Decision:
    """What would be decided for such a call."""
    with _as_given(q):
        return explain(_as_computed(q), _as_computed(k), _as_computed(v), mask, **options)


def _as_computed(x: Tensor) -> Tensor:
    """In the dtype that this device computes in for it."""
    emulated = x.dtype == torch.bfloat16 and x.device.type == "cuda" and emulates_bfloat16(x.device.index)
    return x.half() if emulated else x


def _as_given(q: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: flash_attn and xFormers take operands as they are."""
    on = torch._C._is_any_autocast_enabled() and casts(q)
    return torch.autocast(q.device.type, enabled=False) if on else nullcontext()


@constant_to_tracers
def emulates_bfloat16(device: int | None) -> bool:
    """Whether that GPU cannot compute in bfloat16; said once."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE:
        return False
    if device not in _TOLD:
        _TOLD.add(device)
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic: Headway's shims compute attention of"
            " bfloat16 in float16, and give bfloat16 back; give float32 if values go over 65504, which float16 has not",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


_TOLD: set[int | None] = set()
