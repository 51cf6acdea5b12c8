"""flash_attn_with_kvcache and paged keys: what is written where, and what is seen, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from shims.flash_attn.truth import packed, truth
from torch import Tensor

from headway.errors import RequestError
from headway.shims.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

HEADS, SHARED, DIM, ROOM, PAGE = 4, 2, 16, 12, 4
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "left": {"window_size": (2, -1)},
    "causal slopes": {"causal": True, "alibi_slopes": SLOPES},
    "slopes of each": {"alibi_slopes": torch.rand(3, HEADS, dtype=torch.float64)},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.4},
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def filled(ends: list[int], rows: int | None = None, firsts: list[int] | None = None) -> Tensor:
    """A cache with numbers where they are said to be, and NaN everywhere else."""
    cache = torch.full((rows or len(ends), ROOM, SHARED, DIM), torch.nan, dtype=torch.float64)
    for row, end in enumerate(ends):
        first = firsts[row] if firsts else 0
        cache[row, first:end] = draw(end - first, SHARED, DIM)
    return cache


def expected(q: Tensor, k: Tensor, v: Tensor, ends: list[int], firsts: list[int] | None, **how: Any) -> tuple[Any, Any]:
    slopes = how.pop("alibi_slopes", None)
    each = []
    for b, end in enumerate(ends):
        first = firsts[b] if firsts else 0
        mine = None if slopes is None else slopes.expand(len(q), HEADS)[b]
        each.append(truth(q[b], k[b, first:end], v[b, first:end], alibi_slopes=mine, **how))
    return torch.stack([out for out, _ in each]), torch.stack([lse for _, lse in each])


def check(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert not got[0].requires_grad
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1])


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("firsts", [None, [0, 2, 0]], ids=["", "left pad"])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_rows_of_their_own_lengths(new: int, firsts: list[int] | None, q_len: int, option: dict[str, Any]) -> None:
    ends = [4, 7, 1 if new else 0]
    k_cache, v_cache = filled(ends, firsts=firsts), filled(ends, firsts=firsts)
    after_k, after_v = k_cache.clone(), v_cache.clone()
    q, k, v = draw(3, q_len, HEADS, DIM), draw(3, new, SHARED, DIM), draw(3, new, SHARED, DIM)
    for b, end in enumerate(ends):
        after_k[b, end : end + new], after_v[b, end : end + new] = k[b], v[b]
    got = flash_attn_with_kvcache(
        q, k_cache, v_cache, *((k, v) if new else ()), cache_seqlens=int32(*ends), return_softmax_lse=True,
        cache_leftpad=None if firsts is None else int32(*firsts), **option,
    )  # fmt: skip
    torch.testing.assert_close((k_cache, v_cache), (after_k, after_v), equal_nan=True, rtol=0, atol=0)
    check(got, expected(q, after_k, after_v, [end + new for end in ends], firsts, **option))


@pytest.mark.parametrize("ends", [None, 5], ids=["whole", "one length for all"])
def test_one_length_for_all(ends: int | None) -> None:
    k_cache, v_cache, q = filled([ROOM] * 2), filled([ROOM] * 2), draw(2, 3, HEADS, DIM)
    got = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ends, causal=True, return_softmax_lse=True)
    check(got, expected(q, k_cache, v_cache, [ends or ROOM] * 2, None, causal=True))
    plain = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ends, causal=True, num_splits=3)
    torch.testing.assert_close(plain, got[0])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("option", ["all", "causal", "left"])
@pytest.mark.parametrize("one_length", [False, True])
def test_rotary_at_the_places_in_the_cache(one_length: bool, option: str, interleaved: bool) -> None:
    """Keys turn by their place; so do queries, but without an order all stand where the cache ended."""
    ends, new = [4, 4, 4] if one_length else [4, 7, 0], 3
    k_cache, v_cache = filled(ends), filled(ends)
    q, k, v = draw(3, new, HEADS, DIM), draw(3, new, SHARED, DIM), draw(3, new, SHARED, DIM)
    angles = torch.arange(ROOM, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)

    def turned(x: Tensor, at: int) -> Tensor:
        pairs = x[..., :8].unflatten(-1, (4, 2)) if interleaved else x[..., :8].unflatten(-1, (2, 4)).transpose(-1, -2)
        pairs = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(4, dtype=torch.float64), angles[at])
        back = torch.view_as_real(pairs)
        return torch.cat((back.flatten(-2) if interleaved else back.transpose(-1, -2).flatten(-2), x[..., 8:]), -1)

    after_k, after_v, q_turned = k_cache.clone(), v_cache.clone(), q.clone()
    for b, i in itertools.product(range(3), range(new)):
        after_k[b, ends[b] + i], after_v[b, ends[b] + i] = turned(k[b, i], ends[b] + i), v[b, i]
        q_turned[b, i] = turned(q[b, i], ends[b] + (0 if option == "all" else i))
    before = q.clone(), k.clone()
    got = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angles.cos(), angles.sin(), ends[0] if one_length else int32(*ends),
        rotary_interleaved=interleaved, return_softmax_lse=True, **OPTIONS[option],
    )  # fmt: skip
    torch.testing.assert_close((k_cache, v_cache), (after_k, after_v), equal_nan=True)
    torch.testing.assert_close((q, k), before, rtol=0, atol=0)
    check(got, expected(q_turned, after_k, after_v, [end + new for end in ends], None, **OPTIONS[option]))


def test_rows_of_the_cache_by_index() -> None:
    ends = [4, 7]
    k_cache, v_cache = filled([0] * 5), filled([0] * 5)
    rows = [3, 1]
    for row, end in zip(rows, ends, strict=True):
        k_cache[row, :end], v_cache[row, :end] = draw(end, SHARED, DIM), draw(end, SHARED, DIM)
    q, k, v = draw(2, 2, HEADS, DIM), draw(2, 2, SHARED, DIM), draw(2, 2, SHARED, DIM)
    got = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=int32(*ends), cache_batch_idx=int32(*rows), causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    for b, row in enumerate(rows):
        torch.testing.assert_close(k_cache[row, ends[b] : ends[b] + 2], k[b], rtol=0, atol=0)
    assert k_cache[[0, 2, 4]].isnan().all()
    check(got, expected(q, k_cache[rows], v_cache[rows], [6, 9], None, causal=True))


def in_pages(cache: Tensor) -> tuple[Tensor, Tensor]:
    """The same cache in pages in disorder, among pages of NaN, and the table that finds them."""
    rows, per_row = cache.shape[0], ROOM // PAGE
    table = torch.randperm(rows * per_row + 3)[: rows * per_row].view(rows, per_row)
    pages = torch.full((rows * per_row + 3, PAGE, SHARED, DIM), torch.nan, dtype=torch.float64)
    pages[table] = cache.unflatten(1, (per_row, PAGE))
    return pages, table.to(torch.int32)


@pytest.mark.parametrize("option", ["all", "causal", "window", "causal slopes"])
@pytest.mark.parametrize("new", [0, 1, 5])
def test_pages(new: int, option: str) -> None:
    """New keys go over the edges of pages; pages that nobody uses may be any number."""
    ends = [4, 7, 0 if new else 3]
    torch.manual_seed(1)
    k_rows, v_rows = filled(ends), filled(ends)
    k_cache, table = in_pages(k_rows)
    torch.manual_seed(1)
    v_cache = torch.full_like(k_cache, torch.nan)
    v_cache[table.long()] = v_rows.unflatten(1, (-1, PAGE))
    q, k, v = draw(3, 2, HEADS, DIM), draw(3, new, SHARED, DIM), draw(3, new, SHARED, DIM)
    for b, end in enumerate(ends):
        k_rows[b, end : end + new], v_rows[b, end : end + new] = k[b], v[b]
    used = torch.tensor(ends)[:, None] + new > torch.arange(ROOM // PAGE) * PAGE
    given = torch.where(used, table, -7).to(torch.int32)
    got = flash_attn_with_kvcache(
        q, k_cache, v_cache, *((k, v) if new else ()), cache_seqlens=int32(*ends), block_table=given,
        return_softmax_lse=True, **OPTIONS[option],
    )  # fmt: skip
    torch.testing.assert_close(k_cache[table.long()].flatten(1, 2), k_rows, equal_nan=True, rtol=0, atol=0)
    check(got, expected(q, k_rows, v_rows, [end + new for end in ends], None, **OPTIONS[option]))


@pytest.mark.parametrize("option", ["all", "causal", "window", "slopes of each"])
def test_packed_queries_and_keys_in_pages(option: str) -> None:
    lengths, ends = (3, 0, 2), (5, 7, 0)
    k_rows = filled(list(ends))
    pages, table = in_pages(k_rows)
    q = draw(5, HEADS, DIM).requires_grad_()
    out, lse, _ = flash_attn_varlen_func(
        q, pages, pages, int32(0, 3, 3, 5), int32(0, 5, 12, 12), 3, 7, block_table=table, return_attn_probs=True,
        **OPTIONS[option],
    )  # fmt: skip
    keys = torch.cat([k_rows[b, :end] for b, end in enumerate(ends)])
    wanted, wanted_lse = packed(q, keys, keys, lengths, ends, **OPTIONS[option])
    torch.testing.assert_close((out, lse), (wanted, wanted_lse))
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), q)[0] for x in (out, wanted)))


def test_decoding_step_by_step_is_one_causal_pass() -> None:
    q, k, v = draw(2, 6, HEADS, DIM), draw(2, 6, SHARED, DIM), draw(2, 6, SHARED, DIM)
    k_cache, v_cache = filled([0, 0]), filled([0, 0])
    steps = [
        flash_attn_with_kvcache(q[:, i : i + 1], k_cache, v_cache, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i)
        for i in range(6)
    ]
    wanted = [truth(*x, causal=True)[0] for x in zip(q, k, v, strict=True)]
    torch.testing.assert_close(torch.cat(steps, 1), torch.stack(wanted))


def test_one_graph() -> None:
    ends = [4, 7]
    caches = filled(ends), filled(ends)
    q, k, v = draw(2, 2, HEADS, DIM), draw(2, 2, SHARED, DIM), draw(2, 2, SHARED, DIM)

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor) -> Any:
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=at, causal=True)

    torch.compiler.reset()
    ours, theirs = [x.clone() for x in caches], [x.clone() for x in caches]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, *ours, int32(*ends)), run(q, *theirs, int32(*ends)))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def refused() -> dict[str, tuple[dict[str, Any], str]]:
    q, cache, new = draw(2, 1, HEADS, DIM), filled([4, 4]), draw(2, 1, SHARED, DIM)
    base: dict[str, Any] = {"q": q, "k_cache": cache, "v_cache": cache, "k": new, "v": new, "cache_seqlens": 4}
    table = torch.zeros(2, 3, dtype=torch.int32)
    tables = torch.ones(ROOM, 4, dtype=torch.float64)
    return {
        "k alone": ({**base, "v": None}, "takes both or none"),
        "no place": ({**base, "cache_seqlens": None}, "takes where the cache ends"),
        "no room": ({**base, "cache_seqlens": ROOM}, "leave room"),
        "no room in one row": ({**base, "cache_seqlens": int32(2, ROOM)}, "leave room"),
        "past the end": ({**base, "k": None, "v": None, "cache_seqlens": int32(2, ROOM + 1)}, "from 0 to its room"),
        "below 0": ({**base, "k": None, "v": None, "cache_seqlens": -1}, "0 to its room"),
        "int64": ({**base, "cache_seqlens": torch.tensor([4, 4])}, "takes int32 [2]"),
        "lengths": ({**base, "cache_seqlens": int32(4)}, "takes int32 [2]"),
        "heads": ({**base, "q": draw(2, 1, 3, DIM)}, "got 3 query heads and 2 key heads"),
        "new heads": ({**base, "k": draw(2, 1, 1, DIM), "v": draw(2, 1, 1, DIM)}, "takes the heads and head_dim"),
        "batch": ({**base, "q": draw(3, 1, HEADS, DIM), "k": None, "v": None}, "takes a row for each entry"),
        "cos alone": ({**base, "rotary_cos": tables}, "takes both"),
        "rotary of nothing new": (
            {**base, "k": None, "v": None, "rotary_cos": tables, "rotary_sin": tables}, "new k and v to turn"
        ),
        "short rotary": ({**base, "rotary_cos": tables[:5], "rotary_sin": tables[:5]}, "for 5 positions"),
        "pages and rows": ({**base, "block_table": table, "cache_batch_idx": int32(0, 1)}, "takes it alone"),
        "pages and left pad": ({**base, "block_table": table, "cache_leftpad": int32(0, 1)}, "takes it alone"),
        "table": ({**base, "block_table": table.long()}, "takes int32 (batch, pages)"),
        "pages": (
            {**base, "k": None, "v": None, "block_table": torch.full_like(table, 2)}, "takes pages from 0 to 1"
        ),
        "pages to write": ({**base, "block_table": torch.full_like(table, -1)}, "takes pages from 0 to 1"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused())
def test_what_cannot_be_is_refused_and_writes_nothing(case: str) -> None:
    given, words = refused()[case]
    before = given["k_cache"].clone()
    with pytest.raises(RequestError) as caught:
        flash_attn_with_kvcache(**given)
    assert words in str(caught.value)
    assert torch.equal(given["k_cache"].nan_to_num(), before.nan_to_num())
