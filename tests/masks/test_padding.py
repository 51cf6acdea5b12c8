"""Padding: lengths and bools, left and right."""

from __future__ import annotations

import by_hand
import pytest
import torch

from headway import MaskError
from headway.masks import Frame, Padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[4], [0], [3, 0, 4], [1, 1, 1]])
def test_lengths(lengths: list[int], side: str) -> None:
    frame = Frame(2, 4, batch=3, heads=2)
    truth = by_hand.table(frame, by_hand.padding(frame, lengths, side))
    for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        assert torch.equal(Padding(given, side=side).to_bool(frame).expand_as(truth), truth)


def test_bools_may_have_holes() -> None:
    real = [[True, False, True, False], [False, False, False, True]]
    frame = Frame(3, 4, batch=2)
    truth = by_hand.table(frame, lambda b, h, q, k: real[b][k])
    for given in (torch.tensor(real), real):
        assert torch.equal(Padding(given).to_bool(frame), truth)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Padding(torch.ones(2, 3)), r"got float32\[2, 3\], takes one integer length per batch entry, or bool"),
        (lambda: Padding(torch.ones(2, 3).long()), r"got int64\[2, 3\].*from_transformers"),
        (lambda: Padding(torch.ones(3).bool()), r"got bool\[3\], takes bool \(batch, keys\), True for real keys"),
        (lambda: Padding([1], side="top"), r"got side='top', takes 'left' or 'right'"),
        (lambda: Padding(torch.ones(1, 3).bool(), side="left"), r"got side='left' with bools.*leave side out"),
        (lambda: Padding([2, -1]), r"got a length of -1, takes 0 or more"),
        (lambda: Padding([1, 2, 3]).to_bool(Frame(2, 4, batch=2)), r"got padding for 3 batch entries, takes 1 or 2"),
        (lambda: Padding(torch.ones(1, 3).bool()).to_bool(Frame(2, 4)), r"got padding over 3 keys, takes 4"),
        (lambda: Padding([5]).to_bool(Frame(2, 4)), r"got a length of 5, takes at most the 4 keys there are"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        make()


def test_a_mask_is_a_value() -> None:
    """What was found out about the lengths must stay true of them."""
    lengths = torch.tensor([2, 3])
    mask = Padding(lengths)
    lengths.zero_()
    assert mask.to_bool(Frame(1, 4, batch=2)).sum() == 5


def test_to_cu_seqlens() -> None:
    """Keys without their filler, end to end; every query stays."""
    cu_q, cu_k, longest_q, longest_k = Padding([3, 0, 4]).to_cu_seqlens(Frame(2, 5, batch=3))
    assert cu_q.tolist() == [0, 2, 4, 6]
    assert cu_k.tolist() == [0, 3, 3, 7]
    assert (longest_q, longest_k) == (2, 4)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert Padding([3]).to_cu_seqlens(Frame(2, 5, batch=3))[1].tolist() == [0, 3, 6, 9]


def test_to_cu_seqlens_agrees_with_the_mask() -> None:
    frame, lengths = Frame(2, 5, batch=3), [3, 0, 4]
    cu_q, cu_k, _, _ = Padding(lengths).to_cu_seqlens(frame)
    packed = [(b, k) for b in range(3) for k in range(5) if k < lengths[b]]  # the keys as they are packed
    truth = by_hand.table(frame, by_hand.padding(frame, lengths))
    for b in range(3):
        for q in range(int(cu_q[b]), int(cu_q[b + 1])):
            row, query = divmod(q, 2)
            assert row == b
            assert packed[int(cu_k[b]) : int(cu_k[b + 1])] == [(b, k) for k in range(5) if truth[b, 0, query, k]]


@pytest.mark.parametrize("mask", [Padding([1, 2], side="left"), Padding(torch.ones(2, 4).bool())], ids=repr)
def test_to_cu_seqlens_refuses(mask: Padding) -> None:
    with pytest.raises(MaskError, match=r"takes Padding\(lengths\) with the filler on the right.*count them"):
        mask.to_cu_seqlens(Frame(2, 4, batch=2))
