"""A BERT from flash_attn.modules: filler taken out, norms after the sums, and losses of masked tokens alone."""

from __future__ import annotations

from functools import partial

from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.modules.block import Block
from flash_attn.modules.embedding import BertEmbeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP
from flash_attn.ops.fused_dense import FusedDense
from flash_attn.ops.layer_norm import dropout_add_layer_norm
from torch import Tensor, nn


class BERT(nn.Module):
    """`packed` takes filler out before attention; without it keys are masked."""

    def __init__(
        self, dim: int, heads: int, layers: int, vocabulary: int, dropout: float = 0.0, packed: bool = True
    ) -> None:
        super().__init__()
        self.packed = packed
        self.embeddings = BertEmbeddings(dim, vocabulary, max_position_embeddings=32, type_vocab_size=2, padding_idx=0)
        self.emb_ln = nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList(
            Block(
                dim,
                partial(MHA, num_heads=heads, dropout=dropout, use_flash_attn=packed, return_residual=True),
                partial(FusedMLP, activation="gelu_approx", checkpoint_lvl=1, return_residual=True),
                partial(nn.LayerNorm, eps=1e-12),
                prenorm=False,
                resid_dropout1=dropout,
                resid_dropout2=dropout,
                fused_dropout_add_ln=True,
                return_residual=True,
            )
            for _ in range(layers)
        )
        self.decoder = FusedDense(dim, vocabulary)
        self.loss = CrossEntropyLoss(ignore_index=-1)
        self.dropout = dropout

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        p = self.dropout if self.training else 0.0
        x = dropout_add_layer_norm(x, None, self.emb_ln.weight, self.emb_ln.bias, p, self.emb_ln.eps)
        if not self.packed:
            for layer in self.layers:
                x = layer(x, mixer_kwargs={"key_padding_mask": mask})
            return self.decoder(x)
        x, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
        for layer in self.layers:
            x = layer(x, mixer_kwargs={"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen})
        return pad_input(self.decoder(x), indices, *tokens.shape)

    def learn(self, tokens: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        logits = self(tokens.masked_fill(hidden, 1), mask)
        return self.loss(logits.flatten(0, 1), tokens.masked_fill(~hidden, -1).flatten())
