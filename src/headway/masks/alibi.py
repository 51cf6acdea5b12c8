"""Alibi: scores fall off linearly with distance, at a slope per head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, Rule, Score, Witness, must_be_tensor, shape_of
from headway.masks.causal import Align, check_align
from headway.masks.frame import Frame
from headway.masks.full import Full
from headway.masks.tiles import Blocks, Tiles


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Alibi(Mask):
    """Adds -slope * |distance| (Press et al., 2021, in flash attention's symmetric form).

    `slopes` has one number per head. On unequal lengths the alignment must be named.
    """

    slopes: Tensor
    align: Align | None = None
    kind: ClassVar[str] = "alibi"
    adds_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_align(self.align)
        must_be_tensor(self.slopes, "slopes")
        if self.slopes.ndim != 1 or not self.slopes.is_floating_point():
            raise MaskError(f"got slopes {shape_of(self.slopes)}, takes one floating-point number per head")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def __repr__(self) -> str:
        return f"Alibi({shape_of(self.slopes)}, align={self.align!r})"

    def check(self, frame: Frame) -> None:
        frame.offset(self.align)
        if self.slopes.shape[0] != frame.heads:
            raise MaskError(f"got {self.slopes.shape[0]} slopes, takes one per head ({frame.heads})")

    def rule(self, frame: Frame) -> Rule:
        return Full().rule(frame)

    def score(self, frame: Frame) -> Score:
        slopes, offset = self.moved(self.slopes, frame.device), frame.scalar(frame.offset(self.align))

        def fall(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            # Never narrower than float32: distances have more digits than a half-precision number.
            slope = slopes[h].to(torch.float64 if score.dtype == torch.float64 else torch.float32)
            return score - slope * (q + offset - k).abs()

        return fall

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        return Full().blocks(frame, tiles)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return True
