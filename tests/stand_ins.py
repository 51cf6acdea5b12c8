"""Stand-ins for kernel packages: their true signatures and conventions, computed on a CPU by the textbook.

They check what a kernel would check, so that a backend's file is judged on machines where its package cannot run: how
it says masks, layouts and options. What the kernels themselves answer is judged on a GPU.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from agreement import textbook
from torch import Tensor

Window = tuple[int | None, int | None]


def band(q_len: int, kv_len: int, causal: bool, window: Window) -> Tensor:
    """Flash attention's: lower-right, bounds inclusive, none where None or negative; causal ends at the diagonal."""
    left, right = (None if side is None or side < 0 else side for side in window)
    right = 0 if causal else right
    offset = kv_len - q_len
    rows = [
        [(left is None or k >= q + offset - left) and (right is None or k <= q + offset + right) for k in range(kv_len)]
        for q in range(q_len)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(q_len, kv_len)


def falling(slopes: Tensor | None, q_len: int, kv_len: int) -> Tensor | float:
    if slopes is None:
        return 0.0
    assert slopes.dtype == torch.float32
    rows = [[-abs(q + kv_len - q_len - k) for k in range(kv_len)] for q in range(q_len)]
    return slopes.view(-1, 1, 1) * torch.tensor(rows, dtype=torch.float32).view(q_len, kv_len)


def flash(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool, window: Window, softcap: float,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """On (B, L, H, D), as all three packages lay it out; the log-sum-exp is (B, H, L), +inf where nothing is seen."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    keep = band(q.shape[2], k.shape[2], causal, window).expand(q.shape[0], q.shape[1], -1, -1)
    added = falling(slopes, q.shape[2], k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = textbook(q, k, v, keep, added, scale=scale, softcap=softcap or None, sinks=sinks)
    return out.transpose(1, 2), lse.masked_fill(lse.isneginf(), float("inf"))


def packed(q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int], **how: Any) -> Any:
    """Each sequence by itself, on (tokens, H, D); the log-sum-exp is (H, tokens)."""
    for cumulative, tokens, most in zip(starts, (q, k), longest, strict=True):
        assert cumulative.dtype == torch.int32
        assert cumulative[-1] == tokens.shape[0], "cumulative lengths end at the number of tokens"
        assert int(cumulative.diff().max()) <= most
    outs, lses = [], []
    bounds = zip(starts[0][:-1], starts[0][1:], starts[1][:-1], starts[1][1:], strict=True)
    for q_from, q_to, k_from, k_to in bounds:
        out, lse = flash(q[None, q_from:q_to], k[None, k_from:k_to], v[None, k_from:k_to], **how)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


def must_be_dense(*tensors: Tensor) -> None:
    assert all(x.stride(-1) == 1 for x in tensors), "the last axis must be contiguous"


# -- flash-attn 2.8 ---------------------------------------------------------------------------------------------------


def flash2() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        must_be_dense(q, k, v)
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        out, lse = flash(q, k, v, slopes=alibi_slopes, **how)
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert dropout_p == 0.0
        must_be_dense(q, k, v)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        out, lse = packed(q, k, v, starts, longest, slopes=alibi_slopes, **how)
        return (out, lse, None) if return_attn_probs else out

    return module("flash_attn", flash_attn_func, flash_attn_varlen_func)


# -- flash-attn-3 -----------------------------------------------------------------------------------------------------


def flash3() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        must_be_dense(q, k, v)
        out, lse = flash(q, k, v, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
        return (out, lse) if return_attn_probs else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        must_be_dense(q, k, v)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        out, lse = packed(q, k, v, starts, longest, **how)
        return (out, lse) if return_attn_probs else out

    return module("flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


# -- flash-attn-4 -----------------------------------------------------------------------------------------------------


def flash4() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        assert all(side is None or side >= 0 for side in window_size)
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        out, lse = flash(q, k, v, sinks=learnable_sink, **how)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        assert all(side is None or side >= 0 for side in window_size)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        out, lse = packed(q, k, v, starts, longest, sinks=learnable_sink, **how)
        return out, lse if return_lse else None

    return module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)


# -- SageAttention ----------------------------------------------------------------------------------------------------


def sage() -> types.ModuleType:
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        assert tensor_layout == "HND"
        assert not kwargs, "sageattn would swallow these"
        assert not is_causal or q.shape[2] == k.shape[2]
        keep = band(q.shape[2], k.shape[2], is_causal, (None, None)).expand(*q.shape[:2], -1, -1)
        return textbook(q, k, v, keep, scale=q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)[0]

    return module("sageattention", sageattn)


def module(name: str, *functions: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


# -- xFormers 0.0.35 ------------------------------------------------------------------------------------------------


class LowerTriangularMask:
    def keep(self, q_len: int, kv_len: int) -> Tensor:
        return torch.ones(q_len, kv_len, dtype=torch.bool).tril()


class LowerTriangularFromBottomRightMask:
    def keep(self, q_len: int, kv_len: int) -> Tensor:
        return band(q_len, kv_len, True, (None, None))


class LocalAttentionFromBottomRightMask:
    def __init__(self, window_left: int, window_right: int) -> None:
        self.window = (window_left, window_right)

    def keep(self, q_len: int, kv_len: int) -> Tensor:
        return band(q_len, kv_len, False, self.window)


class BlockDiagonalMask:
    def __init__(self, q_lengths: list[int], k_lengths: list[int], causal: bool = False) -> None:
        self.lengths, self.causal = (q_lengths, k_lengths), causal

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None) -> BlockDiagonalMask:
        return cls(list(q_seqlen), list(q_seqlen if kv_seqlen is None else kv_seqlen))

    def make_causal(self) -> BlockDiagonalMask:
        return BlockDiagonalMask(*self.lengths, causal=True)

    def keep(self, q_len: int, kv_len: int) -> Tensor:
        blocks = [LowerTriangularMask().keep(*size) | (not self.causal) for size in zip(*self.lengths, strict=True)]
        whole = torch.block_diag(*(block.float() for block in blocks)).bool()
        assert whole.shape == (q_len, kv_len), "the lengths add up to the tokens"
        return whole


def xformers() -> types.ModuleType:
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert p == 0.0
        must_be_dense(query, key, value)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        assert q.shape[1] == k.shape[1]
        learns = q.requires_grad or k.requires_grad or v.requires_grad
        assert learns or not walks_heads(k, v)
        added, keep = 0.0, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if isinstance(attn_bias, Tensor):
            assert attn_bias.shape == (*q.shape[:3], k.shape[2])
            assert attn_bias.dtype == q.dtype
            assert all(step % 8 == 0 for step in attn_bias.stride()[:3])
            added, keep = attn_bias, attn_bias > float("-inf")
        elif attn_bias is not None:
            assert q.shape[0] == 1 or not isinstance(attn_bias, BlockDiagonalMask)
            keep = attn_bias.keep(q.shape[2], k.shape[2])
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = textbook(q, k, v, keep.expand(*q.shape[:2], -1, -1), added, scale=scale)[0].transpose(1, 2)
        return out if learns else out.detach()

    fmha = module("xformers.ops.fmha", memory_efficient_attention)
    fmha.attn_bias = module(
        "xformers.ops.fmha.attn_bias",
        LowerTriangularMask,
        LowerTriangularFromBottomRightMask,
        LocalAttentionFromBottomRightMask,
        BlockDiagonalMask,
    )
    fmha.flash = module("xformers.ops.fmha.flash")
    return fmha


# -- what PyTorch has for CUDA alone ----------------------------------------------------------------------------------


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn, as of torch 2.12."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    how = {"scale": scale, "causal": False, "window": window_size, "softcap": 0.0}
    out, lse = packed(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), **how)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def walks_heads(k: Tensor, v: Tensor) -> bool:
    """CUTLASS's forward pass without lse takes heads for queries, and errs, where heads share keys by strides."""
    return k.stride(1) == 0 == v.stride(1)


def upper_left(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return (keep.tril() if causal else keep).expand(*q.shape[:2], -1, -1)


def cudnn(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale=None):
    """torch._scaled_dot_product_cudnn_attention: causal is upper-left, and its log-sum-exp has an axis more."""
    assert dropout_p == 0.0
    assert attn_bias is None or (attn_bias.dtype == query.dtype and not is_causal)
    assert query.shape[-1] == value.shape[-1] or 0 not in query.stride(), "features of the answer would lie apart"
    keep = upper_left(query, key, is_causal)
    keep = keep if attn_bias is None else keep & (attn_bias > float("-inf"))
    out, lse = textbook(query, key, value, keep, 0.0 if attn_bias is None else attn_bias, scale=scale)
    return out, lse.unsqueeze(-1) if compute_log_sumexp else torch.empty(0), None, None


def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """torch._scaled_dot_product_efficient_attention: no shared key heads; a bias that is whole, its rows aligned."""
    assert dropout_p == 0.0
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert compute_log_sumexp or not walks_heads(key, value)
    keep = upper_left(query, key, is_causal)
    if attn_bias is not None:
        assert attn_bias.dtype == query.dtype
        assert attn_bias.shape == keep.shape, "the bias does not broadcast"
        assert attn_bias.stride(-1) == 1
        assert all(step % 16 == 0 for step in attn_bias.stride()[:3]), "rows of the bias start on vectors"
        keep = keep & (attn_bias > float("-inf"))
    out, lse = textbook(query, key, value, keep, 0.0 if attn_bias is None else attn_bias, scale=scale)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)) if compute_log_sumexp else torch.empty(0), 0, 0
