"""Classes of requests: rounding keeps all that a choice depends on."""

from __future__ import annotations

import pytest
from choice.machines import A100, B200, H100, MPS
from hypothesis import given
from hypothesis import strategies as st

from headway.choice.choose import choose
from headway.limits.request import Request, length_class, representative

LENGTHS = st.one_of(st.integers(0, 300), st.integers(0, 1 << 24))


@given(LENGTHS)
def test_a_class_rounds_up_and_stays_itself(length: int) -> None:
    rounded = representative(length)
    assert rounded >= length
    assert representative(rounded) == rounded
    assert (rounded % 128 == 64) == (length % 128 == 64)
    assert (rounded == 1) == (length == 1)


@given(st.integers(0, 1 << 20))
def test_a_batch_that_fits_the_grid_still_fits(batch: int) -> None:
    rounded = Request(batch=batch).rounded().batch
    assert rounded >= batch
    assert (rounded <= 65535) == (batch <= 65535)


@given(LENGTHS, LENGTHS)
def test_lengths_stay_equal_or_unequal_as_the_mask_says(q_len: int, kv_len: int) -> None:
    rounded = Request(q_len=q_len, kv_len=kv_len).rounded()
    if q_len == kv_len:
        assert rounded.q_len == rounded.kv_len


@given(q_len=st.integers(1, 70_000), kv_len=st.integers(1, 70_000), batch=st.integers(1, 70_000), learns=st.booleans())
def test_what_takes_the_class_takes_the_request(q_len: int, kv_len: int, batch: int, learns: bool) -> None:
    request = Request(
        dtype="bfloat16", q_len=q_len, kv_len=kv_len, batch=batch, needs_grad=learns, mask=frozenset({"dense"})
    )
    for machine in (H100, A100, B200, MPS):
        of_class = choose(request.rounded(), machine).accepted
        assert set(of_class) <= set(choose(request, machine).accepted)


@pytest.mark.parametrize(
    "request_, said",
    [
        (Request(), "batch 1, heads 1, length 128, head_dim 64, float32 on cpu, mask none"),
        (
            Request(2, 8, 2, 5, 7, 64, 32, "bfloat16", "cuda", frozenset({"padding", "causal"})),
            "batch 2, heads 8:2, length 5x7, head_dim 64/32, bfloat16 on cuda, mask causal & padding",
        ),
        (
            Request(
                mask_needs_grad=True,
                dropout=True,
                softcap=True,
                sinks=True,
                returns_lse=True,
                plain_scale=False,
                needs_grad=True,
                aligned=False,
                transformed=True,
                compiled=True,
                require=frozenset({"no-sync", "maps"}),
            ),
            "batch 1, heads 1, length 128, head_dim 64, float32 on cpu, mask none, a mask with gradient, dropout,"
            " softcap, sinks, returns lse, an odd scale, gradients on, unaligned views, inside torch.func,"
            " inside torch.compile, require maps, require no-sync",
        ),
    ],
)
def test_says_what_is_asked(request_: Request, said: str) -> None:
    assert str(request_) == said


def test_compiled_lengths_have_few_classes() -> None:
    """Torch compiles a function eight times, and then no more."""
    lengths = range(2, 100_000, 62)
    assert len({length_class(n, "cpu", None) for n in lengths}) == 1
    assert len({length_class(n, "cuda", None) for n in lengths}) <= 5
    struck = {(length_class(n, "cuda", n % 128 == 64), n % 128 == 64) for n in lengths}
    assert len(struck) <= 6
    assert all((length % 128 == 64) == half for length, half in struck)
