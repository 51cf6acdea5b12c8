"""Upper bounds of -log p, in nats, of whole sequences: estimated without bias, and the same number twice.

`masked_bound` draws the *number* of masked sites evenly. To mask each site by itself and weigh by 1 / t estimates the
same, but with the times below its least one left out, and with more variance. Given that k of L sites are masked, the
share that noise masks follows Beta(k, L - k + 1); so a model that is told its noise is told such a level, and the bound
is exact for it too. It is that of first-hitting sampling, which starts with all masked: there is no prior term.

`noise_bound` takes any graph. Score entropy depends on the noise alone, not on the schedule that led there; that says
where noise ends, and the prior term makes up for it. The share of sites that have jumped is drawn as the square of an
even number: jumps under little noise are rare and dear, and shares drawn evenly would give infinite variance.

What is drawn for a sequence depends on `seed` and its index in the data alone: not on the batch that it comes in, its
neighbours, the device or the process; no other random state moves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion import losses
from headway_apps.proteins.diffusion.draws import doubled
from headway_apps.proteins.diffusion.given import free_sites
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph
from headway_apps.proteins.diffusion.schedules import Schedule
from headway_apps.proteins.diffusion.sequences import Model, Sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """What sequences cost: more than -log p in the mean over seeds, by as much as the model is not exact."""

    nats: tuple[float, ...]
    """Of each sequence."""
    residues: tuple[int, ...]
    """How many free sites each has."""
    prior: float
    """Nats per residue, counted in `nats`, of the prior term."""

    @classmethod
    def merged(cls, parts: Iterable[Bound]) -> Bound:
        """One bound of all batches; it is the same number in whatever order they come."""
        parts = list(parts)
        priors = {part.prior for part in parts}
        if len(priors) != 1:
            raise RequestError(f"got bounds with prior terms {sorted(priors)}; takes one or more of the same kind")
        nats, residues = (tuple(x for part in parts for x in getattr(part, name)) for name in ("nats", "residues"))
        return cls(nats, residues, priors.pop())

    @property
    def per_residue(self) -> float:
        """Nats per residue of all sequences together."""
        return math.fsum(self.nats) / sum(self.residues)

    @property
    def perplexity(self) -> float:
        return math.exp(self.per_residue)

    @property
    def standard_error(self) -> float:
        """Of `per_residue`, over sequences drawn from the same source; it takes two or more."""
        count, mean = len(self.nats), self.per_residue
        if count < 2:
            raise RequestError(f"got {count} sequence; takes 2 or more to know a standard error")
        off = math.fsum((nats - mean * residues) ** 2 for nats, residues in zip(self.nats, self.residues, strict=True))
        return math.sqrt(off * count / (count - 1)) / sum(self.residues)


@torch.no_grad()
def masked_bound(
    model: Model,
    graph: Absorbing,
    schedule: Schedule,
    tokens: Tensor,
    lengths: Tensor | None = None,
    *,
    index: Tensor,
    seed: int,
    free: Tensor | None = None,
    draws: int = 1,
) -> Bound:
    """The bound of each sequence, from `draws` calls of the model. `index` (N,) is each one's place in the data.

    The model is told no more noise than the schedule ends with. It must be in eval mode.
    """
    if not isinstance(graph, Absorbing):
        raise RequestError(f"got {type(graph).__name__}; takes Absorbing, which masks: use noise_bound")
    data = _Data.of(tokens, lengths, index, free)

    def cost(draw: int) -> Tensor:
        each = zip(data.free, data.index, strict=True)
        drawn = [_mask(sites, _generator(seed, i, draw), draw, draws) for sites, i in each]
        masked, sigma_bars, weights = zip(*drawn, strict=True)
        noised = torch.where(torch.cat(masked).to(tokens.device), graph.mask, data.tokens)
        told = torch.tensor(sigma_bars, dtype=torch.float64).clamp_max(schedule.sigma_bar_at_end)
        scores, *rest = data.scored(model, noised, told)
        return losses.cross_entropy(graph, scores, *rest, weight=data.spread(weights, scores))

    return data.bound(cost, draws, prior=0.0)


@torch.no_grad()
def noise_bound(
    model: Model,
    graph: Graph,
    schedule: Schedule,
    tokens: Tensor,
    lengths: Tensor | None = None,
    *,
    index: Tensor,
    seed: int,
    free: Tensor | None = None,
    draws: int = 1,
) -> Bound:
    """The bound of each sequence on any graph, with the prior term; arguments are those of `masked_bound`."""
    data = _Data.of(tokens, lengths, index, free)
    end = schedule.jumped_at_end

    def cost(draw: int) -> Tensor:
        noised, sigma_bars, rates = [], [], []
        for clean, sites, i in zip(data.clean, data.free, data.index, strict=True):
            generator = _generator(seed, i, draw)
            position = (draw + float(torch.rand((), generator=generator, dtype=torch.float64))) / draws
            share = end * position**2
            sigma_bars.append(-math.log1p(-share))
            rates.append(2 * end * position / (1 - share))  # d sigma_bar / d position
            level = torch.tensor(sigma_bars[-1], dtype=torch.float64)
            noised.append(graph.perturb(clean, level, generator=generator, free=sites))
        told = torch.tensor(sigma_bars, dtype=torch.float64)
        scores, *rest = data.scored(model, torch.cat(noised).to(tokens.device), told)
        return losses.dwdse(
            graph, scores, *rest, sigma_bar=data.spread(sigma_bars, scores), rate=data.spread(rates, scores)
        )

    return data.bound(cost, draws, prior=graph.prior_term(schedule.sigma_bar_at_end))


def _generator(seed: int, index: int, draw: int) -> torch.Generator:
    """Of one draw for one sequence. torch's generators take 32 bits, so those are well mixed."""
    mixed = hashlib.blake2b(f"{seed} {index} {draw}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little"))


