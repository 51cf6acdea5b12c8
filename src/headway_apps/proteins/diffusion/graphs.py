"""Graphs: which states noise leads a token to, how likely, and the ways back.

A site holds one of `ids`; log scores have `size` columns, one a symbol of the vocabulary. Log score y at a site in
state x estimates log q(y) / q(x), where q is the noised site's distribution given the others. Columns outside `ids` are
never read. Lou et al. 2023 (arXiv:2310.16834) derive the losses and steps.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from headway import RequestError
from headway_apps.proteins.diffusion.draws import doubled, uniform
from headway_apps.proteins.diffusion.given import free_sites, insist, per_token, tokens_given


@dataclasses.dataclass(frozen=True)
class Graph(abc.ABC):
    size: int
    """Columns of the log scores."""
    ids: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)
    """What a free site may hold when it is clean; where none are given, every column but the mask."""
    columns: tuple[bool, ...] = dataclasses.field(init=False, repr=False, compare=False)
    """Which columns are `ids`: told by truth values, as the compiler takes numbers that differ for unknown ones."""

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids) or not all(0 <= i < self.size for i in self.ids):
            raise RequestError(f"got ids {self.ids}; takes different ids from 0 to {self.size - 1}")
        object.__setattr__(self, "columns", self._columns(self.ids))

    @property
    def states(self) -> int:
        """Columns of a row of probabilities: every symbol, and the mask even where it has no log score."""
        return self.size

    def holds(self, tokens: Tensor) -> Tensor:
        """Which tokens are among `ids`."""
        inside = (tokens >= 0) & (tokens < self.size)
        return inside & constant(self.columns, tokens.device)[tokens.clamp(0, self.size - 1)]

    def must_hold(self, tokens: Tensor, free: Tensor) -> None:
        insist(
            (self.holds(tokens) | ~free).all(),
            "got a token at a free site that is none of the graph's ids; takes those alone: padding, boundaries and"
            " masks are not free",
        )

    def perturb(
        self, tokens: Tensor, sigma_bar: Tensor, *, generator: torch.Generator, free: Tensor | None = None
    ) -> Tensor:
        """Clean tokens with noise: each free one has jumped with probability 1 - exp(-sigma_bar)."""
        free = free_sites(free, tokens_given(tokens))
        self.must_hold(tokens, free)
        probability = doubled(-torch.expm1(-per_token(sigma_bar, tokens)))
        jumped = (uniform(probability, generator) < probability).to(tokens.device)
        return torch.where(free & jumped, self.noise(tokens, generator, self.ids), tokens)

    def restrict(self, log_score: Tensor, allowed: tuple[int, ...], sigma_bar: Tensor) -> Tensor:
        """Log scores at this noise of which nothing but `allowed`, some of `ids`, can come."""
        return only(log_score, self._columns(allowed))

    def _columns(self, ids: tuple[int, ...]) -> tuple[bool, ...]:
        return tuple(column in ids for column in range(self.size))

    @abc.abstractmethod
    def noise(self, tokens: Tensor, generator: torch.Generator, allowed: tuple[int, ...]) -> Tensor:
        """Noise alone in the shape of `tokens`; where it has a choice, of `allowed`."""

    @abc.abstractmethod
    def reaches(self, noised: Tensor, clean: Tensor) -> Tensor:
        """Which noised tokens can have come of the clean ones."""

    @abc.abstractmethod
    def entropy(self, log_score: Tensor, sigma_bar: Tensor, noised: Tensor, clean: Tensor) -> Tensor:
        """Score entropy of each token, in nats per unit of noise; `sigma_bar` is one number a token.

        Never below 0, and 0 exactly at the true ratios. Times the schedule's rate it is the DWDSE loss.
        """

    @abc.abstractmethod
    def prior_term(self, sigma_bar: float) -> float:
        """Nats per site by which tokens noised by `sigma_bar` differ from the prior: a bound adds them to the loss."""

    @abc.abstractmethod
    def transition(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Probabilities (..., states) of where noise `sigma`, one number a token, leads from `tokens`."""

    @abc.abstractmethod
    def reverse_rate(self, tokens: Tensor, log_score: Tensor) -> Tensor:
        """Rates (..., states), per unit of noise, of going back to each state from another; 0 for the site's own."""

    @abc.abstractmethod
    def analytic(self, tokens: Tensor, log_score: Tensor, sigma: float) -> Tensor:
        """Weights (..., states) of each site's state after the last `sigma` of its noise is taken away (Tweedie)."""

    @abc.abstractmethod
    def denoise(self, tokens: Tensor, log_score: Tensor, sigma_bar: float) -> Tensor:
        """Weights (..., states) of each site's state after all of its noise, `sigma_bar`, is taken away."""

    def euler(self, tokens: Tensor, log_score: Tensor, sigma: float) -> Tensor:
        """Weights (..., states) after one step of Euler's method along `sigma` of noise."""
        return self._or_stays(tokens, self.reverse_rate(tokens, log_score) * sigma)

    def _or_stays(self, tokens: Tensor, jump: Tensor) -> Tensor:
        """Probabilities of jumps, with the rest to stay: none, where a step is so long that they pass 1."""
        return torch.where(is_state(tokens, self.states), (1 - jump.sum(-1, keepdim=True)).clamp_min(0), jump)


