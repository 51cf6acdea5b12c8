"""Dense, Bias and Alibi."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import by_hand
import pytest
import torch

from headway import MaskError
from headway.masks import Alibi, Bias, Causal, Dense, Frame, Mask, Padding, recognise

FRAME = Frame(3, 4, batch=2, heads=2)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 1), (2, 3, 4), (2, 1, 1, 4), (1, 2, 3, 1), (2, 2, 3, 4), (4,)])
def test_dense_broadcasts(shape: tuple[int, ...]) -> None:
    may = torch.rand(shape) < 0.5
    whole = may.expand(2, 2, 3, 4).tolist()
    truth = by_hand.table(FRAME, lambda b, h, q, k: whole[b][h][q][k])
    assert torch.equal(Dense(may).to_bool(FRAME).expand_as(truth), truth)


@pytest.mark.parametrize("make", [lambda s: Dense(torch.ones(s).bool()), lambda s: Bias(torch.ones(s))])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 5), r"\[3, 5\] with keys 5, takes 1 or 4"),
        ((2, 4), r"\[2, 4\] with queries 2, takes 1 or 3"),
        ((3, 3, 4), r"\[3, 3, 4\] with heads 3, takes 1 or 2"),
        ((3, 1, 3, 4), r"\[3, 1, 3, 4\] with batch 3, takes 1 or 2"),
        ((1, 1, 1, 3, 4), r"takes at most 4 axes \(batch, heads, queries, keys\)"),
    ],
)
def test_shapes_are_checked(make, shape: tuple[int, ...], words: str) -> None:
    for use in (
        lambda: make(shape).to_additive(FRAME, torch.float32),
        lambda: make(shape).to_bool(FRAME),
        lambda: make(shape).to_block_mask(FRAME),
        lambda: make(shape).check(FRAME),
    ):
        with pytest.raises(MaskError, match=words):
            use()


def test_dtypes_are_checked() -> None:
    with pytest.raises(MaskError, match=r"got float32\[3, 4\], takes a bool tensor.*use Bias\(tensor\)"):
        Dense(torch.ones(3, 4))
    with pytest.raises(MaskError, match=r"got bool\[3, 4\], takes floating-point numbers.*use Dense\(tensor\)"):
        Bias(torch.ones(3, 4).bool())
    with pytest.raises(MaskError, match=r"got slopes int64\[2\], takes one floating-point number per head"):
        Alibi(torch.ones(2).long())


def test_bias_is_added_as_it_is() -> None:
    bias = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.equal(Bias(bias).to_additive(FRAME, torch.float64), bias)
    assert Bias(bias).to_additive(FRAME, torch.bfloat16).dtype == torch.bfloat16


def test_minus_infinity_blocks_and_finite_numbers_do_not() -> None:
    bias = torch.zeros(3, 4)
    bias[1, 2], bias[0, 0] = -math.inf, torch.finfo(torch.float32).min
    keep = Bias(bias).to_bool(FRAME).expand(2, 2, 3, 4)
    assert torch.equal(keep, by_hand.table(FRAME, lambda b, h, q, k: (q, k) != (1, 2)))
    joined = (Bias(bias) & Padding([3])).to_bool(FRAME).expand(2, 2, 3, 4)
    assert torch.equal(joined, by_hand.table(FRAME, lambda b, h, q, k: (q, k) != (1, 2) and k < 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [-1e9, torch.finfo(torch.float32).min])
def test_a_finite_bias_stays_finite_in_a_narrow_dtype(dtype: torch.dtype, number: float) -> None:
    """A row of the smallest number alone is the mean of V; rounded to -inf it would be a row that sees nothing."""
    for mask in (Bias(torch.full((3, 4), number)), Bias(torch.full((3, 4), number)) & Padding([4])):
        assert mask.to_additive(FRAME, dtype).isfinite().all()
    blocked = Bias(torch.full((3, 4), -math.inf))
    assert blocked.to_additive(FRAME, dtype).isneginf().all()


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 1), (2, 2, 3, 4)])
def test_gradient_reaches_the_bias(shape: tuple[int, ...]) -> None:
    for join in (
        lambda b: b,
        lambda b: b & Causal(align="lower-right"),
        lambda b: b & Bias(torch.zeros(3, 4)) & Padding([3]),
    ):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        mask = join(Bias(bias))
        weight = torch.randn(2, 2, 3, 4, dtype=torch.float64)
        keep = mask.to_bool(FRAME).expand(2, 2, 3, 4)
        added = mask.to_additive(FRAME, torch.float64).expand(2, 2, 3, 4)
        (weight * torch.where(keep, added, 0.0)).sum().backward()
        want = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in want.shape)).tolist():
            want[tuple(at)] = weight[tuple(at)] if keep[tuple(at)] else 0.0
        assert torch.allclose(bias.grad, want.sum_to_size((1,) * (4 - len(shape)) + shape).view(shape))


@pytest.mark.parametrize(("q_len", "kv_len", "align"), [(4, 4, None), (3, 5, "lower-right"), (5, 3, "upper-left")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alibi(q_len: int, kv_len: int, align: str | None, dtype: torch.dtype) -> None:
    slopes = torch.tensor([2 ** (-8 * (i + 1) / 3) for i in range(3)])
    frame = Frame(q_len, kv_len, batch=2, heads=3)
    shift = kv_len - q_len if align == "lower-right" else 0
    got = Alibi(slopes, align=align).to_additive(frame, dtype).expand(2, 3, q_len, kv_len)
    for h in range(3):
        for q in range(q_len):
            for k in range(kv_len):
                want = -slopes[h].to(dtype) * abs(q + shift - k)
                assert torch.equal(got[:, h, q, k], want.expand(2))
    assert Alibi(slopes, align=align).to_bool(frame).all()


def test_alibi_of_float32_slopes_is_exact_in_float64() -> None:
    """The judge's sums must not be rounded where those of a kernel are."""
    slope = torch.tensor([2.0**-0.5])
    got = Alibi(slope, align="lower-right").to_additive(Frame(1, 10_001), torch.float64)[0, 0, 0, 0]
    assert got.item() == -(slope.double().item() * 10_000)


def test_alibi_takes_a_slope_per_head() -> None:
    with pytest.raises(MaskError, match=r"got 3 slopes, takes one per head \(2\)"):
        Alibi(torch.ones(3)).to_bool(Frame(2, 2, heads=2))
    with pytest.raises(MaskError, match=r"got slopes float32\[2, 2\]"):
        Alibi(torch.ones(2, 2))


def test_half_precision_slopes_are_counted_in_float32() -> None:
    """In their own dtype a distance of 2,048 was off by 4, and one of 70,000 infinite."""
    frame = Frame(1, 70_001, heads=1)
    for dtype in (torch.bfloat16, torch.float16):
        bias = Alibi(torch.tensor([1.0], dtype=dtype), align="upper-left").to_additive(frame, torch.float32)
        assert bias.flatten().tolist() == [-float(n) for n in range(70_001)]


@pytest.mark.parametrize("make", [Dense, Bias, Alibi, recognise])
@pytest.mark.parametrize("wrong", [[[True]], None])
def test_what_is_no_tensor_is_refused(make: Callable[[Any], Mask], wrong: object) -> None:
    with pytest.raises(MaskError, match=f"of type {type(wrong).__name__}, takes a tensor: torch.as_tensor"):
        make(wrong)
