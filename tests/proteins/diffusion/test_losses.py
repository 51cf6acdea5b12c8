"""Losses: the identities between them, what they never read, and that a model trained by them finds its source."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from known_sources import Source, markov, rng, table
from torch import Tensor, nn

from headway import RequestError
from headway_apps.proteins.diffusion.bound import masked_bound, noise_bound
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.losses import cross_entropy, dwdse, per_residue
from headway_apps.proteins.diffusion.schedules import Cosine, Geometric, LogLinear, Schedule, draw_positions

ESM = Absorbing(33, mask=32, ids=tuple(range(4, 24)))
GRAPHS = [ESM, Absorbing(33, mask=33), Uniform(33, ids=tuple(range(4, 24)))]
LOG_LINEAR = LogLinear()
SCHEDULES = [LOG_LINEAR, Geometric(), Cosine(5.0)]


class Draw:
    """Tokens, their noise, and scores that a model may give."""

    def __init__(self, graph: Graph, schedule: Schedule = LOG_LINEAR, shape: tuple[int, int] = (6, 40)) -> None:
        self.graph = graph
        self.t = torch.linspace(0.05, 0.95, shape[0], dtype=torch.float64)
        self.sigma_bar, self.rate, self.reveal = (
            f(self.t) for f in (schedule.sigma_bar, schedule.rate, schedule.reveal)
        )
        self.clean = torch.randint(4, 24, shape, generator=rng())
        self.free = torch.rand(shape, generator=rng(2)) < 0.7
        self.noised = graph.perturb(self.clean, self.sigma_bar, generator=rng(1), free=self.free)
        self.log_score = torch.randn(*shape, graph.size, generator=rng(3), dtype=torch.float64)

    def dwdse(self, log_score: Tensor | None = None, free: Tensor | None = None) -> Tensor:
        score = self.log_score if log_score is None else log_score
        free = self.free if free is None else free
        return dwdse(self.graph, score, self.noised, self.clean, free, sigma_bar=self.sigma_bar, rate=self.rate)

    def cross_entropy(self, log_score: Tensor | None = None, free: Tensor | None = None) -> Tensor:
        assert isinstance(self.graph, Absorbing)
        score = self.log_score if log_score is None else log_score
        free = self.free if free is None else free
        return cross_entropy(self.graph, score, self.noised, self.clean, free, weight=self.reveal)


LOSSES = [(graph, Draw.dwdse) for graph in GRAPHS] + [(graph, Draw.cross_entropy) for graph in GRAPHS[:2]]
each_loss = pytest.mark.parametrize("graph, loss", LOSSES, ids=lambda x: getattr(x, "__name__", type(x).__name__))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("graph", GRAPHS[:2], ids=str)
def test_score_entropy_of_probabilities_is_their_cross_entropy_at_every_token(
    graph: Absorbing, schedule: Schedule
) -> None:
    draw = Draw(graph, schedule)
    p = graph.log_clean(draw.log_score)
    log_r = -torch.expm1(draw.sigma_bar).log()[:, None, None]
    torch.testing.assert_close(draw.dwdse(p + log_r), draw.cross_entropy(p), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(draw.cross_entropy(p + log_r), draw.cross_entropy(p))  # constants do not matter to it
    by_hand = -draw.log_score[..., list(graph.ids)].log_softmax(-1)
    column = torch.tensor([graph.ids.index(i) if i in graph.ids else 0 for i in range(33)])[draw.clean]
    expected = by_hand.gather(-1, column[..., None]).squeeze(-1) * draw.reveal[:, None] * (draw.noised == graph.mask)
    torch.testing.assert_close(draw.cross_entropy(), torch.where(draw.free, expected, 0.0))


def test_the_log_linear_weight_is_one_over_t() -> None:
    draw = Draw(ESM)
    even = draw.cross_entropy(torch.zeros_like(draw.log_score))
    masked = (draw.noised == 32) & draw.free
    torch.testing.assert_close(even, masked * math.log(20) / draw.t[:, None])


@each_loss
def test_levels_by_sequence_by_token_and_packed_are_one_loss(graph: Graph, loss: Callable[..., Tensor]) -> None:
    draw, packed = Draw(graph), Draw(graph)
    document = torch.arange(6).repeat_interleave(40)
    for name in ("sigma_bar", "rate", "reveal"):
        setattr(packed, name, getattr(draw, name)[document])
    for name in ("clean", "noised", "free"):
        setattr(packed, name, getattr(draw, name).flatten())
    packed.log_score = draw.log_score.flatten(0, 1)
    assert torch.equal(loss(packed), loss(draw).flatten())


@each_loss
def test_what_is_not_free_costs_nothing_whatever_stands_there(graph: Graph, loss: Callable[..., Tensor]) -> None:
    """Padding: NaN scores, tokens that no protein holds, levels of no meaning; and no gradient goes there."""
    draw, spoilt = Draw(graph), Draw(graph)
    spoilt.log_score[~spoilt.free] = math.nan
    spoilt.clean[~spoilt.free] = -7
    spoilt.noised[~spoilt.free] = 99
    spoilt.log_score.requires_grad_()
    value = loss(spoilt)
    assert torch.equal(value, loss(draw))
    assert (value[~draw.free] == 0).all()
    value.sum().backward()
    assert spoilt.log_score.grad is not None
    assert spoilt.log_score.grad.isfinite().all()
    assert (spoilt.log_score.grad[~draw.free] == 0).all()
    spoilt.sigma_bar, spoilt.rate, spoilt.reveal = (
        x[:, None].repeat(1, 40) for x in (draw.sigma_bar, draw.rate, draw.reveal)
    )
    for level in (spoilt.sigma_bar, spoilt.rate, spoilt.reveal):
        level[~draw.free] = math.nan
    assert torch.equal(loss(spoilt), loss(draw))


@each_loss
def test_more_padding_does_not_change_nats_per_residue(graph: Graph, loss: Callable[..., Tensor]) -> None:
    draw, padded = Draw(graph), Draw(graph)
    for name, value in (("clean", 1), ("noised", 1), ("free", False), ("log_score", 5.0)):
        old = getattr(draw, name)
        setattr(padded, name, torch.cat([old, old.new_full((6, 100, *old.shape[2:]), value)], dim=1))
    torch.testing.assert_close(per_residue(loss(padded), padded.free), per_residue(loss(draw), draw.free))
    torch.testing.assert_close(per_residue(loss(draw), draw.free), loss(draw).sum() / draw.free.sum())


@each_loss
def test_the_loss_of_bfloat16_scores_is_that_of_the_same_numbers_in_float32(
    graph: Graph, loss: Callable[..., Tensor]
) -> None:
    """Exponentials and sums are float32's; against exact scores only the rounding of the scores is left."""
    draw = Draw(graph)
    scores = draw.log_score.bfloat16()
    value = loss(draw, scores)
    torch.testing.assert_close(value, loss(draw, scores.double()), rtol=1e-5, atol=1e-5)
    ours, exact = (float(per_residue(x, draw.free)) for x in (value, loss(draw)))
    assert ours == pytest.approx(exact, rel=0.01)


