"""What xFormers' attention operators are: here each of them takes what Headway takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set
from typing import Any, ClassVar

import torch
from torch import Tensor

from headway.shims.xformers.ops.common import BaseOperator
from headway.shims.xformers.ops.fmha.attend import Inputs, attend, attend_with_lse, gradients, refusals
from headway.shims.xformers.ops.fmha.attn_bias import BIASES

__all__ = [
    "AttentionBwOpBase", "AttentionFwOpBase", "AttentionOp", "AttentionOpBase", "Context", "Gradients", "Inputs",
]  # fmt: skip


@dataclasses.dataclass
class Context:
    """What a forward operator leaves for a backward one."""

    lse: Tensor
    out: Tensor
    op_bw: type[AttentionBwOpBase] | None = None
    rng_state: Any = None
    qkv_share_storage: bool = False


@dataclasses.dataclass
class Gradients:
    dq: Tensor
    dk: Tensor
    dv: Tensor
    db: Tensor | None = None


class AttentionOpBase(BaseOperator):
    """A name for a kernel of xFormers'. As `op=` it is accepted, as a wish that changes no result."""

    OPERATOR_CATEGORY: ClassVar[str] = "memory_efficient_attention"
    SUPPORTED_DEVICES: ClassVar[Set[str]] = frozenset({"cpu", "cuda", "mps"})
    SUPPORTED_DTYPES: ClassVar[Set[torch.dtype]] = frozenset(
        {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    )
    SUPPORTED_MAX_K: ClassVar[float] = math.inf
    SUPPORTED_ATTN_BIAS_TYPES: ClassVar[tuple[type, ...]] = (type(None), Tensor, *BIASES)
    SUPPORTS_DROPOUT = SUPPORTS_CUSTOM_SCALE = SUPPORTS_DIFFERENT_VALUE_EMBED = SUPPORTS_OUTPUT_DTYPE = True
    SUPPORTS_PARTIAL = SUPPORTS_BMGHK = SUPPORTS_ATTN_BIAS_GRAD = IS_DETERMINISTIC = VARLEN_LSE_PACKED = True

    @classmethod
    def supports(cls, d: Inputs) -> bool:
        return not cls.not_supported_reasons(d)

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        """Why Headway would refuse the call; nothing is computed."""
        return refusals(d)


class AttentionFwOpBase(AttentionOpBase):
    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[Tensor, Context | None]:
        if not needs_gradient:
            return attend(inp), None
        out, lse = attend_with_lse(inp)
        return out, Context(lse=lse, out=out)


class AttentionBwOpBase(AttentionOpBase):
    @classmethod
    def apply(cls, ctx: Context, inp: Inputs, grad: Tensor) -> Gradients:
        return Gradients(*gradients(grad, ctx.out, ctx.lse, inp))


AttentionOp = tuple[type[AttentionFwOpBase] | None, type[AttentionBwOpBase] | None]
