"""A transformer for discrete diffusion, built as SEDD and MDLM build theirs, on the attention that it is given.

Names of parameters, the order of operations, rotary tables of values that stay (cos 1, sin 0), lengths as cumulative
sums of equal rows: all as there. The code is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(qkv (batch, length, 3, heads, size), cos and sin (1, length, 3, 1, size)) -> qkv with queries and keys turned."""
Attend = Callable[[Tensor, Tensor, int], Tensor]
"""(qkv (tokens, 3, heads, size), cu_seqlens, longest) -> (tokens, heads, size)."""


class LayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return F.layer_norm(wide, self.weight.shape) * self.weight


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype) / half)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1))


class Rotary(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(x.shape[1], dtype=self.inv_freq.dtype), self.inv_freq)
        angles = torch.cat((angles, angles), -1)[None, :, None, None].repeat(1, 1, 3, 1, 1)
        cos, sin = angles.cos(), angles.sin()
        cos[:, :, 2], sin[:, :, 2] = 1.0, 0.0
        return cos, sin


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, cond_dim: int, dropout: float, turn: Turn, attend: Attend) -> None:
        super().__init__()
        self.heads, self.turn, self.attend = heads, turn, attend
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.dropout = dropout
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * dim)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], c: Tensor, seqlens: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1))
        with torch.autocast(x.device.type, enabled=False):
            cos, sin = tables
            qkv = self.turn(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype))
        if seqlens is None:
            cu_seqlens = torch.arange(0, (batch + 1) * length, step=length, dtype=torch.int32, device=x.device)
        else:
            cu_seqlens = seqlens.cumsum(-1)
        out = self.attend(qkv.flatten(0, 1), cu_seqlens, length).reshape(batch, length, -1)
        x = x + gate1 * F.dropout(self.attn_out(out), self.dropout, self.training)
        out = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * F.dropout(out, self.dropout, self.training)


class Embedding(nn.Module):
    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding[x]


class FinalLayer(nn.Module):
    def __init__(self, dim: int, vocabulary: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = nn.Linear(dim, vocabulary)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * dim)
        for each in (*self.linear.parameters(), *self.adaLN_modulation.parameters()):
            nn.init.zeros_(each)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiffusionTransformer(nn.Module):
    """(tokens (batch, length), noise level (batch,)) -> (batch, length, vocabulary)."""

    def __init__(
        self, turn: Turn, attend: Attend, *, dim: int, heads: int, blocks: int, cond_dim: int, vocabulary: int,
        dropout: float = 0.0, scores: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocab_embed = Embedding(dim, vocabulary)
        self.sigma_map = TimestepEmbedder(cond_dim)
        self.rotary_emb = Rotary(dim // heads)
        self.blocks = nn.ModuleList(Block(dim, heads, cond_dim, dropout, turn, attend) for _ in range(blocks))
        self.output_layer = FinalLayer(dim, vocabulary, cond_dim)
        self.scores = scores

    def forward(self, indices: Tensor, sigma: Tensor, seqlens: Tensor | None = None) -> Tensor:
        x = self.vocab_embed(indices)
        c = F.silu(self.sigma_map(sigma))
        tables = self.rotary_emb(x)
        for block in self.blocks:
            x = block(x, tables, c, seqlens)
        x = self.output_layer(x, c)
        if not self.scores:
            return x
        # SEDD's: of the noise level less, and 0 for the token that stands there.
        x = x - torch.expm1(sigma).log()[:, None, None] - math.log(x.shape[-1] - 1)
        return torch.scatter(x, -1, indices[..., None], torch.zeros_like(x[..., :1]))
