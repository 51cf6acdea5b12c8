"""xFormers' layers and small operators against their formulas in float64, with the parameter names of checkpoints."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.errors import RequestError
from headway.shims.xformers import info
from headway.shims.xformers import ops as xops
from headway.shims.xformers.ops import fmha
from headway.shims.xformers.ops.rmsnorm import rms_norm, rms_norm_add
from headway.shims.xformers.ops.swiglu_op import swiglu_packed


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def agree(got: Tensor, want: Tensor, *learns: Tensor) -> None:
    torch.testing.assert_close(got, want)
    push = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, learns, push), torch.autograd.grad(want, learns, push), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


# -- SwiGLU -----------------------------------------------------------------------------------------------------------


def by_formula(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, w3: Tensor, b3: Any) -> Tensor:
    one, two = (x @ w.T + (0 if b is None else b) for w, b in ((w1, b1), (w2, b2)))
    return (one / (1 + (-one).exp()) * two) @ w3.T + (0 if b3 is None else b3)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_swiglu(shape: tuple[int, ...], biases: bool) -> None:
    x, weights = rand(*shape), (rand(5, 4), rand(5, 4), rand(6, 5))
    b1, b2, b3 = (rand(len(w)) for w in weights) if biases else (None, None, None)
    w1, w2, w3 = weights
    learns = [t for t in (x, w1, b1, w2, b2, w3, b3) if t is not None]
    for op in (None, xops.SwiGLUEagerOp):
        agree(xops.swiglu(x, w1, b1, w2, b2, w3, b3, op=op), by_formula(x, w1, b1, w2, b2, w3, b3), *learns)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_swiglu_as_a_layer(bias: bool, packed: bool) -> None:
    layer = xops.SwiGLU(4, 5, 6, bias=bias, _pack_weights=packed).double()
    names = {"w12", "w3"} if packed else {"w1", "w2", "w3"}
    kinds = ("weight", "bias") if bias else ("weight",)
    assert set(layer.state_dict()) == {f"{name}.{kind}" for name in names for kind in kinds}
    x = rand(2, 3, 4)
    w1, w2 = layer.w12.weight.split(5) if packed else (layer.w1.weight, layer.w2.weight)
    b1, b2 = (None, None) if not bias else layer.w12.bias.split(5) if packed else (layer.w1.bias, layer.w2.bias)
    agree(layer(x), by_formula(x, w1, b1, w2, b2, layer.w3.weight, layer.w3.bias), x, *layer.parameters())
    assert xops.SwiGLU(4, 5)(torch.zeros(1, 4)).shape == (1, 4)


def test_swiglu_with_an_op_of_ones_own() -> None:
    def fused(x: Tensor, w1w2: Tensor, b1b2: Tensor | None, w3: Tensor, b3: Tensor | None) -> Tensor:
        (w1, w2), (b1, b2) = w1w2, (None, None) if b1b2 is None else b1b2
        return by_formula(x, w1, b1, w2, b2, w3, b3)

    own = xops.SwiGLUOp(fused, True, "own", [])
    for bias in (True, False):
        layer = xops.SwiGLU(4, 5, bias=bias).double()
        x = rand(2, 3, 4)
        want = layer(x)
        torch.testing.assert_close(xops.swiglu(x, *layer._ordered_params(), op=own), want)
        layer.op = own
        torch.testing.assert_close(layer(x), want)
    apart = (rand(5, 4), None, rand(5, 4), None, rand(4, 5), None)
    with pytest.raises(NotImplementedError, match=r"unbind\(w12, 0\)"):
        xops.swiglu(x, *apart, op=own)
    with pytest.raises(RequestError, match="use swiglu"):
        swiglu_packed(x, rand(2, 5, 4), None, rand(4, 5), None, op=xops.SwiGLUEagerOp)


def test_the_dispatch_says_what_it_sees() -> None:
    layer = xops.SwiGLU(4, 5)
    seen = xops.SwiGLUOpDispatch.from_arguments(torch.zeros(1, 4), *layer._ordered_params())
    assert (seen.packed_weights, seen.bias_enabled, seen.op) == (True, True, xops.SwiGLUEagerOp)
    assert xops.SwiGLUOp(print, True, "packed", []).supports(seen)
    unpacked = xops.SwiGLU(4, 5, bias=False, _pack_weights=False)
    seen = xops.SwiGLUOpDispatch.from_arguments(torch.zeros(1, 4), *unpacked._ordered_params())
    assert (seen.packed_weights, seen.bias_enabled) == (False, False)
    assert not xops.SwiGLUOp(print, True, "packed", []).supports(seen)
    assert not xops.SwiGLUOp(print, False, "biased", [lambda op: op.bias_enabled]).supports(seen)


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((5, 4), None, (4, 4), None, (4, 5), None), "takes (hidden, in) twice"),
        (((5, 4), None, (5, 4), None, (4, 4), None), "(out, hidden)"),
        (((5, 4), (4,), (5, 4), None, (4, 5), None), "got b1 [4], takes (5,)"),
        (((5, 4), None, (5, 4), None, (4, 5), (5,)), "got b3 [5], takes (4,)"),
    ],
    ids=["w2", "w3", "b1", "b3"],
)
def test_weights_that_do_not_fit_are_refused(shapes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        xops.swiglu(torch.zeros(1, 4), *[None if shape is None else torch.zeros(shape) for shape in shapes])
    with pytest.raises(RequestError, match="takes a SwiGLUOp"):
        xops.swiglu(*[torch.zeros(4, 4)] * 2, None, torch.zeros(4, 4), None, torch.zeros(4, 4), None, op="eager")


# -- RMSNorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(weighted: bool, eps: float) -> None:
    x, y, weight = rand(2, 3, 8), rand(2, 3, 8), rand(8) if weighted else None

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).sum(-1, keepdim=True) / 8 + eps) ** 0.5 * (1 if weight is None else weight)

    learns = (x,) if weight is None else (x, weight)
    agree(rms_norm(x, weight, eps), norm(x), *learns)
    total = x.clone()
    agree(rms_norm_add(total, y, weight, eps), norm(x + y), y, *learns)
    assert torch.equal(total, x + y)


def test_rms_norm_as_a_layer() -> None:
    layer = xops.RMSNorm(8, eps=0.1)
    assert set(layer.state_dict()) == {"weight"}
    assert not xops.RMSNorm(8, include_weight=False).state_dict()
    nn.init.normal_(layer.weight)
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    torch.testing.assert_close(layer(x), F.rms_norm(x, (8,), layer.weight, 0.1))
    want = layer(x + y)
    torch.testing.assert_close(layer.increment_and_forward_(x, y), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_adds_up_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((1, 4096), 8.0, dtype=dtype)
    got = xops.RMSNorm(4096, include_weight=False)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.ones_like(x))


# -- views and rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_what_was_taken_apart_is_put_together_without_a_copy(dim: int) -> None:
    x = rand(3, 4, 5)
    parts = xops.unbind(x, dim)
    assert all(torch.equal(part, want) for part, want in zip(parts, torch.unbind(x, dim), strict=True))
    stacked = xops.stack_or_none(parts, dim)
    assert stacked is not None
    assert stacked.data_ptr() == x.data_ptr()
    assert xops.get_stack_strides(parts, dim) == x.stride()
    agree(stacked, torch.stack(torch.unbind(x, dim), dim), x)


def test_what_is_no_stack_is_none() -> None:
    x = torch.randn(3, 4, 5)
    one, two, three = x.unbind(0)
    assert xops.stack_or_none((one, two.clone()), 0) is None
    assert xops.stack_or_none((one, three, two), 0) is None
    assert xops.stack_or_none((one, two[:2]), 0) is None
    assert xops.stack_or_none((one,), 0) is None
    assert xops.stack_or_none((one, two.T.contiguous().T), 0) is None


@pytest.mark.parametrize("scaled", [True, False])
def test_rows_are_added_in_place(scaled: bool) -> None:
    x, source, scaling = rand(4, 3, 5), rand(2, 3, 5), rand(5) if scaled else None
    index = torch.tensor([3, 0])
    mine = x.clone()
    got = xops.scaled_index_add(mine, index, source, scaling, alpha=2.0)
    assert got is mine
    want = torch.index_add(x, 0, index, source * (1 if scaling is None else scaling), alpha=2.0)
    agree(got, want, x, source, *(() if scaling is None else (scaling,)))


def test_picked_rows_lie_end_to_end() -> None:
    sources, indices = [rand(4, 3), rand(2, 6)], [torch.tensor([2, 0]), torch.tensor([1])]
    want = torch.cat([s[i].flatten() for s, i in zip(sources, indices, strict=True)])
    agree(xops.index_select_cat(sources, indices), want, *sources)


# -- info -------------------------------------------------------------------------------------------------------------


def test_info_names_the_operators_and_who_computes(capsys: pytest.CaptureFixture[str]) -> None:
    status = info.get_features_status()
    assert {f"memory_efficient_attention.{op.NAME}" for op in fmha.ALL_FW_OPS} <= status.keys()
    assert set(status.values()) == {"available", "False"}
    info.print_info()
    told = capsys.readouterr().out
    assert "computed by Headway" in told
    assert torch.__version__ in told


def test_a_bool_bias_is_refused_with_a_remedy_that_is_taken() -> None:
    q, keep = torch.randn(1, 5, 2, 8), torch.ones(1, 2, 5, 5).tril().bool()
    with pytest.raises(RequestError, match="got an attn_bias of torch.bool, takes numbers to add") as caught:
        xops.memory_efficient_attention(q, q, q, attn_bias=keep)
    remedy = str(caught.value).partition("does: ")[2]
    numbers = eval(remedy, {"torch": torch, "math": math, "keep": keep, "query": q})
    causal = xops.memory_efficient_attention(q, q, q, attn_bias=xops.LowerTriangularMask())
    torch.testing.assert_close(xops.memory_efficient_attention(q, q, q, attn_bias=numbers), causal)
