"""Samplers: from noise back to sequences.

Sites that are not free keep what they hold, so one call samples from nothing or fills in around given residues. All
choices are made in float64. What is not allowed has probability 0; the last step leaves no mask; nothing is repaired
afterwards, and log scores that are no numbers raise.

    Euler         `steps` calls and one more; jumps at the rates that the step begins with
    Analytic      the same calls; each step is exact for every site by itself (Tweedie)
    FirstHitting  as many calls as the longest has free sites; exact. One site of each sequence is revealed at a time,
                  in an even order, at the noise at which it would be (Zheng et al. 2024, arXiv:2409.02908). In fewer
                  calls, if asked, by revealing several at a time
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.draws import categorical, doubled, uniform
from headway_apps.proteins.diffusion.given import free_sites
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph
from headway_apps.proteins.diffusion.schedules import Schedule
from headway_apps.proteins.diffusion.sequences import Model, Sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    tokens: Tensor
    """In the shape of those given."""
    calls: int
    """How often the model was asked."""


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    @torch.no_grad()
    def sample(
        self,
        model: Model,
        graph: Graph,
        schedule: Schedule,
        tokens: Tensor,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator,
        free: Tensor | None = None,
        allowed: tuple[int, ...] | None = None,
    ) -> Samples:
        """Sequences in the shape of `tokens`, whose free sites are drawn anew, whatever they hold.

        Tokens are (B, L), or (T,) with the `lengths` of the sequences packed in them. `allowed` are ids of the graph;
        all of them, where None. The model must be in eval mode.
        """
        sequences = Sequences.of(tokens, lengths)
        sites = free_sites(free, tokens).flatten()
        allowed = graph.ids if allowed is None else tuple(allowed)
        if not allowed or not set(allowed) <= set(graph.ids):
            raise RequestError(f"got allowed={allowed}; takes some of the graph's ids {graph.ids}")
        given = tokens.flatten()
        noise = torch.where(sites, graph.noise(given, generator, allowed), given)
        chain = Chain(model, graph, schedule, sequences, noise, sites, allowed, generator)
        self.walk(chain)
        graph.must_hold(chain.tokens, sites)
        return Samples(chain.tokens.view(tokens.shape), chain.calls)

    @abc.abstractmethod
    def walk(self, chain: Chain) -> None:
        """Take all noise from the chain's free sites."""


@dataclasses.dataclass(eq=False)
class Chain:
    """Sequences on their way, flat, and all that a step needs."""

    model: Model
    graph: Graph
    schedule: Schedule
    sequences: Sequences
    tokens: Tensor
    free: Tensor
    allowed: tuple[int, ...]
    generator: torch.Generator
    calls: int = 0

    def ask(self, sigma_bar: Tensor) -> Tensor:
        """The model's log scores (T, V) at each sequence's noise (N,)."""
        self.calls += 1
        return self.sequences.ask(self.model, self.tokens, sigma_bar)

    def draw(self, weights: Tensor) -> None:
        """Give each free site a state with these weights (T, states)."""
        free = self.free.to(weights.device)
        drawn = categorical(torch.where(free[:, None], weights, 1.0).log(), self.generator).to(self.tokens.device)
        self.tokens = torch.where(self.free, drawn, self.tokens)


@dataclasses.dataclass(frozen=True)
class Stepped(Sampler):
    """Steps of equal time from 1 to `least`; then all noise that is left is taken away at once."""

    steps: int = 128
    least: float = 1e-5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError(f"got {self.steps} steps, takes 1 step or more")
        if not 0 < self.least < 1:
            raise RequestError(f"got a least time of {self.least}, takes one between 0 and 1")

    def walk(self, chain: Chain) -> None:
        times = torch.linspace(1, self.least, self.steps + 1, dtype=torch.float64)
        levels = chain.schedule.sigma_bar(times)
        removed = self.noise_removed(chain.schedule, times)
        for level, sigma in zip(levels, [*removed.tolist(), None], strict=True):
            asked = doubled(chain.ask(level.expand(chain.sequences.count)))
            scores = chain.graph.restrict(asked, chain.allowed, level)
            tokens = chain.tokens.to(scores.device)
            if sigma is None:
                chain.draw(chain.graph.denoise(tokens, scores, float(level)))
            else:
                chain.draw(self.step(chain.graph, tokens, scores, sigma))

    @abc.abstractmethod
    def noise_removed(self, schedule: Schedule, times: Tensor) -> Tensor:
        """In each step between `times`."""

    @abc.abstractmethod
    def step(self, graph: Graph, tokens: Tensor, log_score: Tensor, sigma: float) -> Tensor:
        """Weights (T, states) after `sigma` of noise is taken away."""


