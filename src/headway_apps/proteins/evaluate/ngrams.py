"""What a model has to beat: residues predicted from the few before them, by counts of the training sequences.

An n-gram mixes what was counted after the n - 1 letters before a residue with what the (n - 1)-gram says; below the
1-gram stands the uniform distribution. How much the counts weigh depends on how often those letters were seen, by
powers of two. These weights come from a slice of the training sequences and the counts of the others (Jelinek-Mercer,
by EM); then all training sequences are counted. Nothing is fitted to what is scored.

A sequence begins after START, a letter like others: so an n-gram knows which residue is the first, as a model does that
reads the token before it. The end is not predicted, as no model's bound counts it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from headway import RequestError
from headway_apps.proteins.alphabet import AMBIGUOUS, STANDARD
from headway_apps.proteins.data.packing import shuffled
from headway_apps.proteins.data.shards import Part
from headway_apps.proteins.errors import DataError

ORDERS = (1, 2, 3, 4)
SLICE = 0.1
"""The share of the training sequences that the weights are fitted to."""
MOST_SLICED = 2_000_000
"""Residues of the slice: weights need no more."""
AT_ONCE = 1_000_000
"""Residues that are counted together."""
ROUNDS = 100
"""Of EM."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Baseline:
    name: str
    nats_per_residue: float
    perplexity: float


def baselines(
    train: Part, held_out: Part, *, scored: Ints | None = None, orders: Sequence[int] = ORDERS, seed: int = 0
) -> list[Baseline]:
    """The uniform distribution and each n-gram of `orders`, from the counts of one part, on another: on the sequences
    `scored` of it, or all."""
    if not orders or list(orders) != sorted(set(orders)) or orders[0] < 1:
        raise RequestError(f"got orders {tuple(orders)}, takes rising whole numbers from 1")
    letters = STANDARD + "".join(each for each in AMBIGUOUS if each in train.letters or each in held_out.letters)
    fitted = NGrams.fit(train, letters, orders[-1], seed)
    costs = np.zeros(orders[-1] + 1)
    scored = np.arange(len(held_out)) if scored is None else scored
    for text in _chunks(held_out, scored, letters, orders[-1]):
        costs -= np.log(fitted.probabilities(text)).sum(axis=1)
    costs /= held_out.lengths()[scored].sum()
    names = {0: f"uniform over {len(letters)}", **{n: f"{n}-gram" for n in orders}}
    return [Baseline(name, float(costs[n]), math.exp(costs[n])) for n, name in names.items()]


@dataclasses.dataclass(frozen=True, eq=False)
class NGrams:
    """Counts of all orders, from 1 up, and for each how much they weigh by how often their context was seen."""

    symbols: int
    counts: list[Floats]
    """For each order, (symbols + 1, ..., symbols), flat: the last letter is never START."""
    weights: list[Floats]

    @classmethod
    def fit(cls, train: Part, letters: str, order: int, seed: int = 0) -> NGrams:
        drawn = shuffled(len(train), seed, 0)
        lengths = train.lengths()[drawn]
        few = np.cumsum(lengths) <= min(MOST_SLICED, SLICE * train.residues)
        few[0] = True
        if few.all():
            raise DataError(f"got {len(train)} training sequence, takes 2 or more: weights are fitted to some of them")
        aside = _counted(train, np.sort(drawn[few]), letters, order)
        others = _counted(train, np.sort(drawn[~few]), letters, order)
        found = cls(len(letters), others, [])
        for _ in range(order):
            found.weights.append(np.zeros(64))
            found.weights[-1] = _fitted(found, _chunks(train, np.sort(drawn[few]), letters, order))
        return cls(len(letters), [one + other for one, other in zip(aside, others, strict=True)], found.weights)

    def probabilities(self, text: _Text) -> Floats:
        """Of each residue, by the uniform distribution and by each order that has weights: (orders + 1, residues)."""
        found = [np.full(len(text.residues), 1 / self.symbols)]
        for counts, weights, context in zip(self.counts, self.weights, text.contexts, strict=False):
            said, bucket = self._said(counts, context, text.residues)
            found.append(weights[bucket] * said + (1 - weights[bucket]) * found[-1])
        return np.stack(found)

    def _said(self, counts: Floats, context: Ints, residues: Ints) -> tuple[Floats, Ints]:
        """What the counts say of each residue, and which weight they have there."""
        seen = counts.reshape(-1, self.symbols).sum(axis=1)[context]
        said = counts[context * self.symbols + residues] / np.maximum(seen, 1)
        return said, np.frexp(seen)[1].astype(np.int64)  # 0 for none seen, 1 for 1, 2 for 2 and 3, 3 for 4 to 7


@dataclasses.dataclass(frozen=True, eq=False)
class _Text:
    """Residues of some sequences as digits, and for each order the letters before each residue, as one number."""

    residues: Ints
    contexts: list[Ints]


def _chunks(part: Part, chosen: Ints, letters: str, order: int) -> Iterator[_Text]:
    part_of = np.cumsum(part.lengths()[chosen]) // AT_ONCE
    for number in np.unique(part_of):
        yield _text([part.letters_of(int(at)) for at in chosen[part_of == number]], letters, order)


def _text(sequences: Sequence[NDArray[np.uint8]], letters: str, order: int) -> _Text:
    start = len(letters)
    digit = np.full(256, -1, dtype=np.int64)
    digit[np.frombuffer(letters.encode(), dtype=np.uint8)] = np.arange(start)
    begin = np.full(order - 1, start)
    flat = np.concatenate([each for one in sequences for each in (begin, digit[one])])
    if flat.min(initial=0) < 0:
        raise DataError(f"got a letter that is no residue, takes {letters}; prepare the data again")
    real = np.flatnonzero(flat < start)
    context, contexts = np.zeros(len(real), dtype=np.int64), []
    for n in range(order):
        contexts.append(context)
        if n + 1 < order:
            context = context + flat[real - n - 1] * (start + 1) ** n
    return _Text(flat[real], contexts)


def _counted(part: Part, chosen: Ints, letters: str, order: int) -> list[Floats]:
    size = len(letters)
    found = [np.zeros((size + 1) ** n * size) for n in range(order)]
    for text in _chunks(part, chosen, letters, order):
        for counts, context in zip(found, text.contexts, strict=True):
            counts += np.bincount(context * size + text.residues, minlength=len(counts))
    return found


def _fitted(grams: NGrams, slices: Iterator[_Text]) -> Floats:
    """Weights of the highest order that has any, those of the lower ones held."""
    order = len(grams.weights)
    parts = []
    for text in slices:
        below = grams.probabilities(text)[order - 1]
        parts.append((*grams._said(grams.counts[order - 1], text.contexts[order - 1], text.residues), below))
    said, bucket, below = (np.concatenate(each) for each in zip(*parts, strict=True))
    weights = np.full(64, 0.5)
    weights[0] = 0.0  # of what was never seen nothing is counted
    members = np.bincount(bucket, minlength=64)
    for _ in range(ROUNDS):
        ours = weights[bucket] * said
        share = np.bincount(bucket, ours / (ours + (1 - weights[bucket]) * below), minlength=64)
        weights = share / np.maximum(members, 1)
    nearest = np.maximum.accumulate(np.where(members > 0, np.arange(64), 0))  # of fewer, where the slice had none
    found: Floats = np.minimum(weights[nearest], 1 - 1e-6)  # a residue that never came after these stays possible
    return found
