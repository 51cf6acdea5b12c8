"""Random numbers and choices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from known_sources import p_of_fit, rng

from headway import RequestError
from headway_apps.proteins.diffusion.draws import categorical, doubled, uniform


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_choices_come_as_often_as_their_weights_say(dtype: torch.dtype) -> None:
    """Weights need not be normalised, and what has none never comes."""
    log_weight = torch.tensor([3.0, -math.inf, 1.0, -1.0, 2.5, -4.0, -math.inf], dtype=dtype)
    drawn = categorical(log_weight.expand(200_000, 7), rng(5))
    assert p_of_fit(torch.bincount(drawn, minlength=7), log_weight.double().exp()) > 1e-3


def test_choices_are_made_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number in 2**50 decides, which float32 does not have."""
    assert doubled(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float64
    home = "headway_apps.proteins.diffusion.draws.uniform"
    close = torch.tensor([[0.5, 0.5 + 2.0**-50], [0.5 + 2.0**-50, 0.5]], dtype=torch.float64)
    monkeypatch.setattr(home, lambda like, generator: close)
    assert categorical(torch.zeros(2, 2), rng()).tolist() == [1, 0]
    monkeypatch.setattr(home, lambda like, generator: torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64))
    assert categorical(torch.tensor([[-math.inf, 0.0]]), rng()).tolist() == [1]


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [-math.inf, -math.inf], [math.inf, 0.0]])
def test_weights_that_are_none_raise(bad: list[float]) -> None:
    with pytest.raises(RequestError, match="takes one finite in each row: look for NaN"):
        categorical(torch.tensor([[0.0, 1.0], bad]), rng())


def test_numbers_are_doubles_of_the_generator_given_and_move_no_other() -> None:
    before = torch.get_rng_state()
    numbers = uniform(torch.zeros(3, 5), rng(4))
    assert numbers.dtype == torch.float64
    assert torch.equal(numbers, uniform(torch.zeros(3, 5, dtype=torch.bfloat16), rng(4)))
    assert torch.equal(torch.get_rng_state(), before)
