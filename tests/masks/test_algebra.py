"""What `&`, `|` and `~` mean, for any masks, and what every mask becomes."""

from __future__ import annotations

import copy
import math
import pickle

import by_hand
import pytest
import torch
from drawn import Pair, frames, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from headway import MaskError
from headway.masks import (
    Alibi,
    And,
    Bias,
    Causal,
    Dense,
    Documents,
    Frame,
    Full,
    Mask,
    Padding,
    Predicate,
    Prefix,
    Tree,
    Window,
)  # fmt: skip

FRAME = Frame(4, 4)


def shown(mask: Mask, frame: Frame) -> torch.Tensor:
    return mask.to_bool(frame).expand(frame.batch, frame.heads, frame.q_len, frame.kv_len)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_every_mask_means_what_it_says(data: st.DataObject) -> None:
    frame = data.draw(frames())
    pair: Pair = data.draw(pairs(frame))
    truth = by_hand.table(frame, pair.sees)
    assert torch.equal(shown(pair.mask, frame), truth)
    # Flex attention evaluates the rule by itself, one element at a time under vmap.
    at_once = create_mask(pair.mask.rule(frame), frame.batch, frame.heads, frame.q_len, frame.kv_len, device="cpu")
    assert torch.equal(at_once, truth)
    additive = pair.mask.to_additive(frame, torch.float32)
    assert additive.dtype == torch.float32
    assert torch.equal(additive.expand(truth.shape), torch.zeros(truth.shape).masked_fill(~truth, -math.inf))


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_laws(data: st.DataObject) -> None:
    frame = data.draw(frames(most=5))
    a, b, c = (data.draw(pairs(frame)).mask for _ in range(3))

    def same(one: Mask, other: Mask) -> bool:
        return torch.equal(shown(one, frame), shown(other, frame))

    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert same(a & b, b & a)
    assert same(a | b, b | a)
    assert same(a & (b & c), (a & b) & c)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(~~a, a)
    assert same(a & Full(), a)
    assert not shown(a & ~a, frame).any()
    assert shown(a | ~a, frame).all()


@pytest.mark.parametrize("join", [lambda m: m & None, lambda m: m | True, lambda m: m & torch.ones(4, 4).bool()])
def test_masks_join_with_masks_alone(join) -> None:
    with pytest.raises(MaskError, match=r"masks join with masks, got \w+; wrap a bool tensor in Dense"):
        join(Causal())


@pytest.mark.parametrize("adder", [Bias(torch.zeros(4, 4)), Alibi(torch.ones(1)), Causal() & Bias(torch.zeros(4, 4))])
def test_a_sum_has_no_opposite(adder: Mask) -> None:
    for joined in (lambda: ~adder, lambda: Causal() | adder, lambda: adder | Causal()):
        with pytest.raises(MaskError, match=r"adds to scores and has no yes or no.*join it with & outside"):
            joined()
    assert (adder & Causal()).adds_score


def test_what_is_added_is_added_up() -> None:
    one, other = torch.randn(4, 4), torch.randn(2, 4, 4)
    frame = Frame(4, 4, batch=3, heads=2)
    got = (Bias(one) & Causal() & Bias(other)).to_additive(frame, torch.float64).expand(3, 2, 4, 4)
    for q in range(4):
        for k in range(4):
            want = one[q, k].double() + other[:, q, k].double() if k <= q else torch.full((2,), -math.inf).double()
            assert torch.equal(got[:, :, q, k], want.expand(3, 2))


def test_sums_are_made_in_float32_at_least() -> None:
    small = Bias(torch.full((1, 1), 2.0**-9, dtype=torch.float16))
    ones = Bias(torch.full((1, 1), 8.0, dtype=torch.float16))
    both = (ones & small & small & small & small).to_additive(Frame(1, 1), torch.float16)
    assert both.item() == 8.0 + 4 * 2.0**-9  # each alone would round away
    assert both.dtype == torch.float16


