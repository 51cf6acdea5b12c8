"""xFormers' biases beside what they mean, worked out here again key by key; nothing of Headway's masks is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from headway.shims.xformers.ops.fmha import attn_bias as ab

LENGTHS = {
    "alike": ([3, 1, 4], [3, 1, 4]),
    "one": ([1], [1]),
    "decoding": ([1, 1, 1], [5, 2, 7]),
    "more keys": ([2, 3, 1], [4, 3, 6]),
    "nothing in some": ([0, 2, 1], [1, 2, 0]),
    "more queries": ([4, 1, 0], [2, 1, 3]),
}


@dataclasses.dataclass(frozen=True)
class Case:
    bias: ab.AttentionBias
    sees: Tensor
    """(queries, keys): which key each query sees."""
    filler: Tensor
    """(keys,): which are in use by nobody, whatever they hold."""
    written: tuple[int, int] | None = None
    """The shape that `materialize` is asked for, if not that of `sees`."""


def band(queries: int, keys: int, left: int | None, right: int | None, lower: bool) -> list[list[bool]]:
    def near(row: int, column: int) -> bool:
        step = column - row - (keys - queries if lower else 0)
        return (left is None or step >= -left) and (right is None or step <= right)

    return [[near(row, column) for column in range(keys)] for row in range(queries)]


def blocks(
    q_lens: Sequence[int], places: Sequence[Sequence[int]], total: int, left: int | None, right: int | None, lower: bool
) -> tuple[Tensor, Tensor]:
    """What queries see, if the keys of each block lie at those places; and which keys are filler."""
    sees, filler = torch.zeros(sum(q_lens), total).bool(), torch.ones(total).bool()
    first = 0
    for queries, keys in zip(q_lens, places, strict=True):
        for row, columns in enumerate(band(queries, len(keys), left, right, lower)):
            for place, seen in zip(keys, columns, strict=True):
                sees[first + row, place] |= seen
        filler[list(keys)] = False
        first += queries
    return sees, filler


def end_to_end(lengths: Sequence[int]) -> list[range]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def fits(lower_causal: bool, q_lens: Sequence[int], k_lens: Sequence[int]) -> bool:
    """Whether xFormers takes them: causal from the lower right wants as many keys as queries."""
    return not lower_causal or all(q <= k for q, k in zip(q_lens, k_lens, strict=True))


def plain(q_lens: list[int], k_lens: list[int]) -> Iterator[tuple[str, Case]]:
    mask, places = ab.BlockDiagonalMask.from_seqlens(q_lens, k_lens), end_to_end(k_lens)

    def case(bias: ab.AttentionBias, *sides: object) -> Case:
        return Case(bias, *blocks(q_lens, places, sum(k_lens), *sides))  # type: ignore[arg-type]

    yield "BlockDiagonalMask", case(mask, None, None, False)
    yield "causal", case(mask.make_causal(), None, 0, False)
    if all(q - 3 < k for q, k in zip(q_lens, k_lens, strict=True)):
        yield "causal local", case(mask.make_local_attention(3), 2, 0, False)
    if fits(True, q_lens, k_lens):
        yield "causal from bottom right", case(mask.make_causal_from_bottomright(), None, 0, True)
        yield "local from bottom right", case(mask.make_local_attention_from_bottomright(2), 1, 0, True)


def padded(q_lens: list[int], k_lens: list[int]) -> Iterator[tuple[str, Case]]:
    room = max(k_lens) + 1
    places = [range(i * room, i * room + length) for i, length in enumerate(k_lens)]

    def case(bias: ab.AttentionBias, *sides: object) -> Case:
        return Case(bias, *blocks(q_lens, places, room * len(k_lens), *sides))  # type: ignore[arg-type]

    made = ab.BlockDiagonalPaddedKeysMask.from_seqlens(q_lens, room, k_lens)
    causal = ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(q_lens, room, k_lens)
    local = ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(q_lens, room, k_lens, 2)
    window = ab.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(q_lens, room, k_lens, 1, 2)
    yield "padded", case(made, None, None, False)
    yield "padded causal", case(causal, None, 0, True)
    yield "padded causal local", case(local, 1, 0, True)
    yield "padded local", case(window, 1, 2, True)
    yield "padded made local", case(made.make_local_attention(0, 1), 0, 1, True)


def gappy(q_lens: list[int], k_lens: list[int]) -> Iterator[tuple[str, Case]]:
    starts, at = [], 1
    for i, length in enumerate(k_lens):
        starts.append(at)
        at += length + i % 2
    total = at + 2
    places = [range(start, start + length) for start, length in zip(starts, k_lens, strict=True)]
    for name, kind, sides in (
        ("gappy", ab.BlockDiagonalGappyKeysMask, (None, None, False)),
        ("gappy causal", ab.BlockDiagonalCausalWithOffsetGappyKeysMask, (None, 0, True)),
    ):
        bias = kind.from_seqlens(q_lens, [*starts, total], k_lens)
        yield name, Case(bias, *blocks(q_lens, places, total, *sides))


def paged(q_lens: list[int], k_lens: list[int]) -> Iterator[tuple[str, Case]]:
    size, skipped = 3, 1
    pages = (max(k_lens) + skipped) // size + 1
    pool = list(torch.randperm(len(k_lens) * pages, generator=torch.Generator().manual_seed(2)).tolist())
    tables = [pool[i * pages : (i + 1) * pages] for i in range(len(k_lens))]
    tables = [[tables[0][0], *table[1:]] if i == len(tables) - 1 else table for i, table in enumerate(tables)]  # shared
    total, table = len(pool) * size, torch.tensor(tables, dtype=torch.int32)
    written = (sum(q_lens), len(k_lens) * pages * size)

    def places(first: int) -> list[list[int]]:
        at = [range(first, first + length) for length in k_lens]
        return [[own[key // size] * size + key % size for key in keys] for own, keys in zip(tables, at, strict=True)]

    offsets = [skipped] * len(k_lens)
    for kind, causal, whole in (
        (ab.PagedBlockDiagonalPaddedKeysMask, ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask, True),
        (ab.PagedBlockDiagonalGappyKeysMask, ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask, False),
    ):
        lengths = (q_lens, k_lens) if whole else (q_lens, offsets, k_lens)
        lie = places(0 if whole else skipped)
        name = "paged" if whole else "paged gappy"
        bias = kind.from_seqlens(*lengths, table, size)
        yield name, Case(bias, *blocks(q_lens, lie, total, None, None, False), written)
        bias = causal.from_seqlens(*lengths, table, size)
        yield f"{name} causal", Case(bias, *blocks(q_lens, lie, total, None, 0, True), written)


def banded(queries: int, keys: int) -> Iterator[tuple[str, Case]]:
    lower = ab.LowerTriangularFromBottomRightMask()
    for name, bias, sides in (
        ("causal", ab.LowerTriangularMask(), (None, 0, False)),
        ("from bottom right", lower, (None, 0, True)),
        ("local from bottom right", lower.make_local_attention(2), (1, 0, True)),
        ("local", ab.LocalAttentionFromBottomRightMask(1, 2), (1, 2, True)),
    ):
        yield name, Case(bias, torch.tensor(band(queries, keys, *sides)), torch.zeros(keys).bool())


Make = Callable[[], Case]


def _each() -> Iterator[tuple[str, Make]]:
    for queries, keys in ((5, 5), (3, 6), (6, 3), (1, 7)):
        for name, _ in banded(queries, keys):
            yield f"{name} {queries}x{keys}", lambda q=queries, k=keys, n=name: dict(banded(q, k))[n]
    for kinds in (plain, padded, gappy, paged):
        for lengths, (queries, keys) in LENGTHS.items():
            for name, _ in kinds(queries, keys):
                yield f"{name}, {lengths}", lambda f=kinds, q=queries, k=keys, n=name: dict(f(list(q), list(k)))[n]


CASES: dict[str, Make] = dict(_each())
IN_BLOCKS = {name: make for name, make in CASES.items() if "," in name}
