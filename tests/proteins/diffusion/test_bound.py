"""The bound: exact on sources that are known, and the same number for the same data however it comes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from known_sources import Source, distance, markov, rng, table
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.bound import Bound, masked_bound, noise_bound
from headway_apps.proteins.diffusion.graphs import Absorbing, Uniform
from headway_apps.proteins.diffusion.schedules import Cosine, Geometric, LogLinear

MASKS, JUMPS, SCHEDULE = Absorbing(4, mask=3), Uniform(4, ids=(0, 1, 2)), LogLinear()
ESM = Absorbing(33, mask=32, ids=tuple(range(4, 24)))


def even(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.zeros(*tokens.shape, 33)


def wavering(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
    """Scores that depend on the token, its site, its neighbours in the sequence, and the noise told."""
    counts = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
    rows = tokens.flatten().split(counts.tolist())
    columns = torch.arange(33).double()
    answers = []
    for row, sigma in zip(rows, sigma_bar.double(), strict=True):
        kept = row[row != 1]  # padding does not count
        site = torch.arange(len(row)).double()
        answers.append(torch.sin(columns + site[:, None] * (1 + sigma) + float(kept.sum())) * 2)
    return torch.cat(answers).view(*tokens.shape, 33)


def test_a_model_that_knows_nothing_costs_exactly_the_logarithm_of_its_choices() -> None:
    tokens = torch.randint(4, 24, (5, 64), generator=rng())
    bound = masked_bound(even, ESM, SCHEDULE, tokens, index=torch.arange(5), seed=0)
    assert bound.per_residue == pytest.approx(math.log(20), rel=1e-14)
    assert bound.perplexity == pytest.approx(20, rel=1e-13)
    assert all(nats == pytest.approx(64 * math.log(20), rel=1e-14) for nats in bound.nats)
    assert bound.prior == 0.0


@pytest.mark.parametrize("source", [table(3), markov(4)], ids=["table", "markov"])
def test_a_model_that_knows_its_source_costs_what_each_sequence_does(source: Source) -> None:
    clean = source.sequences[source.probability > 0]
    draws = 80
    bound = masked_bound(
        source.masks_model, MASKS, SCHEDULE, clean, index=torch.arange(len(clean)), seed=1, draws=draws
    )
    truth = -source.log_p(clean)
    weight = source.probability[source.probability > 0]
    torch.testing.assert_close(torch.tensor(bound.nats, dtype=torch.float64), truth, atol=0.6, rtol=0.1)
    assert float((weight * torch.tensor(bound.nats)).sum()) / source.sites == pytest.approx(source.entropy, rel=0.01)


def expected_cost(source: Source, tokens: Tensor, power: float) -> float:
    """The bound as an integral, by quadrature: of a model that is wrong by a power that depends on the noise."""
    share = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    total = torch.zeros_like(share)
    for which in itertools.product([False, True], repeat=source.sites):
        masked = torch.tensor(which)
        if not masked.any():
            continue
        noised = torch.where(masked, source.mask, tokens)
        p = source.clean_probability(noised[None])[0, :, :3]
        chance = share ** int(masked.sum()) * (1 - share) ** int((~masked).sum())
        tempered = p[None] ** (power * share.clamp_max(SCHEDULE.jumped_at_end))[:, None, None]
        log_p = (tempered / tempered.sum(-1, keepdim=True)).log()
        cost = -log_p.gather(-1, tokens.expand(len(share), -1)[..., None]).squeeze(-1)
        total += chance / share * cost[:, masked].sum(-1)
    return float(total.mean())


@pytest.mark.parametrize("power", [0.0, 1.5])
def test_the_bound_of_a_model_that_is_told_its_noise_is_the_integral_over_it(power: float) -> None:
    """So the level that is told is drawn as given by the number masked, and not as noise would be by itself."""
    source = table(3)
    tokens = source.draw(1)[0]

    def wrong(noised: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        share = -torch.expm1(-sigma_bar.double())
        return source.clean_probability(noised).log() * (power * share)[:, None, None]

    count = 3000
    bound = masked_bound(wrong, MASKS, SCHEDULE, tokens.repeat(count, 1), index=torch.arange(count), seed=0)
    nats = torch.tensor(bound.nats, dtype=torch.float64)
    error = float(nats.std()) / math.sqrt(count)
    assert float(nats.mean()) == pytest.approx(expected_cost(source, tokens, power), abs=4 * error + 1e-9)
    assert expected_cost(source, tokens, power) > float(-source.log_p(tokens[None]))


def test_draws_are_spread_over_the_numbers_masked_without_bias() -> None:
    source = table(3)
    tokens = source.draw(1500)
    index = torch.arange(1500)
    one, four = (
        masked_bound(source.masks_model, MASKS, SCHEDULE, tokens, index=index, seed=2, draws=draws) for draws in (1, 4)
    )
    truth = -source.log_p(tokens)
    off = [torch.tensor(bound.nats, dtype=torch.float64) - truth for bound in (one, four)]
    assert [float(x.mean()) for x in off] == pytest.approx([0, 0], abs=4 * float(off[0].std()) / math.sqrt(1500))
    assert float(off[1].std()) < 0.5 * float(off[0].std())  # better than four draws apart from each other


@pytest.mark.parametrize("kind", ["masks", "jumps"])
@pytest.mark.parametrize("schedule", [SCHEDULE, Geometric()], ids=str)
def test_the_noise_bound_at_the_truth_is_the_cost_for_either_graph(kind: str, schedule: LogLinear | Geometric) -> None:
    """Whatever schedule led there: score entropy depends on the noise alone."""
    source = table(2)
    tokens = source.draw(300)
    graph, model = (MASKS, source.masks_model) if kind == "masks" else (JUMPS, source.jumps_model)
    bound = noise_bound(model, graph, schedule, tokens, index=torch.arange(300), seed=3, draws=4)
    off = torch.tensor(bound.nats, dtype=torch.float64) + source.log_p(tokens)
    error = float(off.std()) / math.sqrt(300)
    assert float(off.mean()) == pytest.approx(2 * bound.prior, abs=4 * error + 1e-3)
    assert bound.prior == graph.prior_term(schedule.sigma_bar_at_end) < 0.01


def test_the_prior_term_makes_up_for_a_schedule_that_ends_early() -> None:
    """To know nothing costs the logarithm of the choices whether or not noise covers all of it."""
    short = Cosine(0.8, reaches=0.5)
    tokens = torch.randint(4, 24, (200, 30), generator=rng())

    def nothing(noised: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        return (-math.log(20) - torch.expm1(sigma_bar.double()).log())[:, None, None].expand(200, 30, 33)

    bound = noise_bound(nothing, ESM, short, tokens, index=torch.arange(200), seed=0, draws=8)
    assert bound.prior == pytest.approx((1 - short.jumped_at_end) * math.log(20))
    assert bound.per_residue == pytest.approx(math.log(20), abs=4 * bound.standard_error)
    assert bound.standard_error < 0.05 < bound.prior


def test_the_two_bounds_agree_on_a_wrong_model() -> None:
    tokens = torch.randint(4, 24, (1000, 6), generator=rng())

    def scores(noised: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        logits = torch.linspace(0, 2, 33).double().expand(*noised.shape, 33)
        return ESM.log_clean(logits) - torch.expm1(sigma_bar.double()).log()[:, None, None]

    index = torch.arange(1000)
    masked, noise = (bound(scores, ESM, SCHEDULE, tokens, index=index, seed=0) for bound in (masked_bound, noise_bound))
    assert masked.per_residue == pytest.approx(noise.per_residue, abs=4 * noise.standard_error)
    assert masked.standard_error < noise.standard_error


@pytest.fixture
def ragged() -> list[Tensor]:
    return [torch.randint(4, 24, (length,), generator=rng(length)) for length in (1, 7, 30, 12, 2)]


def packed(bound: object, rows: list[Tensor], index: list[int], seed: int = 0) -> Bound:
    lengths = torch.tensor([len(row) for row in rows])
    return bound(wavering, ESM, SCHEDULE, torch.cat(rows), lengths, index=torch.tensor(index), seed=seed)  # type: ignore[operator, no-any-return]


each_bound = pytest.mark.parametrize("bound", [masked_bound, noise_bound])


@each_bound
def test_the_number_is_the_same_in_any_batch_order_packing_and_padding(bound: object, ragged: list[Tensor]) -> None:
    whole = packed(bound, ragged, [0, 1, 2, 3, 4])
    parts = [packed(bound, [ragged[i]], [i]) for i in (3, 0, 4, 2, 1)]
    merged = Bound.merged(parts)
    assert merged.per_residue == whole.per_residue
    assert sorted(merged.nats) == sorted(whole.nats)
    tokens = torch.ones(5, 40, dtype=torch.int64)  # padded
    for row, sequence in zip(tokens, ragged, strict=True):
        row[: len(sequence)] = sequence
    padded = bound(wavering, ESM, SCHEDULE, tokens, index=torch.arange(5), seed=0, free=tokens != 1)  # type: ignore[operator]
    assert padded.nats == whole.nats
    assert padded.residues == whole.residues == (1, 7, 30, 12, 2)


@each_bound
def test_the_same_number_twice_another_with_another_seed_and_no_random_state_moves(
    bound: object, ragged: list[Tensor]
) -> None:
    before = torch.get_rng_state()
    first, again, other = (packed(bound, ragged, [0, 1, 2, 3, 4], seed) for seed in (0, 0, 1))
    assert first.nats == again.nats
    assert first.per_residue != other.per_residue
    assert torch.equal(torch.get_rng_state(), before)


@each_bound
def test_sites_that_are_not_free_are_neither_noised_nor_counted(bound: object) -> None:
    tokens = torch.randint(4, 24, (3, 20), generator=rng())
    tokens[:, 0], tokens[:, -1] = 0, 2
    free = (tokens > 3) & (torch.arange(20) != 7)
    seen: list[Tensor] = []

    def watching(noised: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        seen.append(noised)
        assert sigma_bar.dtype == torch.float32
        assert sigma_bar.max() <= SCHEDULE.sigma_bar_at_end + 1e-5
        return even(noised, sigma_bar, lengths)

    result = bound(watching, ESM, SCHEDULE, tokens, index=torch.arange(3), seed=0, free=free, draws=5)  # type: ignore[operator]
    assert result.residues == (17, 17, 17)
    assert len(seen) == 5
    assert all(torch.equal(noised[~free], tokens[~free]) for noised in seen)
    assert all((noised != tokens).any() for noised in seen)


def test_a_sequence_without_a_free_site_costs_nothing() -> None:
    tokens = torch.full((2, 4), 5)
    free = torch.tensor([[False] * 4, [True] * 4])
    bound = masked_bound(even, ESM, SCHEDULE, tokens, index=torch.arange(2), seed=0, free=free)
    assert bound.nats == pytest.approx((0, 4 * math.log(20)))
    assert bound.residues == (0, 4)


def test_levels_told_follow_the_number_masked() -> None:
    """k of L masked: the share that noise masks is Beta(k, L - k + 1), and k is even from 1 to L."""
    length, count = 5, 6000
    told: list[tuple[Tensor, Tensor]] = []

    def watching(noised: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        told.append(((noised == 32).sum(-1), -torch.expm1(-sigma_bar.double())))
        return even(noised, sigma_bar, lengths)

    tokens = torch.full((count, length), 9)
    masked_bound(watching, ESM, SCHEDULE, tokens, index=torch.arange(count), seed=0)
    number, share = told[0]
    assert 0.9989 < float(share.max()) <= SCHEDULE.jumped_at_end + 1e-7  # some would be beyond what noise ends with
    counts = torch.bincount(number, minlength=length + 1)[1:] / count
    assert distance(counts.double(), torch.full((length,), 1 / length, dtype=torch.float64)) < 0.02
    for k in range(1, length + 1):
        of_k = share[number == k]
        assert float(of_k.mean()) == pytest.approx(k / (length + 1), abs=0.02)
        assert float(of_k.var()) == pytest.approx(k * (length - k + 1) / ((length + 1) ** 2 * (length + 2)), rel=0.15)


def test_the_standard_error_is_that_of_the_mean_over_sequences() -> None:
    source = table(3)
    draws = [
        masked_bound(source.masks_model, MASKS, SCHEDULE, source.draw(80, seed), index=torch.arange(80), seed=seed)
        for seed in range(40)
    ]
    spread = torch.tensor([bound.per_residue for bound in draws]).std()
    assert float(spread) == pytest.approx(draws[0].standard_error, rel=0.4)
    with pytest.raises(RequestError, match="takes 2 or more"):
        _ = Bound((1.0,), (1,), 0.0).standard_error


def test_what_cannot_be_evaluated_is_refused() -> None:
    tokens = torch.full((2, 4), 5)
    index = torch.arange(2)
    with pytest.raises(RequestError, match="got Uniform; takes Absorbing.*use noise_bound"):
        masked_bound(even, Uniform(33), SCHEDULE, tokens, index=index, seed=0)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="takes one integer for each sequence"):
        masked_bound(even, ESM, SCHEDULE, tokens, index=index[:1], seed=0)
    with pytest.raises(RequestError, match="got draws=0"):
        masked_bound(even, ESM, SCHEDULE, tokens, index=index, seed=0, draws=0)
    with pytest.raises(RequestError, match="add up to the 8 tokens"):
        masked_bound(even, ESM, SCHEDULE, tokens.flatten(), torch.tensor([4, 5]), index=index, seed=0)
    with pytest.raises(RequestError, match=r"takes \(B, L\) without lengths"):
        masked_bound(even, ESM, SCHEDULE, tokens.flatten(), index=index, seed=0)
    with pytest.raises(RequestError, match="none of the graph's ids"):
        masked_bound(even, ESM, SCHEDULE, tokens * 0, index=index, seed=0)
    with pytest.raises(RequestError, match="no sequence"):
        masked_bound(even, ESM, SCHEDULE, tokens[:0], index=index[:0], seed=0)
    with pytest.raises(RequestError, match="prior terms"):
        Bound.merged([Bound((1.0,), (1,), 0.0), Bound((1.0,), (1,), 0.1)])
    with pytest.raises(RequestError, match="got log scores"):
        masked_bound(lambda *_: torch.zeros(8, 33), ESM, SCHEDULE, tokens, index=index, seed=0)
