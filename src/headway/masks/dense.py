"""Dense: a bool tensor that says for each query and key whether it may."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, Rule, must_be_tensor, shape_of
from headway.masks.frame import Frame


def four_axes(tensor: Tensor, frame: Frame, what: str) -> Tensor:
    """`tensor` seen as (batch or 1, heads or 1, queries or 1, keys or 1), or MaskError."""
    if tensor.ndim > 4:
        raise MaskError(f"got {what} {shape_of(tensor)}, takes at most 4 axes (batch, heads, queries, keys)")
    wide = tensor.view((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
    room = (frame.batch, frame.heads, frame.q_len, frame.kv_len)
    for name, have, want in zip(("batch", "heads", "queries", "keys"), wide.shape, room, strict=True):
        if have != 1 and have != want:
            raise MaskError(f"got {what} {shape_of(tensor)} with {name} {have}, takes 1 or {want}; it is (B, H, L, S)")
    return wide


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """True where attention may go; broadcast over batch, heads, queries and keys.

    >>> print(Dense(torch.tensor([[True, False], [True, True]])).matrix(2, 2))
    ■ ·
    ■ ■
    """

    may: Tensor
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        must_be_tensor(self.may, "a mask")
        if self.may.dtype != torch.bool:
            raise MaskError(
                f"got {shape_of(self.may)}, takes a bool tensor that is True where attention may go;"
                " for numbers added to scores use Bias(tensor)"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.may,)

    def __repr__(self) -> str:
        return f"Dense({shape_of(self.may)})"

    def check(self, frame: Frame) -> None:
        four_axes(self.may, frame, "a mask")

    def rule(self, frame: Frame) -> Rule:
        may = self.keep(frame).expand(frame.batch, frame.heads, frame.q_len, frame.kv_len)
        return lambda b, h, q, k: may[b, h, q, k]

    def keep(self, frame: Frame) -> Tensor:
        # As given, not gathered: a mask of one batch entry must not grow to all of them.
        return four_axes(self.moved(self.may, frame.device), frame, "a mask")
