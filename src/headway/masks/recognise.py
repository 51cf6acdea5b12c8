"""Finds the typed mask that a dense tensor equals, and checks the equality on that very tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import And, Mask, must_be_tensor, shape_of
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
    Padding(int64[1], side='right')
    """
    must_be_tensor(tensor, "a mask")
    if tensor.ndim < 2 or tensor.ndim > 4:
        raise MaskError(
            f"got {shape_of(tensor)}, takes (queries, keys) with up to two axes before them;"
            " for (batch, keys) use from_key_padding_mask or from_transformers"
        )
    if tensor.dtype == torch.bool:
        return _typed_or_dense(tensor)
    if not tensor.is_floating_point():
        raise MaskError(
            f"got {shape_of(tensor)}, takes bool (True = may) or floating point (added to scores);"
            " for a mask of ones and zeros pass mask != 0"
        )
    keep = None if tensor.requires_grad else _yes_and_no(tensor)
    if keep is None:
        return Bias(tensor)
    return _typed_or_dense(keep)


def _yes_and_no(bias: Tensor) -> Tensor | None:
    """What an additive tensor keeps, if it only keeps and blocks and blocking is what its numbers really do."""
    lowest = torch.finfo(bias.dtype).min
    keep, least = bias == 0, bias <= lowest
    if not bool((keep | least).all()):
        return None
    # The smallest finite number blocks only beside a score that wins; alone in a row it makes the mean of V.
    mean_rows = ~keep.any(-1) & (bias == lowest).any(-1)
    return None if bool(mean_rows.any()) else keep


def _typed_or_dense(keep: Tensor) -> Mask:
    typed = _typed(keep)
    return Dense(keep) if typed is None else typed


def _typed(keep: Tensor) -> Mask | None:
    if keep.numel() == 0:
        return Full()
    wide = keep.view((1,) * (4 - keep.ndim) + tuple(keep.shape))
    one_head = wide[:, :1]
    if wide.stride(1) != 0 and not bool((wide == one_head).all()):
        return None
    frame = Frame(wide.shape[2], wide.shape[3], wide.shape[0], 1, wide.device)
    for mask in _candidates(one_head[:, 0], frame):
        if torch.equal(mask.to_bool(frame).expand_as(one_head), one_head):
            return mask
    return None


def _candidates(keep: Tensor, frame: Frame) -> Iterator[Mask]:
    """Masks worth comparing with, cheapest to run first; each is built from what the tensor's edges say."""
    yield Full()
    if frame.kv_len == 1:
        return  # it may stand for any number of keys, and of what lies along them nothing is known
    padding = _padding(keep.any(dim=1), frame)
    if padding is not None:
        yield padding
    if frame.q_len == 1:
        return
    aligns: tuple[Align | None, ...] = (None,) if frame.q_len == frame.kv_len else ("lower-right", "upper-left")
    yield from map(Causal, aligns)  # before any window, which may be one of them seen from the other corner
    for align in aligns:
        causal = Causal(align=align)
        yield from _windows(keep[0], frame, align)
        if padding is not None:
            yield And((causal, padding))
        if align is None:
            yield from _packings(keep[0], causal)
        yield causal | _prefix(keep[:, 0])


def _padding(seen: Tensor, frame: Frame) -> Padding | None:
    """The keys that any query sees, by their number if they lie on one side."""
    if bool(seen.all()):
        return None
    lengths = seen.sum(1).cpu()
    for side in ("right", "left"):
        padding = Padding(lengths, side=side)
        if torch.equal(padding.keep(frame)[:, 0, 0], seen):
            return padding
    return Padding(seen)


def _windows(keep: Tensor, frame: Frame, align: Align | None) -> Iterator[Mask]:
    """The narrowest band around all that is seen."""
    rows = keep.any(-1)
    if not bool(rows.any()):
        return
    own = torch.arange(frame.q_len, device=keep.device) + frame.offset(align)
    first = keep.to(torch.uint8).argmax(-1)
    last = frame.kv_len - 1 - keep.flip(-1).to(torch.uint8).argmax(-1)
    left, right = (max(0, int(reach[rows].max())) for reach in (own - first, last - own))
    band = Window(left, right, align=align).band(frame)
    if (band.left, band.right) not in ((None, None), (None, 0)):
        yield Window(band.left, band.right, align=align)


def _packings(keep: Tensor, causal: Mask) -> Iterator[Mask]:
    """Documents start where a token does not see the one before it."""
    before = keep.diagonal(offset=-1)
    starts = torch.nn.functional.pad((~before).nonzero().flatten() + 1, (1, 0))
    lengths = torch.nn.functional.pad(starts, (0, 1), value=keep.shape[0]).diff()
    if lengths.numel() > 1:
        documents = Documents(lengths)
        yield documents
        yield And((causal, documents))


def _prefix(first_row: Tensor) -> Prefix:
    """As many keys as the first query sees from the start, in each batch entry."""
    lengths = first_row.to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
    return Prefix(int(lengths[0])) if bool((lengths == lengths[0]).all()) else Prefix(lengths)