@dataclasses.dataclass(frozen=True)
class Absorbing(Graph):
    """Noise masks a token for good. The mask's column of log scores, where there is one, is never read.

    >>> Absorbing(33, mask=32).ids == tuple(range(32))
    True
    """

    mask: int = dataclasses.field(kw_only=True)
    """Its id: a column of the log scores, or the id after the last of them."""

    def __post_init__(self) -> None:
        if not 0 <= self.mask <= self.size or self.mask in self.ids:
            raise RequestError(f"got mask={self.mask}; takes an id from 0 to {self.size} that is not among ids")
        if not self.ids:
            object.__setattr__(self, "ids", tuple(i for i in range(self.size) if i != self.mask))
        super().__post_init__()

    @property
    def states(self) -> int:
        return max(self.size, self.mask + 1)

    def noise(self, tokens: Tensor, generator: torch.Generator, allowed: tuple[int, ...]) -> Tensor:
        return torch.full_like(tokens, self.mask)

    def reaches(self, noised: Tensor, clean: Tensor) -> Tensor:
        return (noised == clean) | (noised == self.mask)

    def restrict(self, log_score: Tensor, allowed: tuple[int, ...], sigma_bar: Tensor) -> Tensor:
        """What others had goes to `allowed` in proportion.

        All scores of a masked site sum to 1 / (exp(sigma_bar) - 1), whatever it holds, or sites would not be revealed
        as fast as noise hides them. A network need not know that: the cross-entropy leaves the sum open.
        """
        return self.log_clean(log_score, allowed) - log_expm1(sigma_bar).to(log_score.device)[..., None]

    def log_clean(self, log_score: Tensor, allowed: tuple[int, ...] | None = None) -> Tensor:
        """Log probabilities (..., size) of what a masked site holds: its log scores but for one constant."""
        return only(log_score, self.columns if allowed is None else self._columns(allowed)).log_softmax(-1)

    def entropy(self, log_score: Tensor, sigma_bar: Tensor, noised: Tensor, clean: Tensor) -> Tensor:
        # The true ratio is r = 1 / (exp(sigma_bar) - 1) for the clean id, and 0 for the others.
        masked = noised == self.mask
        log_r = -log_expm1(sigma_bar)  # infinite at 0, where nothing is masked: no number or gradient comes of that
        log_score = only(torch.where(masked[..., None], log_score, 0.0), self.columns)
        of_truth = log_score.gather(-1, clean[..., None]).squeeze(-1)
        return torch.where(masked, log_score.exp().sum(-1) - log_r.exp() * (1 + of_truth - log_r), 0.0)

    def prior_term(self, sigma_bar: float) -> float:
        """The prior is taken to mask a site as often as `sigma_bar` does, and else to draw it evenly from `ids`."""
        return math.exp(-sigma_bar) * math.log(len(self.ids))

    def transition(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        stays = torch.exp(-per_token(sigma, tokens))[..., None]
        to_mask = is_state(torch.full_like(tokens, self.mask), self.states)
        return stays * is_state(tokens, self.states) + (1 - stays) * to_mask

    def reverse_rate(self, tokens: Tensor, log_score: Tensor) -> Tensor:
        return torch.where((tokens == self.mask)[..., None], self._of_ids(log_score).exp(), 0.0)

    def analytic(self, tokens: Tensor, log_score: Tensor, sigma: float) -> Tensor:
        return self._or_stays(tokens, self.reverse_rate(tokens, log_score) * math.expm1(sigma))

    def denoise(self, tokens: Tensor, log_score: Tensor, sigma_bar: float) -> Tensor:
        revealed = self._of_ids(log_score).softmax(-1)
        return torch.where((tokens == self.mask)[..., None], revealed, is_state(tokens, self.states).to(revealed))

    def _of_ids(self, log_score: Tensor) -> Tensor:
        """A column a state: the log scores of `ids`, and -inf elsewhere."""
        return F.pad(only(log_score, self.columns), (0, self.states - self.size), value=-math.inf)


@dataclasses.dataclass(frozen=True)
class Uniform(Graph):
    """Noise puts any of `ids` in a token's place, that token among them."""

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(self.size)))
        super().__post_init__()

    def noise(self, tokens: Tensor, generator: torch.Generator, allowed: tuple[int, ...]) -> Tensor:
        numbers = uniform(tokens, generator)
        return constant(allowed, numbers.device)[(numbers * len(allowed)).long()].to(tokens.device)

    def reaches(self, noised: Tensor, clean: Tensor) -> Tensor:
        return self.holds(noised)

    def entropy(self, log_score: Tensor, sigma_bar: Tensor, noised: Tensor, clean: Tensor) -> Tensor:
        count = len(self.ids)
        # q(another id) / q(the true id); it goes to 0 with sigma_bar, its logarithm must stay finite
        log_rho = -torch.log1p(count * torch.exp(-log_expm1(sigma_bar.clamp_min(1e-20))))[..., None]
        stayed, true = (noised == clean)[..., None], is_state(clean, self.size)
        log_ratio = torch.where(stayed, log_rho, torch.where(true, -log_rho, 0.0))
        others = constant(self.columns, noised.device) & ~is_state(noised, self.size)
        log_score = torch.where(others, log_score, 0.0)
        ratio = log_ratio.exp()
        gaps = (log_score.exp() - ratio) - ratio * (log_score - log_ratio)
        return torch.where(others, gaps, 0.0).sum(-1) / count

    def prior_term(self, sigma_bar: float) -> float:
        """The prior draws a site evenly from `ids`."""
        count, kept = len(self.ids), math.exp(-sigma_bar)
        same = (1 + (count - 1) * kept) * math.log1p((count - 1) * kept)
        return (same + (count - 1) * (1 - kept) * math.log1p(-kept)) / count

    def transition(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        stays = torch.exp(-per_token(sigma, tokens))[..., None]
        evenly = constant(self.columns, tokens.device) / len(self.ids)
        return stays * is_state(tokens, self.size) + (1 - stays) * evenly

    def reverse_rate(self, tokens: Tensor, log_score: Tensor) -> Tensor:
        return self._score(tokens, log_score) * ~is_state(tokens, self.size) / len(self.ids)

    def analytic(self, tokens: Tensor, log_score: Tensor, sigma: float) -> Tensor:
        score, moved = self._score(tokens, log_score), -math.expm1(-sigma) / len(self.ids)
        before = (score - moved * score.sum(-1, keepdim=True)).clamp_min(0)  # scores that are wrong can go below 0
        return before * (math.exp(-sigma) * is_state(tokens, self.size) + moved)

    def denoise(self, tokens: Tensor, log_score: Tensor, sigma_bar: float) -> Tensor:
        return self.analytic(tokens, log_score, sigma_bar)

    def _score(self, tokens: Tensor, log_score: Tensor) -> Tensor:
        """Scores of `ids`, that of a site's own state being 1."""
        score = only(log_score, self.columns).exp()
        return torch.where(is_state(tokens, self.size), 1.0, score)


def only(log_score: Tensor, columns: tuple[bool, ...]) -> Tensor:
    """Log scores of these columns, and -inf in the others."""
    return log_score.masked_fill(~constant(columns, log_score.device), -math.inf)


def is_state(tokens: Tensor, states: int) -> Tensor:
    """One row (..., states) a token: True in its column."""
    return tokens[..., None] == torch.arange(states, device=tokens.device)


def log_expm1(x: Tensor) -> Tensor:
    """log(exp(x) - 1) for any x above 0, without overflow."""
    return x + torch.log(-torch.expm1(-x))


def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor of them, copied to a device once, as a copy waits for it."""
    return _constant(values, device) if is_compiling() else _constant_kept(values, device)


@torch.inference_mode(False)  # kept for calls that need gradients
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


_constant_kept = functools.lru_cache(maxsize=64)(_constant)
