"""Padding: keys that are filler are seen by nobody."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import CuSeqlens, Mask, Rule, Witness, holds_integers, shape_of
from headway.masks.frame import Frame
from headway.masks.memo import is_traced
from headway.masks.tiles import Blocks, Tiles, per_tile


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
    """Where the filler is; bools say it themselves."""
    shortest: int | None
    """The smallest and the largest length, where they are known without asking a device."""
    longest: int | None
    kind: ClassVar[str] = "padding"

    def __init__(self, real: Sequence[int] | Tensor, side: Literal["left", "right"] = "right") -> None:
        given = torch.as_tensor(real)
        as_bool = given.dtype == torch.bool
        if as_bool and given.ndim != 2:
            raise MaskError(f"got {shape_of(given)}, takes bool (batch, keys), True for real keys")
        if not as_bool and (given.ndim != 1 or not holds_integers(given)):
            raise MaskError(
                f"got {shape_of(given)}, takes one integer length per batch entry, or bool (batch, keys);"
                " for ones and zeros use from_transformers(tensor)"
            )
        if side not in ("left", "right"):
            raise MaskError(f"got side={side!r}, takes 'left' or 'right'")
        if as_bool and side == "left":
            raise MaskError("got side='left' with bools, which say themselves where the filler is; leave side out")
        known: list[int] = []
        if not as_bool and given.device.type == "cpu" and not is_traced():
            given = given.clone()  # what is found out about it must stay true
            known = given.tolist()
        if known and min(known) < 0:
            raise MaskError(f"got a length of {min(known)}, takes 0 or more")
        object.__setattr__(self, "lengths", None if as_bool else given)
        object.__setattr__(self, "real", given if as_bool else None)
        object.__setattr__(self, "side", side)
        object.__setattr__(self, "shortest", min(known) if known else None)
        object.__setattr__(self, "longest", max(known) if known else None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        held = self.real if self.lengths is None else self.lengths
        assert held is not None
        return (held,)

    def __repr__(self) -> str:
        side = "" if self.lengths is None else f", side={self.side!r}"
        return f"Padding({shape_of(self.tensors[0])}{side})"

    def check(self, frame: Frame) -> None:
        (held,) = self.tensors
        if held.shape[0] != 1 and held.shape[0] != frame.batch:
            raise MaskError(f"got padding for {held.shape[0]} batch entries, takes 1 or {frame.batch}")
        if self.real is not None and self.real.shape[1] != frame.kv_len:
            raise MaskError(f"got padding over {self.real.shape[1]} keys, takes {frame.kv_len}")
        if self.longest is not None and self.longest > frame.kv_len:
            raise MaskError(f"got a length of {self.longest}, takes at most the {frame.kv_len} keys there are")

    def rule(self, frame: Frame) -> Rule:
        held = self.moved(self.tensors[0], frame.device)
        if self.real is not None:
            real = held.expand(frame.batch, -1)
            return lambda b, h, q, k: real[b, k]
        edge = self._edge(held.to(torch.int32), frame).expand(frame.batch)
        return (lambda b, h, q, k: k < edge[b]) if self.side == "right" else (lambda b, h, q, k: k >= edge[b])

    def keep(self, frame: Frame) -> Tensor:
        held = self.moved(self.tensors[0], frame.device)
        if self.real is not None:
            return held[:, None, None]
        (*_, k), edge = frame.indices(), self._edge(held, frame).view(-1, 1, 1, 1)
        return k < edge if self.side == "right" else k >= edge

    def _edge(self, lengths: Tensor, frame: Frame) -> Tensor:
        """Where the filler starts on the right, or ends on the left."""
        return lengths if self.side == "right" else frame.kv_len - lengths

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        held = self.moved(self.tensors[0], frame.device)
        if self.real is not None:
            cells = per_tile(held, tiles.size)[:, None, None]
            return Blocks.of(some=cells.any(-1), every=cells.all(-1))
        edge = self._edge(held, frame).view(-1, 1, 1, 1)
        return Blocks(tiles.k_ends < edge if self.side == "right" else tiles.k_back >= edge)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return witness is Witness.FIRST_KEY and self.side == "right" and self.shortest is not None and self.shortest > 0

    def to_cu_seqlens(self, frame: Frame) -> CuSeqlens:
        """For all queries laid end to end, and keys and values laid end to end without their filler.

        >>> Padding([2, 3]).to_cu_seqlens(Frame(q_len=1, kv_len=3, batch=2))[:2]
        (tensor([0, 1, 2], dtype=torch.int32), tensor([0, 2, 5], dtype=torch.int32))
        """
        self.check(frame)
        if self.lengths is None or self.side == "left":
            raise MaskError(
                f"got {self!r}, takes Padding(lengths) with the filler on the right;"
                " move the real keys to the front and count them: Padding(real.sum(1))"
            )
        q_starts = torch.arange(frame.batch + 1, dtype=torch.int32, device=frame.device) * frame.q_len
        lengths = self.moved(self.lengths, frame.device).expand(frame.batch)
        k_starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return q_starts, k_starts, frame.q_len, frame.kv_len if self.longest is None else self.longest
