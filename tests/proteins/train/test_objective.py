"""What a batch costs: the noise that is used is the noise that model and loss are told, under every curriculum."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from proteins.families import protein
from proteins.train import runs
from torch import Tensor

from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.data.packing import Batch, pack
from headway_apps.proteins.diffusion.curriculum import Curriculum, EarlyTimes, LessNoise, Steady
from headway_apps.proteins.diffusion.graphs import Absorbing
from headway_apps.proteins.diffusion.losses import cross_entropy, dwdse
from headway_apps.proteins.diffusion.schedules import LogLinear
from headway_apps.proteins.train.objective import Objective

GRAPH, SCHEDULE = Absorbing(33, mask=32, ids=ESM.residues), LogLinear()


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    made = [np.frombuffer(protein(rng, 30).encode(), dtype=np.uint8) for _ in range(200)]
    return pack(made, range(len(made)), ESM)


def scores(noised: Tensor, _: Tensor) -> Tensor:
    """Anything, so long as each column is another number."""
    return torch.sin(noised[:, None] + torch.arange(33.0))


@pytest.mark.parametrize(
    "curriculum", [Steady(), LessNoise(10, "linear"), EarlyTimes(10)], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("loss", ["cross-entropy", "score-entropy"])
def test_the_level_used_is_the_level_told_to_model_and_loss(
    batch: Batch, curriculum: Curriculum, loss: Literal["cross-entropy", "score-entropy"]
) -> None:
    told: list[Any] = []

    def model(noised: Tensor, level: Tensor) -> Tensor:
        told.extend((noised, level))
        return scores(noised, level)

    nats = runs.nats(Objective(GRAPH, SCHEDULE, curriculum, loss, seed=1), model, batch, step=2, number=5)
    noised, level = told
    masked = noised == ESM.mask
    share = -torch.expm1(-level)
    assert float(masked.sum() / batch.residues) == pytest.approx(float(share.mean()), abs=0.02)
    stage = curriculum.schedule(SCHEDULE, 2)
    factor = stage.sigma_bar_at_end / SCHEDULE.sigma_bar_at_end
    times = -torch.expm1(-level.double() / factor) / (1 - SCHEDULE.eps)
    given = GRAPH, scores(noised, level), noised, batch.tokens, batch.free
    if loss == "cross-entropy":
        each = cross_entropy(*given, weight=stage.reveal(times)[batch.document])
    else:
        levels, rates = (x[batch.document] for x in (level.double(), stage.rate(times)))
        each = dwdse(*given, sigma_bar=levels, rate=rates)
    assert float(nats) == pytest.approx(float(each.sum()), rel=1e-4)


def test_a_guess_costs_its_logarithm_for_each_residue_and_boundaries_are_never_noised(batch: Batch) -> None:
    seen: list[Tensor] = []

    def guess(noised: Tensor, level: Tensor) -> Tensor:
        seen.append(noised)
        return torch.zeros(len(noised), 33)

    objective = Objective(GRAPH, SCHEDULE, Steady(), "cross-entropy", seed=1)
    nats = sum(float(runs.nats(objective, guess, batch, number=number)) for number in range(40)) / 40
    assert nats / batch.residues == pytest.approx(np.log(20), rel=0.02)
    assert all((noised == batch.tokens)[~batch.free].all() for noised in seen)
