"""Sources of short sequences whose every probability is known, and models that know them, by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass
class Source:
    """Sequences of `sites` ids, each with its probability; `size` is the number of columns of log scores."""

    probability: Tensor
    """Of each of the len(ids) ** sites sequences, in the order of itertools.product."""
    sites: int
    ids: tuple[int, ...] = (0, 1, 2)
    size: int = 4
    mask: int = 3

    def __post_init__(self) -> None:
        self.sequences = torch.tensor(list(itertools.product(self.ids, repeat=self.sites)))

    @property
    def entropy(self) -> float:
        """Nats per site."""
        return float(-torch.xlogy(self.probability, self.probability).sum() / self.sites)

    def draw(self, count: int, seed: int = 0) -> Tensor:
        return self.sequences[torch.multinomial(self.probability, count, replacement=True, generator=rng(seed))]

    def log_p(self, tokens: Tensor) -> Tensor:
        same = (tokens[:, None] == self.sequences).all(-1)
        return (same * self.probability).sum(-1).log()

    def clean_probability(self, noised: Tensor) -> Tensor:
        """Of each id at each site, given what is not masked: (B, L, size)."""
        fits = ((noised[:, None] == self.sequences) | (noised[:, None] == self.mask)).all(-1)
        weight = fits * self.probability
        columns = (self.sequences[..., None] == torch.arange(self.size)).double()
        every = torch.einsum("bs,slv->blv", weight, columns)
        return every / every.sum(-1, keepdim=True)

    def masks_model(self, tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        """The true log scores where noise masks; of packed tokens too, if all sequences are of the source's length."""
        p = self.clean_probability(tokens.view(-1, self.sites))
        return (p.log() - torch.expm1(sigma_bar.double()).log()[:, None, None]).view(*tokens.shape, self.size)

    def jumps_model(self, tokens: Tensor, sigma_bar: Tensor, lengths: Tensor | None) -> Tensor:
        """The true log scores (B, L, size) where noise draws from ids."""
        level, answer = sigma_bar.double(), torch.full((*tokens.shape, self.size), -math.inf, dtype=torch.float64)
        for site, id in itertools.product(range(self.sites), self.ids):
            other = tokens.clone()
            other[:, site] = id
            answer[:, site, id] = (self.jumped(other, level) / self.jumped(tokens, level)).log()
        return answer

    def jumped(self, noised: Tensor, sigma: Tensor) -> Tensor:
        """Probability of each sequence (B, L) after noise (B,) that draws from ids."""
        kept = torch.exp(-sigma)[:, None, None]
        other = (1 - kept) / len(self.ids)
        return torch.where(noised[:, None] == self.sequences, kept + other, other).prod(-1) @ self.probability


def table(sites: int = 3, seed: int = 0) -> Source:
    """A source with no structure to exploit."""
    weight = torch.rand(3**sites, generator=rng(seed), dtype=torch.float64) ** 3
    return Source(weight / weight.sum(), sites)


def markov(sites: int = 4) -> Source:
    """A chain that mostly stays or goes one on."""
    step = torch.tensor([[0.7, 0.25, 0.05], [0.05, 0.7, 0.25], [0.25, 0.05, 0.7]], dtype=torch.float64)
    source = Source(torch.ones(3**sites, dtype=torch.float64), sites)
    pairs = step[source.sequences[:, :-1], source.sequences[:, 1:]]
    return Source(pairs.prod(-1) / 3, sites)


def p_of_fit(counts: Tensor, probability: Tensor) -> float:
    """The chi-squared test's p-value; states of probability 0 must not have come up."""
    assert counts[probability == 0].sum() == 0
    counts, probability = counts[probability > 0].double(), probability[probability > 0].double()
    expected = probability / probability.sum() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


def distance(p: Tensor, q: Tensor) -> float:
    """In total variation."""
    return float((p - q).abs().sum() / 2)
