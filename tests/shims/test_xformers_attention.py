"""xFormers' attention functions against the textbook in float64, forward and backward, for every bias and argument."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from shims.biases import CASES, IN_BLOCKS, Case, Make
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import headway
from headway.errors import RequestError
from headway.shims.xformers import ops as xops
from headway.shims.xformers.ops import fmha
from headway.shims.xformers.ops.fmha import attn_bias as ab

HEADS, SIZE, VALUE = 2, 8, 6


def rand(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return made.requires_grad_()


def textbook(
    q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None = None, added: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """On (B, M, *heads, K); a row that sees nothing gives 0, and -inf for its lse."""
    q, k, v = (x.movedim(1, -2) for x in (q, k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if added is None else logits + added
    logits = logits if sees is None else logits.masked_fill(~sees, float("-inf"))
    some = ~logits.isneginf().all(-1, keepdim=True)
    weights = torch.where(some, logits, 0.0).softmax(-1) * some
    lse = torch.where(some, torch.where(some, logits, 0.0).logsumexp(-1, keepdim=True), float("-inf"))
    return (weights @ v).movedim(-2, 1), lse.squeeze(-1)


def inputs(case: Case, *heads: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = case.sees.shape
    return rand(batch, queries, *heads, SIZE), rand(batch, keys, *heads, SIZE, seed=1), rand(batch, keys, *heads, VALUE)


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def grads(out: Tensor, *learns: Tensor) -> tuple[Tensor, ...]:
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.autograd.grad(out, learns, push, retain_graph=True)


def agree(got: Tensor, want: Tensor, *learns: Tensor) -> None:
    close(got, want)
    for mine, theirs in zip(grads(got, *learns), grads(want, *learns), strict=True):
        close(mine, theirs)


# -- biases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_every_bias_is_what_it_says(make: Make) -> None:
    case = make()
    q, k, v = inputs(case, HEADS)
    agree(xops.memory_efficient_attention(q, k, v, case.bias), textbook(q, k, v, case.sees)[0], q, k, v)
    want, lse = textbook(q, k, v, case.sees, scale=0.3)
    out, logs = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, case.bias, scale=0.3)
    agree(out, want, q, k, v)
    close(logs, lse)


@pytest.mark.parametrize("make", IN_BLOCKS.values(), ids=IN_BLOCKS)
def test_what_lies_between_blocks_of_keys_may_be_anything(make: Make) -> None:
    case = make()
    q, k, v = inputs(case, HEADS)
    filler = case.filler[None, :, None, None]
    mine = [torch.where(filler, float("nan"), x).detach().requires_grad_() for x in (k, v)]
    out = xops.memory_efficient_attention(q, *mine, case.bias)
    want, _ = textbook(q, k, v, case.sees)
    close(out, want)
    for got, x in zip(grads(out, *mine), grads(want, k, v), strict=True):
        close(got, x)
    assert (grads(xops.memory_efficient_attention(q, *mine, case.bias), *mine)[0][:, case.filler] == 0).all()


@pytest.mark.parametrize("shares", [False, True], ids=["keys of their own", "keys shared"])
@pytest.mark.parametrize("name", ["causal 3x6", "BlockDiagonalMask, alike", "padded causal, decoding", "paged, alike"])
def test_groups_of_heads(name: str, shares: bool) -> None:
    case = CASES[name]()
    q, k, v = inputs(case, 2, 3)
    if shares:
        k, v = (x[:, :, :, :1] for x in (k, v))
    wide = [x.expand(-1, -1, -1, 3, -1) for x in (k, v)]
    want, lse = textbook(q, *wide, case.sees)
    out, logs = fmha.memory_efficient_attention_forward_requires_grad(q, *wide, case.bias)
    agree(out, want, q, k, v)
    close(logs, lse)
    assert logs.shape == (1, 2, 3, case.sees.shape[0])


@pytest.mark.parametrize("axes", [3, 4, 5])
@pytest.mark.parametrize("learns", [False, True], ids=["given", "learnt"])
@pytest.mark.parametrize("causal", [False, True], ids=["a tensor", "causal and a tensor"])
def test_numbers_to_add(axes: int, learns: bool, causal: bool) -> None:
    heads = {3: (), 4: (2,), 5: (2, 3)}[axes]
    case = Case(ab.LowerTriangularMask(), torch.ones(4, 4).tril().bool(), torch.zeros(4).bool())
    q, k, v = inputs(case, *heads, batch=2)
    bias = rand(2, *heads, 4, 4).requires_grad_(learns)
    given = ab.LowerTriangularMaskWithTensorBias(bias) if causal else bias
    want, _ = textbook(q, k, v, case.sees if causal else None, bias)
    agree(xops.memory_efficient_attention(q, k, v, given), want, q, k, v, *([bias] if learns else []))


def test_numbers_to_add_that_leave_a_row_nothing() -> None:
    bias = torch.zeros(2, 2, 3, 5, dtype=torch.float64)
    bias[0, 1, 2] = bias[1, 0, :, 3:] = float("-inf")
    q, k, v = rand(2, 3, 2, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 6)
    agree(xops.memory_efficient_attention(q, k, v, bias), textbook(q, k, v, added=bias)[0], q, k, v)


@pytest.mark.parametrize("heads", [(), (2,), (2, 3)], ids=["3 axes", "4 axes", "5 axes"])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
def test_scale_and_axes(heads: tuple[int, ...], scale: float | None) -> None:
    q, k, v = rand(2, 4, *heads, 8), rand(2, 5, *heads, 8), rand(2, 5, *heads, 6)
    want, lse = textbook(q, k, v, scale=scale)
    agree(xops.memory_efficient_attention(q, k, v, None, 0.0, scale), want, q, k, v)
    agree(fmha.memory_efficient_attention_forward(q, k, v, scale=scale), want, q, k, v)
    close(
        fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)[1],
        lse.reshape(2, *heads or (1,), 4),
    )


def test_views_are_taken_as_they_are() -> None:
    qkv = rand(2, 5, 3, 2, 8)
    q, k, v = xops.unbind(qkv, 2)
    agree(xops.memory_efficient_attention(q, k, v), textbook(*qkv.unbind(2))[0], qkv)
    assert xops.memory_efficient_attention(q, k, v).is_contiguous()


@pytest.mark.parametrize("keys", [0, 4])
@pytest.mark.parametrize("queries", [0, 3])
def test_nothing_to_attend_to_gives_zeros(queries: int, keys: int) -> None:
    q, k, v = rand(2, queries, 2, 8), rand(2, keys, 2, 8), rand(2, keys, 2, 6)
    out = xops.memory_efficient_attention(q, k, v)
    assert out.shape == (2, queries, 2, 6)
    assert keys or not out.any()
    assert all(grad.shape == x.shape for grad, x in zip(grads(out, q, k, v), (q, k, v), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_answer_has_the_dtype_asked_for(dtype: torch.dtype) -> None:
    q = rand(1, 6, 2, 8).detach().to(dtype)
    want, _ = textbook(q.double(), q.double(), q.double())
    for function, own in (
        (xops.memory_efficient_attention, dtype),
        (fmha.memory_efficient_attention_partial, torch.float32),
    ):
        for asked in (None, torch.float64):
            got = function(q, q, q, output_dtype=asked)
            got, lse = got if isinstance(got, tuple) else (got, None)
            assert got.dtype == (asked or own)
            assert lse is None or lse.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


# -- what changes in place --------------------------------------------------------------------------------------------


def test_lengths_that_change_in_place_are_followed() -> None:
    bias = ab.BlockDiagonalMask.from_seqlens([4, 2], [3, 5]).make_causal()
    q, k, v = rand(1, 6, 2, 8), rand(1, 8, 2, 8), rand(1, 8, 2, 6)
    for q_lens, k_lens in (([4, 2], [3, 5]), ([3, 3], [4, 4]), ([2, 4], [3, 5])):
        bias.q_seqinfo.from_seqlens_inplace(q_lens)
        bias.k_seqinfo.from_seqlens_inplace(k_lens)
        fresh = ab.BlockDiagonalMask.from_seqlens(q_lens, k_lens).make_causal()
        sees = fresh.materialize((6, 8)) == 0
        agree(xops.memory_efficient_attention(q, k, v, bias), textbook(q, k, v, sees)[0], q, k, v)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode], ids=["grad", "inference"])
def test_a_decoding_loop_may_write_to_the_tensors_alone(mode: Any) -> None:
    """As xFormers' own Llama example does: only queries' lists are told."""
    room, lengths = 6, [2, 1, 3]
    with mode():
        bias = ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(lengths, room, lengths)
        q, k, v = rand(1, 6, 2, 8), rand(1, 18, 2, 8), rand(1, 18, 2, 6)
        close(xops.memory_efficient_attention(q, k, v, bias), textbook(q, k, v, bias.materialize((6, 18)) == 0)[0])
        bias.q_seqinfo.seqstart.copy_(torch.arange(4, dtype=torch.int32))
        bias.q_seqinfo.min_seqlen = bias.q_seqinfo.max_seqlen = 1
        bias.q_seqinfo.seqstart_py = bias.q_seqinfo.seqstart.tolist()
        for step in range(1, 4):
            bias.k_seqinfo.seqlen.add_(bias.k_seqinfo.seqlen < room)
            now = [min(length + step, room) for length in lengths]
            fresh = ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1] * 3, room, now)
            one = rand(1, 3, 2, 8, seed=step)
            want, _ = textbook(one, k, v, fresh.materialize((3, 18)) == 0)
            close(xops.memory_efficient_attention(one, k, v, bias), want)


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal 5x5", "BlockDiagonalMask, alike", "padded, alike", "gappy, more keys"])
def test_dropout_drops_weights_and_scales_the_rest(name: str) -> None:
    case = CASES[name]()
    queries, keys = case.sees.shape
    heads = 2000
    q, k = torch.zeros(1, queries, heads, 8), torch.zeros(1, keys, heads, 8)
    v = torch.eye(keys)[None, :, None].expand(1, keys, heads, keys)
    torch.manual_seed(0)
    weights = xops.memory_efficient_attention(q, k, v, case.bias, 0.25)
    plain = xops.memory_efficient_attention(q, k, v, case.bias)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], (plain / 0.75)[kept])
    assert abs(kept.float().sum() / (plain != 0).float().sum() - 0.75) < 0.01
    torch.manual_seed(0)
    assert torch.equal(xops.memory_efficient_attention(q, k, v, case.bias, 0.25), weights)
    assert not torch.equal(xops.memory_efficient_attention(q, k, v, case.bias, 0.25), weights)


@pytest.mark.parametrize(
    "function",
    [fmha.memory_efficient_attention_forward_requires_grad, fmha.memory_efficient_attention_partial],
)
def test_dropout_is_refused_where_the_caller_makes_the_backward_pass(function: Any) -> None:
    q = rand(1, 3, 2, 8)
    with pytest.raises(NotImplementedError, match=r"got p=0.1 .* takes 0.0"):
        function(q, q, q, p=0.1)
    with pytest.raises(NotImplementedError, match=r"got p=0.1"):
        fmha.memory_efficient_attention_backward(q, q, q, q, q, q, p=0.1)


# -- parts of the keys ------------------------------------------------------------------------------------------------


def split(k: Tensor, v: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(k.split(sizes, 1), v.split(sizes, 1), strict=True))


@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
@pytest.mark.parametrize("heads", [(2,), (2, 3)], ids=["heads", "groups"])
def test_parts_are_merged(heads: tuple[int, ...], stacked: bool) -> None:
    q, k, v = rand(2, 4, *heads, 8), rand(2, 7, *heads, 8), rand(2, 7, *heads, 6)
    parts = [fmha.memory_efficient_attention_partial(q, *part) for part in split(k, v, [3, 1, 3])]
    outs, logs = ([part[i] for part in parts] for i in (0, 1))
    given = (torch.stack(outs), torch.stack(logs)) if stacked else (outs, logs)
    out, lse = fmha.merge_attentions(*given)
    want, full = textbook(q, k, v)
    assert lse is not None
    close(lse, full)
    agree(out, want, q, k, v)
    assert fmha.merge_attentions(*given, write_lse=False)[1] is None
    assert fmha.merge_attentions(*given, output_dtype=torch.float16)[0].dtype == torch.float16


def test_parts_that_see_nothing_take_no_share() -> None:
    q, k, v = rand(1, 4, 2, 8), rand(1, 7, 2, 8), rand(1, 7, 2, 6)
    bias = torch.zeros(1, 2, 4, 7, dtype=torch.float64)
    bias[..., 0, :3] = bias[..., 1, 3:] = bias[..., 2, :] = float("-inf")
    parts = [
        fmha.memory_efficient_attention_partial(q, *part, columns)
        for part, columns in zip(split(k, v, [3, 4]), bias.split([3, 4], -1), strict=True)
    ]
    out, lse = fmha.merge_attentions([parts[0][0], parts[1][0]], [parts[0][1], parts[1][1]])
    want, full = textbook(q, k, v, added=bias)
    assert lse is not None
    close(lse, full)
    agree(out, want, q, k, v)


def test_parts_that_do_not_fit_are_refused() -> None:
    out, lse = torch.zeros(2, 4, 2, 6), torch.zeros(2, 2, 4)
    for outs, logs in (([out], [lse, lse]), ([], []), ([out], [lse[:1]]), ([out, out[:, :2]], [lse, lse[..., :2]])):
        with pytest.raises(RequestError, match="takes as many of one as of the other"):
            fmha.merge_attentions(outs, logs)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_gradients_by_hand_are_those_of_autograd(make: Make) -> None:
    case = make()
    q, k, v = inputs(case, HEADS)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, case.bias)
    push = torch.randn_like(out)
    got = fmha.memory_efficient_attention_backward(push, out, lse, q, k, v, case.bias)
    want, _ = textbook(q, k, v, case.sees)
    for mine, theirs in zip(got, torch.autograd.grad(want, (q, k, v), push), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("heads", [(), (2,), (2, 3)], ids=["3 axes", "4 axes", "5 axes"])
def test_gradients_by_hand_take_the_output_over_all_keys(heads: tuple[int, ...]) -> None:
    """As who merges parts calls it for each: with the merged output and lse."""
    q, k, v = rand(2, 4, *heads, 8), rand(2, 7, *heads, 8), rand(2, 7, *heads, 6)
    want, _ = textbook(q, k, v, scale=0.5)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=0.5)
    push = torch.randn_like(out)
    parts = [
        fmha.memory_efficient_attention_backward(push, out, lse, q, *part, scale=0.5) for part in split(k, v, [3, 4])
    ]
    dq, dk, dv = torch.autograd.grad(want, (q, k, v), push)
    close(sum(part[0] for part in parts), dq)  # type: ignore[arg-type]
    close(torch.cat([part[1] for part in parts], 1), dk)
    close(torch.cat([part[2] for part in parts], 1), dv)


# -- operators --------------------------------------------------------------------------------------------------------

PAIRS = [value for name, value in vars(fmha).items() if name.startswith("MemoryEfficientAttention")]


@pytest.mark.parametrize("pair", [*PAIRS, (None, None), (fmha.cutlass.FwOp, None)], ids=str)
def test_operators_are_taken_and_change_nothing(pair: Any) -> None:
    q = rand(1, 3, 2, 8)
    want = xops.memory_efficient_attention(q, q, q)
    assert torch.equal(xops.memory_efficient_attention(q, q, q, op=pair), want)
    assert torch.equal(fmha.memory_efficient_attention_forward(q, q, q, op=pair[0]), want)
    for op in (pair, pair[0]):
        close(fmha.memory_efficient_attention_partial(q, q, q, op=op)[0], want)


@pytest.mark.parametrize(
    "op", ["cutlass", (fmha.cutlass.BwOp, fmha.cutlass.FwOp), fmha.flash.FwOp, (int, None), 3], ids=str
)
def test_what_is_no_operator_is_refused(op: Any) -> None:
    q = rand(1, 3, 2, 8)
    with pytest.raises(RequestError, match="takes None or a pair of AttentionFwOpBase and AttentionBwOpBase"):
        xops.memory_efficient_attention(q, q, q, op=op)
    with pytest.raises(RequestError, match="got op="):
        fmha.memory_efficient_attention_backward(q, q, q, q, q, q, op=fmha.cutlass.FwOp)


@pytest.mark.parametrize("op", [*fmha.ALL_FW_OPS], ids=lambda op: op.NAME)
def test_an_operator_says_what_it_takes_and_runs(op: Any) -> None:
    q = rand(1, 3, 2, 8)
    assert op.is_available()
    assert op.supports(fmha.Inputs(q, q, q))
    out, context = op.apply(fmha.Inputs(q, q, q), needs_gradient=True)
    found = fmha.cutlass.BwOp.apply(context, fmha.Inputs(q, q, q), torch.ones_like(out))
    want = torch.autograd.grad(textbook(q, q, q)[0].sum(), q)[0]
    close(found.dq + found.dk + found.dv, want)
    assert op.apply(fmha.Inputs(q, q, q), needs_gradient=False)[1] is None
    (reason,) = op.not_supported_reasons(fmha.Inputs(q, q[..., :4], q))
    assert "takes" in reason


def test_operators_declare_every_bias_that_is_tested() -> None:
    tested = {type(make().bias) for make in CASES.values()} | {type(None), Tensor, ab.LowerTriangularMaskWithTensorBias}
    for op in (*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS):
        assert set(op.SUPPORTED_ATTN_BIAS_TYPES) == tested
        dtype, *_ = op.SUPPORTED_DTYPES
        assert dtype.is_floating_point


# -- refusals ---------------------------------------------------------------------------------------------------------

FOUR = (torch.zeros(2, 4, 2, 8),) * 3
ONE = (torch.zeros(1, 4, 2, 8),) * 3


class Own(ab.LowerTriangularMask):
    pass


REFUSED: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], str]] = {
    "axes": ((torch.zeros(4, 8),) * 3, {}, "takes (B, M, K), (B, M, H, K) or (B, M, G, H, K)"),
    "heads to repeat": ((FOUR[0], *[x[:, :, :1] for x in FOUR[1:]]), {}, "expand key and value"),
    "a size": ((FOUR[0], FOUR[1][..., :4], FOUR[2]), {}, "one head_dim for q and k"),
    "keys and values": ((FOUR[0], FOUR[1], FOUR[2][:, :3]), {}, "the same heads and keys in k and v"),
    "dtypes": ((FOUR[0], FOUR[1].half(), FOUR[2]), {}, "one floating-point dtype"),
    "axes of a bias": (FOUR, {"attn_bias": torch.zeros(4, 4)}, "(B, H, M, N) for 4"),
    "a bias of other keys": (FOUR, {"attn_bias": torch.zeros(2, 2, 4, 5)}, "takes"),
    "bools": (FOUR, {"attn_bias": torch.ones(2, 2, 4, 4).bool()}, "takes numbers to add"),
    "a bias of one's own": (FOUR, {"attn_bias": Own()}, "got attn_bias of Own"),
    "a string": (FOUR, {"attn_bias": "causal"}, "got attn_bias of str"),
    "a share": (FOUR, {"p": 1.5}, "got dropout=1.5"),
    "a negative share": (FOUR, {"p": -0.1}, "got dropout=-0.1"),
    "a batch of blocks": (FOUR, {"attn_bias": ab.BlockDiagonalMask.from_seqlens([4])}, "got a batch of 2"),
    "fewer than there are": (ONE, {"attn_bias": ab.BlockDiagonalMask.from_seqlens([3])}, "for 4 tokens"),
    "more than there are": (ONE, {"attn_bias": ab.BlockDiagonalMask.from_seqlens([3, 2])}, "for 4 tokens"),
    "fewer keys": (ONE, {"attn_bias": ab.BlockDiagonalMask.from_seqlens([4], [3])}, "for 4 tokens"),
    "fewer padded": (ONE, {"attn_bias": ab.BlockDiagonalPaddedKeysMask.from_seqlens([4], 3, [3])}, "takes the 3"),
    "fewer gappy": (ONE, {"attn_bias": ab.BlockDiagonalGappyKeysMask.from_seqlens([4], [0, 3], [3])}, "takes the 3"),
    "a page too many": (
        ONE,
        {"attn_bias": ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens([4], [4], torch.tensor([[0, 2]]), 2)},
        "outside the 4 that there are",
    ),
}


@pytest.mark.parametrize("given, how, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused(given: tuple[Tensor, ...], how: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        xops.memory_efficient_attention(*given, **how)


def test_a_bias_made_for_fewer_tokens_is_refused_after_it_served() -> None:
    bias = ab.BlockDiagonalMask.from_seqlens([2, 2])
    q = rand(1, 4, 2, 8)
    xops.memory_efficient_attention(q, q, q, bias)
    longer = rand(1, 5, 2, 8)
    with pytest.raises(RequestError, match="takes the 4 that it was made for"):
        xops.memory_efficient_attention(longer, longer, longer, bias)


# -- compiled ---------------------------------------------------------------------------------------------------------


TRACED = {name: make for name, make in CASES.items() if "more keys" in name or name == "local 5x5"}


@pytest.mark.parametrize("make", TRACED.values(), ids=TRACED)
def test_one_graph(make: Make) -> None:
    torch._dynamo.reset()
    case = make()
    q, k, v = inputs(case, HEADS)
    traced = torch.compile(xops.memory_efficient_attention, fullgraph=True, backend="eager")
    agree(traced(q, k, v, case.bias), textbook(q, k, v, case.sees)[0], q, k, v)


def test_one_graph_with_the_bias_made_in_it() -> None:
    torch._dynamo.reset()
    q, k, v = rand(1, 6, 2, 8), rand(1, 13, 2, 8), rand(1, 13, 2, 6)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bias = ab.BlockDiagonalMask.from_seqlens([2, 3, 1], [4, 3, 6]).make_causal_from_bottomright()
        return fmha.memory_efficient_attention_forward_requires_grad(q, k, v, bias, scale=0.5)

    out, lse = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    want, logs = run(q, k, v)
    agree(out, want, q, k, v)
    close(lse, logs)


def test_changing_lengths_are_few_programs() -> None:
    torch._dynamo.reset()
    programs = CompileCounter()
    traced = torch.compile(xops.memory_efficient_attention, fullgraph=True, backend=programs)
    draw = random.Random(0)
    counts = []
    for _ in range(24):
        lengths = [draw.randint(1, 9) for _ in range(draw.randint(2, 5))]
        q, bias = rand(1, sum(lengths), 2, 8), ab.BlockDiagonalMask.from_seqlens(lengths)
        close(traced(q, q, q, bias), textbook(q, q, q, bias.materialize((sum(lengths),) * 2) == 0)[0])
        counts.append(programs.frame_count)
    assert counts[-1] == counts[12] <= 7, counts


def test_a_bias_made_in_inference_mode_serves_training() -> None:
    for name in ("BlockDiagonalMask, alike", "padded causal, alike"):
        with torch.inference_mode():
            case = CASES[name]()
            xops.memory_efficient_attention(*inputs(case, HEADS), case.bias)
        q, k, v = inputs(case, HEADS)
        agree(xops.memory_efficient_attention(q, k, v, case.bias), textbook(q, k, v, case.sees)[0], q, k, v)


def test_backends_can_be_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    q = rand(1, 3, 2, 8)
    monkeypatch.setenv("HEADWAY_BACKEND", "flash4")
    with pytest.raises(headway.NoBackendError, match="flash4"):
        xops.memory_efficient_attention(q, q, q)
