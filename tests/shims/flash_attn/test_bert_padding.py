"""flash_attn.bert_padding: filler out and in again, forward and backward."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import Tensor

from headway.errors import RequestError

bert_padding = importlib.import_module("headway.shims.flash_attn.bert_padding")

SIGNATURES = {
    "unpad_input": {"hidden_states": inspect._empty, "attention_mask": inspect._empty, "unused_mask": None},
    "unpad_input_for_concatenated_sequences": dict.fromkeys(
        ("hidden_states", "attention_mask_in_length"), inspect._empty
    ),
    "pad_input": dict.fromkeys(("hidden_states", "indices", "batch", "seqlen"), inspect._empty),
    "index_first_axis": dict.fromkeys(("input", "indices"), inspect._empty),
    "index_put_first_axis": dict.fromkeys(("values", "indices", "first_axis_dim"), inspect._empty),
    "index_first_axis_residual": dict.fromkeys(("input", "indices"), inspect._empty),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    parameters = inspect.signature(getattr(bert_padding, name)).parameters
    assert {each.name: each.default for each in parameters.values()} == SIGNATURES[name]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("lengths", [(3, 1), (0, 4), (4, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_unpad_and_pad(shape: tuple[int, ...], lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, *shape, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    tokens, indices, starts, longest, used = bert_padding.unpad_input(x, mask.to(dtype))
    assert torch.equal(tokens, x[mask])
    assert torch.equal(indices, mask.flatten().nonzero().flatten())
    assert (starts.tolist(), starts.dtype) == ([0, lengths[0], sum(lengths)], torch.int32)
    assert (longest, type(longest)) == (max(lengths), int)
    assert (used.tolist(), used.dtype) == (list(lengths), torch.int32)
    back = bert_padding.pad_input(tokens, indices, 2, 4)
    assert torch.equal(back, x.masked_fill(~mask[(..., *[None] * len(shape))], 0.0))
    (grad,) = torch.autograd.grad((back * 3).sum(), x)
    assert torch.equal(grad, 3.0 * mask[(..., *[None] * len(shape))].expand_as(x))


def test_left_padding_and_tokens_not_in_use() -> None:
    x = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0]])
    tokens, indices, starts, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert tokens.flatten().tolist() == [1, 2, 3, 4, 5]
    assert (indices.tolist(), starts.tolist(), longest, used.tolist()) == ([1, 2, 3, 4, 5], [0, 3, 5], 3, [2, 1])


def test_rows_that_hold_several_sequences() -> None:
    x = torch.arange(18.0).view(3, 6, 1)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, starts, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert tokens.flatten().tolist() == indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert (starts.tolist(), starts.dtype, longest) == ([0, 2, 5, 8, 10, 16], torch.int32, 6)


def test_index_functions_and_their_gradients() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 0], dtype=torch.int32)  # transformers gives such to pad_input
    torch.autograd.gradcheck(bert_padding.index_first_axis, (x, indices))
    torch.autograd.gradcheck(bert_padding.index_put_first_axis, (x[:2], indices, 7))
    rows, residual = bert_padding.index_first_axis_residual(x, indices)
    (grad,) = torch.autograd.grad(rows.sum() * 2 + residual.sum(), x)
    counts = torch.tensor([3.0, 1, 1, 3, 1], dtype=torch.float64)
    assert torch.equal(grad, counts[:, None, None].expand_as(x))
    with torch.no_grad():
        residual.zero_()
    assert not x.any()  # it is the input itself, as there


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(8)], ids=str)
def test_masks_of_another_shape_are_refused(mask: Tensor) -> None:
    with pytest.raises(RequestError, match=r"takes \(batch, length\)"):
        bert_padding.unpad_input(torch.randn(2, 4, 1), mask)
    with pytest.raises(RequestError, match=r"takes \(batch, length\)"):
        bert_padding.unpad_input_for_concatenated_sequences(torch.randn(2, 4, 1), mask.long())


@pytest.mark.parametrize("filler", [-1e4, float("-inf"), 2.0])
def test_an_additive_mask_is_refused(filler: float) -> None:
    """1 for a token: 0 and -10000 would keep the filler, and drop the tokens."""
    mask = torch.tensor([[0.0, 0.0, filler], [0.0, filler, filler]])
    with pytest.raises(RequestError, match="got attention_mask with other numbers than 0 and 1.*: mask == 0"):
        bert_padding.unpad_input(torch.randn(2, 3, 4), mask)
    assert bert_padding.unpad_input(torch.randn(2, 3, 4), mask == 0)[4].tolist() == [2, 1]
