"""Padding: keys that are filler are seen by nobody."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Blocks, Mask, Rule, Tiles, Witness, shape_of
from headway.masks.frame import Frame


@dataclasses.dataclass(frozen=True, eq=False, init=False, repr=False)
class Padding(Mask):
    """Real keys per batch entry: their count, or a bool tensor (batch, keys) that is True for real ones.

    >>> print(Padding([2]).matrix(2, 3))
    ■ ■ ·
    ■ ■ ·
    >>> print(Padding([2], side="left").matrix(1, 3))
    · ■ ■
    """

    lengths: Tensor | None
    real: Tensor | None
    side: Literal["left", "right"]
    shortest: int | None
    """The smallest length where it is known without asking a device."""
    kind: ClassVar[str] = "padding"

    def __init__(self, real: Sequence[int] | Tensor, side: Literal["left", "right"] = "right") -> None:
        given = torch.as_tensor(real)
        as_bool = given.dtype == torch.bool
        if as_bool and given.ndim != 2:
            raise MaskError(f"got {shape_of(given)}, takes bool (batch, keys), True for real keys")
        if not as_bool and (given.ndim != 1 or given.is_floating_point()):
            raise MaskError(f"got {shape_of(given)}, takes one integer length per batch entry, or bool (batch, keys)")
        if side not in ("left", "right"):
            raise MaskError(f"got side={side!r}, takes 'left' or 'right'")
        known = not as_bool and given.device.type == "cpu" and given.numel() > 0
        shortest = int(given.min()) if known else None
        if shortest is not None and shortest < 0:
            raise MaskError(f"got a length of {shortest}, takes 0 or more")
        object.__setattr__(self, "lengths", None if as_bool else given)
        object.__setattr__(self, "real", given if as_bool else None)
        object.__setattr__(self, "side", side)
        object.__setattr__(self, "shortest", shortest)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        held = self.real if self.lengths is None else self.lengths
        assert held is not None
        return (held,)

    def __repr__(self) -> str:
        return f"Padding({shape_of(self.tensors[0])}, side={self.side!r})"

    def check(self, frame: Frame) -> None:
        (held,) = self.tensors
        if held.shape[0] not in (1, frame.batch):
            raise MaskError(f"got padding for {held.shape[0]} batch entries, takes {frame.batch}")
        if self.real is not None and self.real.shape[1] != frame.kv_len:
            raise MaskError(f"got padding over {self.real.shape[1]} keys, takes {frame.kv_len}")
        if self.lengths is not None and self.lengths.device.type == "cpu" and self.lengths.numel():
            longest = int(self.lengths.max())
            if longest > frame.kv_len:
                raise MaskError(f"got a length of {longest}, takes at most the {frame.kv_len} keys there are")

    def rule(self, frame: Frame) -> Rule:
        if self.real is not None:
            real = self.real.to(frame.device).expand(frame.batch, -1)
            return lambda b, h, q, k: real[b, k] & (q >= 0)
        low, high = self._bounds(frame)
        return lambda b, h, q, k: (k >= low[b]) & (k < high[b]) & (q >= 0)

    def _bounds(self, frame: Frame) -> tuple[Tensor, Tensor]:
        assert self.lengths is not None
        lengths = self.lengths.to(frame.device, torch.int32, non_blocking=True).expand(frame.batch)
        if self.side == "right":
            return torch.zeros_like(lengths), lengths
        return frame.kv_len - lengths, torch.full_like(lengths, frame.kv_len)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        first, last = tiles.k_first, tiles.k_last
        if self.lengths is not None:
            count = self.lengths.to(frame.device, non_blocking=True).view(-1, 1, 1, 1)
            if self.side == "right":
                return Blocks(some=first < count, every=last < count)
            return Blocks(some=last >= frame.kv_len - count, every=first >= frame.kv_len - count)
        assert self.real is not None
        # Real keys before each position: a tile's count is a difference of two of these.
        before = torch.nn.functional.pad(self.real.to(frame.device).cumsum(1), (1, 0))
        real = (before[:, last + 1] - before[:, first])[:, None, None]
        return Blocks(some=real > 0, every=real == last - first + 1)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return witness is Witness.FIRST_KEY and self.side == "right" and self.shortest is not None and self.shortest > 0
