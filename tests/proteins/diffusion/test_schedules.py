"""Schedules: their formulas, their derivatives, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from known_sources import rng

from headway import RequestError
from headway_apps.proteins.diffusion.schedules import Cosine, Geometric, LogLinear, Scaled, Schedule, draw_positions

SCHEDULES = [
    LogLinear(),
    LogLinear(eps=1e-5),
    Geometric(),
    Cosine(5.0),
    Cosine(0.8, reaches=0.5),
    Scaled(LogLinear(), 0.3),
]
TIMES = torch.linspace(1e-3, 1, 97, dtype=torch.float64)
each = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@each
def test_the_rate_is_the_derivative_of_the_noise(schedule: Schedule) -> None:
    t = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.sigma_bar(t).sum(), t)
    torch.testing.assert_close(schedule.rate(TIMES), slope, rtol=1e-9, atol=1e-12)
    assert (schedule.sigma_bar(TIMES).diff() > 0).all()


@each
def test_the_weight_of_the_cross_entropy_is_the_rate_over_the_odds(schedule: Schedule) -> None:
    expected = schedule.rate(TIMES) / torch.expm1(schedule.sigma_bar(TIMES))
    torch.testing.assert_close(schedule.reveal(TIMES), expected, rtol=1e-9, atol=0)


@each
def test_float32_is_as_good_as_float32_can_be(schedule: Schedule) -> None:
    times = torch.cat([TIMES, 1 - torch.logspace(-6, -1, 50, dtype=torch.float64)]).float()
    for function in (schedule.sigma_bar, schedule.rate, schedule.reveal):
        assert function(times).dtype == torch.float32
        scale = function(TIMES).max()
        torch.testing.assert_close(
            function(times).double(), function(times.double()), rtol=3e-6, atol=float(3e-7 * scale)
        )


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_log_linear_noise_keeps_every_digit_up_to_the_end(eps: float) -> None:
    t = (1 - torch.logspace(-7, -1, 40)).float()
    for function in (LogLinear(eps=eps).sigma_bar, LogLinear(eps=eps).rate):
        torch.testing.assert_close(function(t).double(), function(t.double()), rtol=1e-6, atol=0)


def test_the_formulas_are_the_published_ones() -> None:
    t = TIMES
    jumped = 1 - torch.exp(-LogLinear(eps=1e-3).sigma_bar(t))
    torch.testing.assert_close(jumped, (1 - 1e-3) * t)
    torch.testing.assert_close(LogLinear().reveal(t), 1 / t)
    torch.testing.assert_close(Geometric().sigma_bar(t), 1e-4 ** (1 - t) * 20**t)
    cosine = 5 + 0.5 * (0.1 - 5) * (1 + torch.cos(math.pi * t))
    torch.testing.assert_close(Cosine(5.0, sigma_min=0.1).sigma_bar(t), cosine)
    torch.testing.assert_close(
        Cosine(5.0, sigma_min=0.1).rate(t), 0.5 * math.pi * 4.9 * torch.sin(math.pi * t), rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize("sigma_max, share", [(0.5, 0.39), (0.8, 0.55), (0.95, 0.61)])
def test_a_schedule_that_does_not_reach_the_prior_is_refused_unless_asked_for(sigma_max: float, share: float) -> None:
    with pytest.raises(
        RequestError, match=r"jumped by t=1 with probability 0\.\d+; takes 0\.99 or more.*pass reaches="
    ):
        Cosine(sigma_max)
    assert Cosine(sigma_max, reaches=0.3).jumped_at_end == pytest.approx(share, abs=0.01)
    assert all(schedule.jumped_at_end >= 0.99 for schedule in (LogLinear(), Geometric(), Cosine(5.0)))
    with pytest.raises(RequestError):
        LogLinear(eps=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogLinear(eps=0.0),
        lambda: LogLinear(eps=math.nan),
        lambda: Geometric(1.0, 0.5),
        lambda: Geometric(sigma_max=math.nan),
        lambda: Cosine(math.nan),
        lambda: Scaled(LogLinear(), 0.0),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(make: object) -> None:
    with pytest.raises(RequestError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("time", [-1e-3, 1.001, math.nan])
def test_times_that_are_none_are_refused(time: float) -> None:
    with pytest.raises(RequestError, match="takes times from 0 to 1"):
        LogLinear().sigma_bar(torch.tensor([0.5, time]))
    with pytest.raises(RequestError, match="bfloat16; takes float32 or float64"):
        LogLinear().rate(torch.tensor([0.5], dtype=torch.bfloat16))


def test_the_times_of_a_batch_are_each_uniform_and_together_evenly_spread() -> None:
    generator = rng()
    drawn = torch.stack([draw_positions(8, generator=generator) for _ in range(4000)])
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert ((drawn * 8).long().clamp_max(7).sort(-1).values == torch.arange(8)).all(-1).float().mean() > 0.999
    torch.testing.assert_close(drawn.mean(0), torch.full((8,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.var(0), torch.full((8,), 1 / 12, dtype=torch.float64), atol=0.005, rtol=0)
