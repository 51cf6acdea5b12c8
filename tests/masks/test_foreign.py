"""Masks of other libraries, beside what those libraries do with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import by_hand
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headway import MaskError
from headway.masks import (
    Frame,
    Full,
    Mask,
    from_attn_mask,
    from_key_padding_mask,
    from_sdpa,
    from_transformers,
)  # fmt: skip

BATCH, HEADS, LENGTH, WIDTH = 2, 2, 5, 8
FRAME = Frame(LENGTH, LENGTH, BATCH, HEADS)
BLOCKED = torch.tensor([[False, False, True, False, True], [False, True, True, True, False]])
AHEAD = torch.ones(LENGTH, LENGTH).bool().triu(1)


def softmax_with(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + mask.to_additive(FRAME, torch.float64)
    return scores.softmax(-1) @ v


def through_multihead(mask: Mask, layer: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    q, k, v = functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return layer.out_proj(softmax_with(mask, q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture
def layer() -> torch.nn.MultiheadAttention:
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("numbers", [False, True])
def test_key_padding_mask(layer: torch.nn.MultiheadAttention, x: Tensor, numbers: bool) -> None:
    given = torch.randn(BATCH, LENGTH, dtype=torch.float64) if numbers else BLOCKED
    want, _ = layer(x, x, x, key_padding_mask=given)
    torch.testing.assert_close(through_multihead(from_key_padding_mask(given), layer, x), want)
    if not numbers:
        truth = by_hand.table(FRAME, lambda b, h, q, k: not BLOCKED[b, k])
        assert torch.equal(from_key_padding_mask(BLOCKED).to_bool(FRAME).expand_as(truth), truth)
        one = from_key_padding_mask(BLOCKED[0]).to_bool(Frame(2, LENGTH))
        assert one[0, 0, 0].tolist() == (~BLOCKED[0]).tolist()


ATTN = {
    "bool": AHEAD,
    "numbers": torch.randn(LENGTH, LENGTH, dtype=torch.float64),
    "bool, each head": torch.stack([AHEAD.roll(i, 1) for i in range(BATCH * HEADS)]),
    "numbers, each head": torch.randn(BATCH * HEADS, LENGTH, LENGTH, dtype=torch.float64),
}


@pytest.mark.parametrize("given", ATTN.values(), ids=ATTN)
def test_attn_mask(layer: torch.nn.MultiheadAttention, x: Tensor, given: Tensor) -> None:
    want, _ = layer(x, x, x, attn_mask=given)
    torch.testing.assert_close(through_multihead(from_attn_mask(given, HEADS), layer, x), want)


def test_both_at_once(layer: torch.nn.MultiheadAttention, x: Tensor) -> None:
    want, _ = layer(x, x, x, attn_mask=AHEAD, key_padding_mask=BLOCKED)
    mask = from_attn_mask(AHEAD, HEADS) & from_key_padding_mask(BLOCKED)
    torch.testing.assert_close(through_multihead(mask, layer, x), want)


SDPA = {
    "bool": ~AHEAD,
    "numbers": ATTN["numbers"],
    "bool, all axes": torch.stack([~AHEAD.roll(i, 1) for i in range(4)]).view(2, 2, LENGTH, LENGTH),
    "numbers, keys": torch.randn(BATCH, 1, 1, LENGTH, dtype=torch.float64),
    "none": None,
}


@pytest.mark.parametrize("given", SDPA.values(), ids=SDPA)
def test_sdpa(given: Tensor | None) -> None:
    q, k, v = torch.randn(3, BATCH, HEADS, LENGTH, 4, dtype=torch.float64)
    want = functional.scaled_dot_product_attention(q, k, v, attn_mask=given)
    torch.testing.assert_close(softmax_with(from_sdpa(given), q, k, v), want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
def test_transformers_tokens(dtype: torch.dtype) -> None:
    """1 is a real token, as a tokenizer says it."""
    ones = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    truth = by_hand.table(FRAME, lambda b, h, q, k: ones[b][k] == 1)
    assert torch.equal(from_transformers(torch.tensor(ones, dtype=dtype)).to_bool(FRAME).expand_as(truth), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformers_numbers(dtype: torch.dtype) -> None:
    """As its `_prepare_4d_causal_attention_mask` writes them; a row of nothing but the smallest number sees nothing."""
    may = (~AHEAD)[None, None] & ~BLOCKED[:, None, None]
    may[1, 0, 0] = False
    given = torch.zeros(may.shape, dtype=dtype).masked_fill(~may, torch.finfo(dtype).min)
    mask = from_transformers(given)
    assert torch.equal(mask.to_bool(FRAME), may)
    assert torch.equal(mask.to_additive(FRAME, dtype).isneginf(), ~may)
    assert torch.equal(from_transformers(may).to_bool(FRAME), may)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: from_key_padding_mask(torch.ones(1, 1, 3).bool()),
            r"got key_padding_mask bool\[1, 1, 3\], takes \(batch, keys\)",
        ),
        (lambda: from_key_padding_mask(torch.ones(1, 3).long()), r"got key_padding_mask int64\[1, 3\].*True = blocked"),
        (
            lambda: from_attn_mask(torch.ones(3, 2, 2), 2),
            r"got attn_mask float32\[3, 2, 2\], takes batch \* 2 heads in front",
        ),
        (lambda: from_attn_mask(torch.ones(3), 2), r"got attn_mask float32\[3\], takes \(queries, keys\) or"),
        (lambda: from_attn_mask(torch.ones(3, 3).long(), 2), r"got attn_mask int64\[3, 3\].*True = blocked"),
        (lambda: from_sdpa(torch.ones(3, 3).long()), r"got attn_mask int64\[3, 3\].*True = may"),
        (
            lambda: from_transformers(torch.ones(1, 3)),
            r"got attention_mask float32\[1, 3\].*pass attention_mask.bool\(\)",
        ),
        (
            lambda: from_transformers(torch.ones(1, 3, 3)),
            r"got attention_mask float32\[1, 3, 3\], takes \(batch, keys\) or",
        ),
        (
            lambda: from_transformers(torch.ones(1, 1, 3, 3).long()),
            r"got attention_mask int64\[1, 1, 3, 3\].*bool \(True = may\)",
        ),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        make()


@pytest.mark.parametrize(
    "make", [from_sdpa, from_key_padding_mask, from_transformers, lambda mask: from_attn_mask(mask, 2)]
)
def test_none_hides_nothing_and_what_is_no_tensor_is_refused(make: Callable[[Any], Mask]) -> None:
    assert make(None) == Full()
    with pytest.raises(MaskError, match="of type list, takes a tensor: torch.as_tensor"):
        make([[True, False]])


def test_numbers_of_packed_documents_are_no_padding() -> None:
    with pytest.raises(MaskError, match=r"other numbers than 0 and 1, takes 1 for a real token; .* Documents"):
        from_transformers(torch.tensor([[1, 1, 2]]))
