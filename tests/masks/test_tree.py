"""Tree, against a search for ancestors one token at a time."""

from __future__ import annotations

import by_hand
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway import MaskError
from headway.masks import Frame, Tree


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_against_ancestors(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(count)]
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any))
    kv_len = sum(lengths)
    q_len = data.draw(st.integers(1, kv_len))
    align = data.draw(st.sampled_from(("upper-left", "lower-right")))
    frame = Frame(q_len, kv_len, batch=2)
    truth = by_hand.table(frame, by_hand.tree(frame, parents, lengths, align))
    mask = Tree(parents, lengths, align=align)
    assert torch.equal(mask.to_bool(frame).expand_as(truth), truth)


def test_a_chain_is_causal_and_roots_are_strangers() -> None:
    chain, roots = Tree([-1, 0, 1]).to_bool(Frame(3, 3)), Tree([-1, -1, -1]).to_bool(Frame(3, 3))
    assert torch.equal(chain[0, 0], torch.ones(3, 3).bool().tril())
    assert torch.equal(roots[0, 0], torch.eye(3).bool())


def test_new_tokens_on_a_cached_prefix() -> None:
    """The ensemble's step: one new token per branch, over a prefix and the branches so far."""
    parents, lengths = [-1, 0, 0, 1, 2], [3, 1, 1, 1, 1]
    seen = Tree(parents, lengths, align="lower-right").to_bool(Frame(2, 7))[0, 0].tolist()
    assert seen == [[True, True, True, True, False, True, False], [True, True, True, False, True, False, True]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tree([]), r"got 0 parents and 0 lengths, takes one of each per segment"),
        (lambda: Tree([-1, 0], [1]), r"got 2 parents and 1 lengths, takes one of each per segment"),
        (lambda: Tree([-1], [-2]), r"got lengths \[-2\], takes 0 or more"),
        (lambda: Tree([1, -1]), r"got parent 1 for segment 0, takes an earlier segment or -1; list parents first"),
        (lambda: Tree([0]), r"got parent 0 for segment 0"),
        (lambda: Tree([-2]), r"got parent -2 for segment 0"),
        (lambda: Tree([-1, 0]).to_bool(Frame(3, 3)), r"got a tree of 2 tokens, takes 3"),
        (
            lambda: Tree([-1, 0], align="lower-right").to_bool(Frame(3, 2)),
            r"got 3 queries for a tree of 2 tokens; each query is a token of it",
        ),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        make()
