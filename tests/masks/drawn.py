"""Hypothesis draws frames, and masks together with what they mean by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import by_hand
import torch
from by_hand import Sees
from hypothesis import strategies as st

from headway.masks import (
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

Draw = Callable[[st.SearchStrategy], object]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A mask and the same thing said in plain Python."""

    mask: Mask
    sees: Sees

    def __repr__(self) -> str:
        return repr(self.mask)


def frames(most: int = 7, batches: int = 2, heads: int = 2) -> st.SearchStrategy[Frame]:
    length = st.integers(1, most)
    return st.builds(Frame, q_len=length, kv_len=length, batch=st.integers(1, batches), heads=st.integers(1, heads))


def aligns(frame: Frame) -> st.SearchStrategy[str | None]:
    named = ("upper-left", "lower-right")
    return st.sampled_from(named if frame.q_len != frame.kv_len else (None, *named))


@st.composite
def cuts(draw: Draw, total: int, count: int) -> list[int]:
    """`count` lengths of 0 or more that add up to `total`."""
    at = sorted(draw(st.lists(st.integers(0, total), min_size=count - 1, max_size=count - 1)))
    return [b - a for a, b in zip([0, *at], [*at, total], strict=True)]


@st.composite
def leaves(draw: Draw, frame: Frame, structured: bool = False) -> Pair:
    """One mask of one kind; `structured` leaves out those that say nothing of whole tiles."""
    kinds = ["full", "causal", "window", "prefix", "prefixes", "documents", "cross", "padding", "real"]
    kinds += ["tree"] * (frame.q_len <= frame.kv_len) + ["dense", "predicate"] * (not structured)
    kind = draw(st.sampled_from(kinds))
    rows = draw(st.sampled_from((1, frame.batch)))
    keys = st.integers(0, frame.kv_len)
    if kind == "full":
        return Pair(Full(), lambda b, h, q, k: True)
    if kind == "causal":
        align = draw(aligns(frame))
        return Pair(Causal(align=align), by_hand.causal(frame, align))
    if kind == "window":
        align, size = draw(aligns(frame)), st.none() | st.integers(0, frame.kv_len + 1) | st.just(2**40)
        left, right = draw(size), draw(size)
        return Pair(Window(left, right, align=align), by_hand.window(frame, left, right, align))
    if kind == "prefix":
        n = draw(keys)
        return Pair(Prefix(n), by_hand.prefix(n))
    if kind == "prefixes":
        each = draw(st.lists(keys, min_size=rows, max_size=rows))
        return Pair(Prefix(torch.tensor(each)), by_hand.prefix(each))
    if kind in ("documents", "cross"):
        count = draw(st.integers(1, 4))
        lengths, kv_lengths = draw(cuts(frame.q_len, count)), draw(cuts(frame.kv_len, count))
        if kind == "documents" and frame.q_len == frame.kv_len:
            return Pair(Documents(lengths), by_hand.documents(lengths))
        return Pair(Documents(lengths, kv_lengths), by_hand.documents(lengths, kv_lengths))
    if kind == "padding":
        side, each = draw(st.sampled_from(("left", "right"))), draw(st.lists(keys, min_size=rows, max_size=rows))
        return Pair(Padding(each, side=side), by_hand.padding(frame, each, side))
    if kind == "real":
        real = draw(
            st.lists(
                st.lists(st.booleans(), min_size=frame.kv_len, max_size=frame.kv_len), min_size=rows, max_size=rows
            )
        )
        return Pair(Padding(torch.tensor(real)), lambda b, h, q, k: real[b if rows > 1 else 0][k])
    if kind == "tree":
        count = draw(st.integers(1, 4))
        lengths = draw(cuts(frame.kv_len, count))
        parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
        align = draw(aligns(frame))
        return Pair(Tree(parents, lengths, align=align), by_hand.tree(frame, parents, lengths, align))
    if kind == "dense":
        shape = [draw(st.sampled_from((1, n))) for n in (frame.batch, frame.heads, frame.q_len, frame.kv_len)]
        cells = draw(st.lists(st.booleans(), min_size=(n := torch.Size(shape).numel()), max_size=n))
        may = torch.tensor(cells).view(shape)
        whole = may.expand(frame.batch, frame.heads, frame.q_len, frame.kv_len).tolist()
        return Pair(Dense(may), lambda b, h, q, k: whole[b][h][q][k])
    return Pair(
        Predicate(lambda b, h, q, k: (2 * b + h + 3 * q + k) % 4 != 1),
        lambda b, h, q, k: (2 * b + h + 3 * q + k) % 4 != 1,
    )


def pairs(frame: Frame, structured: bool = False) -> st.SearchStrategy[Pair]:
    """Any mask, joined from up to four."""
    return st.recursive(
        leaves(frame, structured),
        lambda more: st.one_of(
            st.builds(both, more, more),
            st.builds(either, more, more),
            st.builds(opposite, more),
        ),
        max_leaves=4,
    )


def both(one: Pair, other: Pair) -> Pair:
    return Pair(one.mask & other.mask, lambda b, h, q, k: one.sees(b, h, q, k) and other.sees(b, h, q, k))


def either(one: Pair, other: Pair) -> Pair:
    return Pair(one.mask | other.mask, lambda b, h, q, k: one.sees(b, h, q, k) or other.sees(b, h, q, k))


def opposite(one: Pair) -> Pair:
    return Pair(~one.mask, lambda b, h, q, k: not one.sees(b, h, q, k))
