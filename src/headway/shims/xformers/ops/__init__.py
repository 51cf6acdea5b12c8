"""xFormers' operators."""

from __future__ import annotations

from headway.shims.absent import absent
from headway.shims.xformers.ops import fmha
from headway.shims.xformers.ops.fmha import (
    AttentionBias,
    AttentionOp,
    AttentionOpBase,
    LowerTriangularMask,
    MemoryEfficientAttentionCkOp,
    MemoryEfficientAttentionCutlassFwdFlashBwOp,
    MemoryEfficientAttentionCutlassOp,
    MemoryEfficientAttentionFlashAttentionOp,
    MemoryEfficientAttentionSplitKCkOp,
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from headway.shims.xformers.ops.indexing import index_select_cat, scaled_index_add
from headway.shims.xformers.ops.rmsnorm import RMSNorm
from headway.shims.xformers.ops.swiglu_op import SwiGLU, SwiGLUEagerOp, SwiGLUOp, SwiGLUOpDispatch, swiglu
from headway.shims.xformers.ops.unbind import get_stack_strides, stack_or_none, unbind

__all__ = [
    "AttentionBias", "AttentionMask", "AttentionOp", "AttentionOpBase", "LowerTriangularMask",
    "MemoryEfficientAttentionCkOp", "MemoryEfficientAttentionCutlassFwdFlashBwOp",
    "MemoryEfficientAttentionCutlassOp", "MemoryEfficientAttentionFlashAttentionOp",
    "MemoryEfficientAttentionSplitKCkOp", "RMSNorm", "SwiGLU", "SwiGLUEagerOp", "SwiGLUOp", "SwiGLUOpDispatch", "fmha",
    "get_stack_strides", "index_select_cat", "memory_efficient_attention", "memory_efficient_attention_backward",
    "memory_efficient_attention_forward", "memory_efficient_attention_forward_requires_grad", "scaled_index_add",
    "stack_or_none", "swiglu", "unbind",
]  # fmt: skip

AttentionMask = AttentionBias
"""As it was called long ago."""

__getattr__ = absent(__name__)
