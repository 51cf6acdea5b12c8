"""Models that several tests of sites are about."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(16), attention, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.attention(self.norm(x)))
        return out


def gpt(attention: type[nn.Module]) -> nn.Module:
    """Two blocks between tokens and logits, as nanoGPT's, around an attention of width 16."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 16), Block(attention()), Block(attention()), nn.Linear(16, 11))
