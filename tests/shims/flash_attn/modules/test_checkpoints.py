"""Weights trained elsewhere, renamed as flash-attn's own loaders rename them, give the answers they gave there."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from headway.shims.flash_attn.modules.block import Block
from headway.shims.flash_attn.modules.embedding import GPT2Embeddings
from headway.shims.flash_attn.modules.mha import MHA
from headway.shims.flash_attn.modules.mlp import FusedMLP, Mlp

DIM, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 50


class GPT2(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embeddings = GPT2Embeddings(DIM, VOCABULARY, 16)
        mlp = FusedMLP if fused else partial(Mlp, activation=partial(F.gelu, approximate="tanh"))
        mixer = partial(MHA, num_heads=HEADS, causal=True, use_flash_attn=fused)
        self.layers = nn.ModuleList(Block(DIM, mixer, mlp, fused_dropout_add_ln=fused) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        x, residual = self.embeddings(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.ln_f(x + residual) @ self.embeddings.word_embeddings.weight.T


RENAMED = {
    r"wte\.": "embeddings.word_embeddings.",
    r"wpe\.": "embeddings.position_embeddings.",
    r"h\.(\d+)\.ln_(\d)\.": r"layers.\1.norm\2.",
    r"h\.(\d+)\.attn\.c_attn\.": r"layers.\1.mixer.Wqkv.",
    r"h\.(\d+)\.attn\.c_proj\.": r"layers.\1.mixer.out_proj.",
    r"h\.(\d+)\.mlp\.c_fc\.": r"layers.\1.mlp.fc1.",
    r"h\.(\d+)\.mlp\.c_proj\.": r"layers.\1.mlp.fc2.",
}


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's linear layers hold their weights transposed."""
    found = {}
    for name, weight in weights.items():
        new = name
        for pattern, other in RENAMED.items():
            new = re.sub(f"^{pattern}", other, new)
        found[new] = weight.T if re.search(r"\.c_\w+\.weight$", name) else weight
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_gpt_2_of_hugging_face_answers_alike(fused: bool) -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=DIM, n_layer=LAYERS, n_head=HEADS, bos_token_id=0, eos_token_id=0
    )
    there = GPT2LMHeadModel(config).double().eval()
    here = GPT2(fused).double()
    here.load_state_dict(renamed(there.transformer.state_dict()))
    tokens = torch.randint(0, VOCABULARY, (2, 11))
    torch.testing.assert_close(here(tokens), there(tokens).logits)