@dataclasses.dataclass(frozen=True)
class Euler(Stepped):
    """Each site jumps with the probability that its rate makes of the step."""

    steps: int = 1000

    def noise_removed(self, schedule: Schedule, times: Tensor) -> Tensor:
        return schedule.rate(times[:-1]) * -times.diff()

    def step(self, graph: Graph, tokens: Tensor, log_score: Tensor, sigma: float) -> Tensor:
        return graph.euler(tokens, log_score, sigma)


@dataclasses.dataclass(frozen=True)
class Analytic(Stepped):
    """Each site goes where it would with the others held: exact but for sites that jump in the same step."""

    def noise_removed(self, schedule: Schedule, times: Tensor) -> Tensor:
        return -schedule.sigma_bar(times).diff()

    def step(self, graph: Graph, tokens: Tensor, log_score: Tensor, sigma: float) -> Tensor:
        return graph.analytic(tokens, log_score, sigma)


@dataclasses.dataclass(frozen=True)
class FirstHitting(Sampler):
    """From one reveal to the next, on absorbing graphs alone. When and where they are is drawn before any call."""

    steps: int | None = None
    """The most calls. A sequence of more sites reveals several in a call, as evenly as can be, each as if alone."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise RequestError(f"got {self.steps} steps, takes 1 step or more, or none for one for each site")

    def calls(self, longest: int) -> int:
        """For sequences of which the longest has so many free sites."""
        return longest if self.steps is None else min(self.steps, longest)

    def walk(self, chain: Chain) -> None:
        if not isinstance(chain.graph, Absorbing):
            noise = type(chain.graph).__name__.lower()
            raise RequestError(f"got first-hitting for {noise} noise, takes absorbing, which masks; take analytic")
        document = chain.sequences.document
        left = torch.bincount(document[chain.free].cpu(), minlength=chain.sequences.count)
        calls = self.calls(int(left.max()))
        shares = _shares_masked(left, chain.generator).clamp_max(chain.schedule.jumped_at_end)
        shares = shares.gather(0, _first_turns(left, calls).clamp_max(len(shares) - 1))
        sigma_bars = (-torch.log1p(-shares)).to(document.device, torch.float32)
        order = _reveal_order(document, chain.free, chain.generator, left, calls)
        for sigma_bar, sites in zip(sigma_bars, order, strict=True):
            log_clean = chain.graph.log_clean(doubled(chain.ask(sigma_bar)[sites]), chain.allowed)
            drawn = categorical(log_clean, chain.generator).to(document.device)
            chain.tokens = chain.tokens.index_copy(0, sites, drawn)


def _shares_masked(left: Tensor, generator: torch.Generator) -> Tensor:
    """The share of sites that noise masks (turns, N), just as each sequence's next site is revealed.

    With k sites left it falls by a factor whose k-th power is even: the greatest of k even numbers. It is 1 at first.
    """
    turns = int(left.max())
    still = left - torch.arange(turns)[:, None]
    power = torch.where(still > 0, 1 / still.clamp_min(1).double(), 0.0)
    return (uniform(power, generator) ** power).cumprod(0)


def _first_turns(left: Tensor, calls: int) -> Tensor:
    """The turn (calls, N) at which each sequence is when a call is made: as many as calls, or spread over them."""
    call = torch.arange(calls)[:, None]
    return torch.where(left > calls, -(call * -left // calls), call)


def _reveal_order(document: Tensor, free: Tensor, generator: torch.Generator, left: Tensor, calls: int) -> list[Tensor]:
    """The sites that are revealed in each call: of every sequence that has one left, all orders being as likely."""
    every = document.cpu()
    sites = free.cpu().nonzero().squeeze(-1)
    sites = sites[uniform(sites, generator).argsort()]
    sites = sites[every[sites].argsort(stable=True)]
    turns = torch.arange(len(sites)) - torch.searchsorted(every[sites], every[sites])  # less where its sequence starts
    of_each = left[every[sites]]
    call = torch.where(of_each > calls, turns * calls // of_each, turns)
    counts = torch.bincount(call).tolist()
    return list(sites[call.argsort(stable=True)].to(document.device).split(counts))
