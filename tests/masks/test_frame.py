"""Frame: where the diagonal is, and the indices."""

from __future__ import annotations

import pytest
import torch

from headway import MaskError
from headway.masks import Alibi, Causal, Frame, Tree, Window


def test_offset() -> None:
    assert Frame(3, 5).offset("upper-left") == 0
    assert Frame(3, 5).offset("lower-right") == 2
    assert Frame(5, 3).offset("lower-right") == -2
    assert Frame(4, 4).offset(None) == 0


@pytest.mark.parametrize("mask", [Causal(), Window(1, 1), Alibi(torch.ones(1)), Tree([-1] * 5)], ids=repr)
def test_unequal_lengths_need_a_named_alignment(mask) -> None:
    with pytest.raises(MaskError) as refusal:
        mask.to_additive(Frame(3, 5), torch.float32)
    assert "got 3 queries and 5 keys with no alignment named" in str(refusal.value)
    assert "align='upper-left' (query 0 meets key 0)" in str(refusal.value)
    assert "align='lower-right' (the last query meets the last key)" in str(refusal.value)


@pytest.mark.parametrize("make", [Causal, Window, lambda align: Tree([-1], align=align)])
def test_unknown_alignment(make) -> None:
    with pytest.raises(MaskError, match=r"got align='top-left', takes 'upper-left' or 'lower-right'"):
        make(align="top-left")


def test_indices_broadcast_to_the_grid() -> None:
    b, h, q, k = Frame(2, 3, batch=4, heads=5).indices()
    assert torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape) == (4, 5, 2, 3)
    assert {x.dtype for x in (b, h, q, k)} == {torch.int32}
