"""What the original SEDD and the V100 model compute, written out anew from their formulas on weights by their names."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def sedd_shapes(width: int, blocks: int, cond: int, symbols: int) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint of the original, in its order, but for the rotary table."""
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (symbols, width),
        "sigma_map.mlp.0.weight": (cond, 256),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
    }
    for i in range(blocks):
        shapes |= {
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.attn_qkv.weight": (3 * width, width),
            f"blocks.{i}.attn_out.weight": (width, width),
            f"blocks.{i}.norm2.weight": (width,),
            f"blocks.{i}.mlp.0.weight": (4 * width, width),
            f"blocks.{i}.mlp.0.bias": (4 * width,),
            f"blocks.{i}.mlp.2.weight": (width, 4 * width),
            f"blocks.{i}.mlp.2.bias": (width,),
            f"blocks.{i}.adaLN_modulation.weight": (6 * width, cond),
            f"blocks.{i}.adaLN_modulation.bias": (6 * width,),
        }
    return shapes | {
        "output_layer.norm_final.weight": (width,),
        "output_layer.linear.weight": (symbols, width),
        "output_layer.linear.bias": (symbols,),
        "output_layer.adaLN_modulation.weight": (2 * width, cond),
        "output_layer.adaLN_modulation.bias": (2 * width,),
    }


def v100_shapes(width: int, blocks: int, cond: int, symbols: int) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint of the V100 model: the original's, three things renamed and one left out."""
    shapes = sedd_shapes(width, blocks, cond, symbols)
    del shapes["output_layer.linear.bias"]
    renamed = {
        "vocab_embed.embedding": "vocab_embed.weight",
        "output_layer.norm_final.weight": "output_layer.norm.weight",
    }
    return {
        renamed.get(name, name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2."))
        if not name.startswith("sigma_map")
        else name: shape
        for name, shape in shapes.items()
    }


def drawn(shapes: dict[str, tuple[int, ...]], head_dim: int) -> Weights:
    """Weights of which none is 0, and the rotary table."""
    weights = {
        name: 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in shapes.items()
    }
    return weights | {"rotary_emb.inv_freq": 1.0 / 10_000 ** (torch.arange(0, head_dim, 2) / head_dim)}


def scores(weights: Weights, tokens: Tensor, sigma: Tensor, heads: int) -> Tensor:
    """Log scores (batch, length, symbols) in float64, of either model's weights."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    v100 = "vocab_embed.weight" in w
    first, last = ("mlp.fc1", "mlp.fc2") if v100 else ("mlp.0", "mlp.2")
    x = w["vocab_embed.weight" if v100 else "vocab_embed.embedding"][tokens]
    width, length = x.shape[2], x.shape[1]

    speeds = 10_000.0 ** (-torch.arange(128).double() / 128)
    angles = sigma.double()[:, None] * speeds
    c = torch.cat([torch.cos(angles), torch.sin(angles)], 1) @ w["sigma_map.mlp.0.weight"].T
    c = F.silu(c + w["sigma_map.mlp.0.bias"]) @ w["sigma_map.mlp.2.weight"].T + w["sigma_map.mlp.2.bias"]
    c = c if v100 else F.silu(c)

    size = width // heads
    turn = torch.arange(length).double()[:, None] * 10_000.0 ** (-torch.arange(0, size, 2).double() / size)
    turn = torch.complex(turn.cos(), turn.sin())[None, :, None]

    def normed(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        b = f"blocks.{i}."
        told = c @ w[b + "adaLN_modulation.weight"].T + w[b + "adaLN_modulation.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = (each[:, None] for each in told.split(width, 1))
        h = normed(x, b + "norm1.weight") * (1 + scale1) + shift1
        q, k, v = (each.unflatten(2, (heads, size)) for each in (h @ w[b + "attn_qkv.weight"].T).split(width, 2))
        logits = torch.einsum("bqhd,bkhd->bhqk", rotated(q), rotated(k)) / math.sqrt(size)
        h = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)
        x = x + gate1 * (h @ w[b + "attn_out.weight"].T)
        h = normed(x, b + "norm2.weight") * (1 + scale2) + shift2
        h = h @ w[b + first + ".weight"].T + w[b + first + ".bias"]
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2 if v100 else F.gelu(h, approximate="tanh")
        x = x + gate2 * (h @ w[b + last + ".weight"].T + w[b + last + ".bias"])

    told = c @ w["output_layer.adaLN_modulation.weight"].T + w["output_layer.adaLN_modulation.bias"]
    shift, scale = (each[:, None] for each in told.split(width, 1))
    x = normed(x, "output_layer.norm.weight" if v100 else "output_layer.norm_final.weight") * (1 + scale) + shift
    x = x @ w["output_layer.linear.weight"].T + w.get("output_layer.linear.bias", 0.0)
    x = x - torch.log(torch.exp(sigma.double()) - 1)[:, None, None] - math.log(x.shape[2] - 1)
    return x.scatter(2, tokens[..., None], 0.0)
