"""Tree: branches that share a prefix and do not see each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from headway.errors import MaskError
from headway.masks.base import Mask, Rule, Witness
from headway.masks.causal import Align, check_align
from headway.masks.frame import Frame
from headway.masks.tiles import Blocks, Tiles, per_tile


@dataclasses.dataclass(frozen=True, eq=False, init=False, repr=False)
class Tree(Mask):
    """Each segment sees itself causally and all of its ancestors.

    `parents[i]` is the parent segment of segment i, or -1 for a root; `lengths[i]` its tokens (1 each by default,
    so `parents` alone is a tree of tokens). With more keys than queries the alignment must be named.

    A prefix of two tokens and two branches of one token each:

    >>> print(Tree(parents=[-1, 0, 0], lengths=[2, 1, 1]).matrix(4, 4))
    ■ · · ·
    ■ ■ · ·
    ■ ■ ■ ·
    ■ ■ · ■
    """

    rank: Tensor
    """Each token's place in a walk that finishes one branch before it starts the next."""
    end: Tensor
    """One past the rank of the token's last descendant."""
    align: Align | None
    kind: ClassVar[str] = "tree"

    def __init__(
        self, parents: Sequence[int], lengths: Sequence[int] | None = None, align: Align | None = None
    ) -> None:
        check_align(align)
        counts = [1] * len(parents) if lengths is None else list(lengths)
        if len(counts) != len(parents) or not counts:
            raise MaskError(f"got {len(parents)} parents and {len(counts)} lengths, takes one of each per segment")
        if any(n < 0 for n in counts):
            raise MaskError(f"got lengths {counts}, takes 0 or more")
        rank, end = _walk(list(parents), counts)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "end", end)
        object.__setattr__(self, "align", align)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rank, self.end)

    def __repr__(self) -> str:
        return f"Tree({self.rank.numel()} tokens{'' if self.align is None else f', align={self.align!r}'})"

    def check(self, frame: Frame) -> None:
        frame.offset(self.align)
        if self.rank.numel() != frame.kv_len:
            raise MaskError(f"got a tree of {self.rank.numel()} tokens, takes {frame.kv_len} keys")
        if frame.q_len > frame.kv_len:
            raise MaskError(
                f"got {frame.q_len} queries for a tree of {frame.kv_len} tokens; each query is a token of it"
            )

    def rule(self, frame: Frame) -> Rule:
        own, rank, end = self._placed(frame)
        return lambda b, h, q, k: (rank[k] <= own[q]) & (own[q] < end[k])

    def _placed(self, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """Each query's rank, and each key's rank and end."""
        rank, shift = self.moved(self.rank, frame.device), frame.offset(self.align)
        return rank[shift : shift + frame.q_len], rank, self.moved(self.end, frame.device)

    def blocks(self, frame: Frame, tiles: Tiles) -> Blocks:
        own, rank, end = (per_tile(numbers, tiles.size) for numbers in self._placed(frame))
        low, high = own.amin(-1)[:, None], own.amax(-1)[:, None]
        return Blocks.of(
            some=((rank.amin(-1) <= high) & (low < end.amax(-1)))[None, None],
            every=((rank.amax(-1) <= low) & (high < end.amin(-1)))[None, None],
        )

    def shows(self, frame: Frame, witness: Witness) -> bool:
        lower = self.align == "lower-right" or frame.q_len == frame.kv_len
        return witness is (Witness.LOWER_DIAGONAL if lower else Witness.UPPER_DIAGONAL)


def _walk(parents: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Rank and subtree end of every token, depth first."""
    children: list[list[int]] = [[] for _ in parents]
    roots: list[int] = []
    for segment, parent in enumerate(parents):
        if not -1 <= parent < segment:
            raise MaskError(
                f"got parent {parent} for segment {segment}, takes an earlier segment or -1; list parents first"
            )
        (roots if parent == -1 else children[parent]).append(segment)
    first, last = [0] * len(parents), [0] * len(parents)
    clock, todo = 0, [(root, False) for root in reversed(roots)]
    while todo:
        segment, done = todo.pop()
        if done:
            last[segment] = clock
            continue
        first[segment] = clock
        clock += lengths[segment]
        todo.append((segment, True))
        todo.extend((child, False) for child in reversed(children[segment]))
    rank = [first[s] + i for s, n in enumerate(lengths) for i in range(n)]
    end = [last[s] for s, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor(rank, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)
