"""flash_attn.ops.layer_norm: dropout, residual and LayerNorm, as functions and as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import RequestError
from headway.masks.base import shape_of
from headway.shims.flash_attn.ops.triton.layer_norm import added, normed, sum_dtype
from headway.shims.insist import insist


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """LayerNorm over the last axis, computed in float32 at least.

    >>> layer_norm(torch.tensor([2.0, 4.0]), torch.ones(2), torch.zeros(2), 0.0)
    tensor([-1.,  1.])
    """
    return normed(added(x, None, None, 0.0, None)[0], weight, bias, epsilon, False, False, x.dtype)


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """The norm of dropout(x0 · rowscale) · layerscale + residual; with `prenorm` the sum too, then the mask if asked.

    `residual_in_fp32` says what the sum is kept in where there is no residual yet.
    """
    return add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


def dropout_add_layer_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """The same for rows of which some have no x0, and some no use for the norm.

    `x0_subset` and `out_subset` say for each row which row of x0 is its own, and which of the `out_numrows` results,
    from 1 on; 0 is none.
    """
    return add_norm_of_subset(
        x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset, rowscale_const, out_numrows,
        prenorm, residual_in_fp32, return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


def dropout_add_layer_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Two norms of dropout(x0) + dropout(x1) + residual; the second is None without weight1."""
    return add_norms(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm, residual_in_fp32,
        return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


class DropoutAddLayerNorm(nn.Module):
    """`dropout_add_layer_norm` with weights of its own; dropout acts in training."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


# -- for LayerNorm and RMSNorm alike ----------------------------------------------------------------------------------


def add_norm(
    x0: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, dropout_p: float, epsilon: float,
    rowscale: Tensor | None, layerscale: Tensor | None, prenorm: bool, residual_in_fp32: bool,
    return_dropout_mask: bool, *, is_rms_norm: bool,
) -> Any:  # fmt: skip
    total, mask, _ = added(x0, residual, None, dropout_p, rowscale, layerscale)
    due = [normed(total, weight, bias, epsilon, False, is_rms_norm, x0.dtype)]
    if prenorm:
        due.append(total.to(sum_dtype(x0, residual, residual_in_fp32)))
    if return_dropout_mask:
        due.append(_bytes(mask, x0))
    return due[0] if len(due) == 1 else tuple(due)


def add_norms(
    x0: Tensor, x1: Tensor | None, residual: Tensor | None, weight0: Tensor, bias0: Tensor | None,
    weight1: Tensor | None, bias1: Tensor | None, dropout_p: float, epsilon: float, prenorm: bool,
    residual_in_fp32: bool, return_dropout_mask: bool, *, is_rms_norm: bool,
) -> Any:  # fmt: skip
    if bias1 is not None and weight1 is None:
        raise RequestError("got bias1 without weight1, takes both, or weight1 alone: nothing would use bias1")
    total, mask, mask1 = added(x0, residual, x1, dropout_p, None)
    pairs = ((weight0, bias0), (weight1, bias1))
    due: list[Tensor | None] = [
        None if weight is None else normed(total, weight, bias, epsilon, False, is_rms_norm, x0.dtype)
        for weight, bias in pairs
    ]
    if prenorm:
        due.append(total.to(sum_dtype(x0, residual, residual_in_fp32)))
    if return_dropout_mask:
        due += [_bytes(mask, x0), _bytes(mask1, x0)]
    return tuple(due)


def add_norm_of_subset(
    x0: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, dropout_p: float, epsilon: float,
    layerscale: Tensor | None, x0_subset: Tensor | None, out_subset: Tensor | None, rowscale_const: float,
    out_numrows: int, prenorm: bool, residual_in_fp32: bool, return_dropout_mask: bool, *, is_rms_norm: bool,
) -> Any:  # fmt: skip
    if x0_subset is None and out_subset is None and rowscale_const == 1 and out_numrows == 0:
        return add_norm(
            x0, residual, weight, bias, dropout_p, epsilon, None, layerscale, prenorm, residual_in_fp32,
            return_dropout_mask, is_rms_norm=is_rms_norm,
        )  # fmt: skip
    if x0_subset is None or out_subset is None:
        raise RequestError(
            "got a subset of None, takes x0_subset and out_subset, or neither of them with rowscale_const=1.0 and"
            " out_numrows=0: give rows that are all used as torch.arange(1, rows + 1)"
        )
    rows = x0.flatten(0, -2)
    _check_subsets(x0_subset, out_subset, len(rows), out_numrows)
    kept, mask, _ = added(rows, None, None, dropout_p, None, layerscale)
    kept = kept * rowscale_const
    own = x0_subset.flatten().long()
    total = torch.cat((kept.new_zeros(1, kept.shape[-1]), kept))[own]
    if residual is not None:
        total = total + residual.reshape(total.shape)
    numbers = torch.arange(len(own), device=own.device)
    source = own.new_zeros(out_numrows + 1).scatter(0, out_subset.flatten().long(), numbers)
    shape = (-1, *x0.shape[1:])
    due = [normed(total[source[1:]], weight, bias, epsilon, False, is_rms_norm, x0.dtype).view(shape)]
    if prenorm:
        due.append(total.to(sum_dtype(x0, residual, residual_in_fp32)).view(shape))
    if return_dropout_mask:
        due.append(_bytes(mask, rows).view(x0.shape))
    return due[0] if len(due) == 1 else tuple(due)


def _check_subsets(x0_subset: Tensor, out_subset: Tensor, rows: int, results: int) -> None:
    integers = (torch.int32, torch.int64)
    if x0_subset.shape != out_subset.shape or x0_subset.dtype not in integers or out_subset.dtype not in integers:
        raise RequestError(
            f"got x0_subset {shape_of(x0_subset)} and out_subset {shape_of(out_subset)}, takes int32, one number a row"
        )
    for name, subset, most in (("x0_subset", x0_subset, rows), ("out_subset", out_subset, results)):
        insist(
            ((subset >= 0) & (subset <= most)).all(),
            f"got {name} with rows that are not there, takes 1 to {most}, and 0 for none",
        )
    insist(
        (out_subset > 0).sum() == results,
        f"got out_numrows={results}, takes as many as out_subset has rows above 0",
    )


def _bytes(mask: Tensor | None, x: Tensor) -> Tensor:
    """What was kept, as flash-attn gives it: uint8, and ones where nothing is dropped."""
    return torch.ones_like(x, dtype=torch.uint8) if mask is None else mask.to(torch.uint8)
