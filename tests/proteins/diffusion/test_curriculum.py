"""Curricula: where they begin and end, and that the noise they use is the noise they tell."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from known_sources import rng, table

from headway import RequestError
from headway_apps.proteins.diffusion.curriculum import SHAPES, EarlyTimes, LessNoise, Steady
from headway_apps.proteins.diffusion.graphs import Absorbing
from headway_apps.proteins.diffusion.losses import cross_entropy, dwdse
from headway_apps.proteins.diffusion.schedules import LogLinear


@pytest.mark.parametrize("shape", SHAPES)
def test_less_noise_begins_at_a_tenth_ends_whole_and_stays_there(shape: str) -> None:
    curriculum, base = LessNoise(1000, shape), LogLinear()
    factors = [curriculum.factor(step) for step in range(0, 1001, 50)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[-1] == pytest.approx(1.0, abs=1e-15)
    assert all(earlier < later for earlier, later in itertools.pairwise(factors))
    assert curriculum.schedule(base, 1000) is base
    assert curriculum.schedule(base, 5000) is base


def test_the_curves_are_those_named() -> None:
    for u in (0.1, 0.5, 0.9):
        assert SHAPES["linear"](u) == u
        assert SHAPES["exponential"](u) == pytest.approx((1 - math.exp(-3 * u)) / (1 - math.exp(-3)))
        assert SHAPES["cosine"](u) == pytest.approx((1 - math.cos(math.pi * u)) / 2)


def test_early_times_begin_cubed_and_end_even() -> None:
    curriculum, u = EarlyTimes(100), torch.linspace(0, 1, 11, dtype=torch.float64)
    for step, power in ((0, 3.0), (50, 2.0), (100, 1.0), (900, 1.0)):
        torch.testing.assert_close(curriculum.times(u, step, least=0.01), 0.01 + 0.99 * u**power)
    assert curriculum.schedule(LogLinear(), 0) == LogLinear()
    torch.testing.assert_close(Steady().times(u, 0, least=0.01), 0.01 + 0.99 * u)


@pytest.mark.parametrize("curriculum", [Steady(), LessNoise(10), EarlyTimes(10)], ids=str)
@pytest.mark.parametrize("step", [0, 4, 10])
def test_the_noise_used_is_the_noise_told_to_model_and_loss(curriculum: object, step: int) -> None:
    """What is masked has the probability told, and score entropy is cross-entropy, which holds for one level alone."""
    source, graph = table(), Absorbing(4, mask=3)
    schedule = curriculum.schedule(LogLinear(), step)  # type: ignore[attr-defined]
    t = curriculum.times(torch.rand(4000, generator=rng(9), dtype=torch.float64), step)  # type: ignore[attr-defined]
    clean, sigma_bar = source.draw(4000), schedule.sigma_bar(t)
    noised = graph.perturb(clean, sigma_bar, generator=rng(1))
    expected = -torch.expm1(-sigma_bar).mean()
    assert float((noised == 3).double().mean() - expected) == pytest.approx(0, abs=0.015)
    scores = source.masks_model(noised, sigma_bar, None)
    entropy = dwdse(graph, scores, noised, clean, sigma_bar=sigma_bar, rate=schedule.rate(t))
    torch.testing.assert_close(entropy, cross_entropy(graph, scores, noised, clean, weight=schedule.reveal(t)))


def test_what_makes_no_curriculum_is_refused() -> None:
    with pytest.raises(RequestError, match="takes 1 or more, or Steady"):
        EarlyTimes(0)
    with pytest.raises(RequestError, match="takes one of linear, exponential, cosine"):
        LessNoise(10, "sigmoid")
