"""recognise: exact on every kind, and never wrong."""

from __future__ import annotations

import math

import by_hand
import pytest
import torch
from drawn import Pair, frames, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headway import MaskError
from headway.masks import Bias, Dense, Frame, Full, Mask, recognise

SQUARE, WIDE, TALL = Frame(6, 6, batch=2), Frame(4, 7, batch=2), Frame(7, 4, batch=2)
PACKED = (2, 3, 1)


def and_then(*every: by_hand.Sees) -> by_hand.Sees:
    return lambda b, h, q, k: all(sees(b, h, q, k) for sees in every)


def or_else(*every: by_hand.Sees) -> by_hand.Sees:
    return lambda b, h, q, k: any(sees(b, h, q, k) for sees in every)


KINDS = {
    "full": (SQUARE, lambda f: lambda b, h, q, k: True, "Full()"),
    "causal": (SQUARE, by_hand.causal, "Causal(align=None)"),
    "causal, wide": (WIDE, lambda f: by_hand.causal(f, "lower-right"), "Causal(align='lower-right')"),
    "causal, tall": (TALL, lambda f: by_hand.causal(f, "lower-right"), "Causal(align='lower-right')"),
    "upper-left, wide": (WIDE, lambda f: by_hand.causal(f, "upper-left"), "Causal(align='upper-left')"),
    "upper-left, tall": (TALL, lambda f: by_hand.causal(f, "upper-left"), "Causal(align='upper-left')"),
    "window": (SQUARE, lambda f: by_hand.window(f, 2, 0), "Window(left=2, right=0, align=None)"),
    "window, both": (SQUARE, lambda f: by_hand.window(f, 1, 2), "Window(left=1, right=2, align=None)"),
    "window, ahead": (SQUARE, lambda f: by_hand.window(f, None, 2), "Window(left=None, right=2, align=None)"),
    "window, not back": (SQUARE, lambda f: by_hand.window(f, 0, None), "Window(left=0, right=None, align=None)"),
    "window, wide": (
        WIDE, lambda f: by_hand.window(f, 1, 1, "lower-right"), "Window(left=1, right=1, align='lower-right')"
    ),
    "window, upper-left": (
        WIDE, lambda f: by_hand.window(f, 1, 1, "upper-left"), "Window(left=1, right=1, align='upper-left')"
    ),
    "prefix-lm": (SQUARE, lambda f: or_else(by_hand.causal(f), by_hand.prefix(3)), "Causal(align=None) | Prefix(3)"),
    "prefix-lm, each": (
        SQUARE, lambda f: or_else(by_hand.causal(f), by_hand.prefix([3, 5])), "Causal(align=None) | Prefix(int32[2])"
    ),
    "documents": (SQUARE, lambda f: by_hand.documents(PACKED), "Documents(3 of up to 3 tokens, 6 in all)"),
    "causal documents": (
        SQUARE,
        lambda f: and_then(by_hand.causal(f), by_hand.documents(PACKED)),
        "Causal(align=None) & Documents(3 of up to 3 tokens, 6 in all)",
    ),
    "padding": (SQUARE, lambda f: by_hand.padding(f, [3, 6]), "Padding(int64[2], side='right')"),
    "padding, left": (WIDE, lambda f: by_hand.padding(f, [3, 6], "left"), "Padding(int64[2], side='left')"),
    "padding, holes": (SQUARE, lambda f: lambda b, h, q, k: k % 3 != b, "Padding(bool[2, 6])"),
    "causal padding": (
        SQUARE,
        lambda f: and_then(by_hand.causal(f), by_hand.padding(f, [3, 6])),
        "Causal(align=None) & Padding(int64[2], side='right')",
    ),
    "causal padding, left": (
        SQUARE,
        lambda f: and_then(by_hand.causal(f), by_hand.padding(f, [3, 6], "left")),
        "Causal(align=None) & Padding(int64[2], side='left')",
    ),
    "causal padding, wide": (
        WIDE,
        lambda f: and_then(by_hand.causal(f, "lower-right"), by_hand.padding(f, [5, 7], "left")),
        "Causal(align='lower-right') & Padding(int64[2], side='left')",
    ),
}  # fmt: skip


def shown(mask: Mask, like: Tensor) -> Tensor:
    wide = like.view((1,) * (4 - like.ndim) + tuple(like.shape))
    batch, heads, q_len, kv_len = wide.shape
    return mask.to_bool(Frame(q_len, kv_len, batch, heads)).expand(wide.shape).view(like.shape)


