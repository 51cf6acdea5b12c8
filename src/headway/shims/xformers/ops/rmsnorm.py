"""RMSNorm: x / sqrt(mean(x²) + eps), times a weight, in float32 at least. Here it has gradients too."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Over the last axis.

    >>> rms_norm(torch.tensor([3.0, 4.0]), None, eps=0.0) * 12.5**0.5
    tensor([3., 4.])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * weight).to(x.dtype)


def rms_norm_add(x: Tensor, y: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Add y to x in place, then rms_norm(x)."""
    return rms_norm(x.add_(y), weight, eps)


class RMSNorm(nn.Module):
    """rms_norm with a weight of its own, or none."""

    def __init__(self, dim: int, include_weight: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(dim)) if include_weight else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def increment_and_forward_(self, x: Tensor, y: Tensor) -> Tensor:
        return rms_norm_add(x, y, self.weight, self.eps)
