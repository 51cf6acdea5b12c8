"""Terms, and what is known of rows without looking at any."""

from __future__ import annotations

import functools
import math

import by_hand
import pytest
import torch
from drawn import Pair, frames, pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.masks import (
    Alibi,
    Bias,
    Causal,
    Dense,
    Documents,
    Frame,
    Full,
    Mask,
    Padding,
    Prefix,
    Tree,
    Window,
)  # fmt: skip
from headway.masks.band import Band
from headway.masks.terms import rows_may_be_empty, terms

SQUARE, WIDE = Frame(6, 6), Frame(3, 6)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_terms_mean_what_the_mask_means(data: st.DataObject) -> None:
    frame = data.draw(frames())
    made: list[Pair] = data.draw(st.lists(pairs(frame), min_size=1, max_size=4))
    mask = functools.reduce(lambda one, other: one & other, (pair.mask for pair in made))
    found = terms(mask, frame)
    truth = by_hand.table(frame, lambda *at: all(pair.sees(*at) for pair in made))
    keep = torch.ones(truth.shape).bool()
    if found.band is not None:
        band, offset = found.band, found.band.offset
        keep &= by_hand.table(
            frame,
            lambda b, h, q, k: (
                (band.left is None or k >= q + offset - band.left)
                and (band.right is None or k <= q + offset + band.right)
            ),
        )
        assert (band.left, band.right) != (None, None)
    for part in (found.documents, found.padding, *found.rest):
        if part is not None:
            keep &= part.to_bool(frame).expand(keep.shape)
    assert torch.equal(keep, truth)


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_a_row_said_to_see_does_see(data: st.DataObject) -> None:
    frame = data.draw(frames())
    pair: Pair = data.draw(pairs(frame))
    mask, truth = pair.mask, by_hand.table(frame, pair.sees)
    if data.draw(st.booleans()):
        cells = data.draw(st.lists(st.sampled_from((0.0, -math.inf)), min_size=frame.kv_len, max_size=frame.kv_len))
        mask = mask & Bias(torch.tensor(cells))
        truth = truth & torch.tensor([cell == 0.0 for cell in cells])
    if data.draw(st.booleans()):
        mask = mask & Alibi(torch.ones(frame.heads), align="lower-right")
    if not rows_may_be_empty(mask, frame):
        assert truth.any(-1).all()


KNOWN = {
    "none": (None, SQUARE),
    "full": (Full(), WIDE),
    "causal": (Causal(), SQUARE),
    "causal, wide": (Causal(align="lower-right"), WIDE),
    "window": (Window(2, 0), SQUARE),
    "causal & documents": (Causal() & Documents([2, 0, 4]), SQUARE),
    "causal & padding": (Causal() & Padding([2]), SQUARE),
    "prefix lm": (Causal() | Prefix(3), SQUARE),
    "prefix": (Prefix(1), WIDE),
    "tree": (Tree([-1, 0], [2, 4], align="lower-right"), WIDE),
    "tree & causal": (Tree([-1, 0], [2, 4]) & Causal(), SQUARE),
    "alibi": (Alibi(torch.ones(1)) & Causal(), SQUARE),
    "tall": (Causal(align="upper-left"), Frame(6, 3)),
}


@pytest.mark.parametrize(("mask", "frame"), KNOWN.values(), ids=KNOWN)
def test_what_is_known_to_see(mask: Mask | None, frame: Frame) -> None:
    """Lost knowledge would only cost speed, quietly; so it is written down."""
    assert not rows_may_be_empty(mask, frame)


UNKNOWN = {
    "no keys": (None, Frame(3, 0)),
    "tall": (Causal(align="lower-right"), Frame(6, 3)),
    "prefix 0": (Prefix(0), SQUARE),
    "prefixes": (Prefix(torch.tensor([3])), SQUARE),
    "padding 0": (Padding([0]), SQUARE),
    "padding, left": (Padding([3], side="left") & Causal(), SQUARE),
    "padding, bool": (Padding(torch.ones(1, 6).bool()), SQUARE),
    "dense": (Dense(torch.ones(6, 6).bool()), SQUARE),
    "bias": (Bias(torch.zeros(6, 6)), SQUARE),
    "not": (~Prefix(1), SQUARE),
    "documents, cross": (Documents([2, 4], [6, 0]), SQUARE),
    "documents & padding": (Documents([2, 4]) & Padding([3]), SQUARE),
}


@pytest.mark.parametrize(("mask", "frame"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known(mask: Mask | None, frame: Frame) -> None:
    assert rows_may_be_empty(mask, frame)


KINDS = [
    (None, SQUARE, set()),
    (Full(), SQUARE, set()),
    (Causal(), SQUARE, {"causal"}),
    (Causal(align="upper-left"), WIDE, {"causal-upper-left"}),
    (Causal(align="lower-right"), WIDE, {"causal-lower-right"}),
    (Causal(align="lower-right"), Frame(1, 6), set()),
    (Window(1, 1), SQUARE, {"window"}),
    (Window(9, 0), SQUARE, {"causal"}),
    (Window(9, 9), SQUARE, set()),
    (Causal() & Window(2), SQUARE, {"window"}),
    (Causal() & Documents([2, 4]), SQUARE, {"causal", "documents"}),
    (Documents([2, 4], [4, 2]), SQUARE, {"documents-cross"}),
    (Documents([2, 4]) & Documents([4, 2]), SQUARE, {"documents", "and"}),
    (Padding([3]) & Padding([2]), SQUARE, {"padding", "and"}),
    (Causal() & Bias(torch.zeros(6, 6)) & Alibi(torch.ones(1)), SQUARE, {"causal", "bias", "alibi"}),
    (Alibi(torch.ones(1), align="lower-right"), WIDE, {"alibi-lower-right"}),
    (Causal() | Prefix(2), SQUARE, {"or"}),
    (~Causal(), SQUARE, {"not"}),
    (Prefix(2) & Causal(), SQUARE, {"prefix", "causal"}),
    (Causal(align="upper-left") & Causal(align="lower-right"), WIDE, {"causal-upper-left", "and"}),
]


@pytest.mark.parametrize(
    ("mask", "frame", "words"),
    KINDS,
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else repr(value),
)
def test_kinds(mask: Mask | None, frame: Frame, words: set[str]) -> None:
    assert terms(mask, frame).kinds(frame) == words


def test_a_band_without_bounds_does_not_hide_another() -> None:
    frame = Frame(3, 6)
    found = terms(Window(9, 9, align="upper-left") & Causal(align="lower-right"), frame)
    assert found.band == Band(None, 0, 3)
    assert found.rest == ()
