"""As SEDD uses flash-attn: attention imported at the top, rotary embeddings when they are first needed."""

from __future__ import annotations

from typing import Any

from diffusion_transformer import DiffusionTransformer
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from torch import Tensor


def turn(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    import flash_attn.layers.rotary

    cos = cos[0, :, 0, 0, : cos.shape[-1] // 2]
    sin = sin[0, :, 0, 0, : sin.shape[-1] // 2]
    return flash_attn.layers.rotary.apply_rotary_emb_qkv_(qkv, cos, sin)


def attend(qkv: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, length, 0.0, causal=False)


def build(**options: Any) -> DiffusionTransformer:
    return DiffusionTransformer(turn, attend, scores=True, **options)
