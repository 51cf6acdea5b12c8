"""Our xFormers functions take what theirs take: a table of theirs, as xFormers 0.0.35 writes them."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import pytest

ATTENTION = "(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None)"
WRITTEN = "(self, shape, dtype=torch.float32, device='cpu')"
PADDED = "(q_seqlen, kv_padding, kv_seqlen, causal_diagonal=None, *, device=None)"
BLOCKS = "(q_seqinfo, k_seqinfo, _batch_sizes=None)"
LOCAL = "(q_seqinfo, k_seqinfo, _batch_sizes=None, _window_size=0)"
PAGED = "(q_seqinfo, k_seqinfo, block_tables, page_size)"
TO = "(self, device)"

THEIRS = {
    "ops": {
        "memory_efficient_attention": ATTENTION,
        "memory_efficient_attention_forward": ATTENTION,
        "memory_efficient_attention_forward_requires_grad": ATTENTION,
        "memory_efficient_attention_backward": (
            "(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None)"
        ),
        "SwiGLU": "(in_features, hidden_features, out_features=None, bias=True, *, _pack_weights=True)",
        "SwiGLUOp": "(op, packed_weights, name, constraints)",
        "SwiGLUOp.supports": "(self, op)",
        "SwiGLUOpDispatch": "(device, dtype, dtype_autocast_gpu, packed_weights, bias_enabled)",
        "SwiGLUOpDispatch.from_arguments": "(x, w1, b1, w2, b2, w3, b3)",
        "swiglu": "(x, w1, b1, w2, b2, w3, b3, *, op=None)",
        "RMSNorm": "(dim, include_weight=True, eps=1e-06)",
        "RMSNorm.forward": "(self, x)",
        "RMSNorm.increment_and_forward_": "(self, x, y)",
        "unbind": "(x, dim)",
        "stack_or_none": "(tensors, dim)",
        "get_stack_strides": "(tensors, dim)",
        "scaled_index_add": "(input, index, source, scaling=None, alpha=1.0)",
        "index_select_cat": "(sources, indices)",
    },
    "ops.swiglu_op": {"swiglu_packed": "(x, w1w2, b1b2, w3, b3, *, op)"},
    "ops.rmsnorm": {
        "rms_norm": "(x, weight, eps=1e-06)",
        "rms_norm_add": "(x, y, weight, eps=1e-06)",
    },
    "ops.fmha": {
        "memory_efficient_attention_partial": ATTENTION,
        "merge_attentions": "(attn_split, lse_split, write_lse=True, output_dtype=None)",
        "Inputs": "(query, key, value, attn_bias=None, p=0.0, scale=None, output_dtype=None, is_partial=False)",
        "Inputs.get_output_dtype": "(self)",
    },
    "ops.fmha.common": {
        "Context": "(lse, out, op_bw=None, rng_state=None, qkv_share_storage=False)",
        "Gradients": "(dq, dk, dv, db=None)",
        "AttentionFwOpBase.apply": "(inp, needs_gradient)",
        "AttentionBwOpBase.apply": "(ctx, inp, grad)",
        "AttentionOpBase.supports": "(d)",
        "AttentionOpBase.not_supported_reasons": "(d)",
        "AttentionOpBase.is_available": "()",
    },
    "ops.fmha.attn_bias": {
        "AttentionBias.materialize": WRITTEN,
        "LowerTriangularMask": "(device=None)",
        "LowerTriangularMask.to": TO,
        "LowerTriangularMask.materialize": WRITTEN,
        "LowerTriangularMask.add_bias": "(self, bias)",
        "LowerTriangularMaskWithTensorBias": "(bias)",
        "LowerTriangularMaskWithTensorBias.to": TO,
        "LowerTriangularMaskWithTensorBias.materialize": WRITTEN,
        "LowerTriangularFromBottomRightMask": "()",
        "LowerTriangularFromBottomRightMask.make_local_attention": "(self, window_size)",
        "LowerTriangularFromBottomRightLocalAttentionMask": "(_window_size)",
        "LocalAttentionFromBottomRightMask": "(window_left, window_right)",
        "BlockDiagonalMask": BLOCKS,
        "BlockDiagonalMask.to": TO,
        "BlockDiagonalMask.materialize": WRITTEN,
        "BlockDiagonalMask.from_seqlens": "(q_seqlen, kv_seqlen=None, *, device=None)",
        "BlockDiagonalMask.from_tensor_list": "(tensors)",
        "BlockDiagonalMask.from_tensor_lists_qkv": "(tensors_q, tensors_k, tensors_v=None)",
        "BlockDiagonalMask.split": "(self, tensor)",
        "BlockDiagonalMask.split_queries": "(self, tensor)",
        "BlockDiagonalMask.split_kv": "(self, tensor)",
        "BlockDiagonalMask.make_causal": "(self)",
        "BlockDiagonalMask.make_causal_from_bottomright": "(self)",
        "BlockDiagonalMask.make_local_attention": "(self, window_size)",
        "BlockDiagonalMask.make_local_attention_from_bottomright": "(self, window_size)",
        "BlockDiagonalCausalMask": BLOCKS,
        "BlockDiagonalCausalFromBottomRightMask": BLOCKS,
        "BlockDiagonalCausalLocalAttentionMask": LOCAL,
        "BlockDiagonalCausalLocalAttentionFromBottomRightMask": LOCAL,
        "BlockDiagonalPaddedKeysMask": "(q_seqinfo, k_seqinfo)",
        "BlockDiagonalPaddedKeysMask.from_seqlens": PADDED,
        "BlockDiagonalPaddedKeysMask.make_paged": "(self, block_tables, page_size, paged_type)",
        "BlockDiagonalPaddedKeysMask.make_local_attention": "(self, window_left, window_right)",
        "BlockDiagonalCausalWithOffsetPaddedKeysMask": "(q_seqinfo, k_seqinfo, causal_diagonal=None)",
        "BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens": PADDED,
        "BlockDiagonalLocalAttentionPaddedKeysMask": "(q_seqinfo, k_seqinfo, window_left, window_right)",
        "BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local": (
            "(q_seqlen, kv_padding, kv_seqlen, window_left, window_right)"
        ),
        "BlockDiagonalCausalLocalAttentionPaddedKeysMask": "(q_seqinfo, k_seqinfo, _window_size)",
        "BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local": (
            "(q_seqlen, kv_padding, kv_seqlen, window_size)"
        ),
        "BlockDiagonalGappyKeysMask": "(q_seqinfo, k_seqinfo)",
        "BlockDiagonalGappyKeysMask.from_seqlens": "(q_seqlen, kv_seqstarts, kv_seqlen, *, device=None)",
        "BlockDiagonalGappyKeysMask.make_paged": "(self, block_tables, page_size, notional_padding, paged_type)",
        "BlockDiagonalCausalWithOffsetGappyKeysMask": "(q_seqinfo, k_seqinfo)",
        "PagedBlockDiagonalPaddedKeysMask": PAGED,
        "PagedBlockDiagonalPaddedKeysMask.from_seqlens": (
            "(q_seqlen, kv_seqlen, block_tables, page_size, *, device=None)"
        ),
        "PagedBlockDiagonalPaddedKeysMask.materialize": WRITTEN,
        "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": PAGED,
        "PagedBlockDiagonalGappyKeysMask": PAGED,
        "PagedBlockDiagonalGappyKeysMask.from_seqlens": (
            "(q_seqlen, kv_seqstarts, kv_seqlen, block_tables, page_size, *, device=None)"
        ),
        "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": PAGED,
        "_SeqLenInfo": "(seqstart, max_seqlen, min_seqlen, seqstart_py)",
        "_SeqLenInfo.from_seqlens": "(seqlens, *, device=None)",
        "_SeqLenInfo.from_seqlens_inplace": "(self, seqlens)",
        "_SeqLenInfo.split": "(self, x, batch_sizes=None)",
        "_SeqLenInfo.intervals": "(self)",
        "_SeqLenInfo.to": TO,
        "_PaddedSeqLenInfo": "(seqstart, max_seqlen, min_seqlen, seqstart_py, seqlen, seqlen_py, padding)",
        "_PaddedSeqLenInfo.from_seqlens_padded": "(seqlens, padding, *, device=None)",
        "_PaddedSeqLenInfo.from_seqlens_padded_inplace": "(self, seqlens)",
        "_GappySeqInfo": "(seqstart, max_seqlen, min_seqlen, seqstart_py, seqlen, seqlen_py)",
        "_GappySeqInfo.from_seqlens_gappy": "(seqstarts, seqlens, paged, *, device)",
    },
    "info": {"get_features_status": "()", "print_info": "()"},
}
EACH = [(module, name, theirs) for module, named in THEIRS.items() for name, theirs in named.items()]

TYPES = {
    "ops": ("AttentionBias", "AttentionMask", "AttentionOp", "AttentionOpBase", "LowerTriangularMask", "SwiGLUEagerOp"),
    "ops.fmha": (
        "ALL_BW_OPS", "ALL_FW_OPS", "VARLEN_BIASES", "AttentionBias", "AttentionOp", "AttentionOpBase",
        "BlockDiagonalMask", "LowerTriangularMask", "MemoryEfficientAttentionCkOp",
        "MemoryEfficientAttentionCutlassBlackwellOp", "MemoryEfficientAttentionCutlassFwdFlashBwOp",
        "MemoryEfficientAttentionCutlassOp", "MemoryEfficientAttentionFlashAttentionOp",
        "MemoryEfficientAttentionSplitKCkOp", "attn_bias", "cutlass", "flash", "flash3", "triton_splitk",
    ),
    "ops.fmha.cutlass": ("FwOp", "BwOp"),
    "ops.fmha.triton_splitk": ("FwOp",),
    "": ("__version__", "_is_triton_available", "_has_cpp_library"),
}  # fmt: skip


def ours(module: str) -> Any:
    return importlib.import_module(f"headway.shims.xformers.{module}".rstrip("."))


def written(function: Any) -> str:
    """A signature as it would be written without annotations."""
    found = inspect.signature(function)
    bare = [each.replace(annotation=each.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


@pytest.mark.parametrize("module, name, theirs", EACH, ids=[f"{module}.{name}" for module, name, _ in EACH])
def test_names_order_defaults_and_kinds_of_arguments_are_theirs(module: str, name: str, theirs: str) -> None:
    assert written(functools.reduce(getattr, name.split("."), ours(module))) == theirs


@pytest.mark.parametrize("module", TYPES)
def test_the_other_names_are_there(module: str) -> None:
    assert [name for name in TYPES[module] if not hasattr(ours(module), name)] == []


def test_the_table_would_notice_another_default() -> None:
    def other(query, key, value, attn_bias=None, p=0.1, scale=None, *, op=None, output_dtype=None): ...

    assert written(other) != ATTENTION
    assert written(lambda x, dim: x) == "(x, dim)"


def test_it_says_that_it_is_headway() -> None:
    assert ours("").__version__.endswith("+headway")
    assert int(ours("").__version__.split(".")[2]) == 35
    assert all(op.NAME.endswith("+headway") for op in (*ours("ops.fmha").ALL_FW_OPS, *ours("ops.fmha").ALL_BW_OPS))
