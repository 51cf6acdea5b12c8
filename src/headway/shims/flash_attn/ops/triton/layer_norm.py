"""flash_attn.ops.triton.layer_norm: dropout, what is added, and the norm of the sum, in float32 at least."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.errors import RequestError
from headway.masks.base import shape_of


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Norm of dropout(x · rowscale) + dropout(x1) + residual, with weight, and once more with weight1 if given.

    Returns that, then the second norm, then the sum if `prenorm`, then both dropout masks if asked for (None where
    nothing is dropped): one tensor if only one is due. rowscale gets no gradient, as in flash-attn.

    >>> x, weight = torch.tensor([[3.0, -3.0]]), torch.ones(2)
    >>> layer_norm_fn(x, weight, None, residual=x, prenorm=True)
    (tensor([[ 1., -1.]]), tensor([[ 6., -6.]]))
    """
    if bias1 is not None and weight1 is None:
        raise RequestError("got bias1 without weight1, takes both, or weight1 alone: nothing would use bias1")
    if out is not None and out_dtype not in (None, out.dtype):
        raise RequestError(f"got out of {out.dtype} with out_dtype={out_dtype}, takes one dtype: leave out_dtype out")
    total, mask, mask1 = added(x, residual, x1, dropout_p, rowscale)
    dtype = x.dtype if out_dtype is None else out_dtype
    options = (eps, zero_centered_weight, is_rms_norm, dtype)
    due: list[Tensor | None] = [_put(normed(total, weight, bias, *options), out)]
    if weight1 is not None:
        due.append(normed(total, weight1, bias1, *options))
    if prenorm:
        due.append(_put(total.to(sum_dtype(x, residual, residual_in_fp32)), residual_out))
    elif residual_out is not None:
        raise RequestError("got residual_out without prenorm, takes prenorm=True with it: or leave it out")
    if return_dropout_mask:
        due += [mask, mask1]
    return due[0] if len(due) == 1 else tuple(due)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` with the root mean square in place of the deviation."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A norm and the linear layer after it; with `prenorm` also the sum that was normed."""
    y, total = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=True, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


class RMSNorm(nn.Module):
    """A norm by the root mean square, of the sum with a residual if given."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


# -- what all of flash-attn's norms are made of -----------------------------------------------------------------------


def added(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    dropout_p: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dropout(x · rowscale) · layerscale + dropout(x1) + residual, in float32 at least, and both dropout masks."""
    if not 0 <= dropout_p < 1:
        raise RequestError(f"got dropout_p={dropout_p}, takes a share from 0 to below 1")
    if x1 is not None and rowscale is not None:
        raise RequestError("got rowscale with x1, takes one of them: scale x and x1 before the call")
    for name, other in (("residual", residual), ("x1", x1)):
        if other is not None and other.shape != x.shape:
            raise RequestError(f"got {name} {list(other.shape)} for x {list(x.shape)}, takes the same shape")
    if rowscale is not None and rowscale.numel() != x.shape[:-1].numel():
        raise RequestError(f"got rowscale {shape_of(rowscale)} for x {list(x.shape)}, takes one number a row")
    wide = torch.promote_types(x.dtype if residual is None else residual.dtype, torch.float32)
    total = x.to(torch.promote_types(x.dtype, wide))
    if rowscale is not None:
        total = total * rowscale.detach().reshape(*x.shape[:-1], 1)
    total, mask = _dropped(total, dropout_p)
    if layerscale is not None:
        total = total * layerscale
    other, mask1 = (None, None) if x1 is None else _dropped(x1.to(total.dtype), dropout_p)
    for term in (other, residual):
        total = total if term is None else total + term
    return total, mask, mask1


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    return torch.native_dropout(x, p, True) if p > 0 else (x, None)


def normed(
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered_weight: bool,
    is_rms_norm: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The norm of a sum in its own precision, rounded once at the end."""
    size = total.shape[-1:]
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and each.shape != size:
            raise RequestError(f"got {name} {list(each.shape)} for {size[0]} features, takes [{size[0]}]")
    weight = weight.to(total.dtype) + 1 if zero_centered_weight else weight.to(total.dtype)
    bias = None if bias is None else bias.to(total.dtype)
    if not is_rms_norm:
        return F.layer_norm(total, size, weight, bias, eps).to(dtype)
    out = F.rms_norm(total, size, weight, eps)
    return (out if bias is None else out + bias).to(dtype)


def sum_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """Of the sum that is handed on: as the residual was, and wide enough from the first block on if asked for."""
    if residual is not None:
        return residual.dtype
    return torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype


def _put(made: Tensor, into: Tensor | None) -> Tensor:
    return made if into is None else into.view(made.shape).copy_(made)
