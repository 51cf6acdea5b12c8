"""flash_attn.ops.activations: activations, and their derivatives where flash-attn has them as functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_fwd(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, from the gradient g of gelu_fwd(x)."""
    grad: Tensor = torch.ops.aten.gelu_backward(g, x, approximate="tanh")
    return grad.to(x.dtype)


fast_gelu_impl = gelu_fwd


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    return gelu_fwd(y + bias).to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y (rows, features) and of bias (features,), from the gradient g of bias_gelu(y, bias)."""
    grad = gelu_bwd(g, y + bias)
    return grad.to(y.dtype), grad.sum(dim=0, dtype=bias.dtype)


bias_gelu_impl = bias_gelu


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, from the gradient g of relu(x); at 0 it is g, as in flash-attn."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x) squared."""
    return F.relu(x).square().to(x.dtype)


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, from the gradient g of sqrelu_fwd(x)."""
    return (2.0 * g * F.relu(x)).to(x.dtype)


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) · y.

    >>> swiglu_fwd(torch.tensor([0.0, 30.0]), torch.tensor([5.0, 2.0]))
    tensor([ 0., 60.])
    """
    return F.silu(x) * y


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of y, from the gradient g of swiglu_fwd(x, y)."""
    sigmoid = x.sigmoid()
    return g * y * sigmoid * (1 + x * (1 - sigmoid)), g * x * sigmoid


swiglu = swiglu_fwd
