"""What each mask means, in plain Python, one query and key at a time: the truth that tests of masks compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headway.masks import Frame

Sees = Callable[[int, int, int, int], bool]
"""May query q of batch entry b and head h see key k?"""


def table(frame: Frame, sees: Sees) -> Tensor:
    """The answer for every batch entry, head, query and key."""
    b, h, q, k = (range(n) for n in (frame.batch, frame.heads, frame.q_len, frame.kv_len))
    cells = [bool(sees(i, j, x, y)) for i in b for j in h for x in q for y in k]
    return torch.tensor(cells, dtype=torch.bool).view(frame.batch, frame.heads, frame.q_len, frame.kv_len)


def shift_of(frame: Frame, align: str | None) -> int:
    return frame.kv_len - frame.q_len if align == "lower-right" else 0


def causal(frame: Frame, align: str | None = None) -> Sees:
    shift = shift_of(frame, align)
    return lambda b, h, q, k: k <= q + shift


def window(frame: Frame, left: int | None, right: int | None, align: str | None = None) -> Sees:
    shift = shift_of(frame, align)

    def sees(b: int, h: int, q: int, k: int) -> bool:
        middle = q + shift
        return not (left is not None and k < middle - left) and not (right is not None and k > middle + right)

    return sees


def prefix(n: int | Sequence[int]) -> Sees:
    if isinstance(n, int):
        return lambda b, h, q, k: k < n
    return lambda b, h, q, k: k < n[b if len(n) > 1 else 0]


def documents(lengths: Sequence[int], kv_lengths: Sequence[int] | None = None) -> Sees:
    q_of = [i for i, n in enumerate(lengths) for _ in range(n)]
    k_of = [i for i, n in enumerate(lengths if kv_lengths is None else kv_lengths) for _ in range(n)]
    return lambda b, h, q, k: q_of[q] == k_of[k]


def padding(frame: Frame, lengths: Sequence[int], side: str = "right") -> Sees:
    def sees(b: int, h: int, q: int, k: int) -> bool:
        n = lengths[b if len(lengths) > 1 else 0]
        return k < n if side == "right" else k >= frame.kv_len - n

    return sees


def tree(frame: Frame, parents: Sequence[int], lengths: Sequence[int], align: str | None = None) -> Sees:
    segment_of = [i for i, n in enumerate(lengths) for _ in range(n)]
    shift = shift_of(frame, align)

    def sees(b: int, h: int, q: int, k: int) -> bool:
        token = q + shift
        if segment_of[k] == segment_of[token]:
            return k <= token
        above = parents[segment_of[token]]
        while above != -1:
            if above == segment_of[k]:
                return True
            above = parents[above]
        return False

    return sees
