"""The built-in model of `headway demo`: a small decoder in plain PyTorch, whose attention is a function it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.masks import Mask

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model; two query heads share a key head, as in Llama."""

    vocabulary: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass
class Seen:
    """What went through one layer's attention in the last pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    toward: Tensor | None = None
    """The gradient that came back to the result."""


class Attention(nn.Module):
    """Projections, rotary positions, and the attention it is given."""

    def __init__(self, shape: Shape, attend: Attend) -> None:
        super().__init__()
        self.shape, self.attend = shape, attend
        self.to_q = nn.Linear(shape.width, shape.width, bias=False)
        self.to_kv = nn.Linear(shape.width, 2 * shape.kv_heads * shape.head_dim, bias=False)
        self.to_out = nn.Linear(shape.width, shape.width, bias=False)
        self.seen: Seen | None = None

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        batch, length, _ = x.shape
        q = self.to_q(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
        k, v = self.to_kv(x).view(batch, length, 2, -1, self.shape.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(q), rotate(k)
        out = self.attend(q, k, v, mask)
        if out.requires_grad:
            self.seen = Seen(q.detach(), k.detach(), v.detach())
            out.register_hook(self._see)
        mixed: Tensor = self.to_out(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed

    def _see(self, toward: Tensor) -> None:
        assert self.seen is not None
        self.seen.toward = toward.detach()


class Block(nn.Module):
    """Attention and a gated MLP, each on what a norm leaves, each added to its input."""

    def __init__(self, shape: Shape, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.attention = Attention(shape, attend)
        self.gate_up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(2 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


class Decoder(nn.Module):
    """Tokens in, logits of the next tokens out."""

    def __init__(self, shape: Shape, attend: Attend) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape, attend) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        nn.init.normal_(self.embed.weight, std=shape.width**-0.5)  # it is the output projection too

    def forward(self, tokens: Tensor, mask: Mask) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return F.linear(self.norm(x), self.embed.weight)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: pairs of channels turned by an angle that grows with the position.

    >>> torch.equal(rotate(torch.ones(1, 1, 1, 4)), torch.ones(1, 1, 1, 4))
    True
    """
    length, dim = x.shape[-2:]
    frequency = 10_000 ** (-torch.arange(0, dim, 2, device=x.device, dtype=x.dtype) / dim)
    angle = torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * frequency
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()), dim=-1)
