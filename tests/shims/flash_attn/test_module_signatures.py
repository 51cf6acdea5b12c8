"""What our modules above flash_attn's functions take: a table of what theirs take, as version 2.8.3 writes it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

THEIRS = """
flash_attn.layers.rotary
    rotate_half(x, interleaved=False)
    apply_rotary_emb_torch(x, cos, sin, interleaved=False)
    apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
        max_seqlen=None)
    apply_rotary_emb_qkv_(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0,
        num_heads_q=None)
    apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0)
    RotaryEmbedding(dim, base=10000.0, interleaved=False, scale_base=None, device=None)
    RotaryEmbedding.forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None)
flash_attn.ops.triton.rotary
    apply_rotary(x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False,
        conjugate=False)
flash_attn.ops.triton.layer_norm
    layer_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0,
        rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False,
        return_dropout_mask=False, out_dtype=None, out=None, residual_out=None)
    rms_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0,
        rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False, return_dropout_mask=False,
        out_dtype=None, out=None, residual_out=None)
    layer_norm_linear_fn(x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-06,
        prenorm=False, residual_in_fp32=False, is_rms_norm=False)
    RMSNorm(hidden_size, eps=1e-05, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None)
    RMSNorm.forward(self, x, residual=None, prenorm=False, residual_in_fp32=False)
flash_attn.ops.triton.cross_entropy
    cross_entropy_loss(logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0,
        lse_square_scale=0.0, ignore_index=-100, inplace_backward=False, process_group=None)
flash_attn.ops.layer_norm
    layer_norm(x, weight, bias, epsilon)
    dropout_add_layer_norm(x0, residual, weight, bias, dropout_p, epsilon, rowscale=None, layerscale=None,
        prenorm=False, residual_in_fp32=False, return_dropout_mask=False)
    dropout_add_layer_norm_subset(x0, residual, weight, bias, dropout_p, epsilon, layerscale=None, x0_subset=None,
        out_subset=None, rowscale_const=1.0, out_numrows=0, prenorm=False, residual_in_fp32=False,
        return_dropout_mask=False)
    dropout_add_layer_norm_parallel_residual(x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon,
        prenorm=False, residual_in_fp32=False, return_dropout_mask=False)
    DropoutAddLayerNorm(hidden_size, prenorm=False, p=0.0, eps=1e-05, residual_in_fp32=False, device=None,
        dtype=None)
    DropoutAddLayerNorm.forward(self, x0, residual=None)
flash_attn.ops.rms_norm
    rms_norm(x, weight, epsilon)
    dropout_add_rms_norm(x0, residual, weight, bias, dropout_p, epsilon, rowscale=None, layerscale=None,
        prenorm=False, residual_in_fp32=False, return_dropout_mask=False)
    dropout_add_rms_norm_subset(x0, residual, weight, bias, dropout_p, epsilon, layerscale=None, x0_subset=None,
        out_subset=None, rowscale_const=1.0, out_numrows=0, prenorm=False, residual_in_fp32=False,
        return_dropout_mask=False)
    dropout_add_rms_norm_parallel_residual(x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon,
        prenorm=False, residual_in_fp32=False, return_dropout_mask=False)
    RMSNorm(hidden_size, eps=1e-05, device=None, dtype=None)
    RMSNorm.forward(self, x)
    DropoutAddRMSNorm(hidden_size, prenorm=False, p=0.0, eps=1e-05, residual_in_fp32=False, device=None, dtype=None)
    DropoutAddRMSNorm.forward(self, x0, residual=None)
flash_attn.ops.fused_dense
    fused_dense_func(x, weight, bias=None, return_residual=False, process_group=None, sequence_parallel=True)
    FusedDense(in_features, out_features, bias=True, return_residual=False, device=None, dtype=None)
    FusedDense.forward(self, x, process_group=None)
    fused_mlp_func(x, weight1, weight2, bias1=None, bias2=None, activation='gelu_approx', save_pre_act=True,
        return_residual=False, checkpoint_lvl=0, heuristic=0, process_group=None, sequence_parallel=True)
    FusedMLP(in_features, hidden_features=None, out_features=None, bias1=True, bias2=True, activation='gelu_approx',
        return_residual=False, checkpoint_lvl=0, heuristic='auto', device=None, dtype=None)
    FusedMLP.forward(self, x, process_group=None)
    ParallelFusedMLP(in_features, hidden_features=None, out_features=None, activation='gelu_approx',
        process_group=None, bias1=True, bias2=True, sequence_parallel=True, checkpoint_lvl=0, heuristic='auto',
        device=None, dtype=None)
    ColumnParallelLinear(in_features, out_features, process_group, bias=True, sequence_parallel=True, multiple_of=1,
        device=None, dtype=None)
    RowParallelLinear(in_features, out_features, process_group, bias=True, sequence_parallel=True, multiple_of=1,
        device=None, dtype=None)
flash_attn.ops.activations
    bias_gelu(y, bias)
    bias_gelu_back(g, y, bias)
    gelu_fwd(x)
    gelu_bwd(g, x)
    relu_bwd(g, x)
    sqrelu_fwd(x)
    sqrelu_bwd(g, x)
flash_attn.losses.cross_entropy
    CrossEntropyLoss(ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0,
        lse_square_scale=0.0, inplace_backward=False, process_group=None, return_z_loss=False)
    CrossEntropyLoss.forward(self, input, target, precomputed_lse=None)
