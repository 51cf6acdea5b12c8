"""DiT: a transformer that is told the noise level and scores what each token was, after SEDD (Lou et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

import headway
from headway import Documents, RequestError
from headway_apps.proteins.diffusion.given import insist
from headway_apps.proteins.diffusion.graphs import log_expm1
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.packed import Packed, not_recordable

FREQUENCIES = 256
"""Of the noise level: half cosines, half sines."""
PERIOD = 10_000.0
"""The longest period, of the noise level's sinusoids and of rotary positions alike."""
LEAST_SIGMA = 1e-12
"""Scores at less noise are as if it were this: at 0 nothing is masked, and the ratio of what is would be infinite."""


Turns = tuple[Tensor, Tensor]
"""Cosines and sines of positions: `rotations`."""


class DiT(nn.Module):
    """Log scores of every symbol at every token, given the noise level of each sequence.

    `model(tokens, sigma_bar)` takes rows of one length, (B, L) with (B,). `model(tokens, sigma_bar, lengths)` takes
    documents laid end to end, (T,) or (1, T), with (N,) levels and lengths, and gives each what it would get alone;
    keep lengths on the host. The answer has the tokens' shape and a column for each scored symbol. It is in float32 at
    least: log s(y), the ratio of the probabilities of y and of the token that stands there, whose own is 0.

    >>> model = DiT(DiTConfig(width=32, blocks=1, heads=2, cond=8, embedded=33, scored=33, mask=32))
    >>> tokens = torch.full((7,), 32)
    >>> model(tokens, torch.tensor([0.5, 2.0]), torch.tensor([3, 4])).shape
    torch.Size([7, 33])
    """

    checkpointing = False
    """Whether to keep no activations inside blocks for the backward pass, but to compute them again."""
    between: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    """The function of that name, if it is compiled."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.embedded, config.width)
        self.time = TimeEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.head = Head(config)
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def reset_parameters(self) -> None:
        """Blocks that add nothing and scores of a guess, as in the original."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, Norm):
                nn.init.ones_(module.weight)
        bound = self.config.width**-0.5
        nn.init.uniform_(self.embed.weight, -bound, bound)
        for linear in (self.head.linear, self.head.modulation, *(block.modulation for block in self._blocks())):
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)

    def compile_parts(self, *, one_shape: bool = False) -> None:
        """Compile what stands between calls of attention, for batches of any shape; or first of all for the one shape
        that is met first, and over the bounds of blocks, which then are not called as modules.

        Attention itself is called as it is: on some GPUs its fastest kernels cannot be part of a compiled graph.
        """
        dynamic = None if one_shape else True
        blocks = self._blocks()
        for block in blocks[:1] if one_shape else blocks:
            block.before = torch.compile(block.before, dynamic=dynamic)  # type: ignore[method-assign]
        for block in blocks[-1:] if one_shape else blocks:
            block.after = torch.compile(block.after, dynamic=dynamic)  # type: ignore[method-assign]
        self.between = torch.compile(between, dynamic=dynamic) if one_shape else None
        self.head.compile(dynamic=dynamic)

    def forward(self, tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | Packed | None = None) -> Tensor:
        packed = self.pack(tokens, lengths) if isinstance(lengths, Tensor) else lengths
        self._check(tokens, sigma_bar, packed)
        if packed is not None and packed.is_rows:
            rows = tokens.reshape(packed.documents, packed.longest)
            return self._scored(rows, sigma_bar, None).reshape(*tokens.shape, self.config.scored)
        return self._scored(tokens, sigma_bar, packed)

    def _scored(self, tokens: Tensor, sigma_bar: Tensor, packed: Packed | None) -> Tensor:
        # No part of this calls forward, around which others may have put something that is entered once.
        rows = tokens if packed is None else tokens.reshape(1, -1)
        x = self.embed(rows)
        told = self.time(sigma_bar)
        positions = torch.arange(rows.shape[1], device=x.device) if packed is None else packed.positions
        turns = rotations(positions, self.config.head_dim, _wide(x.dtype))
        x = self._through(x, told, turns, packed)
        logits = self.head(x, told, packed)
        scores = self._scores(logits.to(_wide(logits.dtype)), rows, sigma_bar, packed)
        return scores.reshape(*tokens.shape, self.config.scored)

    def _through(self, x: Tensor, told: Tensor, turns: Turns, packed: Packed | None) -> Tensor:
        """All blocks."""
        kept = not (self.checkpointing and self.training and torch.is_grad_enabled())
        if self.between is None or not kept:
            for block in self.blocks:
                x = (
                    block(x, told, turns, packed) if kept
                    else cast(Tensor, checkpoint(block, x, told, turns, packed, use_reentrant=False))
                )  # fmt: skip
            return x
        blocks = self._blocks()
        modulations = [block.modulation(told) for block in blocks]
        q, k, v = blocks[0].before(x, modulations[0], turns, packed)
        for (one, other), told_each in zip(pairwise(blocks), pairwise(modulations), strict=True):
            x, q, k, v = self.between((one, other), x, attended(q, k, v, packed), told_each, turns, packed)
        return blocks[-1].after(x, attended(q, k, v, packed), modulations[-1], packed)

    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    def pack(self, tokens: Tensor, lengths: Tensor) -> Packed:
        """What `forward` makes of lengths, and takes in their place: given it, `torch.compile` makes one graph of all.

        Call it under the autocast that the model will run under, as on it depends which kernels there are.
        """
        # Lengths have to be read, which breaks a graph. As a decorator this would import the compiler for everybody.
        of = torch.compiler.disable(Packed.of) if is_compiling() else Packed.of
        return of(lengths, self._queries(tokens.numel()), traced=is_compiling())

    def not_recordable(self, lengths: Sequence[int]) -> str | None:
        """Why passes over batches such as of these lengths cannot be recorded, under this autocast."""
        return not_recordable(Documents(lengths), self._queries(sum(lengths)))

    def _queries(self, tokens: int) -> Tensor:
        """Such as a block's, to ask about."""
        weight = self.embed.weight
        heads, size = self.config.heads, self.config.head_dim
        like = torch.empty(1, heads, 1, size, dtype=weight.dtype, device=weight.device)
        return like.requires_grad_(torch.is_grad_enabled()).expand(1, heads, tokens, size)

    def _scores(self, logits: Tensor, tokens: Tensor, sigma_bar: Tensor, packed: Packed | None) -> Tensor:
        config = self.config
        if config.scale_by_sigma:
            guess = log_expm1(sigma_bar.to(logits.dtype).clamp_min(LEAST_SIGMA)) + math.log(
                config.scored - config.scores_mask
            )
            logits = logits - (guess[:, None] if packed is None else guess[packed.document][None])[..., None]
        symbols = torch.arange(config.scored, device=tokens.device)
        return logits.masked_fill(tokens[..., None] == symbols, 0.0)

    def _check(self, tokens: Tensor, sigma_bar: Tensor, packed: Packed | None) -> None:
        shape = list(tokens.shape)
        if tokens.dtype != torch.int64:
            raise RequestError(f"got tokens {tokens.dtype}, takes int64: ids are not rounded")
        if packed is None and tokens.ndim != 2:
            raise RequestError(f"got tokens {shape} without lengths, takes (B, L); give lengths for packed tokens")
        if packed is not None and (tokens.ndim not in (1, 2) or tokens.shape[:-1].numel() != 1):
            raise RequestError(f"got tokens {shape} with lengths, takes (T,) or (1, T): lay documents end to end")
        if packed is not None and packed.document.shape[0] != tokens.numel():
            raise RequestError(f"got documents of {packed.document.shape[0]} tokens for {tokens.numel()}, takes all")
        count = tokens.shape[0] if packed is None else packed.documents
        if sigma_bar.shape != (count,) or sigma_bar.dtype not in (torch.float32, torch.float64):
            raise RequestError(
                f"got sigma_bar {list(sigma_bar.shape)} {sigma_bar.dtype} for {count} sequences, takes one number each:"
                f" float32 ({count},), as bfloat16 cannot tell levels apart"
            )
        known = (tokens >= 0) & (tokens < self.config.embedded)
        insist(known.all(), f"got a token out of range, takes ids from 0 to {self.config.embedded - 1}")
        insist((sigma_bar >= 0).all(), "got a sigma_bar below 0 or NaN, takes levels of 0 or more")


