"""The rows that every table of statistics carries, so that a reader sees where the samples lie.

The held-out proteins are drawn into two halves. One is what all rows are compared with; of the other come the rows, but
for the training proteins: families that are held out differ from those, and so would the best model's samples.

    random              as many proteins, of the same lengths, each residue any of the twenty as likely
    training, shuffled  those of the row `training`, each with its residues in a random order: what a model is
                        worth that learned which residues there are, and nothing of their order
    training            as many of the training proteins, cut to the lengths of the samples
    real, shuffled      those of the row `real`, each with its residues in a random order
    real                as many proteins, where there are as many, cut to the lengths of the samples
    real, whole         all of the other half, as they are: also their lengths are nature's
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from headway import RequestError
from headway_apps.proteins.alphabet import STANDARD

NAMES = ("random", "training, shuffled", "training", "real, shuffled", "real", "real, whole")


@dataclasses.dataclass(frozen=True)
class References:
    compared_with: list[str]
    rows: dict[str, list[str]]


def references(held_out: Sequence[str], train: Sequence[str], lengths: Sequence[int], seed: int = 0) -> References:
    """For samples of these lengths; the same for the same seed."""
    if len(held_out) < 2:
        raise RequestError(f"got {len(held_out)} held-out proteins, takes 2 or more: one half is compared to the other")
    if not lengths or min(lengths) < 1:
        raise RequestError(f"got {len(lengths)} lengths, takes 1 or more, of samples of 1 residue or more")
    rng = np.random.default_rng(seed)
    drawn = [held_out[at] for at in rng.permutation(len(held_out))]
    half = len(drawn) // 2
    real = _cut(drawn[half:], [lengths[at] for at in rng.permutation(len(lengths))])
    letters = np.array(list(STANDARD))
    random = ["".join(rng.choice(letters, length)) for length in lengths]
    shuffled = _shuffled(real, rng)
    chosen = [train[at] for at in rng.permutation(len(train))[: len(drawn) - half]]
    training = _cut(chosen, [lengths[at] for at in rng.permutation(len(lengths))])
    rows = (random, _shuffled(training, rng), training, shuffled, real, drawn[half:])
    return References(drawn[:half], dict(zip(NAMES, rows, strict=True)))


def _shuffled(proteins: Sequence[str], rng: np.random.Generator) -> list[str]:
    return ["".join(rng.permutation(list(each))) for each in proteins]


def _cut(proteins: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """For each length the shortest protein left that has it, cut; where none has, the longest left, as it is."""
    left = sorted(proteins, key=lambda each: (len(each), each))
    found = []
    for length in lengths[: len(left)]:
        at = min(bisect_left(left, length, key=len), len(left) - 1)
        found.append(left.pop(at)[:length])
    return found
