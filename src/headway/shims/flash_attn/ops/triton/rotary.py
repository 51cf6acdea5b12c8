"""flash_attn.ops.triton.rotary: pairs of features turned by an angle that grows with the position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from headway.errors import RequestError
from headway.masks.base import shape_of
from headway.masks.documents import documents_of
from headway.shims.insist import insist


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """x (batch, length, heads, head_dim), or (tokens, heads, head_dim) with cu_seqlens, its first features turned.

    cos and sin are (positions, rotary_dim / 2) and get no gradient, as in flash-attn. Positions that they do not reach
    are refused; flash-attn leaves such tokens as they are.
    """
    if x.dim() != (4 if cu_seqlens is None else 3):
        raise RequestError(
            f"got x {list(x.shape)}, takes (batch, length, heads, head_dim), or (tokens, heads, head_dim)"
            " with cu_seqlens"
        )
    cos, sin = at_positions(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if inplace:
        return in_place(x, lambda whole: turn_(whole, cos, sin, interleaved, conjugate))
    turned = 2 * cos.shape[-1]
    out = rotated(x[..., :turned], cos, sin, interleaved, conjugate)
    return out if turned == x.shape[-1] else torch.cat((out, x[..., turned:]), dim=-1)


def at_positions(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The row of cos and of sin for each token of x (batch, length, ...), or (tokens, ...) with cu_seqlens."""
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[-1] > x.shape[-1]:
        raise RequestError(
            f"got cos {list(cos.shape)} and sin {list(sin.shape)} for head_dim {x.shape[-1]}, takes the same"
            " (positions, rotary_dim / 2) for both with rotary_dim up to head_dim: give half a head's columns"
        )
    cos, sin = cos.detach(), sin.detach()
    if isinstance(seqlen_offsets, Tensor):
        _check_offsets(seqlen_offsets, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
    if cu_seqlens is not None:
        positions = _packed_positions(x, cu_seqlens, max_seqlen, seqlen_offsets, len(cos))
    elif isinstance(seqlen_offsets, Tensor):
        positions = seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        first, last = seqlen_offsets, seqlen_offsets + x.shape[1]
        _check_reach(x.shape[1], first, len(cos))
        return cos[None, first:last], sin[None, first:last]
    insist(
        ((positions >= 0) & (positions < len(cos))).all(),
        f"got positions outside cos and sin of {len(cos)} rows, takes seqlen_offsets that keep each token inside: "
        "make the tables longer",
    )
    return cos[positions], sin[positions]


def _check_offsets(offsets: Tensor, batch: int) -> None:
    if offsets.shape != (batch,) or offsets.dtype not in (torch.int32, torch.int64):
        raise RequestError(f"got seqlen_offsets {shape_of(offsets)}, takes an int, or int32 or int64 ({batch},)")


def _check_reach(length: int, offset: int, rows: int) -> None:
    if offset < 0 or offset + length > rows:
        raise RequestError(
            f"got cos and sin of {rows} rows for {length} tokens from position {offset}, takes a row for each position:"
            " make the tables longer"
        )


def _packed_positions(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, seqlen_offsets: int | Tensor, rows: int
) -> Tensor:
    """The position of each token in its own sequence, plus that sequence's offset."""
    if max_seqlen is None:
        raise RequestError("got cu_seqlens without max_seqlen, takes both: give the longest sequence's length")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise RequestError(f"got cu_seqlens {shape_of(cu_seqlens)}, takes 1-D int32 (batch + 1,)")
    if not isinstance(seqlen_offsets, Tensor):
        _check_reach(max_seqlen, seqlen_offsets, rows)
    total, lengths = len(x), cu_seqlens.diff()
    insist(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (lengths >= 0).all() & (lengths <= max_seqlen).all(),
        f"got cu_seqlens that do not rise from 0 to {total} in steps of at most max_seqlen={max_seqlen}, takes"
        " cumulative lengths: torch.nn.functional.pad(lengths.cumsum(0), (1, 0))",
    )
    tokens = torch.arange(total, device=x.device, dtype=cu_seqlens.dtype)
    sequences = documents_of(tokens, cu_seqlens).clamp_(0, len(lengths) - 1)
    first = cu_seqlens[:-1] - seqlen_offsets
    return tokens - first[sequences]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """All features of x turned, in float32 at least: halves with each other, or neighbours if interleaved."""
    heads = (1,) * (x.dim() - cos.dim())
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.unflatten(-2, (-1, *heads)).to(wide) for table in (cos, -sin if conjugate else sin))
    one, other = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    one, other = one.to(wide), other.to(wide)
    turned = (one * cos - other * sin, one * sin + other * cos)
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


def turn_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool = False) -> None:
    part = x[..., : 2 * cos.shape[-1]]
    part.copy_(rotated(part, cos, sin, interleaved, conjugate))


def in_place(x: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    """x, changed. A leaf that learns, or one of several views, autograd lets nobody write to: x gets the new numbers
    then, but gradients flow through what is returned alone, as they do in flash-attn."""
    if _takes_writes(x):
        change(x)
        return x
    out = x.clone()
    change(out)
    with torch.no_grad():
        x.copy_(out)
    return out


def _takes_writes(x: Tensor) -> bool:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return True
    if is_compiling():
        return not x.is_leaf
    if not x._is_view():
        return not x.is_leaf
    autograd = torch._C._autograd
    made_by_one = autograd._get_creation_meta(x) == autograd.CreationMeta.DEFAULT
    return made_by_one and x._base is not None and not x._base.is_leaf
