"""The rate rises in a line, falls along a cosine, ends at the least exactly, and stays there."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway import RequestError
from headway_apps.training.rates import Rate


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    warmup = draw(st.integers(0, 50))
    peak = draw(st.floats(1e-6, 10.0))
    return Rate(peak, warmup, warmup + draw(st.integers(1, 50)), peak * draw(st.sampled_from([0.0, 0.01, 0.1, 1.0])))


@given(rates())
def test_it_rises_in_a_line_and_falls_to_the_least_for_ever(rate: Rate) -> None:
    told = [rate(step) for step in range(1, rate.steps + 1)]
    assert told[: rate.warmup] == [rate.peak * (step / rate.warmup) for step in range(1, rate.warmup + 1)]
    assert told[-1] == rate.least
    falling = told[max(rate.warmup - 1, 0) :]
    assert falling == sorted(falling, reverse=True)
    for later in (1, 2, rate.steps, 10 * rate.steps, 10**9):  # a cosine that is not stopped would rise again
        assert rate(rate.steps + later) == rate.least


def test_half_way_down_it_is_half_way_between() -> None:
    rate = Rate(peak=1.0, warmup=10, steps=110, least=0.2)
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.6, abs=1e-15)
    assert rate(35) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, abs=1e-15)


def test_a_least_rate_equal_to_the_peak_is_constant_after_the_warm_up() -> None:
    rate = Rate(peak=3e-4, warmup=4, steps=9, least=3e-4)
    assert [rate(step) for step in range(4, 20)] == [3e-4] * 16


@pytest.mark.parametrize(
    "given",
    [
        {"peak": 0.0}, {"peak": -1.0}, {"peak": math.nan}, {"peak": math.inf}, {"least": 2.0}, {"least": -0.1},
        {"least": math.nan}, {"warmup": 10}, {"warmup": 11}, {"warmup": -1}, {"steps": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=r"got Rate\(.*, takes a"):
        Rate(**{"peak": 1.0, "warmup": 0, "steps": 10, "least": 0.1, **given})


@pytest.mark.parametrize("step", [0, -1])
def test_steps_are_counted_from_one(step: int) -> None:
    with pytest.raises(RequestError, match=f"got step {step}, takes 1 for the first optimizer step"):
        Rate(peak=1.0, warmup=0, steps=10)(step)
