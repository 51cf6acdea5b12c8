"""A batch in buffers of one shape costs what it costs by itself, whatever stood in them before; in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from proteins.families import protein
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.alphabet import ESM
from headway_apps.proteins.data.packing import Batch, pack
from headway_apps.proteins.diffusion.curriculum import Steady
from headway_apps.proteins.diffusion.graphs import Absorbing
from headway_apps.proteins.diffusion.schedules import LogLinear
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.dit import DiT
from headway_apps.proteins.train.fixed import Fixed
from headway_apps.proteins.train.objective import Noised, Objective
from headway_apps.training.gradients import Gradients

CONFIG = DiTConfig(width=16, blocks=2, heads=2, cond=8, embedded=33, scored=33, mask=32, dropout=0.0)
Loss = Literal["cross-entropy", "score-entropy"]


def batch_of(lengths: Sequence[int], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    made = [np.frombuffer(protein(rng, length - 2).encode(), dtype=np.uint8) for length in lengths]
    return pack(made, range(len(made)), ESM)


def network() -> DiT:
    torch.manual_seed(0)
    model = DiT(CONFIG).double()
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.3)
    return model


def objective(loss: Loss = "cross-entropy") -> Objective:
    return Objective(Absorbing(33, mask=32, ids=ESM.residues), LogLinear(), Steady(), loss, seed=0)


def noised_of(batch: Batch, number: int, loss: Loss = "cross-entropy") -> Noised:
    found = objective(loss).noised(batch, 0, number)
    return dataclasses.replace(found, level=found.level.double(), weights=tuple(x.double() for x in found.weights))


def gradients(model: DiT) -> Tensor:
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize("loss", ["cross-entropy", "score-entropy"])
def test_batches_one_after_the_other_cost_what_each_costs_alone(loss: Loss) -> None:
    model, fixed = network(), None
    for number, lengths in enumerate(([12, 30, 5, 30], [3] * 20, [30, 4])):
        batch = batch_of(lengths, number)
        noised = noised_of(batch, number, loss)
        fixed = fixed or Fixed.room(80, 24, 30, noised)
        fixed.fill(noised, batch.lengths)
        found = []
        for given, packed in ((noised, batch.lengths), (fixed.noised, fixed.packed())):
            model.zero_grad()
            nats = objective(loss).cost(model(given.tokens, given.level, packed), given)
            nats.backward()
            found.append((nats.detach(), gradients(model)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_documents_begin_where_they_do_and_filler_is_of_documents_that_are_no_longer() -> None:
    batch = batch_of([4, 6])
    noised = noised_of(batch, 0)
    fixed = Fixed.room(25, 8, 6, noised)
    fixed.fill(noised, batch.lengths)
    assert fixed.starts.tolist() == [0, 4, 10, 16, 22, 25, 25, 25, 25]
    packed = fixed.packed()
    assert packed.positions.tolist() == [*range(4), *range(6), *range(6), *range(6), *range(3)]
    assert packed.document.tolist() == [0] * 4 + [1] * 6 + [2] * 6 + [3] * 6 + [4] * 3
    assert fixed.noised.free[10:].sum() == 0
    assert torch.equal(fixed.noised.clean[:10], batch.tokens)


@pytest.mark.parametrize("lengths", [[7, 3], [6, 6, 6, 6, 6], [3] * 7], ids=["longer", "more tokens", "more of them"])
def test_what_does_not_fit_is_refused(lengths: list[int]) -> None:
    batch = batch_of(lengths)
    noised = noised_of(batch, 0)
    fixed = Fixed.room(25, 6, 6, noised)
    with pytest.raises(RequestError, match="takes 6 with their filler, of 25 tokens in all and of 6 at most"):
        fixed.fill(noised, batch.lengths)


def test_gradients_of_weights_of_any_size_are_parts_of_one_tensor() -> None:
    model = network()
    all_in_one = Gradients(model)
    batch = batch_of([5, 9])
    noised = noised_of(batch, 0)

    def passed() -> Tensor:
        objective().cost(model(noised.tokens, noised.level, batch.lengths), noised).backward()
        return gradients(model).clone()

    once, twice = passed(), passed()
    torch.testing.assert_close(twice, 2 * once)
    assert torch.equal(all_in_one.flat[all_in_one.flat != 0], twice[twice != 0])
    places = [each.grad.data_ptr() - all_in_one.flat.data_ptr() for each in model.parameters() if each.grad is not None]
    assert all(place % 128 == 0 for place in places)
    all_in_one.zero()
    assert not gradients(model).any()