@each_loss
def test_gradients_are_those_of_finite_differences(graph: Graph, loss: Callable[..., Tensor]) -> None:
    draw = Draw(graph, shape=(2, 3))
    scores = draw.log_score.requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(loss, draw), (scores,))


@each_loss
def test_tokens_out_of_range_raise(graph: Graph, loss: Callable[..., Tensor]) -> None:
    for bad in (-1, 2, 99) if len(graph.ids) == 20 else (-1, 33, 99):
        draw = Draw(graph)
        draw.clean[draw.free.nonzero()[0].unbind()] = bad
        with pytest.raises(RequestError, match="none of the graph's ids"):
            loss(draw)


@each_loss
def test_noise_of_other_tokens_raises(graph: Graph, loss: Callable[..., Tensor]) -> None:
    draw = Draw(graph)
    draw.noised[draw.free.nonzero()[0].unbind()] = 99
    with pytest.raises(RequestError, match="takes what its perturb gave"):
        loss(draw)


@each_loss
def test_shapes_that_do_not_fit_raise(graph: Graph, loss: Callable[..., Tensor]) -> None:
    for name, wrong in {
        "noised": lambda x: x[:, :1],
        "log_score": lambda x: x[..., :-1],
        "free": lambda x: x[:1],
        "sigma_bar": lambda x: x[:, None],
        "rate": lambda x: x[:, None],
        "reveal": lambda x: x[:, None],
        "clean": lambda x: x.float(),
    }.items():
        if (name == "reveal") == (loss is Draw.dwdse) and name in ("sigma_bar", "rate", "reveal"):
            continue
        if loss is Draw.cross_entropy and name in ("sigma_bar", "rate"):
            continue
        draw = Draw(graph)
        setattr(draw, name, wrong(getattr(draw, name)))
        with pytest.raises(RequestError, match="takes"):
            loss(draw)


