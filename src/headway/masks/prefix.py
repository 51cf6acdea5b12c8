"""Prefix: the first n keys are open to every query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, Rule, Witness, holds_integers, shape_of
from headway.masks.frame import Frame
from headway.masks.tiles import Blocks, Tiles


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    """The first `n` keys: one number for all, or a tensor with one per batch entry.

    A prefix language model is `Causal() | Prefix(n)`:

    >>> from headway.masks import Causal
    >>> print((Causal() | Prefix(2)).matrix(4, 4))
    ■ ■ · ·
    ■ ■ · ·
    ■ ■ ■ ·
    ■ ■ ■ ■
    """

    n: int | Tensor
    kind: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        n = self.n
        if isinstance(n, Tensor):
            if n.ndim != 1 or not holds_integers(n):
                raise MaskError(f"got {shape_of(n)}, takes an int, or integers with one length per batch entry")
        elif isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise MaskError(f"got n={n!r}, takes an int of 0 or more")

    def __repr__(self) -> str:
        return f"Prefix({shape_of(self.n) if isinstance(self.n, Tensor) else self.n})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prefix) or isinstance(self.n, Tensor) or isinstance(other.n, Tensor):
            return self is other
        return self.n == other.n

    def __hash__(self) -> int:
        return id(self) if isinstance(self.n, Tensor) else hash((Prefix, self.n))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.n,) if isinstance(self.n, Tensor) else ()

    def check(self, frame: Frame) -> None:
        if isinstance(self.n, Tensor):
            if self.n.shape[0] != 1 and self.n.shape[0] != frame.batch:
                raise MaskError(f"got {self.n.shape[0]} prefix lengths, takes 1 or {frame.batch}: one per batch entry")
        elif self.n > frame.kv_len:
            raise MaskError(f"got a prefix of {self.n}, takes at most the {frame.kv_len} keys there are")

    def rule(self, frame: Frame) -> Rule:
        if isinstance(self.n, Tensor):
            lengths = self.moved(self.n, frame.device).expand(frame.batch)
            return lambda b, h, q, k: k < lengths[b]
        n = frame.scalar(self.n)
        return lambda b, h, q, k: k < n

    def keep(self, frame: Frame) -> Tensor:
        return frame.indices()[3] < self._each(frame)

    def _each(self, frame: Frame) -> Tensor | int:
        """The length, or one for each batch entry."""
        return self.moved(self.n, frame.device).view(-1, 1, 1, 1) if isinstance(self.n, Tensor) else self.n

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        return Blocks(tiles.k_ends < self._each(frame))

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return witness is Witness.FIRST_KEY and not isinstance(self.n, Tensor) and self.n > 0