class Block(nn.Module):
    """Attention, then an MLP; the noise level shifts and scales what each reads, and gates what each adds."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, inner = config.width, config.mlp_ratio * config.width
        self.heads, self.dropout, self.gelu = config.heads, config.dropout, config.gelu
        self.attention_norm = Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = Norm(width)
        self.mlp_in = nn.Linear(width, inner)
        self.mlp_out = nn.Linear(inner, width)
        self.modulation = nn.Linear(config.cond, 6 * width)

    def forward(self, x: Tensor, told: Tensor, turns: Turns, packed: Packed | None) -> Tensor:
        """x (B, L, width), or (1, T, width) if packed."""
        modulation = self.modulation(told)
        heads = attended(*self.before(x, modulation, turns, packed), packed)
        return self.after(x, heads, modulation, packed)

    def before(
        self, x: Tensor, modulation: Tensor, turns: Turns, packed: Packed | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, L, heads, size) each as they lie in memory: `attended` turns them, as compiled
        code wants gradients of what it gives to lie in order, and copies those that do not."""
        shift, scale = at_tokens(modulation[:, : 2 * x.shape[-1]], packed).chunk(2, -1)
        x = modulated(self.attention_norm(x), scale, shift).to(x.dtype)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, heads, size)
        if is_compiling():
            v = v.clone()  # its gradient is taken as it comes if it is no view: one copy less
        return turned(q, turns), turned(k, turns), v

    def after(self, x: Tensor, heads: Tensor, modulation: Tensor, packed: Packed | None) -> Tensor:
        """All that comes of what attention gives."""
        gate, shift, scale, gate2 = at_tokens(modulation[:, 2 * x.shape[-1] :], packed).chunk(4, -1)
        x = self._add(x, gate, self.out(heads.flatten(2)))
        return self._add(x, gate2, self._mlp(modulated(self.mlp_norm(x), scale, shift).to(x.dtype)))

    def _mlp(self, x: Tensor) -> Tensor:
        approximate = "tanh" if self.gelu == "tanh" else "none"
        return cast(Tensor, self.mlp_out(F.gelu(self.mlp_in(x), approximate=approximate)))

    def _add(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return x + gate * F.dropout(branch, self.dropout, self.training)


class Head(nn.Module):
    """One column of logits for each scored symbol."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.shifts = config.final == "shift and scale"
        self.norm = Norm(config.width)
        self.linear = nn.Linear(config.width, config.scored, bias=config.head_bias)
        self.modulation = nn.Linear(config.cond, (2 if self.shifts else 1) * config.width)

    def forward(self, x: Tensor, told: Tensor, packed: Packed | None) -> Tensor:
        modulation = self.modulation(told)
        parts = at_tokens(modulation, packed).chunk(2 if self.shifts else 1, -1)
        shift, scale = (parts[0] if self.shifts else None), parts[-1]
        return cast(Tensor, self.linear(modulated(self.norm(x), scale, shift).to(x.dtype)))


class TimeEmbedding(nn.Module):
    """Sinusoids of the noise level through a small MLP, outside of autocast: few numbers, told to all blocks."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.ends_in_silu = config.silu_after_time
        self.inner = nn.Linear(FREQUENCIES, config.cond)
        self.outer = nn.Linear(config.cond, config.cond)

    def forward(self, sigma_bar: Tensor) -> Tensor:
        dtype, half = self.inner.weight.dtype, FREQUENCIES // 2
        steps = torch.arange(half, dtype=_wide(dtype), device=sigma_bar.device) * (-math.log(PERIOD) / half)
        angles = sigma_bar.to(steps.dtype)[:, None] * steps.exp()
        waves = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
        with torch.autocast(sigma_bar.device.type, enabled=False):
            told = self.outer(F.silu(self.inner(waves)))
        return F.silu(told) if self.ends_in_silu else told


class Norm(nn.Module):
    """LayerNorm without a bias, in float32 at least."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x.dtype)
        return F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide))


def modulated(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x (1 + scale) + shift, in x's dtype: 1 + scale in a narrower one would round the scale away."""
    x = x + x * scale
    return x if shift is None else x + shift


def at_tokens(values: Tensor, packed: Packed | None) -> Tensor:
    """(sequences, C) so that it meets (sequences, L, C), or the tokens of packed ones."""
    return values[:, None] if packed is None else packed.spread(values)


def attended(q: Tensor, k: Tensor, v: Tensor, packed: Packed | None) -> Tensor:
    """(B, L, heads, size), as it takes them."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    heads = headway.attention(q, k, v) if packed is None else packed.attend(q, k, v)
    return heads.transpose(1, 2)


def between(
    blocks: tuple[Block, Block], x: Tensor, heads: Tensor, told: tuple[Tensor, Tensor], turns: Turns,
    packed: Packed | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All from one block's attention to the next one's: x, and what that takes."""
    one, other = blocks
    x = one.after(x, heads, told[0], packed)
    return x, *other.before(x, told[1], turns, packed)


def rotations(positions: Tensor, size: int, dtype: torch.dtype) -> Turns:
    """Cosines and sines, (L, size / 2), that turn a head's pairs of features by their position."""
    steps = torch.arange(0, size, 2, dtype=dtype, device=positions.device) * (-math.log(PERIOD) / size)
    angles = positions.to(dtype)[:, None] * steps.exp()
    return angles.cos(), angles.sin()


def turned(x: Tensor, turns: Turns) -> Tensor:
    """x (B, L, heads, size) with feature i and i + size / 2 turned as a pair, in float32 at least."""
    cos, sin = (each[:, None] for each in turns)
    one, other = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1).to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