def test_a_mask_for_all_stays_one_row() -> None:
    """What does not vary over an axis must not grow to it: at 16,384 keys it is 16 KB or 256 MB."""
    frame = Frame(64, 64, batch=8, heads=4)
    padding, dense, bias = Padding([3]), Dense(torch.ones(64, 64).bool()), Bias(torch.zeros(64, 64))
    for mask in (padding, dense, dense & padding, ~padding, padding | dense, Prefix(3)):
        assert mask.to_bool(frame).untyped_storage().nbytes() <= 64 * 64
    assert Padding([3]).to_additive(frame, torch.float32).untyped_storage().nbytes() <= 64 * 4
    assert (bias & dense).to_additive(frame, torch.float32).untyped_storage().nbytes() <= 64 * 64 * 4


def test_plain_masks_are_values() -> None:
    assert Causal() == Causal()
    assert Causal() & Window(1) == Causal() & Window(1)
    assert hash(Causal() | Prefix(3)) == hash(Causal() | Prefix(3))
    assert Causal() != Causal(align="upper-left")
    assert Padding([1]) != Padding([1])  # of tensors, only the mask itself is known to be the same


EVERY = {
    "Full()": Full(),
    "Causal(align=None)": Causal(),
    "Window(left=2, right=0, align='lower-right')": Window(2, 0, align="lower-right"),
    "Prefix(3)": Prefix(3),
    "Prefix(int64[2])": Prefix(torch.tensor([1, 2])),
    "Documents(2 of up to 3 tokens, 4 in all)": Documents([3, 1]),
    "Documents(2 of up to 3 tokens, 4 in all; keys of up to 5 tokens, 6 in all)": Documents([3, 1], [5, 1]),
    "Padding(int64[2], side='left')": Padding([1, 2], side="left"),
    "Padding(bool[1, 4])": Padding(torch.ones(1, 4).bool()),
    "Tree(4 tokens)": Tree([-1, 0, 0], [2, 1, 1]),
    "Tree(2 tokens, align='lower-right')": Tree([-1, 0], align="lower-right"),
    "Dense(bool[2, 1, 4, 4])": Dense(torch.ones(2, 1, 4, 4).bool()),
    "Bias(float32[4, 4])": Bias(torch.zeros(4, 4)),
    "Alibi(float32[8], align=None)": Alibi(torch.ones(8)),
    "Causal(align=None) & (Prefix(3) | Full()) & ~Prefix(1)": Causal() & (Prefix(3) | Full()) & ~Prefix(1),
    "~(Causal(align=None) & Prefix(1)) | (Full() & Prefix(2))": ~(Causal() & Prefix(1)) | (Full() & Prefix(2)),
}


@pytest.mark.parametrize(("text", "mask"), EVERY.items(), ids=EVERY)
def test_repr(text: str, mask: Mask) -> None:
    assert repr(mask) == text


@pytest.mark.parametrize("mask", EVERY.values(), ids=EVERY)
def test_survives_copy_and_pickle(mask: Mask) -> None:
    mask.memo["something worked out"] = lambda: "not to be copied"
    for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert repr(again) == repr(mask)
        assert again.memo == {}
        assert getattr(again, "one_packing", None) == getattr(mask, "one_packing", None)


def test_tensors_are_listed_through_every_join() -> None:
    may = torch.ones(4, 4).bool()
    assert (Causal() & ~(Dense(may) | Full())).tensors == (may,)
    assert (Causal() | Full()).tensors == ()
    assert isinstance(Causal() & Full() & Causal(), And)
    assert len((Causal() & (Full() & Causal())).parts) == 3


def test_a_predicate_inside_is_checked_too() -> None:
    other = torch.ones(4, device="meta").bool()
    with pytest.raises(MaskError, match=r"captures other on meta"):
        (Causal() & ~Predicate(lambda b, h, q, k: other[q])).to_bool(FRAME)


def test_no_mask_is_yes_or_no() -> None:
    """`Causal() and Padding(...)` was Padding alone."""
    for join in (lambda: Causal() and Padding([3]), lambda: Causal() or Padding([3]), lambda: not Causal()):
        with pytest.raises(MaskError, match=r"takes & \| ~"):
            join()
