"""Window: a query sees keys at most `left` before it and `right` after it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from headway.errors import MaskError
from headway.masks.band import Band
from headway.masks.base import Mask, Rule, Witness
from headway.masks.causal import Align, check_align
from headway.masks.frame import Frame
from headway.masks.tiles import Blocks, Tiles


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A sliding window; both bounds are inclusive and None leaves that side open.

    >>> print(Window(left=1, right=0).matrix(3, 3))
    ■ · ·
    ■ ■ ·
    · ■ ■
    """

    left: int | None = None
    right: int | None = None
    align: Align | None = None
    kind: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        check_align(self.align)
        for side, size in (("left", self.left), ("right", self.right)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
                raise MaskError(f"got {side}={size!r}, takes an int of 0 or more, or None for no bound")

    def band(self, frame: Frame) -> Band:
        return Band(self.left, self.right, frame.offset(self.align)).within(frame)

    def check(self, frame: Frame) -> None:
        frame.offset(self.align)

    def rule(self, frame: Frame) -> Rule:
        return self.band(frame).rule(frame)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        return self.band(frame).blocks(tiles)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return self.band(frame).shows(frame, witness)
