"""What a token's noise costs, in nats, to average over times: of the whole sequence it bounds -log p from above.

Every function gives one loss a token, in the tokens' shape, and exactly 0 where a site is not free, whatever the model
says there. Sums are in float32 or better. With log scores log r + log p, where r = 1 / (exp(sigma_bar) - 1) and p are
probabilities, `dwdse` at a schedule's `rate` equals `cross_entropy` at its `reveal` (1 / t, log-linear) at every token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from headway import RequestError
from headway_apps.proteins.diffusion.given import free_sites, insist, like_tokens, per_token, scores_given, tokens_given
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph


def dwdse(
    graph: Graph,
    log_score: Tensor,
    noised: Tensor,
    clean: Tensor,
    free: Tensor | None = None,
    *,
    sigma_bar: Tensor,
    rate: Tensor,
) -> Tensor:
    """Diffusion-weighted denoising score entropy: the schedule's `rate` at the time, times `graph.entropy`.

    `sigma_bar` and `rate` are one number a token or one a sequence, those that the tokens were noised at.
    """
    given = _Given.of(graph, log_score, noised, clean, free)
    entropy = graph.entropy(given.log_score, per_token(sigma_bar, clean), given.noised, given.clean)
    return torch.where(given.free, per_token(rate, clean, "rate") * entropy, 0.0)


def cross_entropy(
    graph: Graph, log_score: Tensor, noised: Tensor, clean: Tensor, free: Tensor | None = None, *, weight: Tensor
) -> Tensor:
    """-log p of what is masked, times `weight`: one number a token or one a sequence, such as `schedule.reveal(t)`.

    Only differences between log scores matter, so it trains a network that is told no time. Absorbing graphs alone.
    """
    if not isinstance(graph, Absorbing):
        raise RequestError(f"got {type(graph).__name__}; takes Absorbing, which masks: use dwdse")
    given = _Given.of(graph, log_score, noised, clean, free)
    masked = given.free & (given.noised == graph.mask)
    log_clean = graph.log_clean(torch.where(masked[..., None], given.log_score, 0.0))
    nats = -log_clean.gather(-1, given.clean[..., None]).squeeze(-1)
    return torch.where(masked, per_token(weight, clean, "weight") * nats, 0.0)


def per_residue(loss: Tensor, free: Tensor | None = None) -> Tensor:
    """Nats per residue: the sum over all tokens, over the number of free ones."""
    return loss.sum() / free_sites(free, loss).sum()


@dataclasses.dataclass(frozen=True, eq=False)
class _Given:
    """The arguments of a loss, checked. Sites that are not free hold an id, and scores that pass no gradient on."""

    log_score: Tensor
    noised: Tensor
    clean: Tensor
    free: Tensor

    @classmethod
    def of(cls, graph: Graph, log_score: Tensor, noised: Tensor, clean: Tensor, free: Tensor | None) -> _Given:
        tokens_given(clean, "clean")
        like_tokens(tokens_given(noised, "noised"), clean, "noised")
        log_score, free = scores_given(log_score, clean, graph.size), free_sites(free, clean)
        graph.must_hold(clean, free)
        insist(
            (graph.reaches(noised, clean) | ~free).all(),
            "got noised tokens that the graph cannot have made of the clean ones; takes what its perturb gave",
        )
        noised, clean = (torch.where(free, tokens, graph.ids[0]) for tokens in (noised, clean))
        return cls(torch.where(free[..., None], log_score, 0.0), noised, clean, free)
