"""A GPT from flash_attn.modules: rotary embeddings, grouped key heads, SwiGLU, RMSNorm fused with what it adds up."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.modules.block import Block
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import GatedMlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from torch import Tensor, nn


class GPT(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int, vocabulary: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embeddings = GPT2Embeddings(dim, vocabulary, max_position_embeddings=0)
        self.layers = nn.ModuleList(
            Block(
                dim,
                partial(
                    MHA,
                    num_heads=heads,
                    num_heads_kv=heads // 2,
                    causal=True,
                    dropout=dropout,
                    rotary_emb_dim=dim // heads,
                    use_flash_attn=True,
                    layer_idx=i,
                ),
                partial(GatedMlp, activation=F.silu, multiple_of=16),
                partial(RMSNorm, eps=1e-6),
                resid_dropout1=dropout,
                resid_dropout2=dropout,
                fused_dropout_add_ln=True,
                residual_in_fp32=True,
            )
            for i in range(layers)
        )
        self.ln_f = RMSNorm(dim, eps=1e-6)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.embeddings.word_embeddings.weight
        self.loss = CrossEntropyLoss(inplace_backward=True, lse_square_scale=1e-4)

    def forward(self, tokens: Tensor, inference_params: Any = None) -> Tensor:
        x, residual = self.embeddings(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual, mixer_kwargs={"inference_params": inference_params})
        weight, eps = self.ln_f.weight, self.ln_f.eps
        return self.lm_head(layer_norm_fn(x, weight, None, residual=residual, eps=eps, is_rms_norm=True))

    def learn(self, tokens: Tensor) -> Tensor:
        return self.loss(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