@each_loss
def test_a_loss_is_one_graph_for_the_compiler(graph: Graph, loss: Callable[..., Tensor]) -> None:
    draw = Draw(graph, shape=(3, 8))
    compiled = torch.compile(functools.partial(loss, draw), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(draw.log_score), loss(draw))
    with torch.inference_mode():
        loss(draw)
    loss(draw, draw.log_score.requires_grad_()).sum().backward()  # what inference kept does not stand in the way


def test_uniform_noise_has_no_cross_entropy() -> None:
    draw = Draw(GRAPHS[2])
    with pytest.raises(RequestError, match="got Uniform; takes Absorbing.*use dwdse"):
        cross_entropy(draw.graph, draw.log_score, draw.noised, draw.clean, weight=draw.reveal)  # type: ignore[arg-type]


class Small(nn.Module):
    """Log scores by way of clean probabilities, of one-hot sequences and their noise: it learns few sites by heart."""

    def __init__(self, source: Source, graph: Graph) -> None:
        super().__init__()
        self.source, self.graph, self.ids = source, graph, len(source.ids)
        inputs, width = source.sites * (source.size + 1) + 1, 64
        self.inner = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.outer = nn.Linear(width, source.sites * self.ids)

    def forward(self, tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = nn.functional.one_hot(tokens, self.source.size + 1).float().flatten(1)
        kept = torch.exp(-sigma_bar.float())
        logits = self.outer(self.inner(torch.cat([x, kept[:, None]], 1))).view(*tokens.shape, self.ids)
        if isinstance(self.graph, Absorbing):
            scores = logits.log_softmax(-1) - torch.expm1(sigma_bar.float()).log()[:, None, None]
        else:  # q(y) / q(x) for one site, whose clean state has `logits` by what the others hold
            reach = kept[:, None, None] * torch.eye(self.ids) + ((1 - kept) / self.ids)[:, None, None]
            q = torch.einsum("blc,bcy->bly", logits.softmax(-1), reach).log()
            scores = q - q.gather(-1, tokens[..., None])
        return nn.functional.pad(scores, (0, self.source.size - self.ids), value=-math.inf)


@pytest.mark.parametrize("name, within", [("dwdse", 0.02), ("cross_entropy", 0.02), ("uniform", 0.04)])
def test_a_model_trained_by_each_loss_comes_near_the_entropy(name: str, within: float) -> None:
    source = markov(3)
    graph: Graph = Uniform(4, ids=source.ids) if name == "uniform" else Absorbing(4, mask=3)
    schedule, model, generator = LogLinear(), Small(source, graph), rng()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)

    def loss(count: int) -> Tensor:
        clean = source.draw(count, seed=int(torch.randint(1 << 30, (), generator=generator)))
        t = 1e-3 + (1 - 1e-3) * draw_positions(count, generator=generator)
        sigma_bar = schedule.sigma_bar(t)
        noised = graph.perturb(clean, sigma_bar, generator=generator)
        score = model(noised, sigma_bar)
        if name == "cross_entropy":
            value = cross_entropy(graph, score, noised, clean, weight=schedule.reveal(t))  # type: ignore[arg-type]
        else:
            value = dwdse(graph, score, noised, clean, sigma_bar=sigma_bar, rate=schedule.rate(t))
        return per_residue(value)

    for _ in range(400):
        optimizer.zero_grad()
        loss(256).backward()
        optimizer.step()
        decay.step()
    evaluate = masked_bound if isinstance(graph, Absorbing) else noise_bound
    bound = evaluate(model, graph, schedule, source.sequences, index=torch.arange(27), seed=0, draws=200)  # type: ignore[operator]
    nats = float(torch.tensor(bound.nats, dtype=torch.float64) @ source.probability) / source.sites
    assert nats == pytest.approx(source.entropy, rel=within)
    assert math.log(3) > 1.15 * nats  # what knows nothing is far


def test_the_loss_is_a_bound_of_the_source_at_the_truth() -> None:
    """At the true scores what is left is the entropy, for either graph."""
    source, schedule = table(), LogLinear()
    t = torch.rand(60_000, generator=rng(9), dtype=torch.float64)
    clean, sigma_bar = source.draw(len(t)), schedule.sigma_bar(t)
    graph = Absorbing(4, mask=3)
    noised = graph.perturb(clean, sigma_bar, generator=rng(1))
    loss = dwdse(
        graph, source.masks_model(noised, sigma_bar, None), noised, clean, sigma_bar=sigma_bar, rate=schedule.rate(t)
    ).sum(-1)
    error = float(loss.std() / math.sqrt(len(t))) / 3
    assert float(per_residue(loss)) / 3 == pytest.approx(source.entropy, abs=4 * error + 2e-3)
