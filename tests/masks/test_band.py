"""Causal and Window."""

from __future__ import annotations

import by_hand
import pytest
import torch

from headway import MaskError
from headway.masks import Causal, Frame, Window
from headway.masks.band import Band

LENGTHS = [(1, 1), (4, 4), (3, 6), (6, 3), (1, 5), (5, 1)]


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("align", ["upper-left", "lower-right"])
def test_causal(q_len: int, kv_len: int, align: str) -> None:
    frame = Frame(q_len, kv_len, batch=2, heads=2)
    truth = by_hand.table(frame, by_hand.causal(frame, align))
    assert torch.equal(Causal(align=align).to_bool(frame).expand_as(truth), truth)


@pytest.mark.parametrize("left", [None, 0, 2, 9, 2**40])
@pytest.mark.parametrize("right", [None, 0, 1, 9, 2**40])
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("align", ["upper-left", "lower-right"])
def test_window(q_len: int, kv_len: int, align: str, left: int | None, right: int | None) -> None:
    frame = Frame(q_len, kv_len)
    truth = by_hand.table(frame, by_hand.window(frame, left, right, align))
    mask = Window(left, right, align=align)
    assert torch.equal(mask.to_bool(frame), truth)
    assert torch.equal(mask.to_block_mask(frame).mask_mod(*frame.indices()).expand_as(truth), truth)


def test_empty_rows_above_a_tall_causal() -> None:
    """Lower-right with more queries than keys: the first queries see nothing, and that is what was asked for."""
    keep = Causal(align="lower-right").to_bool(Frame(5, 3))
    assert keep[0, 0].any(-1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("size", [-1, 1.5, True, "2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_window_refuses(side: str, size: object) -> None:
    with pytest.raises(MaskError, match=rf"got {side}=.*, takes an int of 0 or more, or None for no bound"):
        Window(**{side: size})


def test_a_bound_that_nothing_reaches_is_no_bound() -> None:
    """So that a model's window of 4,096 on a short text runs as the causal mask it is, and one query as no mask."""
    assert Window(4096, 0).band(Frame(1000, 1000)) == Causal().band(Frame(1000, 1000)) == Band(None, 0, 0)
    assert Window(4096, 0).band(Frame(8192, 8192)) == Band(4096, 0, 0)
    assert Causal(align="lower-right").band(Frame(1, 77)) == Band(None, None, 76)
    assert Causal(align="upper-left").band(Frame(1, 77)) == Band(None, 0, 0)
    assert Window(3, 3).band(Frame(4, 4)) == Band(None, None, 0)
    assert Window(2, 2).band(Frame(4, 4)) == Band(2, 2, 0)
