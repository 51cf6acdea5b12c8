"""Samplers: what comes out follows the source, is never a mask, and holds what was given."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from known_sources import Source, distance, markov, p_of_fit, rng, table
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.samplers import Analytic, Euler, FirstHitting, Sampler, Stepped
from headway_apps.proteins.diffusion.schedules import Geometric, LogLinear, Schedule

SCHEDULE = LogLinear()
MASKS = Absorbing(4, mask=3)
JUMPS = Uniform(4, ids=(0, 1, 2))
ESM = Absorbing(33, mask=32, ids=tuple(range(4, 24)))
EVERY = [
    (FirstHitting(), ESM),
    (FirstHitting(), Absorbing(33, mask=33, ids=tuple(range(4, 24)))),
    (FirstHitting(3), ESM),
    *((sampler, graph) for sampler in (Euler(12), Analytic(12)) for graph in (ESM, Uniform(33, ids=ESM.ids))),
    (Euler(12), Absorbing(33, mask=33, ids=tuple(range(4, 24)))),
    (Analytic(12), Absorbing(33, mask=33, ids=tuple(range(4, 24)))),
]
each = pytest.mark.parametrize("sampler, graph", EVERY, ids=lambda x: type(x).__name__)


def rough(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
    """Scores of no true source, in bfloat16, with much weight where no protein may be."""
    scores = torch.sin(torch.arange(33) * 1.7 + tokens[..., None]) * 3
    scores[..., :4] += 5
    scores[..., 24:] += 5
    return scores.bfloat16()


def exactly(sampler: Stepped, source: Source, schedule: Schedule) -> Tensor:
    """The distribution of what the sampler makes: from each state to each by the product over sites, step by step."""
    states = torch.tensor(list(itertools.product(range(4), repeat=source.sites)))
    times = torch.linspace(1, sampler.least, sampler.steps + 1, dtype=torch.float64)
    levels = schedule.sigma_bar(times)
    at = torch.zeros(len(states), dtype=torch.float64)
    at[-1] = 1  # all masked

    def lead(weights: Tensor) -> Tensor:
        rows = weights / weights.sum(-1, keepdim=True)
        moves = torch.ones(len(states), len(states), dtype=torch.float64)
        for site in range(source.sites):
            moves *= rows[:, site][:, states[:, site]]
        return at @ moves

    for level, sigma in zip(levels[:-1], sampler.noise_removed(schedule, times), strict=True):
        scores = source.masks_model(states, level.expand(len(states)), None).nan_to_num(nan=-math.inf)
        at = lead(sampler.step(MASKS, states, scores, float(sigma)))
    scores = source.masks_model(states, levels[-1].expand(len(states)), None).nan_to_num(nan=-math.inf)
    at = lead(MASKS.denoise(states, scores, float(levels[-1])))
    masked = (states == 3).any(-1)
    assert at[masked].sum() == 0
    return at[~masked]


@pytest.mark.parametrize("schedule", [SCHEDULE, Geometric()], ids=str)
@pytest.mark.parametrize("make", [Euler, Analytic])
def test_stepped_samplers_come_to_the_source_at_first_order(make: type[Stepped], schedule: Schedule) -> None:
    source = table(3)
    off = [distance(exactly(make(steps), source, schedule), source.probability) for steps in (1, 4, 16, 64, 256)]
    assert off[0] > 0.1
    assert off[3] < 0.03
    assert off[4] < 0.008
    assert 3 < off[3] / off[4] < 5


def test_what_is_drawn_is_what_the_steps_say() -> None:
    source, count = table(3), 12_000
    sampler = Analytic(3)
    drawn = sampler.sample(
        source.masks_model, MASKS, SCHEDULE, torch.zeros(count, 3, dtype=torch.int64), generator=rng(1)
    )
    index = drawn.tokens @ torch.tensor([9, 3, 1])
    assert p_of_fit(torch.bincount(index, minlength=27), exactly(sampler, source, SCHEDULE)) > 1e-3
    assert drawn.calls == 4


@pytest.mark.parametrize("sampler", [Euler(64), Analytic(64), FirstHitting()], ids=lambda x: type(x).__name__)
def test_what_the_cross_entropy_leaves_open_changes_no_sample(sampler: Sampler) -> None:
    """It tells a network how scores of a site differ, and not their sum, which the noise alone says."""
    source, tokens = table(3), torch.zeros(500, 3, dtype=torch.int64)

    def adrift(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        return source.masks_model(tokens, sigma_bar, lengths) + 9 * torch.sin(tokens.sum(-1) + sigma_bar)[:, None, None]

    exact, other = (
        sampler.sample(model, MASKS, SCHEDULE, tokens, generator=rng(4)).tokens
        for model in (source.masks_model, adrift)
    )
    assert torch.equal(exact, other)


@pytest.mark.parametrize("source", [table(3), markov(4)], ids=["table", "markov"])
def test_first_hitting_is_exact_in_as_many_calls_as_sites(source: Source) -> None:
    count = 15_000
    tokens = torch.zeros(count, source.sites, dtype=torch.int64)
    drawn = FirstHitting().sample(source.masks_model, MASKS, SCHEDULE, tokens, generator=rng(2))
    index = drawn.tokens @ torch.tensor([3**i for i in reversed(range(source.sites))])
    counts = torch.bincount(index, minlength=len(source.probability))
    assert drawn.calls == source.sites
    assert p_of_fit(counts, source.probability) > 1e-3


def test_first_hitting_in_fewer_calls_comes_to_the_source_with_more() -> None:
    """Of four sites: all at once is as good as no order at all, in three calls two at a time are drawn as if alone."""
    source, count = markov(4), 15_000
    tokens = torch.zeros(count, 4, dtype=torch.int64)
    off = []
    for steps in (1, 2, 3, 4, 9):
        drawn = FirstHitting(steps).sample(source.masks_model, MASKS, SCHEDULE, tokens, generator=rng(2))
        index = drawn.tokens @ torch.tensor([27, 9, 3, 1])
        found = torch.bincount(index, minlength=len(source.probability)).double() / count
        off.append(distance(found, source.probability))
        assert drawn.calls == min(steps, 4)
    assert off == sorted(off, reverse=True)
    assert off[0] > 3 * off[3]
    assert off[3] == off[4]


def test_first_hitting_in_fewer_calls_spreads_every_sequence_over_them() -> None:
    """At the noise at which the first of its sites would be revealed that are revealed in a call."""
    told: list[Tensor] = []
    masked: list[Tensor] = []
    lengths = torch.tensor([7, 3, 2, 5])

    def watching(tokens: Tensor, sigma_bar: Tensor, _: Tensor | None) -> Tensor:
        told.append(sigma_bar)
        masked.append(torch.stack([(each == 3).sum() for each in tokens.flatten().split(lengths.tolist())]))
        return torch.zeros(*tokens.shape, 4)

    tokens = torch.zeros(int(lengths.sum()), dtype=torch.int64)
    FirstHitting(3).sample(watching, MASKS, SCHEDULE, tokens, lengths, generator=rng())
    few = torch.stack(told)
    assert torch.stack(masked).tolist() == [[7, 3, 2, 5], [4, 2, 1, 3], [2, 1, 0, 1]]
    told.clear()
    FirstHitting().sample(watching, MASKS, SCHEDULE, tokens, lengths, generator=rng())
    for sequence, turns in enumerate(([0, 3, 5], [0, 1, 2], [0, 1], [0, 2, 4])):
        assert few[: len(turns), sequence].tolist() == [float(told[turn][sequence]) for turn in turns]


def test_first_hitting_tells_the_noise_at_which_each_site_would_be_revealed() -> None:
    """With k of L left, the share masked is the k-th least of L even numbers; and all sites come in all orders."""
    told: list[Tensor] = []
    order: list[Tensor] = []

    def watching(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        told.append(-torch.expm1(-sigma_bar.double()))
        order.append(tokens == 3)
        return torch.zeros(*tokens.shape, 4)

    count, length = 20_000, 3
    FirstHitting().sample(watching, MASKS, SCHEDULE, torch.zeros(count, length, dtype=torch.int64), generator=rng())
    for k, share, masked in zip((3, 2, 1), told, order, strict=True):
        assert (masked.sum(-1) == k).all()
        assert float(share.mean()) == pytest.approx(k / (length + 1), abs=0.01)
        assert float(share.var()) == pytest.approx(k * (length + 1 - k) / ((length + 1) ** 2 * (length + 2)), rel=0.06)
    for masked in order[1:]:
        torch.testing.assert_close(masked.double().mean(0), masked.double().mean().expand(3), atol=0.02, rtol=0)


def test_uniform_noise_is_undone_to_the_source() -> None:
    source, count = table(2), 1500
    tokens = torch.zeros(count, 2, dtype=torch.int64)
    cache: dict[tuple[float, int], Tensor] = {}

    def known(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        level = float(sigma_bar[0])
        if (level, 0) not in cache:
            cache[level, 0] = source.jumps_model(source.sequences, sigma_bar[:1].expand(9), None)
        return cache[level, 0][tokens @ torch.tensor([3, 1])]

    for sampler in (Analytic(40), Euler(80)):
        drawn = sampler.sample(known, JUMPS, SCHEDULE, tokens, generator=rng(7))
        counts = torch.bincount(drawn.tokens @ torch.tensor([3, 1]), minlength=9)
        assert distance(counts / count, source.probability) < 0.05
        assert drawn.calls == sampler.steps + 1


@each
def test_every_sampler_gives_ids_alone_and_holds_what_is_given(sampler: Sampler, graph: Graph) -> None:
    """Boundaries and given residues stay, masks and padding never come, whatever weight the model gives them."""
    tokens = torch.randint(4, 24, (3, 20), generator=rng())
    tokens[:, 0], tokens[:, 15], tokens[:, 16:] = 0, 2, 1
    free = (tokens > 3) & (torch.arange(20) % 4 != 1)
    drawn = sampler.sample(rough, graph, SCHEDULE, tokens, free=free, generator=rng())
    assert drawn.tokens.shape == tokens.shape
    assert drawn.tokens.dtype == torch.int64
    assert torch.equal(drawn.tokens[~free], tokens[~free])
    assert graph.holds(drawn.tokens[free]).all()
    assert (drawn.tokens[free] != tokens[free]).any()
    longest = int(free.sum(-1).max())
    calls = sampler.calls(longest) if isinstance(sampler, FirstHitting) else sampler.steps + 1
    assert drawn.calls == calls


@each
def test_what_is_not_allowed_never_comes(sampler: Sampler, graph: Graph) -> None:
    tokens = torch.full((4, 30), 5)
    drawn = sampler.sample(rough, graph, SCHEDULE, tokens, allowed=(7, 11), generator=rng())
    assert set(drawn.tokens.flatten().tolist()) == {7, 11}
    for bad in ((), (7, 2), (40,)):
        with pytest.raises(RequestError, match="takes some of the graph's ids"):
            sampler.sample(rough, graph, SCHEDULE, tokens, allowed=bad, generator=rng())


@each
def test_the_same_generator_gives_the_same_samples_and_no_other_state_moves(sampler: Sampler, graph: Graph) -> None:
    before, tokens = torch.get_rng_state(), torch.full((2, 25), 5)
    first, again, other = (sampler.sample(rough, graph, SCHEDULE, tokens, generator=rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tokens == 5).all()


@each
def test_packed_sequences_of_many_lengths_are_sampled_as_they_are(sampler: Sampler, graph: Graph) -> None:
    lengths = torch.tensor([4, 9, 1, 0, 6])
    tokens = torch.full((20,), 5)
    tokens[[0, 4, 13, 14]] = 0  # the third sequence has no free site
    free = tokens == 5
    seen: list[Tensor] = []

    def watching(tokens: Tensor, sigma_bar: Tensor, given: Tensor | None) -> Tensor:
        assert given is lengths
        assert sigma_bar.shape == (5,)
        seen.append(tokens)
        return rough(tokens, sigma_bar, given)

    drawn = sampler.sample(watching, graph, SCHEDULE, tokens, lengths, free=free, generator=rng())
    assert graph.holds(drawn.tokens[free]).all()
    assert torch.equal(drawn.tokens[~free], tokens[~free])
    if sampler == FirstHitting():
        assert drawn.calls == 8
        left = torch.stack([(x == graph.mask) for x in seen]).split(lengths.tolist(), -1)  # type: ignore[attr-defined]
        assert [part[0].sum().item() for part in left] == [3, 8, 0, 0, 5]
        for part in left:  # one site less each turn, in each that has one
            assert torch.equal(part.sum(-1).diff(), -(part.sum(-1)[:-1] > 0).long())


@each
def test_where_nothing_is_free_nothing_is_drawn(sampler: Sampler, graph: Graph) -> None:
    tokens = torch.full((2, 3), 1)
    drawn = sampler.sample(rough, graph, SCHEDULE, tokens, free=tokens == 0, generator=rng())
    assert torch.equal(drawn.tokens, tokens)


@each
def test_scores_that_are_no_numbers_raise(sampler: Sampler, graph: Graph) -> None:
    def broken(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        return torch.full((*tokens.shape, 33), math.nan)

    with pytest.raises(RequestError, match="look for NaN in the log scores"):
        sampler.sample(broken, graph, SCHEDULE, torch.full((2, 5), 5), generator=rng())


def test_first_hitting_of_uniform_noise_is_refused() -> None:
    with pytest.raises(RequestError, match="got first-hitting for uniform noise, takes absorbing.* take analytic"):
        FirstHitting().sample(rough, Uniform(33), SCHEDULE, torch.full((2, 5), 5), generator=rng())


def test_steps_that_are_none_are_refused() -> None:
    with pytest.raises(RequestError, match="got 0 steps, takes 1 step or more$"):
        Euler(0)
    for least in (0.0, 1.0):
        with pytest.raises(RequestError, match=f"got a least time of {least}, takes one between 0 and 1"):
            Analytic(4, least=least)
