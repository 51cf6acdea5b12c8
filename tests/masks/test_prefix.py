"""Prefix: a number, or one per batch entry."""

from __future__ import annotations

import by_hand
import pytest
import torch

from headway import MaskError
from headway.masks import Causal, Frame, Prefix


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_one_number(n: int) -> None:
    frame = Frame(3, 5, batch=2)
    truth = by_hand.table(frame, by_hand.prefix(n))
    assert torch.equal(Prefix(n).to_bool(frame).expand_as(truth), truth)


@pytest.mark.parametrize("each", [[2], [0, 5], [3, 1]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_per_batch_entry(each: list[int], dtype: torch.dtype) -> None:
    frame = Frame(3, 5, batch=2, heads=2)
    truth = by_hand.table(frame, by_hand.prefix(each))
    assert torch.equal(Prefix(torch.tensor(each, dtype=dtype)).to_bool(frame).expand_as(truth), truth)


def test_prefix_language_model() -> None:
    frame = Frame(4, 4)
    truth = by_hand.table(frame, lambda b, h, q, k: k <= q or k < 2)
    assert torch.equal((Causal() | Prefix(2)).to_bool(frame), truth)


def test_equality_is_always_a_plain_yes_or_no() -> None:
    tensor = Prefix(torch.tensor([3]))
    assert Prefix(3) == Prefix(3) != Prefix(4)
    assert (Prefix(3) == tensor) is False
    assert (tensor == Prefix(3)) is False
    assert tensor == tensor
    assert tensor != Prefix(torch.tensor([3]))
    assert (Prefix(3) == 3) is False
    assert hash(Prefix(3)) == hash(Prefix(3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Prefix(-1), r"got n=-1, takes an int of 0 or more"),
        (lambda: Prefix(True), r"got n=True, takes an int of 0 or more"),
        (lambda: Prefix(1.0), r"got n=1.0, takes an int of 0 or more"),
        (lambda: Prefix(torch.tensor(3)), r"got int64\[\], takes an int, or integers with one length per batch entry"),
        (lambda: Prefix(torch.tensor([1.0])), r"got float32\[1\], takes an int, or integers"),
        (lambda: Prefix(torch.tensor([True])), r"got bool\[1\], takes an int, or integers"),
        (lambda: Prefix(6).to_bool(Frame(2, 5)), r"got a prefix of 6, takes at most the 5 keys there are"),
        (lambda: Prefix(torch.tensor([1, 2, 3])).to_bool(Frame(2, 5, batch=2)), r"got 3 prefix lengths, takes 1 or 2"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        make()
