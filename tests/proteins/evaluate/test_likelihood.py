"""The number is the same twice, in whatever batches, and asking for it changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from proteins.evaluate.made import prepared, trained

from headway import RequestError
from headway_apps.proteins.data.shards import Part
from headway_apps.proteins.diffusion.bound import Bound
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.evaluate.likelihood import likelihood


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return prepared(tmp_path_factory.mktemp("data") / "x")["held_out"]


@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
def test_is_the_same_number_twice_and_in_any_batches(part: Part, graph: str) -> None:
    model = trained(graph)
    model.model.double()
    one, again = (likelihood(model, part, tokens=300, seed=1) for _ in range(2))
    assert one.nats == again.nats
    for tokens in (61, 10_000):
        other = likelihood(model, part, tokens=tokens, seed=1)
        assert other.nats == pytest.approx(one.nats, rel=1e-9)
    assert one.residues == tuple(part.lengths().tolist())
    assert likelihood(model, part, tokens=300, seed=2).nats != one.nats


def test_the_bound_of_shares_is_the_bound_of_all(part: Part) -> None:
    model = trained()
    model.model.double()
    every = likelihood(model, part, tokens=300, seed=1)
    shares = [likelihood(model, part, tokens=300, seed=1, share=(rank, 5)) for rank in range(5)]
    assert sum(len(each.nats) for each in shares) == len(part)
    assert Bound.merged(shares).per_residue == pytest.approx(every.per_residue, rel=1e-9)
    with pytest.raises(RequestError, match="takes one that has a sequence"):
        likelihood(model, part, tokens=300, share=(len(part), len(part) + 1))


def test_who_knows_nothing_pays_the_logarithm_of_the_residues(part: Part) -> None:
    """Scores of a guess are over the 32 symbols of the network; of them 20 are residues, and the graph reads those."""
    found = likelihood(trained(guesses=True), part, tokens=500)
    assert found.per_residue == pytest.approx(math.log(20), rel=1e-6)
    assert found.perplexity == pytest.approx(20, rel=1e-5)


def test_more_draws_lie_nearer_together(part: Part) -> None:
    model = trained()
    few, many = ([likelihood(model, part, tokens=2000, draws=n, seed=s).per_residue for s in range(6)] for n in (1, 8))
    assert torch.tensor(many).std() < 0.6 * torch.tensor(few).std()


def test_some_sequences_are_drawn_by_the_seed_and_cost_what_they_cost_among_all(part: Part) -> None:
    model = trained()
    every = likelihood(model, part, tokens=500, seed=3)
    some = likelihood(model, part, tokens=500, seed=3, sequences=7)
    assert len(some.nats) == 7
    assert all(min(abs(each - other) for other in every.nats) < 1e-3 for each in some.nats)
    assert likelihood(model, part, tokens=500, seed=4, sequences=7).residues != some.residues


def test_the_process_and_the_model_are_as_they_were(part: Part) -> None:
    model = trained()
    model.model.train()
    model.model.blocks[0].eval()
    modes = [each.training for each in model.model.modules()]
    state = torch.get_rng_state()
    likelihood(model, part, tokens=500, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in model.model.modules()] == modes


def test_dropout_is_off(part: Part) -> None:
    model = trained()
    found = likelihood(model, part, tokens=500)
    model.model.train()
    assert likelihood(model, part, tokens=500).nats == found.nats


def test_the_mode_is_put_back_also_after_an_error(part: Part) -> None:
    model = trained()
    with torch.no_grad():
        model.model.head.linear.bias.fill_(math.nan)
    model.model.train()
    with pytest.raises((RequestError, DataError)):
        likelihood(model, part, tokens=500)
    assert model.model.training


def test_progress_goes_to_the_end(part: Part) -> None:
    told: list[tuple[str, int, int | None]] = []
    likelihood(trained(), part, tokens=200, progress=lambda *each: told.append(each))
    assert told[-1] == ("sequences scored", 24, 24)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


@pytest.mark.parametrize(
    "asked, says",
    [({"tokens": 20}, "takes at least"), ({"tokens": 200, "sequences": 0}, "got 0 sequences, takes 1 or more")],
)
def test_what_has_no_meaning_is_refused(part: Part, asked: dict[str, int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        likelihood(trained(), part, **asked)
