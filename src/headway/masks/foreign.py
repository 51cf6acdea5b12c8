"""Masks as other libraries write them, each with a constructor of its name, so that nobody flips one by accident."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, must_be_tensor, shape_of
from headway.masks.bias import Bias
from headway.masks.dense import Dense
from headway.masks.full import Full
from headway.masks.padding import Padding


def from_sdpa(attn_mask: Tensor | None) -> Mask:
    """`F.scaled_dot_product_attention`'s mask: bool with True = may attend, numbers added to scores, or None for none.

    >>> from_sdpa(torch.ones(2, 2, dtype=torch.bool))
    Dense(bool[2, 2])
    """
    if attn_mask is None:
        return Full()
    _yes_or_numbers(attn_mask, "attn_mask", "may")
    return Dense(attn_mask) if attn_mask.dtype == torch.bool else Bias(attn_mask)


def from_key_padding_mask(key_padding_mask: Tensor | None) -> Mask:
    """`nn.MultiheadAttention`'s key_padding_mask: bool (batch, keys) with True = blocked, or numbers added, or None.

    >>> print(from_key_padding_mask(torch.tensor([[False, False, True]])).matrix(1, 3))
    ■ ■ ·
    """
    mask = key_padding_mask
    if mask is None:
        return Full()
    must_be_tensor(mask, "key_padding_mask")
    if mask.ndim == 1:
        mask = mask[None]
    if mask.ndim != 2:
        raise MaskError(f"got key_padding_mask {shape_of(mask)}, takes (batch, keys) or (keys,)")
    _yes_or_numbers(mask, "key_padding_mask", "blocked")
    return Padding(~mask) if mask.dtype == torch.bool else Bias(mask[:, None, None, :])


def from_attn_mask(attn_mask: Tensor | None, num_heads: int) -> Mask:
    """`nn.MultiheadAttention`'s attn_mask: True = blocked or numbers; (L, S) or (batch * heads, L, S), or None."""
    mask = attn_mask
    if mask is None:
        return Full()
    _yes_or_numbers(mask, "attn_mask", "blocked")
    if mask.ndim == 3:
        if mask.shape[0] % num_heads:
            raise MaskError(f"got attn_mask {shape_of(mask)}, takes batch * {num_heads} heads in front")
        mask = mask.reshape(-1, num_heads, *mask.shape[1:])
    elif mask.ndim != 2:
        raise MaskError(f"got attn_mask {shape_of(mask)}, takes (queries, keys) or (batch * heads, queries, keys)")
    return Dense(~mask) if mask.dtype == torch.bool else Bias(mask)


def from_transformers(attention_mask: Tensor | None) -> Mask:
    """Hugging Face transformers' attention_mask.

    2-D (batch, keys): 1 or True = real token. 4-D bool: True = may. 4-D numbers: added, and the smallest number of
    the dtype means blocked there, so a row of nothing else sees nothing. None hides nothing.

    >>> print(from_transformers(torch.tensor([[0, 1, 1]])).matrix(1, 3))
    · ■ ■
    """
    mask = attention_mask
    if mask is None:
        return Full()
    must_be_tensor(mask, "attention_mask")
    if mask.ndim not in (2, 4):
        raise MaskError(f"got attention_mask {shape_of(mask)}, takes (batch, keys) or (batch, heads, queries, keys)")
    if mask.ndim == 2 and mask.is_floating_point():
        raise MaskError(
            f"got attention_mask {shape_of(mask)}, takes integers or bools for (batch, keys), 1 for a real token;"
            " if these numbers are ones and zeros pass attention_mask.bool(), if they are added use Bias"
        )
    if mask.ndim == 2:
        # On a device it would have to be waited for, and a tracer cannot look.
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((mask != 0) & (mask != 1)).any()):
            raise MaskError(
                f"got attention_mask {shape_of(mask)} of other numbers than 0 and 1, takes 1 for a real token; where"
                " they number packed documents use Documents(lengths)"
            )
        return Padding(mask != 0)
    _yes_or_numbers(mask, "attention_mask", "may")
    if mask.dtype == torch.bool:
        return Dense(mask)
    lowest = torch.finfo(mask.dtype).min
    return Bias(mask.masked_fill(mask <= lowest, float("-inf")))


def _yes_or_numbers(mask: Tensor, name: str, true: str) -> None:
    must_be_tensor(mask, name)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise MaskError(
            f"got {name} {shape_of(mask)}, takes bool (True = {true}) or numbers added to scores;"
            f" for ones and zeros pass {name} != 0, if 1 means {true}"
        )
