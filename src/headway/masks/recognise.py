"""Finds the typed mask that a dense tensor equals, and checks the equality on that very tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import And, Mask, shape_of
from headway.masks.bias import Bias
from headway.masks.causal import Align, Causal
from headway.masks.dense import Dense
from headway.masks.documents import Documents
from headway.masks.frame import Frame
from headway.masks.full import Full
from headway.masks.padding import Padding
from headway.masks.prefix import Prefix
from headway.masks.window import Window


def recognise(tensor: Tensor) -> Mask:
    """The typed mask equal to a dense bool (True = may) or additive tensor, else Dense or Bias of it.

    The tensor is read, so on an accelerator this waits for it. An additive tensor is a yes-and-no mask if it holds
    only 0 and numbers that block (-inf, or the smallest of its dtype in rows that see something else).

    >>> recognise(torch.ones(4, 4, dtype=torch.bool).tril())
    Causal(align=None)
    >>> recognise(torch.zeros(2, 4).index_fill(1, torch.tensor([3]), float("-inf")))
    Padding(bool[1, 4], side='right')
    """
    if tensor.ndim < 2 or tensor.ndim > 4:
        raise MaskError(f"got {shape_of(tensor)}, takes (queries, keys) with up to two axes before them")
    if tensor.dtype == torch.bool:
        return _typed(tensor) or Dense(tensor)
    if not tensor.is_floating_point():
        raise MaskError(f"got {shape_of(tensor)}, takes bool (True = may) or floating point (added to scores)")
    keep = _yes_and_no(tensor)
    if keep is None:
        return Bias(tensor)
    return _typed(keep) or Dense(keep)


def _yes_and_no(bias: Tensor) -> Tensor | None:
    """What an additive tensor keeps, if it only keeps and blocks and blocking is what its numbers really do."""
    lowest = torch.finfo(bias.dtype).min
    keep, least, never = bias == 0, bias <= lowest, torch.isneginf(bias)
    if not bool((keep | least).all()):
        return None
    # The smallest finite number blocks only beside a score that wins; alone in a row it makes the mean of V.
    mean_rows = ~keep.any(-1, keepdim=True) & (least & ~never).any(-1, keepdim=True)
    return None if bool(mean_rows.any()) or bias.requires_grad else keep


def _typed(keep: Tensor) -> Mask | None:
    wide = keep.view((1,) * (4 - keep.ndim) + tuple(keep.shape))
    if wide.stride(1) == 0 or bool((wide == wide[:, :1]).all()):
        wide = wide[:, :1]
    else:
        return None
    frame = Frame(wide.shape[2], wide.shape[3], wide.shape[0], 1, wide.device)
    for mask in _candidates(wide[:, 0], frame):
        if torch.equal(mask.to_bool(frame).expand_as(wide), wide):
            return mask
    return None


def _candidates(keep: Tensor, frame: Frame) -> Iterator[Mask]:
    """Masks worth comparing with, cheapest to run first; each is built from what the tensor's edges say."""
    yield Full()
    if frame.q_len == 0 or frame.kv_len == 0:
        return
    aligns: tuple[Align | None, ...] = (None,) if frame.q_len == frame.kv_len else ("lower-right", "upper-left")
    seen = keep.any(dim=1)
    padding = None if bool(seen.all()) else Padding(seen)
    if padding is not None:
        yield padding
    for align in aligns:
        causal = Causal(align=align)
        yield causal
        yield from _windows(keep, frame, align)
        if padding is not None:
            yield And((causal, padding))
        if align is None:
            yield from _packings(keep[0], causal)
        prefix = int(keep[0, 0].long().cumprod(0).sum())
        yield causal | Prefix(prefix)


def _windows(keep: Tensor, frame: Frame, align: Align | None) -> Iterator[Mask]:
    q, k = keep[0].nonzero(as_tuple=True)
    if q.numel() == 0:
        return
    distance = k - q - frame.offset(align)
    left, right = max(0, -int(distance.min())), max(0, int(distance.max()))
    open_left = None if left >= frame.q_len - 1 + frame.offset(align) else left
    open_right = None if right >= frame.kv_len - 1 - frame.offset(align) else right
    if open_left is not None or open_right not in (None, 0):
        yield Window(open_left, open_right, align=align)


def _packings(keep: Tensor, causal: Mask) -> Iterator[Mask]:
    """Documents start where a token does not see the one before it."""
    before = keep.diagonal(offset=-1)
    starts = torch.nn.functional.pad((~before).nonzero().flatten() + 1, (1, 0))
    lengths = torch.nn.functional.pad(starts, (0, 1), value=keep.shape[0]).diff()
    if lengths.numel() > 1:
        documents = Documents(lengths)
        yield documents
        yield And((causal, documents))
