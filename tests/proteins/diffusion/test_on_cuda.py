"""On a GPU: the same numbers as on the CPU from the same generator, and a loss that never waits for the device."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from known_sources import rng
from torch import Tensor
from waiting import no_waiting

from headway_apps.proteins.diffusion.bound import masked_bound, noise_bound
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.losses import cross_entropy, dwdse, per_residue
from headway_apps.proteins.diffusion.samplers import Analytic, Euler, FirstHitting, Sampler
from headway_apps.proteins.diffusion.schedules import LogLinear

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

IDS = tuple(range(4, 24))
MASKS, JUMPS, SCHEDULE = Absorbing(33, mask=32, ids=IDS), Uniform(33, ids=IDS), LogLinear()
each = pytest.mark.parametrize("graph", [MASKS, JUMPS], ids=lambda x: type(x).__name__)


def scores(tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
    """The same on every device."""
    table = torch.randn(33, 33, generator=rng(), dtype=torch.float64).to(tokens.device)
    return table[tokens]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([5, 40, 17, 1])
    tokens = torch.randint(4, 24, (63,), generator=rng())
    free = torch.rand(63, generator=rng(1)) < 0.8
    return torch.where(free, tokens, 1), lengths, free


@each
def test_noise_and_losses_are_the_cpus_and_do_not_wait(graph: Graph) -> None:
    tokens, lengths, free = batch()
    document = torch.arange(4).repeat_interleave(lengths)
    t = torch.tensor([0.1, 0.5, 0.7, 0.9])
    answers = []
    for device in ("cpu", "cuda"):
        generator, values = rng(3), (tokens, free, t, document)
        if device == "cuda":
            values = tuple(x.cuda() for x in values)  # type: ignore[assignment]
        clean, sites, times, at = values
        noised = graph.perturb(clean, SCHEDULE.sigma_bar(times)[at], generator=generator, free=sites)
        log_score = scores(noised, t, None).float()
        with no_waiting() if device == "cuda" else nullcontext():
            level, rate, weight = (f(times)[at] for f in (SCHEDULE.sigma_bar, SCHEDULE.rate, SCHEDULE.reveal))
            loss = [dwdse(graph, log_score, noised, clean, sites, sigma_bar=level, rate=rate)]
            if isinstance(graph, Absorbing):
                loss.append(cross_entropy(graph, log_score, noised, clean, sites, weight=weight))
            mean = [per_residue(x, sites) for x in loss]
        answers.append((noised.cpu(), *(x.cpu() for x in loss + mean)))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@each
def test_noise_of_the_devices_own_generator_does_not_wait(graph: Graph) -> None:
    tokens, _, free = (x.cuda() for x in batch())
    generator = torch.Generator("cuda").manual_seed(0)
    level = torch.full((63,), 0.7, device="cuda")
    graph.perturb(tokens, level, generator=generator, free=free)
    with no_waiting():
        noised = graph.perturb(tokens, level, generator=generator, free=free)
    assert (noised != tokens).any()
    assert torch.equal(noised[~free], tokens[~free])


@pytest.mark.parametrize(
    "sampler, graph",
    [(FirstHitting(), MASKS), (Euler(9), MASKS), (Analytic(9), MASKS), (Euler(9), JUMPS), (Analytic(9), JUMPS)],
    ids=lambda x: type(x).__name__,
)
def test_samples_are_the_cpus(sampler: Sampler, graph: Graph) -> None:
    tokens, lengths, free = batch()
    here = sampler.sample(scores, graph, SCHEDULE, tokens, lengths, free=free, generator=rng(5))
    there = sampler.sample(
        scores, graph, SCHEDULE, tokens.cuda(), lengths.cuda(), free=free.cuda(), generator=rng(5), allowed=IDS
    )
    assert torch.equal(here.tokens, there.tokens.cpu())
    own = torch.Generator("cuda").manual_seed(0)
    drawn = sampler.sample(scores, graph, SCHEDULE, tokens.cuda(), lengths.cuda(), free=free.cuda(), generator=own)
    assert graph.holds(drawn.tokens[free.cuda()]).all()
    assert drawn.calls == here.calls


@each
def test_bounds_are_the_cpus(graph: Graph) -> None:
    tokens, lengths, free = batch()
    bounds = [noise_bound, masked_bound] if isinstance(graph, Absorbing) else [noise_bound]
    for bound in bounds:
        here, there = (
            bound(scores, graph, SCHEDULE, *x[:2], free=x[2], index=torch.arange(4), seed=0, draws=3)  # type: ignore[arg-type]
            for x in ((tokens, lengths, free), (tokens.cuda(), lengths.cuda(), free.cuda()))
        )
        assert here.nats == pytest.approx(there.nats, rel=1e-10)
