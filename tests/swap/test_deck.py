"""The edge deck: right calls pass, and each card finds what it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway import Causal, Mask, Padding, Window
from headway.swap import deck
from headway.swap.deck import Card, Shape, deal

SHAPE = Shape(4, 2, 17, 17, "float32", "cpu", "auto")


def failed(cards: list[Card]) -> set[str]:
    return {card.case for card in cards if card.failure}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_right_calls_pass(dtype: str) -> None:
    cards = list(deal([dataclasses.replace(SHAPE, dtype=dtype)]))
    assert not failed(cards)
    assert all(card.backend for card in cards), "auto always has a backend"


def wider(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, **options: Any) -> Tensor:
    """One key too many: harmless where it is like the others, and seen where it is not."""
    mask = Padding([96, 32]) if isinstance(mask, Padding) and k.shape[2] == 96 else mask
    return headway.attention(q, k, v, mask, **options)


def other_corner(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, **options: Any) -> Tensor:
    if isinstance(mask, Causal) and q.shape[2] != k.shape[2]:
        mask = Causal("lower-right" if mask.align == "upper-left" else "upper-left")
    return headway.attention(q, k, v, mask, **options)


def narrower(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, **options: Any) -> Tensor:
    return headway.attention(q, k, v, Window(16, 0) if isinstance(mask, Window) else mask, **options)


def mean_of_all(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, **options: Any) -> Tensor:
    """What many kernels make of a row that sees nothing."""
    out = headway.attention(q, k, v, mask, **options)
    if isinstance(mask, Padding):
        sees = mask.to_bool(headway.masks.Frame(q.shape[2], k.shape[2], q.shape[0], q.shape[1])).any(-1, keepdim=True)
        out = torch.where(sees, out, v.repeat_interleave(2, 1).mean(2, keepdim=True))
    return out


def contiguous_alone(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, **options: Any) -> Tensor:
    """A kernel that takes strided memory for contiguous."""
    taken = (x if x.is_contiguous() else x.as_strided(x.shape, torch.empty(x.shape).stride()) for x in (q, k, v))
    return headway.attention(*taken, mask, **options)


WRONG: dict[Callable[..., Tensor], set[str]] = {
    wider: {"padding", "large numbers in padding", "rows that see nothing"},
    other_corner: {"causal, fewer queries than keys", "causal, more queries than keys"},
    narrower: {"window"},
    mean_of_all: {"rows that see nothing"},
    contiguous_alone: {"strided views"},
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_each_card_finds_what_it_is_for(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: Any, backend: str, **options: Any) -> Tensor:
        return (headway.attention if backend == "reference" else wrong)(*args, backend=backend, **options)

    monkeypatch.setattr(deck, "attention", spoiled)
    assert failed(list(deal([SHAPE]))) == WRONG[wrong]
