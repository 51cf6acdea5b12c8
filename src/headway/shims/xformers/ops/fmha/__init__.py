"""xFormers' attention: memory_efficient_attention and its kin, its biases and the names of its operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headway.errors import RequestError
from headway.shims.xformers.ops.fmha import (
    attn_bias,
    ck,
    ck_splitk,
    cutlass,
    cutlass_blackwell,
    flash,
    flash3,
    triton_splitk,
)
from headway.shims.xformers.ops.fmha.attend import attend, attend_with_lse, gradients
from headway.shims.xformers.ops.fmha.attn_bias import (
    VARLEN_BIASES,
    AttentionBias,
    BlockDiagonalMask,
    LowerTriangularMask,
)
from headway.shims.xformers.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    AttentionOp,
    AttentionOpBase,
    Context,
    Gradients,
    Inputs,
)

__all__ = [
    "ALL_BW_OPS", "ALL_FW_OPS", "VARLEN_BIASES", "AttentionBias", "AttentionBwOpBase", "AttentionFwOpBase",
    "AttentionOp", "AttentionOpBase", "BlockDiagonalMask", "Context", "Gradients", "Inputs", "LowerTriangularMask",
    "MemoryEfficientAttentionCkOp", "MemoryEfficientAttentionCutlassBlackwellOp",
    "MemoryEfficientAttentionCutlassFwdFlashBwOp", "MemoryEfficientAttentionCutlassOp",
    "MemoryEfficientAttentionFlashAttentionOp", "MemoryEfficientAttentionSplitKCkOp", "attn_bias",
    "memory_efficient_attention", "memory_efficient_attention_backward", "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_partial", "merge_attentions",
]  # fmt: skip

MemoryEfficientAttentionCutlassOp = (cutlass.FwOp, cutlass.BwOp)
MemoryEfficientAttentionCutlassBlackwellOp = (cutlass_blackwell.FwOp, cutlass_blackwell.BwOp)
MemoryEfficientAttentionCutlassFwdFlashBwOp = (cutlass.FwOp, flash.BwOp)
MemoryEfficientAttentionFlashAttentionOp = (flash.FwOp, flash.BwOp)
MemoryEfficientAttentionCkOp = (ck.FwOp, ck.BwOp)
MemoryEfficientAttentionSplitKCkOp = (ck_splitk.FwOp, ck.BwOp)

ALL_FW_OPS: list[type[AttentionFwOpBase]] = [
    cutlass.FwOp, cutlass_blackwell.FwOp, flash.FwOp, flash3.FwOp, triton_splitk.FwOp,
]  # fmt: skip
ALL_BW_OPS: list[type[AttentionBwOpBase]] = [cutlass.BwOp, cutlass_blackwell.BwOp, flash.BwOp, flash3.BwOp]


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionOp | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax(query keyᵀ · scale + bias) value on the fastest backend that is right here.

    (B, M, H, K) each, or (B, M, K) for one head, or (B, M, G, H, K) for G groups of H heads.
    """
    _check_op(op, (AttentionFwOpBase, AttentionBwOpBase))
    return attend(Inputs(query, key, value, attn_bias, p, scale, output_dtype))


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: type[AttentionFwOpBase] | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same; here it has a gradient too."""
    _check_op(op, AttentionFwOpBase)
    return attend(Inputs(query, key, value, attn_bias, p, scale, output_dtype))


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: type[AttentionFwOpBase] | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and the log of each row's denominator: (B, H, M), or (B, G, H, M) for groups.

    Packed sequences have theirs end to end, (1, H, tokens); a row that sees nothing has -inf.
    """
    _check_op(op, AttentionFwOpBase)
    _refuse_dropout(p)
    return attend_with_lse(Inputs(query, key, value, attn_bias, p, scale, output_dtype))


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: type[AttentionBwOpBase] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given an output and its lse, which may be of more keys than these."""
    _check_op(op, AttentionBwOpBase)
    _refuse_dropout(p)
    return gradients(grad, output, lse, Inputs(query, key, value, attn_bias, p, scale))


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionOp | type[AttentionFwOpBase] | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The output over some of the keys, in float32 at least, and its lse: for `merge_attentions`."""
    _check_op(op, (AttentionFwOpBase, AttentionBwOpBase) if isinstance(op, tuple) else AttentionFwOpBase)
    _refuse_dropout(p)
    return attend_with_lse(Inputs(query, key, value, attn_bias, p, scale, output_dtype, is_partial=True))


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over all keys, of answers over parts of them: sum(out · exp(lse)) / sum(exp(lse)).

    Outputs (B, M, H, K) and lse (B, H, M) of each part, or (B, M, G, H, K) and (B, G, H, M); in lists, or stacked in
    front. What no part sees gives 0, and -inf for its lse.
    """
    outs, logs = list(attn_split), list(lse_split)
    fits = len(outs) == len(logs) > 0 and all(
        out.dim() in (4, 5)
        and out.shape == outs[0].shape
        and log.shape == (out.shape[0], *out.shape[2:-1], out.shape[1])
        for out, log in zip(outs, logs, strict=True)
    )
    if not fits:
        raise RequestError(
            f"got outputs {[list(out.shape) for out in outs]} and lse {[list(log.shape) for log in logs]}, takes as"
            " many of one as of the other, (B, M, H, K) and (B, H, M), or (B, M, G, H, K) and (B, G, H, M), all alike"
        )
    lse = torch.stack(logs)
    wide = lse.to(torch.promote_types(lse.dtype, torch.float32))
    most = wide.detach().amax(0)
    most = torch.where(most.isneginf(), 0.0, most)
    weights = (wide - most).exp()
    total = weights.sum(0)
    some = total > 0
    shares = (weights / torch.where(some, total, 1.0)).movedim(-1, 2).unsqueeze(-1)
    parts = torch.stack(outs).to(shares.dtype)
    out = torch.where(shares > 0, parts * shares, 0.0).sum(0).to(output_dtype or outs[0].dtype)
    if not write_lse:
        return out, None
    merged = torch.where(some, most + torch.where(some, total, 1.0).log(), float("-inf"))
    return out, merged.to(lse.dtype)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_op(op: Any, takes: Any) -> None:
    """An operator names a kernel and changes no result: accepted as the wish it is, or refused for what it is not."""
    if op is None:
        return
    given, kinds = (op, takes) if isinstance(takes, tuple) and isinstance(op, tuple) else ((op,), (takes,))
    fits = len(given) == len(kinds) and all(
        one is None or (isinstance(one, type) and isinstance(kind, type) and issubclass(one, kind))
        for one, kind in zip(given, kinds, strict=True)
    )
    if not fits:
        known = " and ".join(kind.__name__ for kind in (takes if isinstance(takes, tuple) else (takes,)))
        pair = f"a pair of {known}, either of which may be None" if isinstance(takes, tuple) else known
        raise RequestError(
            f"got op={op!r}, takes None or {pair}, such as those of fmha.cutlass; the kernel is Headway's to choose:"
            " leave op out, or set HEADWAY_BACKEND"
        )


def _refuse_dropout(p: float) -> None:
    if p != 0.0:
        raise NotImplementedError(
            f"got p={p} where the caller makes the backward pass, takes 0.0, as what was dropped is not told:"
            " memory_efficient_attention drops, and has its own"
        )
