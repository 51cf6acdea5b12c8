"""Causal: a query sees its own position and what came before."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, TypeAlias

from headway.errors import MaskError
from headway.masks.band import Band
from headway.masks.base import Mask, Rule, Witness
from headway.masks.frame import Frame
from headway.masks.tiles import Blocks, Tiles

Align: TypeAlias = Literal["upper-left", "lower-right"]


def check_align(align: str | None) -> None:
    if align not in (None, "upper-left", "lower-right"):
        raise MaskError(f"got align={align!r}, takes 'upper-left' or 'lower-right'")


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """No look ahead. On unequal lengths the alignment must be named.

    >>> print(Causal(align="lower-right").matrix(2, 4))
    ■ ■ ■ ·
    ■ ■ ■ ■
    """

    align: Align | None = None
    kind: ClassVar[str] = "causal"

    def __post_init__(self) -> None:
        check_align(self.align)

    def band(self, frame: Frame) -> Band:
        return Band(left=None, right=0, offset=frame.offset(self.align)).within(frame)

    def check(self, frame: Frame) -> None:
        frame.offset(self.align)

    def rule(self, frame: Frame) -> Rule:
        return self.band(frame).rule(frame)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        return self.band(frame).blocks(tiles)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return self.band(frame).shows(frame, witness)
