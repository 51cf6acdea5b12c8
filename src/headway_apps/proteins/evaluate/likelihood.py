"""Nats per residue of a part: whole sequences, under noise that depends on a seed and a sequence's place alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from headway import RequestError
from headway_apps.proteins.data.packing import BOUNDARIES, Batch, Ints, pack, shuffled
from headway_apps.proteins.data.prepare import Progress
from headway_apps.proteins.data.shards import Part
from headway_apps.proteins.diffusion.bound import Bound, masked_bound, noise_bound
from headway_apps.proteins.diffusion.graphs import Absorbing
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.model.evaluated import evaluated
from headway_apps.proteins.trained import Trained


def likelihood(
    trained: Trained,
    part: Part,
    *,
    tokens: int,
    draws: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
    sequences: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Progress = lambda *_: None,
) -> Bound:
    """What each sequence of the part costs, in the part's order: all of them, or `sequences` drawn by the seed.

    The number is the same twice; batches of another size (`tokens`) move it by rounding alone. The model runs on
    `device` (where None, where it is) in eval mode, and afterwards is as it was. No random state moves.

    Of several processes each takes its `share`, (its rank, their number); the bounds of all, merged, are the bound.
    """
    part.fits(trained.alphabet)
    scored = chosen(part, seed, sequences)[share[0] :: share[1]]
    if not len(scored):
        raise RequestError(f"got share {share} of fewer sequences than that, takes one that has a sequence")
    lengths = part.lengths()[scored] + BOUNDARIES
    if (longest := int(lengths.max())) > tokens:
        raise RequestError(
            f"got batches of {tokens} tokens, takes at least {longest}, the longest sequence of {part.name} with its "
            f"{BOUNDARIES} boundary tokens; give larger ones"
        )
    found: list[Bound] = []
    order = scored[np.argsort(lengths, kind="stable")]  # like lengths together: rows waste least where nothing packs
    with evaluated(trained.model, device) as model:
        for batch in _batches(part, order, tokens, trained):
            found.append(_bound(trained, batch.to(model.device), batch, draws, seed))
            progress("sequences scored", sum(len(each.nats) for each in found), len(order))
    return _in_order(Bound.merged(found), order)


def chosen(part: Part, seed: int, sequences: int | None) -> Ints:
    """Which sequences are scored: so many, the same for the same seed, or all."""
    if not len(part):
        raise DataError(f"got no sequences in {part.name}, takes at least one")
    if sequences is not None and sequences < 1:
        raise RequestError(f"got {sequences} sequences, takes 1 or more, or None for all")
    return np.sort(shuffled(len(part), seed, 0)[:sequences])


def _batches(part: Part, order: Ints, tokens: int, trained: Trained) -> Iterator[Batch]:
    lengths = part.lengths()[order] + BOUNDARIES
    first = 0
    while first < len(order):
        count = int(np.searchsorted(np.cumsum(lengths[first:]), tokens, side="right"))
        places = order[first : first + count]
        yield pack([part.letters_of(int(at)) for at in places], places, trained.alphabet)
        first += count


def _bound(trained: Trained, batch: Batch, host: Batch, draws: int, seed: int) -> Bound:
    asked = (trained.schedule, batch.tokens, host.lengths)
    if isinstance(trained.graph, Absorbing):
        return masked_bound(
            trained.model, trained.graph, *asked, index=host.index, seed=seed, free=batch.free, draws=draws
        )
    return noise_bound(trained.model, trained.graph, *asked, index=host.index, seed=seed, free=batch.free, draws=draws)


def _in_order(bound: Bound, order: Ints) -> Bound:
    if bad := [int(at) for at, nats in zip(order, bound.nats, strict=True) if not math.isfinite(nats)]:
        raise DataError(
            f"got a bound that is no number for {len(bad)} of {len(order)} sequences, the first at {min(bad)}: the "
            "model's scores are infinite or NaN; look at its weights, or take an earlier checkpoint"
        )
    places = np.argsort(order)
    return Bound(tuple(bound.nats[at] for at in places), tuple(bound.residues[at] for at in places), bound.prior)
