"""Bias: numbers added to scores, with gradient if they want one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, Rule, Score, Witness, must_be_tensor, narrowed, shape_of
from headway.masks.dense import four_axes
from headway.masks.frame import Frame
from headway.masks.full import Full
from headway.masks.tiles import Blocks, Tiles


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bias(Mask):
    """Added to the scaled scores; -inf blocks, and any finite number is only a number.

    >>> Bias(torch.zeros(1, 8, 16, 16))
    Bias(float32[1, 8, 16, 16])
    """

    bias: Tensor
    kind: ClassVar[str] = "bias"
    adds_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        must_be_tensor(self.bias, "a bias")
        if not self.bias.is_floating_point():
            raise MaskError(
                f"got {shape_of(self.bias)}, takes floating-point numbers; for yes and no use Dense(tensor)"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bias,)

    def __repr__(self) -> str:
        return f"Bias({shape_of(self.bias)})"

    def check(self, frame: Frame) -> None:
        four_axes(self.bias, frame, "a bias")

    def rule(self, frame: Frame) -> Rule:
        return Full().rule(frame)

    def score(self, frame: Frame) -> Score:
        bias = self.wide(frame).expand(frame.batch, frame.heads, frame.q_len, frame.kv_len)
        return lambda score, b, h, q, k: score + narrowed(bias[b, h, q, k], bias.dtype)

    def wide(self, frame: Frame) -> Tensor:
        """The bias with four axes, of which any may be 1."""
        return four_axes(self.moved(self.bias, frame.device), frame, "a bias")

    def keep(self, frame: Frame) -> Tensor:
        # The rule need not say so: -inf blocks as the score it is.
        return ~self.wide(frame).isneginf()

    def added(self, frame: Frame, dtype: torch.dtype) -> Tensor:
        return self.wide(frame)

    def to_additive(self, frame: Frame, dtype: torch.dtype) -> Tensor:
        return narrowed(self.wide(frame), dtype).expand(-1, -1, frame.q_len, frame.kv_len)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        return Full().blocks(frame, tiles)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        # A row of -inf is an empty row, and only the numbers could tell.
        return False
