"""Prefix: the first n keys are open to every query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Blocks, Mask, Rule, Tiles, Witness, shape_of
from headway.masks.frame import Frame


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
            if n.ndim != 1 or n.is_floating_point():
                raise MaskError(f"got {shape_of(n)}, takes an int, or integers with one length per batch entry")
        elif isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise MaskError(f"got n={n!r}, takes an int of 0 or more")

    def __repr__(self) -> str:
        return f"Prefix({shape_of(self.n) if isinstance(self.n, Tensor) else self.n})"

    def __eq__(self, other: object) -> bool:
        if isinstance(self.n, Tensor):
            return self is other
        return isinstance(other, Prefix) and other.n is not None and self.n == other.n

    def __hash__(self) -> int:
        return id(self) if isinstance(self.n, Tensor) else hash((Prefix, self.n))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.n,) if isinstance(self.n, Tensor) else ()

    def check(self, frame: Frame) -> None:
        if isinstance(self.n, Tensor):
            if self.n.shape[0] not in (1, frame.batch):
                raise MaskError(f"got {self.n.shape[0]} prefix lengths, takes one per batch entry ({frame.batch})")
        elif self.n > frame.kv_len:
            raise MaskError(f"got a prefix of {self.n}, takes at most the {frame.kv_len} keys there are")

    def rule(self, frame: Frame) -> Rule:
        if isinstance(self.n, Tensor):
            lengths = self.n.to(frame.device).expand(frame.batch)
            return lambda b, h, q, k: (k < lengths[b]) & (q >= 0)
        n = frame.scalar(self.n)
        return lambda b, h, q, k: (k < n) & (q >= 0)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        n = self.n.to(frame.device).view(-1, 1, 1, 1) if isinstance(self.n, Tensor) else self.n
        return Blocks(some=tiles.k_first < n, every=tiles.k_last < n)

    def shows(self, frame: Frame, witness: Witness) -> bool:
        return witness is Witness.FIRST_KEY and not isinstance(self.n, Tensor) and self.n > 0