@pytest.mark.parametrize(("frame", "meaning", "text"), KINDS.values(), ids=KINDS)
def test_round_trip(frame: Frame, meaning, text: str) -> None:
    truth = by_hand.table(frame, meaning(frame))
    inf, lowest = -math.inf, torch.finfo(torch.float32).min
    empty = ~truth.any(-1, keepdim=True)
    tensors = [truth, truth.expand(2, 3, -1, -1), torch.zeros(truth.shape).masked_fill(~truth, inf)]
    tensors.append(torch.zeros(truth.shape).masked_fill(~truth, lowest).masked_fill(empty, inf))
    for tensor in tensors:
        mask = recognise(tensor)
        assert repr(mask) == text
        assert torch.equal(shown(mask, truth), truth)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_never_wrong(data: st.DataObject) -> None:
    """On any mask, and on any mask with one cell flipped, what is recognised equals the tensor."""
    frame = data.draw(frames(most=6))
    pair: Pair = data.draw(pairs(frame))
    tensor = by_hand.table(frame, pair.sees)
    if data.draw(st.booleans()):
        at = tuple(data.draw(st.integers(0, n - 1)) for n in tensor.shape)
        tensor[at] = ~tensor[at]
    assert torch.equal(shown(recognise(tensor), tensor), tensor)
    two = tensor[0, 0]
    assert torch.equal(shown(recognise(two), two), two)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_never_wrong_on_noise(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    cells = data.draw(st.lists(st.booleans(), min_size=(n := torch.Size(shape).numel()), max_size=n))
    tensor = torch.tensor(cells).view(shape)
    assert torch.equal(shown(recognise(tensor), tensor), tensor)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_an_additive_tensor_keeps_its_softmax(data: st.DataObject) -> None:
    numbers = st.sampled_from((0.0, -math.inf, torch.finfo(torch.float32).min, -1e4, 1.0))
    tensor = torch.tensor(data.draw(st.lists(numbers, min_size=16, max_size=16))).view(4, 4)
    scores = torch.arange(16.0).view(4, 4) / 4
    want = (scores + tensor).softmax(-1).nan_to_num(0.0)
    got = (scores + recognise(tensor).to_additive(Frame(4, 4), torch.float32)[0, 0]).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(got, want)


def test_the_smallest_number_alone_in_a_row_is_the_mean_of_v() -> None:
    bias = torch.zeros(3, 3).masked_fill(~torch.ones(3, 3).bool().tril(), torch.finfo(torch.float32).min)
    assert repr(recognise(bias)) == "Causal(align=None)"
    bias[1] = torch.finfo(torch.float32).min
    assert isinstance(recognise(bias), Bias)
    bias[1] = -math.inf
    assert isinstance(recognise(bias), Dense)
    bias[0, 0] = math.nan
    assert isinstance(recognise(bias), Bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_smallest_number_is_the_dtypes_own(dtype: torch.dtype) -> None:
    low = torch.zeros(3, 3, dtype=dtype).masked_fill(~torch.ones(3, 3).bool().tril(), torch.finfo(dtype).min)
    assert repr(recognise(low)) == "Causal(align=None)"
    assert isinstance(recognise(low / 2), Bias)


def test_numbers_that_learn_stay_numbers() -> None:
    zeros = torch.zeros(3, 3, requires_grad=True)
    mask = recognise(zeros)
    assert isinstance(mask, Bias)
    assert mask.bias is zeros


def test_heads_of_their_own_stay_dense() -> None:
    may = torch.ones(1, 2, 4, 4).bool().tril()
    assert repr(recognise(may)) == "Causal(align=None)"
    may[0, 1] = True
    assert recognise(may).may is may


@pytest.mark.parametrize("shape", [(2, 1, 5, 1), (5, 1)])
def test_one_key_may_stand_for_any_number(shape: tuple[int, ...]) -> None:
    """An axis of one is broadcast, so nothing may be read into its length."""
    may = torch.ones(shape).bool()
    assert isinstance(recognise(may), Full)
    may.view(-1, 5)[:, 0] = False  # a lower-right diagonal, were there one key
    mask = recognise(may)
    assert isinstance(mask, Dense)
    assert torch.equal(mask.to_bool(Frame(5, 3, batch=2)).expand(2, 1, 5, 3), may.expand(2, 1, 5, 3))


def test_one_query_may_stand_for_any_number() -> None:
    may = torch.tensor([[[[True, False, False]]], [[[True, True, False]]]])
    mask = recognise(may)
    assert torch.equal(mask.to_bool(Frame(4, 3, batch=2)).expand(2, 1, 4, 3), may.expand(2, 1, 4, 3))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 1, 3, 3), (2, 0, 3, 3)])
def test_nothing_in_it(shape: tuple[int, ...]) -> None:
    assert isinstance(recognise(torch.ones(shape).bool()), Full)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(3).bool(), r"got bool\[3\], takes \(queries, keys\) with up to two axes before them"),
        (torch.ones(1, 1, 1, 1, 1).bool(), r"takes \(queries, keys\) with up to two axes"),
        (torch.ones(3, 3).long(), r"got int64\[3, 3\], takes bool.*for a mask of ones and zeros pass mask != 0"),
    ],
)
def test_refusals(tensor: Tensor, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        recognise(tensor)
