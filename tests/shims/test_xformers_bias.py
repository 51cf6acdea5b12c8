"""xFormers' biases: each written out is what its definition says, and what is made of them is what it should be."""

from __future__ import annotations

import re

import pytest
import torch
from shims.biases import CASES, Make
from torch import Tensor

from headway.errors import RequestError
from headway.shims.xformers.ops.fmha import attn_bias as ab
from headway.shims.xformers.ops.fmha.seqinfo import _GappySeqInfo, _PaddedSeqLenInfo, _SeqLenInfo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_written_out_it_is_its_definition(make: Make, dtype: torch.dtype) -> None:
    case = make()
    used = int(case.sees.any(0).nonzero().max()) + 1 if case.written else case.sees.shape[1]
    written = case.bias.materialize((2, *(case.written or case.sees.shape)), dtype)
    assert written.dtype == dtype
    width = written.shape[2]  # of pages, up to the last that a table names
    assert used <= width <= case.sees.shape[1]
    want = torch.where(case.sees[:, :width], 0.0, float("-inf")).to(dtype)
    assert torch.equal(written, want.expand(2, -1, -1))


def test_a_bias_to_add_is_added() -> None:
    numbers = torch.randn(2, 3, 4, 5)
    bias = ab.LowerTriangularMask().add_bias(numbers)
    assert isinstance(bias, ab.LowerTriangularMask)
    assert torch.equal(bias.materialize((2, 3, 4, 5)), numbers + ab.LowerTriangularMask().materialize((2, 3, 4, 5)))


