"""Graphs: noise against the matrix exponential, score entropy against its definition, steps back against Bayes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from known_sources import Source, p_of_fit, rng, table
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform, log_expm1

IDS = (1, 2, 4)
GRAPHS = [
    Absorbing(6, mask=5),
    Absorbing(6, mask=2, ids=(1, 4)),
    Absorbing(6, mask=6, ids=IDS),
    Uniform(6),
    Uniform(6, ids=IDS),
]
each = pytest.mark.parametrize("graph", GRAPHS, ids=str)


def generator_matrix(graph: Graph) -> Tensor:
    """Q[x, y]: the rate from state x to y, for states that noise reaches."""
    q = torch.zeros(graph.states, graph.states, dtype=torch.float64)
    for x in graph.ids:
        if isinstance(graph, Absorbing):
            q[x, graph.mask] += 1
        else:
            for y in graph.ids:
                q[x, y] += 1 / len(graph.ids)
        q[x, x] -= 1
    return q


@each
@pytest.mark.parametrize("sigma", [1e-3, 0.7, 12.0])
def test_noise_is_the_exponential_of_its_rates(graph: Graph, sigma: float) -> None:
    states = torch.tensor(graph.ids)
    rows = graph.transition(states, torch.full((len(states),), sigma, dtype=torch.float64))
    torch.testing.assert_close(rows, torch.linalg.matrix_exp(sigma * generator_matrix(graph))[states])


@each
def test_tokens_jump_as_often_as_they_should(graph: Graph) -> None:
    sigma = torch.tensor(0.9, dtype=torch.float64)
    for start in graph.ids[:2]:
        tokens = torch.full((20_000,), start)
        noised = graph.perturb(tokens, sigma, generator=rng(start))
        counts = torch.bincount(noised, minlength=graph.states)
        assert p_of_fit(counts, graph.transition(tokens[:1], sigma)[0]) > 1e-4


@each
def test_sites_that_are_not_free_keep_what_they_hold(graph: Graph) -> None:
    tokens = torch.full((4, 50), graph.ids[0])
    tokens[:, :9] = 3  # no id of some graphs: a boundary
    free = torch.ones_like(tokens, dtype=torch.bool)
    free[:, :10] = False
    noised = graph.perturb(tokens, torch.full((4,), 30.0), generator=rng(), free=free)
    assert torch.equal(noised[:, :10], tokens[:, :10])
    assert (noised[:, 10:] != tokens[:, 10:]).any()


@pytest.mark.parametrize("batch, length", [(1, 5), (5, 5), (5, 1), (1, 1), (3, 7)])
def test_levels_are_one_a_sequence_or_one_a_token_and_nothing_broadcasts(batch: int, length: int) -> None:
    graph, tokens = Absorbing(6, mask=5), torch.ones(batch, length, dtype=torch.int64)
    by_sequence = torch.linspace(0.0, 40.0, batch)
    rows = graph.perturb(tokens, by_sequence, generator=rng())
    assert rows.shape == tokens.shape
    assert torch.equal(rows, graph.perturb(tokens, by_sequence[:, None].expand(batch, length), generator=rng()))
    if batch > 1:  # the first row has no noise, the last nothing else
        assert (rows[0] == 1).all()
        assert (rows[-1] == 5).all()
    wrong = [(), (batch + 1,), (batch, length, 1), (length + 1, batch)] + ([(batch, 1)] if length > 1 else [])
    for shape in wrong:
        with pytest.raises(RequestError, match="takes one a token, or one a sequence"):
            graph.perturb(tokens, torch.ones(shape), generator=rng())


def test_what_no_clean_site_holds_is_refused() -> None:
    for graph, bad in itertools.product((Absorbing(6, mask=5, ids=IDS), Uniform(6, ids=IDS)), (-1, 0, 5, 6, 99)):
        with pytest.raises(RequestError, match="none of the graph's ids"):
            graph.perturb(torch.tensor([1, bad]), torch.tensor(1.0), generator=rng())
    with pytest.raises(RequestError, match="takes int64 ids"):
        Uniform(6).perturb(torch.ones(3), torch.tensor(1.0), generator=rng())
    with pytest.raises(RequestError, match="got free in torch.int64; takes bool"):
        Uniform(6).perturb(torch.tensor([1]), torch.tensor(1.0), generator=rng(), free=torch.tensor([1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Absorbing(6, mask=7),
        lambda: Absorbing(6, mask=1, ids=IDS),
        lambda: Uniform(6, ids=(1, 1)),
        lambda: Uniform(6, ids=(6,)),
    ],
)
def test_graphs_that_are_none_are_refused(make: object) -> None:
    with pytest.raises(RequestError):
        make()  # type: ignore[operator]


def ratios(graph: Graph, noised: int, clean: int, sigma: float) -> dict[int, tuple[float, float]]:
    """For every state y that can go to `noised`: Q[y, noised], and q(y) / q(noised) when `clean` is the truth."""
    q = generator_matrix(graph)
    reached = torch.linalg.matrix_exp(sigma * q)[clean]
    return {
        y: (float(q[y, noised]), float(reached[y] / reached[noised]))
        for y in range(graph.states)
        if y != noised and q[y, noised]
    }


@each
@pytest.mark.parametrize("sigma", [1e-3, 0.5, 5.0])
def test_score_entropy_is_its_definition_never_negative_and_zero_at_the_truth(graph: Graph, sigma: float) -> None:
    states = (*graph.ids, graph.mask) if isinstance(graph, Absorbing) else graph.ids
    pairs = [(x, x0) for x in states for x0 in graph.ids if bool(graph.reaches(torch.tensor(x), torch.tensor(x0)))]
    noised, clean = torch.tensor(pairs).T
    log_score = torch.randn(len(pairs), graph.size, generator=rng(), dtype=torch.float64)
    level = torch.full((len(pairs),), sigma, dtype=torch.float64)
    by_hand, true_score = [], log_score.clone()
    for row, (x, x0) in enumerate(pairs):
        total = 0.0
        for y, (rate, ratio) in ratios(graph, x, x0, sigma).items():
            score = float(log_score[row, y].exp())
            constant = ratio * (math.log(ratio) - 1) if ratio > 1e-200 else 0.0
            total += rate * (score - ratio * float(log_score[row, y]) + constant)
            true_score[row, y] = math.log(ratio) if ratio > 1e-200 else -math.inf
        by_hand.append(total)
    entropy = graph.entropy(log_score, level, noised, clean)
    torch.testing.assert_close(entropy, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    assert (entropy >= 0).all()
    least = graph.entropy(true_score, level, noised, clean)
    torch.testing.assert_close(least, torch.zeros_like(least), atol=1e-9, rtol=0)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-12, 1e-4, 30.0, 200.0])
def test_score_entropy_and_its_gradient_are_finite_at_any_noise(graph: Graph, sigma: float, dtype: torch.dtype) -> None:
    tokens = torch.full((50,), graph.ids[0])
    level = torch.tensor(sigma, dtype=dtype)
    noised = graph.perturb(tokens, level, generator=rng())
    log_score = torch.zeros(50, graph.size, dtype=dtype, requires_grad=True)
    entropy = graph.entropy(log_score, level.expand(50), noised, tokens)
    entropy.sum().backward()
    assert entropy.isfinite().all()
    assert log_score.grad is not None
    assert log_score.grad.isfinite().all()


@each
def test_columns_that_a_site_cannot_hold_are_never_read(graph: Graph) -> None:
    tokens = torch.tensor(graph.ids).repeat(20)
    level = torch.full((len(tokens),), 1.5, dtype=torch.float64)
    noised = graph.perturb(tokens, level, generator=rng())
    log_score = torch.randn(len(tokens), graph.size, generator=rng(), dtype=torch.float64)
    spoilt = log_score.clone()
    spoilt[:, [i for i in range(graph.size) if i not in graph.ids]] = math.nan
    read = [
        lambda s: graph.entropy(s, level, noised, tokens),
        lambda s: graph.euler(noised, s, 0.1),
        lambda s: graph.analytic(noised, s, 0.1),
        lambda s: graph.denoise(noised, s, 0.1),
        lambda s: graph.denoise(noised, graph.restrict(s, graph.ids[:1], level), 0.1)[noised == 5],
    ]
    for function in read:
        assert torch.equal(function(log_score), function(spoilt))


def single(graph: Graph) -> Source:
    """A source of one site: its score is exact whatever step is taken."""
    ids = graph.ids
    weight = torch.arange(1, len(ids) + 1, dtype=torch.float64)
    mask = graph.mask if isinstance(graph, Absorbing) else -1
    return Source(weight / weight.sum(), 1, ids, graph.size, mask)


@each
@pytest.mark.parametrize("end, begin", [(1.3, 0.2), (3.0, 2.9), (0.5, 1e-5)])
def test_the_analytic_step_is_bayes_for_one_site(graph: Graph, end: float, begin: float) -> None:
    """q(state at `begin` | state at `end`), by the two transitions and the source."""
    source, q = single(graph), generator_matrix(graph)
    at_begin = torch.zeros(graph.states, dtype=torch.float64)
    at_begin[list(graph.ids)] = source.probability
    at_begin = at_begin @ torch.linalg.matrix_exp(begin * q)
    joint = at_begin[:, None] * torch.linalg.matrix_exp((end - begin) * q)
    states = [s for s in range(graph.states) if joint[:, s].sum() > 0]
    tokens = torch.tensor(states)[:, None]
    level = torch.full((len(states),), end, dtype=torch.float64)
    model = source.masks_model if isinstance(graph, Absorbing) else source.jumps_model
    weights = graph.analytic(tokens, model(tokens, level, None), end - begin).squeeze(1)
    truth = (joint / joint.sum(0)).T[states]
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), truth, rtol=1e-6, atol=1e-9)


@each
def test_a_short_step_of_euler_is_the_analytic_one_and_a_long_one_leaves_no_negative_weight(graph: Graph) -> None:
    noised = graph.perturb(torch.tensor(graph.ids).repeat(5), torch.tensor(1.0), generator=rng())
    log_score = torch.randn(len(noised), graph.size, generator=rng(), dtype=torch.float64)
    short = [
        step / step.sum(-1, keepdim=True)
        for step in (f(noised, log_score, 1e-7) for f in (graph.euler, graph.analytic))
    ]
    torch.testing.assert_close(*short, rtol=0, atol=1e-12)
    long = graph.euler(noised, log_score, 100.0)
    assert (long >= 0).all()
    assert (long.sum(-1) > 0).all()


@each
def test_denoising_leaves_no_noise(graph: Graph) -> None:
    noised = graph.perturb(torch.tensor(graph.ids).repeat(20), torch.tensor(1.0), generator=rng())
    log_score = torch.randn(len(noised), graph.size, generator=rng(), dtype=torch.float64)
    weights = graph.denoise(noised, log_score, 1e-3)
    outside = [i for i in range(graph.states) if i not in graph.ids]
    assert (weights[:, outside] == 0).all()
    assert (weights.sum(-1) > 0).all()


@each
def test_what_is_not_allowed_cannot_be_reached(graph: Graph) -> None:
    allowed, tokens = graph.ids[:1], torch.full((4,), graph.ids[0])
    noised = graph.noise(tokens, rng(), allowed)
    free_score = torch.randn(4, graph.size, generator=rng(), dtype=torch.float64)
    level = torch.tensor(0.7, dtype=torch.float64)
    score = graph.restrict(free_score, allowed, level)
    banned = [i for i in graph.ids if i not in allowed]
    for weights in (
        graph.euler(noised, score, 0.1),
        graph.analytic(noised, score, 0.1),
        graph.denoise(noised, score, 1.0),
    ):
        assert (weights[:, banned] == 0).all()
    if isinstance(graph, Absorbing):  # sites are revealed as fast as noise hides them
        rates = graph.reverse_rate(noised, score).sum(-1)
        torch.testing.assert_close(rates, (1 / level.expm1()).expand(4))


@each
@pytest.mark.parametrize("sigma_bar", [0.3, 6.9])
def test_the_prior_term_is_a_divergence(graph: Graph, sigma_bar: float) -> None:
    reached = torch.linalg.matrix_exp(sigma_bar * generator_matrix(graph))[graph.ids[0]]
    prior = torch.zeros(graph.states, dtype=torch.float64)
    if isinstance(graph, Absorbing):
        prior[list(graph.ids)] = math.exp(-sigma_bar) / len(graph.ids)
        prior[graph.mask] = -math.expm1(-sigma_bar)
    else:
        prior[list(graph.ids)] = 1 / len(graph.ids)
    expected = float((torch.xlogy(reached, reached) - torch.xlogy(reached, prior)).sum())
    assert graph.prior_term(sigma_bar) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_log_expm1_is_right_from_the_least_number_to_the_greatest() -> None:
    x = torch.tensor([1e-300, 1e-9, 1.0, 50.0, 1e5], dtype=torch.float64)
    expected = torch.tensor([math.log(1e-300), math.log(math.expm1(1e-9)), math.log(math.e - 1), 50.0, 1e5])
    torch.testing.assert_close(log_expm1(x), expected.double(), rtol=1e-6, atol=0)
    assert log_expm1(torch.tensor([1e-30, 200.0])).isfinite().all()


def test_a_table_knows_its_own_ratios() -> None:
    """The sources of these tests, by another road: masking and unmasking one site."""
    source = table(2)
    noised = torch.tensor([[3, 1]])
    p = source.probability.view(3, 3)[:, 1]
    torch.testing.assert_close(source.clean_probability(noised)[0, 0, :3], p / p.sum())
