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


# Functions that draw, and no strategies: one that is made for a frame is looked through before it is used, which takes
# longer than all that it draws.


def cuts(draw: Draw, total: int, count: int) -> list[int]:
    """`count` lengths of 0 or more that add up to `total`."""
    at = sorted(draw(st.integers(0, total)) for _ in range(count - 1))
    return [b - a for a, b in zip([0, *at], [*at, total], strict=True)]


def leaf(draw: Draw, frame: Frame, structured: bool = False) -> Pair:
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
        align = draw(aligns(frame))
        # -1 is no bound, and the last is far out
        sizes = [draw(st.integers(-1, frame.kv_len + 2)) for _ in range(2)]
        left, right = (None if size < 0 else 2**40 if size == frame.kv_len + 2 else size for size in sizes)
        return Pair(Window(left, right, align=align), by_hand.window(frame, left, right, align))
    if kind == "prefix":
        n = draw(keys)
        return Pair(Prefix(n), by_hand.prefix(n))
    if kind == "prefixes":
        each = [draw(keys) for _ in range(rows)]
        return Pair(Prefix(torch.tensor(each)), by_hand.prefix(each))
    if kind in ("documents", "cross"):
        count = draw(st.integers(1, 4))
        lengths, kv_lengths = cuts(draw, frame.q_len, count), cuts(draw, frame.kv_len, count)
        if kind == "documents" and frame.q_len == frame.kv_len:
            return Pair(Documents(lengths), by_hand.documents(lengths))
        return Pair(Documents(lengths, kv_lengths), by_hand.documents(lengths, kv_lengths))
    if kind == "padding":
        side, each = draw(st.sampled_from(("left", "right"))), [draw(keys) for _ in range(rows)]
        return Pair(Padding(each, side=side), by_hand.padding(frame, each, side))
    if kind == "real":
        real = [[draw(st.booleans()) for _ in range(frame.kv_len)] for _ in range(rows)]
        return Pair(Padding(torch.tensor(real)), lambda b, h, q, k: real[b if rows > 1 else 0][k])
    if kind == "tree":
        count = draw(st.integers(1, 4))
        lengths = cuts(draw, frame.kv_len, count)
        parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
        align = draw(aligns(frame))
        return Pair(Tree(parents, lengths, align=align), by_hand.tree(frame, parents, lengths, align))
    if kind == "dense":
        shape = [draw(st.sampled_from((1, n))) for n in (frame.batch, frame.heads, frame.q_len, frame.kv_len)]
        may = torch.tensor([draw(st.booleans()) for _ in range(torch.Size(shape).numel())]).view(shape)
        whole = may.expand(frame.batch, frame.heads, frame.q_len, frame.kv_len).tolist()
        return Pair(Dense(may), lambda b, h, q, k: whole[b][h][q][k])
    return Pair(
        Predicate(lambda b, h, q, k: (2 * b + h + 3 * q + k) % 4 != 1),
        lambda b, h, q, k: (2 * b + h + 3 * q + k) % 4 != 1,
    )


@st.composite
def leaves(draw: Draw, frame: Frame, structured: bool = False) -> Pair:
    return leaf(draw, frame, structured)


@st.composite
def pairs(draw: Draw, frame: Frame, structured: bool = False) -> Pair:
    """Any mask, joined from up to four."""
    return joined(draw, frame, structured, 4)


def joined(draw: Draw, frame: Frame, structured: bool, most: int) -> Pair:
    """Of `most` leaves or fewer, each and what is joined of them turned round or not."""
    how = draw(st.sampled_from((None, both, either))) if most > 1 else None
    if how is None:
        pair = leaf(draw, frame, structured)
    else:
        left = draw(st.integers(1, most - 1))
        pair = how(joined(draw, frame, structured, left), joined(draw, frame, structured, most - left))
    return opposite(pair) if draw(st.integers(0, 3)) == 3 else pair


def both(one: Pair, other: Pair) -> Pair:
    return Pair(one.mask & other.mask, lambda b, h, q, k: one.sees(b, h, q, k) and other.sees(b, h, q, k))


def either(one: Pair, other: Pair) -> Pair:
    return Pair(one.mask | other.mask, lambda b, h, q, k: one.sees(b, h, q, k) or other.sees(b, h, q, k))


def opposite(one: Pair) -> Pair:
    return Pair(~one.mask, lambda b, h, q, k: not one.sees(b, h, q, k))
