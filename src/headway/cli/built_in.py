"""The built-in models of `headway try`: small, of torch alone, one for each way in which models call attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, TOKENS = 128, 4, 4, 256

Made: TypeAlias = tuple[nn.Module, Any]
"""A model and its example."""


class Encoder(nn.Module):
    """PyTorch's own transformer encoder over padded text, which calls nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.layers(self.embed(tokens), src_key_padding_mask=padding)
        out: Tensor = self.head(x.masked_fill(padding[..., None], 0.0).mean(1))
        return out


class CausalAttention(nn.Module):
    """As in Llama: rotary positions, and two query heads to a key head; calls F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.size = WIDTH // HEADS
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (HEADS, self.size)).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(-1, (2, HEADS // 2, self.size)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        mixed: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and an MLP, each on what a norm leaves, each added to its input."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Decoder(nn.Module):
    """Tokens in, logits of the next tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(*(Block(CausalAttention()) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)  # it is the output projection too

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embed(tokens))), self.embed.weight)


class ImageAttention(nn.Module):
    """As in timm: q, k and v from one projection; calls F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class AttentionPool(nn.Module):
    """The mean patch asks all patches, with softmax(q kᵀ) v written out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.to_kv(x).chunk(2, -1)
        scores = torch.matmul(self.to_q(x.mean(1, keepdim=True)), k.transpose(1, 2)) / math.sqrt(WIDTH)
        return torch.matmul(scores.softmax(-1), v).squeeze(1)


class VisionTransformer(nn.Module):
    """Patches in, classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 64, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(ImageAttention()) for _ in range(LAYERS)))
        self.pool = AttentionPool()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.patch(image).flatten(2).transpose(1, 2) + self.position)
        out: Tensor = self.head(self.pool(x))
        return out


class Captioner(nn.Module):
    """An image in, text out: each kind of site at once, self-attention and cross-attention, and one left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(*(Block(ImageAttention()) for _ in range(2)))
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.pool = AttentionPool()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.text = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, image: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        seen = self.eye(self.patch(image).flatten(2).transpose(1, 2))
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.embed(tokens) + self.pool(seen)[:, None]
        out: Tensor = self.head(self.text(x, seen, tgt_mask=later, tgt_key_padding_mask=padding))
        return out


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


# -- each with its example --------------------------------------------------------------------------------------------

LENGTHS = (96, 61, 24)
"""Real tokens of each sequence; the rest is padding."""


def _text() -> tuple[Tensor, Tensor]:
    """Tokens, and True where they are padding."""
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(max(LENGTHS)) >= lengths[:, None]
    return torch.randint(TOKENS, (len(LENGTHS), max(LENGTHS))), padding


def encoder() -> Made:
    return Encoder(), _text()


def decoder() -> Made:
    return Decoder(), (torch.randint(TOKENS, (2, 128)),)


def vit() -> Made:
    return VisionTransformer(), (torch.randn(2, 3, 64, 64),)


def captioner() -> Made:
    return Captioner(), (torch.randn(len(LENGTHS), 3, 64, 64), *_text())


BUILT_IN: dict[str, tuple[Callable[[], Made], str]] = {
    "encoder": (encoder, "text encoder: nn.TransformerEncoder with padding"),
    "decoder": (decoder, "Llama-like decoder: causal F.scaled_dot_product_attention, two query heads to a key head"),
    "vit": (vit, "vision transformer: F.scaled_dot_product_attention, and a pool with attention written by hand"),
    "captioner": (captioner, "image to text: all of these at once, with cross-attention"),
}