def _mask(free: Tensor, generator: torch.Generator, draw: int, draws: int) -> tuple[Tensor, float, float]:
    """Masked sites, their noise, and what each counts; how many, from the `draw`-th of `draws` parts of 1 to L."""
    count = int(free.sum())
    masked = torch.zeros_like(free)
    if count == 0:
        return masked, 0.0, 0.0
    *shares, position = torch.rand(count + 1, generator=generator, dtype=torch.float64).tolist()
    number = min(int((draw + position) / draws * count) + 1, count)
    share = sorted(shares)[number - 1]  # the k-th least of L even numbers: Beta(k, L - k + 1)
    masked[free] = torch.tensor(shares, dtype=torch.float64) <= share
    return masked, -math.log1p(-share), count / number


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """A batch of sequences; what is by sequence lies on the CPU, where it is drawn."""

    sequences: Sequences
    tokens: Tensor
    sites: Tensor
    """Flat: which are free."""
    clean: list[Tensor]
    free: list[Tensor]
    index: list[int]

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor | None, index: Tensor, free: Tensor | None) -> _Data:
        sequences = Sequences.of(tokens, lengths)
        if index.shape != (sequences.count,) or index.is_floating_point():
            raise RequestError(f"got index {tuple(index.shape)} in {index.dtype}; takes one integer for each sequence")
        flat, sites = tokens.flatten(), free_sites(free, tokens).flatten()
        return cls(sequences, flat, sites, sequences.split(flat), sequences.split(sites), index.tolist())

    def scored(self, model: Model, noised: Tensor, sigma_bar: Tensor) -> tuple[Tensor, ...]:
        """The model's log scores in float64, and beside them the noised tokens, the clean ones and the free sites."""
        scores = doubled(self.sequences.ask(model, noised, sigma_bar))
        return scores, *(x.to(scores.device) for x in (noised, self.tokens)), self.sites.to(scores.device)

    def spread(self, values: Iterable[float], like: Tensor) -> Tensor:
        """One number a sequence, at each of its tokens."""
        each = torch.tensor(list(values), dtype=torch.float64, device=like.device)
        return each[self.sequences.document.to(like.device)]

    def bound(self, cost: Callable[[int], Tensor], draws: int, prior: float) -> Bound:
        if draws < 1:
            raise RequestError(f"got draws={draws}; takes 1 or more")
        parts = zip(*(self.sequences.split(cost(draw)) for draw in range(draws)), strict=True)
        residues = tuple(int(sites.sum()) for sites in self.free)
        nats = tuple(
            math.fsum(x for part in each for x in part.tolist()) / draws + prior * count
            for each, count in zip(parts, residues, strict=True)
        )
        return Bound(nats, residues, prior)
