"""Documents and cu_seqlens."""

from __future__ import annotations

import by_hand
import pytest
import torch
from drawn import cuts
from hypothesis import given, settings
from hypothesis import strategies as st

from headway import MaskError
from headway.masks import Causal, Documents, Frame


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_documents(data: st.DataObject) -> None:
    q_len, kv_len, count = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)))
    lengths, kv_lengths = cuts(data.draw, q_len, count), cuts(data.draw, kv_len, count)
    frame = Frame(q_len, kv_len, batch=2)
    truth = by_hand.table(frame, by_hand.documents(lengths, kv_lengths))
    assert torch.equal(Documents(lengths, kv_lengths).to_bool(frame).expand_as(truth), truth)
    square = Frame(q_len, q_len)
    truth = by_hand.table(square, by_hand.documents(lengths))
    assert torch.equal(Documents(torch.tensor(lengths)).to_bool(square), truth)
    # From cumulative lengths, with or without what can be read from them.
    ends = torch.tensor([0, *(sum(lengths[: i + 1]) for i in range(count))], dtype=torch.int32)
    for known in ({}, {"total": q_len}, {"longest": max(lengths)}, {"longest": max(lengths), "total": q_len}):
        mask = Documents.from_cu_seqlens(ends, **known)
        assert torch.equal(mask.to_bool(square), truth)
        assert (mask.queries.total, mask.queries.longest) == (q_len, max(lengths))
        assert mask.queries.starts.dtype == torch.int32
        assert mask.one_packing


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_to_cu_seqlens(data: st.DataObject) -> None:
    """Rows of the batch end to end: between two starts lie the tokens that may see each other, and no others."""
    q_len, kv_len, count = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4)))
    lengths, kv_lengths = cuts(data.draw, q_len, count), cuts(data.draw, kv_len, count)
    batch = data.draw(st.integers(1, 3))
    cu_q, cu_k, longest_q, longest_k = Documents(lengths, kv_lengths).to_cu_seqlens(Frame(q_len, kv_len, batch))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q[0], cu_k[0], cu_q[-1], cu_k[-1]) == (0, 0, batch * q_len, batch * kv_len)
    assert cu_q.diff().tolist() == lengths * batch
    assert cu_k.diff().tolist() == kv_lengths * batch
    assert (longest_q, longest_k) == (max(lengths), max(kv_lengths))


def test_to_cu_seqlens_checks_and_names_the_way_out() -> None:
    with pytest.raises(MaskError, match=r"got documents of 3 tokens in all"):
        Documents([1, 2]).to_cu_seqlens(Frame(4, 4))
    with pytest.raises(MaskError, match=r"got and, takes Documents or Padding\(lengths\).*ask the part that is one"):
        (Causal() & Documents([1, 2])).to_cu_seqlens(Frame(3, 3))


def test_the_same_lengths_twice_are_one_packing() -> None:
    assert Documents([2, 1]).one_packing
    assert Documents([2, 1], [2, 1]).one_packing
    assert not Documents([2, 1], [1, 2]).one_packing


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Documents([]), r"got lengths float32\[0\], takes one integer per document"),
        (lambda: Documents([1.5]), r"got lengths float32\[1\], takes one integer per document"),
        (lambda: Documents([True]), r"got lengths bool\[1\], takes one integer per document"),
        (lambda: Documents(torch.ones(2, 2).long()), r"got lengths int64\[2, 2\], takes one integer per document"),
        (lambda: Documents([2, -1]), r"got a document of length -1, takes lengths of 0 or more"),
        (lambda: Documents([1, 2], [3]), r"got 2 query documents and 1 key documents, takes as many of one"),
        (
            lambda: Documents.from_cu_seqlens(torch.tensor([0.0, 1.0])),
            r"got cu_seqlens float32\[2\], takes 1-D integers",
        ),
        (
            lambda: Documents.from_cu_seqlens(torch.tensor([False, True])),
            r"got cu_seqlens bool\[2\], takes 1-D integers",
        ),
        (lambda: Documents.from_cu_seqlens(torch.tensor([0])), r"got cu_seqlens int64\[1\], takes 1-D integers"),
        (
            lambda: Documents.from_cu_seqlens(torch.tensor([1, 3])),
            r"got cu_seqlens that start at 1, takes a start of 0",
        ),
        (lambda: Documents.from_cu_seqlens(torch.tensor([0, 3, 2])), r"got a document of length -1"),
        (lambda: Documents.from_cu_seqlens(torch.tensor([0, 3]), total=4), r"got total=4, .* say 3; leave total out"),
        (
            lambda: Documents.from_cu_seqlens(torch.tensor([0, 3]), longest=2),
            r"got longest=2, .* say 3; leave longest out",
        ),
        (lambda: Documents([1, 2]).to_bool(Frame(4, 4)), r"got documents of 3 tokens in all for 4 queries"),
        (lambda: Documents([1, 2], [1, 3]).to_bool(Frame(3, 3)), r"got documents of 4 tokens in all for 3 keys"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        make()


def test_a_copy_on_another_device_is_made_once() -> None:
    packing = Documents([1, 2]).queries
    meta = torch.device("meta")
    first = packing.on(meta)
    assert first.device == meta
    assert packing.on(meta) is first
    assert packing.on(torch.device("cpu")) is packing.starts


def test_cumulative_lengths_for_lengths_are_noticed() -> None:
    with pytest.raises(MaskError, match=r"look like cumulative lengths, which Documents.from_cu_seqlens takes"):
        Documents(torch.tensor([0, 5, 13, 16])).check(Frame(16, 16))