flash_attn.modules.mha
    get_alibi_slopes(nheads)
    FlashSelfAttention(causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1),
        alibi_slopes=None, deterministic=False)
    FlashSelfAttention.forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None)
    FlashCrossAttention(causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, window_size=(-1,
        -1), deterministic=False)
    FlashCrossAttention.forward(self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None,
        max_seqlen_k=None)
    SelfAttention(causal=False, softmax_scale=None, attention_dropout=0.0)
    SelfAttention.forward(self, qkv, causal=None, key_padding_mask=None)
    CrossAttention(causal=False, softmax_scale=None, attention_dropout=0.0)
    CrossAttention.forward(self, q, kv, causal=None, key_padding_mask=None)
    MHA(embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True,
        dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0,
        rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False,
        window_size=(-1, -1), fused_bias_fc=False, use_flash_attn=False, return_residual=False, checkpointing=False,
        device=None, dtype=None)
    MHA.allocate_inference_cache(self, batch_size, max_seqlen, dtype=None)
    MHA.forward(self, x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None, mixer_subset=None,
        inference_params=None, **kwargs)
    ParallelMHA(embed_dim, num_heads, process_group, num_heads_kv=None, qkv_proj_bias=True, out_proj_bias=True,
        dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, rotary_emb_dim=0, rotary_emb_base=10000.0,
        rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1),
        use_flash_attn=False, checkpointing=False, sequence_parallel=True, device=None, dtype=None)
flash_attn.modules.mlp
    Mlp(in_features, hidden_features=None, out_features=None, activation=F.gelu, bias1=True, bias2=True,
        return_residual=False, device=None, dtype=None)
    Mlp.forward(self, x)
    ParallelMLP(in_features, hidden_features=None, out_features=None, activation=F.gelu, process_group=None,
        sequence_parallel=True, bias1=True, bias2=True, device=None, dtype=None)
    GatedMlp(in_features, hidden_features=None, out_features=None, activation=F.sigmoid, bias1=True, bias2=True,
        multiple_of=128, return_residual=False, device=None, dtype=None)
    GatedMlp.forward(self, x)
    ParallelGatedMlp(in_features, process_group, hidden_features=None, out_features=None, activation=F.sigmoid,
        bias1=True, bias2=True, multiple_of=128, sequence_parallel=True, device=None, dtype=None)
flash_attn.modules.block
    Block(dim, mixer_cls=None, mlp_cls=None, norm_cls=nn.LayerNorm, dropout_cls=nn.Dropout, prenorm=True,
        resid_dropout1=0.0, resid_dropout2=0.0, drop_path1=0.0, drop_path2=0.0, fused_dropout_add_ln=False,
        return_residual=False, residual_in_fp32=False, sequence_parallel=False, mark_shared_params=False)
    Block.allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs)
    Block.forward(self, hidden_states, residual=None, mixer_subset=None, mixer_kwargs=None)
    ParallelBlock(dim, mixer_cls=None, mlp_cls=None, norm_cls=nn.LayerNorm, dropout_cls=nn.Dropout,
        resid_dropout1=0.0, resid_dropout2=0.0, tied_norm=False, fused_dropout_add_ln=False, residual_in_fp32=False,
        sequence_parallel=False, mark_shared_params=False)
    ParallelBlock.allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs)
    ParallelBlock.forward(self, hidden_states1, hidden_states2=None, residual=None, mixer_kwargs=None)
flash_attn.modules.embedding
    GPT2Embeddings(embed_dim, vocab_size, max_position_embeddings, padding_idx=None, word_embed_proj_dim=None,
        device=None, dtype=None)
    GPT2Embeddings.forward(self, input_ids, position_ids=None)
    BertEmbeddings(embed_dim, vocab_size, max_position_embeddings, type_vocab_size, padding_idx=None, device=None,
        dtype=None)
    BertEmbeddings.forward(self, input_ids, position_ids=None, token_type_ids=None)
    VocabParallelEmbedding(num_embeddings, *args, process_group=None, padding_idx=None, **kwargs)
    ColumnParallelEmbedding(num_embeddings, embedding_dim, *args, process_group=None, **kwargs)
    ParallelGPT2Embeddings(embed_dim, vocab_size, max_position_embeddings, process_group, padding_idx=None,
        sequence_parallel=True, device=None, dtype=None)
"""


def _entries() -> list[tuple[str, str, str]]:
    """(module, name, parameters); a name is indented once, and what does not fit its line twice."""
    found: list[tuple[str, str, str]] = []
    module = ""
    for line in THEIRS.strip().replace("\n        ", " ").splitlines():
        if not line.startswith(" "):
            module = line
            continue
        name, _, parameters = line.strip().removesuffix(")").partition("(")
        found.append((module, name, parameters))
    return found


def _shape(function: Any) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("module", "name", "parameters"), _entries(), ids=lambda each: each.rpartition(".")[2][:40])
def test_names_order_and_defaults_are_flash_attns(module: str, name: str, parameters: str) -> None:
    ours: Any = importlib.import_module(f"headway.shims.{module}")
    for part in name.split("."):
        ours = getattr(ours, part)
    there: dict[str, Any] = {"F": F, "nn": nn}
    exec(f"def theirs({parameters}): ...", there)
    assert _shape(ours) == _shape(there["theirs"])


def test_the_table_is_read() -> None:
    entries = _entries()
    assert len(entries) == 78
    assert ("flash_attn.ops.rms_norm", "rms_norm", "x, weight, epsilon") in entries