def test_tensors_of_several_lengths_and_batches_come_apart_as_they_were() -> None:
    given = [torch.randn(1, 3, 2, 4), torch.randn(2, 0, 2, 4), torch.randn(3, 2, 2, 4)]
    bias, packed = ab.BlockDiagonalMask.from_tensor_list(given)
    assert packed.shape == (1, 9, 2, 4)
    assert bias.q_seqinfo.seqstart_py == [0, 3, 3, 3, 5, 7, 9]
    assert all(torch.equal(one, other) for one, other in zip(bias.split(packed), given, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(bias.make_causal().split(packed), given, strict=True))


def test_queries_and_keys_of_other_lengths_come_apart_each() -> None:
    queries, keys = [torch.randn(2, 3, 4), torch.randn(1, 1, 4)], [torch.randn(2, 5, 4), torch.randn(1, 2, 4)]
    bias, q, k, v = ab.BlockDiagonalMask.from_tensor_lists_qkv(queries, keys, keys)
    assert v is not None
    assert (q.shape[1], k.shape[1], v.shape[1]) == (7, 12, 12)
    for apart, given in ((bias.split_queries(q), queries), (bias.split_kv(k), keys)):
        assert all(torch.equal(one, other) for one, other in zip(apart, given, strict=True))
    assert ab.BlockDiagonalMask.from_tensor_lists_qkv(queries, keys)[3] is None
    with pytest.raises(RequestError, match="split_queries or split_kv"):
        bias.split(q)


def test_one_info_serves_both_if_their_lengths_are_equal() -> None:
    bias = ab.BlockDiagonalMask.from_seqlens([1, 2], [1, 2])
    assert bias.q_seqinfo is bias.k_seqinfo
    assert (bias.q_seqinfo.max_seqlen, bias.q_seqinfo.min_seqlen) == (2, 1)
    assert torch.equal(bias.q_seqinfo.seqstart, torch.tensor([0, 1, 3], dtype=torch.int32))
    assert list(bias.q_seqinfo.intervals()) == [(0, 1), (1, 3)]


def test_infos_say_where_keys_lie() -> None:
    padded = _PaddedSeqLenInfo.from_seqlens_padded([2, 3], 4)
    assert padded.seqstart_py == [0, 4, 8]
    assert list(padded.intervals()) == [(0, 2), (4, 7)]
    gappy = _GappySeqInfo.from_seqlens_gappy([1, 5, 9], [2, 3], False, device=torch.device("cpu"))
    assert list(gappy.intervals()) == [(1, 3), (5, 8)]
    pages = _GappySeqInfo.from_seqlens_gappy([1, 0], [2, 3], True, device=torch.device("cpu"))
    assert (pages.seqstart_py, list(pages.seqlen_py), pages.seqlen.tolist()) == ([1, 0, -1], [3, 3], [3, 3])


def test_what_is_on_a_device_already_stays_the_same_object() -> None:
    for name in ("BlockDiagonalMask, alike", "padded causal local, alike", "paged gappy, alike", "local 5x5"):
        bias = CASES[name]().bias
        assert bias.to("cpu") is bias  # type: ignore[attr-defined]
        moved = bias.to("meta")  # type: ignore[attr-defined]
        assert type(moved) is type(bias)
        if "," in name:
            assert moved.q_seqinfo.seqstart.device.type == moved.k_seqinfo.seqstart.device.type == "meta"


def test_kinds_are_kinds_of_each_other_as_code_asks() -> None:
    for kind, base in (
        (ab.BlockDiagonalCausalMask, ab.BlockDiagonalMask),
        (ab.BlockDiagonalCausalFromBottomRightMask, ab.BlockDiagonalMask),
        (ab.BlockDiagonalCausalLocalAttentionMask, ab.BlockDiagonalCausalMask),
        (ab.BlockDiagonalCausalLocalAttentionFromBottomRightMask, ab.BlockDiagonalCausalFromBottomRightMask),
        (ab.BlockDiagonalCausalWithOffsetPaddedKeysMask, ab.BlockDiagonalPaddedKeysMask),
        (ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask, ab.BlockDiagonalPaddedKeysMask),
        (ab.BlockDiagonalCausalWithOffsetGappyKeysMask, ab.BlockDiagonalGappyKeysMask),
        (ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask, ab.PagedBlockDiagonalPaddedKeysMask),
        (ab.LowerTriangularMaskWithTensorBias, ab.LowerTriangularMask),
        (ab.LowerTriangularFromBottomRightLocalAttentionMask, ab.LowerTriangularFromBottomRightMask),
    ):
        assert issubclass(kind, base)
        assert issubclass(kind, ab.AttentionBias)
    assert not issubclass(ab.BlockDiagonalPaddedKeysMask, ab.BlockDiagonalMask)
    assert not issubclass(ab.PagedBlockDiagonalPaddedKeysMask, ab.BlockDiagonalPaddedKeysMask)


def written(bias: ab.AttentionBias, *shape: int) -> Tensor:
    return bias.materialize(shape)


def test_padded_keys_go_into_pages() -> None:
    tables = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    for kind, paged in (
        (ab.BlockDiagonalPaddedKeysMask, ab.PagedBlockDiagonalPaddedKeysMask),
        (ab.BlockDiagonalCausalWithOffsetPaddedKeysMask, ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask),
    ):
        made = kind.from_seqlens([1, 2], 4, [3, 4]).make_paged(tables, 2, paged)
        assert type(made) is paged
        want = paged.from_seqlens([1, 2], [3, 4], tables, 2)
        assert torch.equal(written(made, 3, 8), written(want, 3, 8))


def test_gappy_keys_go_into_pages() -> None:
    tables = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    for kind, paged in (
        (ab.BlockDiagonalGappyKeysMask, ab.PagedBlockDiagonalGappyKeysMask),
        (ab.BlockDiagonalCausalWithOffsetGappyKeysMask, ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask),
    ):
        made = kind.from_seqlens([1, 2], [1, 8, 16], [3, 2]).make_paged(tables, 2, 8, paged)
        want = paged.from_seqlens([1, 2], [1, 0], [3, 2], tables, 2)
        assert torch.equal(written(made, 3, 8), written(want, 3, 8))
        assert made.k_seqinfo.seqlen.tolist() == want.k_seqinfo.seqlen.tolist() == [4, 2]  # type: ignore[attr-defined]


def test_lengths_change_in_place() -> None:
    info = _SeqLenInfo.from_seqlens([4, 2])
    tensor = info.seqstart
    info.from_seqlens_inplace([1, 3])
    assert (tensor.tolist(), info.seqstart_py) == ([0, 1, 4], [0, 1, 4])
    padded = _PaddedSeqLenInfo.from_seqlens_padded([4, 2], 6)
    padded.from_seqlens_padded_inplace([1, 3])
    assert (padded.seqlen.tolist(), padded.seqlen_py, padded.seqstart_py) == ([1, 3], [1, 3], [0, 6, 12])
    for change in (info.from_seqlens_inplace, padded.from_seqlens_padded_inplace):
        with pytest.raises(RequestError, match="takes 2 of at most the max_seqlen of 4"):
            change([5, 1])
        with pytest.raises(RequestError, match="got 1 lengths"):
            change([1])


REFUSED = {
    "lengths in a tensor": (lambda: ab.BlockDiagonalMask.from_seqlens(torch.tensor([1])), "lengths.tolist()"),
    "no lengths": (lambda: ab.BlockDiagonalMask.from_seqlens([]), "one per sequence"),
    "negative": (lambda: ab.BlockDiagonalMask.from_seqlens([2, -1]), "got a length of -1"),
    "other blocks": (lambda: ab.BlockDiagonalMask.from_seqlens([1, 2], [3]), "2 blocks of queries and 1 of keys"),
    "too long for its room": (
        lambda: ab.BlockDiagonalPaddedKeysMask.from_seqlens([1], 2, [3]),
        "the padding of 2",
    ),
    "more queries": (
        lambda: ab.BlockDiagonalMask.from_seqlens([3], [2]).make_causal_from_bottomright(),
        "num_keys >= num_queries",
    ),
    "a window of none": (lambda: ab.BlockDiagonalMask.from_seqlens([3]).make_local_attention(0), "window_size=0"),
    "a window left of 0": (lambda: ab.LocalAttentionFromBottomRightMask(-1, 0), "window_left=-1"),
    "starts": (lambda: ab.BlockDiagonalGappyKeysMask.from_seqlens([1], [0], [1]), "one start more"),
    "no room": (lambda: _PaddedSeqLenInfo.from_seqlens([1]), "from_seqlens_padded"),
    "a shape": (lambda: ab.BlockDiagonalMask.from_seqlens([3]).materialize((4, 3)), "takes the 3 and 3"),
    "to split": (lambda: ab.BlockDiagonalMask.from_seqlens([3]).split(torch.zeros(1, 4)), "(1, 3, ...)"),
    "pages": (
        lambda: ab.BlockDiagonalGappyKeysMask.from_seqlens([1], [0, 4], [1]).make_paged(
            torch.zeros(1, 1, dtype=torch.int32), 3, 4, ab.PagedBlockDiagonalGappyKeysMask
        ),
        "multiples of page_size=3",
    ),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_a_window_that_reaches_no_key_is_refused_as_there() -> None:
    with pytest.raises(RuntimeError, match="No keys are attended"):
        ab.BlockDiagonalMask.from_seqlens([4], [2]).make_local_attention(2)


def test_padded_infos_are_not_split() -> None:
    with pytest.raises(NotImplementedError, match="intervals"):
        _PaddedSeqLenInfo.from_seqlens_padded([1], 2).split(torch.zeros(1, 2))
