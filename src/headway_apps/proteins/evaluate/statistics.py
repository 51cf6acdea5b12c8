"""What can be said of a set of proteins without knowing what they fold to; all in numpy, by stated rules.

kmer distance     Jensen-Shannon distance of k-mer frequencies to those of a reference set: the square root of the
                  divergence in bits, so 0 for the same and 1 for no k-mer in common. A small set is far from any
                  for want of residues alone, the more so the larger k: so every table carries real proteins
length distance   Wasserstein-1 of the lengths: residues that a length has to be moved, in the mean
duplicates        share of proteins that stand in the set before
longest run       of one residue: of each protein its longest, in the mean, and the longest of all
low complexity    share of residues inside some window of 12 whose entropy is 2.2 bits or less, as SEG begins
groups            share of all residues: hydrophobic AILMFPWV, polar NQSTC, positive RHK, negative DE, aromatic FWY
identity          with the nearest training sequence, as nearest.py defines it; novelty is 1 less it
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from headway import RequestError
from headway_apps.proteins.alphabet import AMBIGUOUS, STANDARD

KMERS = (1, 2, 3)
WINDOW, LOW_ENTROPY = 12, 2.2
COPY = 0.9
"""Identity from which a protein counts as a copy of a training sequence."""
GROUPS = {
    "hydrophobic": "AILMFPWV", "polar": "NQSTC", "positive": "RHK", "negative": "DE", "aromatic": "FWY",
}  # fmt: skip

_OTHER = len(STANDARD)
_DIGIT = np.full(256, _OTHER, dtype=np.int64)
_DIGIT[np.frombuffer(STANDARD.encode(), dtype=np.uint8)] = np.arange(_OTHER)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Nearness:
    """Of proteins to the training sequences: the identity of each with its nearest."""

    median: float
    greatest: float
    copies: float
    """Share of proteins with an identity of COPY or more."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one set of proteins. None stands for what was not measured."""

    name: str
    count: int
    residues: int
    valid: float
    """Share of proteins that have a letter, and nothing but letters of proteins. No mask or padding is hidden here: to
    decode ids with one inside raises."""
    kmer_distance: dict[int, float]
    length_distance: float
    length_mean: float
    length_std: float
    length_min: int
    length_max: int
    duplicates: float
    longest_run: int
    mean_longest_run: float
    low_complexity: float
    distinct_residues: float
    """How many of the twenty a protein has, in the mean."""
    groups: dict[str, float]
    frequencies: dict[str, float]
    nearness: Nearness | None = None


def statistics(
    name: str,
    proteins: Sequence[str],
    reference: Sequence[str],
    *,
    identities: Sequence[float] | None = None,
) -> Statistics:
    """Of proteins against a reference set. What is no residue counts in lengths, and in nothing else."""
    if not proteins or not reference:
        raise RequestError(f"got {len(proteins)} proteins and a reference of {len(reference)}, takes 1 or more of each")
    lengths = np.array([len(each) for each in proteins])
    text, owner = _flat(proteins)
    counts = kmer_counts(proteins, 1)
    if not counts.sum():
        raise RequestError(f"got {name} without any of the residues {STANDARD}, takes proteins")
    frequencies = counts / counts.sum()
    runs = _longest_runs(text, owner, len(proteins))
    has = np.zeros((len(proteins), _OTHER + 1), dtype=np.bool_)
    has[owner, text] = True
    return Statistics(
        name=name,
        count=len(proteins),
        residues=int(lengths.sum()),
        valid=float(np.mean([is_valid(each) for each in proteins])),
        kmer_distance={k: distance(kmer_counts(proteins, k), kmer_counts(reference, k)) for k in KMERS},
        length_distance=length_distance(lengths, np.array([len(each) for each in reference])),
        length_mean=float(lengths.mean()),
        length_std=float(lengths.std()),
        length_min=int(lengths.min()),
        length_max=int(lengths.max()),
        duplicates=1 - len(set(proteins)) / len(proteins),
        longest_run=int(runs.max()),
        mean_longest_run=float(runs.mean()),
        low_complexity=_low_complexity(text, owner),
        distinct_residues=float(has[:, :_OTHER].sum(axis=1).mean()),
        groups={group: sum(float(frequencies[_DIGIT[ord(x)]]) for x in of) for group, of in GROUPS.items()},
        frequencies=dict(zip(STANDARD, frequencies.tolist(), strict=True)),
        nearness=None if identities is None else _nearness(identities),
    )


def measured(rows: Sequence[Statistics]) -> list[tuple[str, list[str]]]:
    """A table of sets side by side, in words: each measure, and what it is for each set."""
    measures: list[tuple[str, Callable[[Statistics], str]]] = [
        ("proteins", lambda row: f"{row.count:,}"),
        ("residues", lambda row: f"{row.residues:,}"),
        ("valid", lambda row: f"{row.valid:.1%}"),
        *((f"{k}-mer distance", lambda row, k=k: f"{row.kmer_distance[k]:.3f}") for k in KMERS),
        ("length distance", lambda row: f"{row.length_distance:.1f}"),
        ("length", lambda row: f"{row.length_mean:.0f} ± {row.length_std:.0f}"),
        ("shortest, longest", lambda row: f"{row.length_min}, {row.length_max}"),
        ("duplicates", lambda row: f"{row.duplicates:.1%}"),
        ("longest run", lambda row: f"{row.longest_run}"),
        ("longest run, mean", lambda row: f"{row.mean_longest_run:.1f}"),
        ("low complexity", lambda row: f"{row.low_complexity:.1%}"),
        ("distinct residues", lambda row: f"{row.distinct_residues:.1f}"),
        *((group, lambda row, group=group: f"{row.groups[group]:.1%}") for group in GROUPS),
        ("identity, median", lambda row: _of_nearness(row, lambda near: f"{near.median:.2f}")),
        ("identity, greatest", lambda row: _of_nearness(row, lambda near: f"{near.greatest:.2f}")),
        ("copies", lambda row: _of_nearness(row, lambda near: f"{near.copies:.1%}")),
    ]
    return [(name, [tell(row) for row in rows]) for name, tell in measures]


def _of_nearness(row: Statistics, tell: Callable[[Nearness], str]) -> str:
    return "not measured" if row.nearness is None else tell(row.nearness)


def is_valid(protein: str) -> bool:
    """Whether there are letters of a protein and nothing else; ambiguous ones are letters."""
    return bool(protein) and set(protein) <= set(STANDARD + AMBIGUOUS)


def _nearness(identities: Sequence[float]) -> Nearness:
    found = np.array(identities)
    return Nearness(float(np.median(found)), float(found.max()), float((found >= COPY).mean()))


def kmer_counts(proteins: Sequence[str], k: int) -> Floats:
    """Of all k-mers of residues, 20 ** k; those with any other letter are left out."""
    text, owner = _flat(proteins)
    if len(text) < k:
        return np.zeros(_OTHER**k)
    windows = np.lib.stride_tricks.sliding_window_view(text, k)
    whole = (windows < _OTHER).all(axis=1) & (owner[: len(windows)] == owner[k - 1 :])
    codes = windows[whole] @ (_OTHER ** np.arange(k))
    return np.bincount(codes, minlength=_OTHER**k).astype(np.float64)


def distance(one: Floats, other: Floats) -> float:
    """Jensen-Shannon distance of two counts; 1 from anything to no counts at all.

    >>> distance(np.array([1.0, 1.0]), np.array([2.0, 2.0])), distance(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    (0.0, 1.0)
    """
    if not one.sum() or not other.sum():
        return 1.0
    p, q = one / one.sum(), other / other.sum()
    middle = (p + q) / 2
    divergence = sum(float((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum()) for x in (p, q)) / 2
    return math.sqrt(min(max(divergence, 0.0), 1.0))  # rounding can pass either end


def length_distance(one: Ints, other: Ints) -> float:
    """Wasserstein-1: the area between the two cumulative distributions.

    >>> length_distance(np.array([10, 20]), np.array([13, 23, 13, 23]))
    3.0
    """
    places = np.unique(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(each), places[:-1], side="right") / len(each) for each in (one, other)]
    return float((np.abs(below[0] - below[1]) * np.diff(places)).sum())


def _flat(proteins: Sequence[str]) -> tuple[Ints, Ints]:
    """All letters as digits, and the protein of each."""
    text = _DIGIT[np.frombuffer("".join(proteins).encode("latin-1", "replace"), dtype=np.uint8)]
    return text, np.repeat(np.arange(len(proteins)), [len(each) for each in proteins])


def _longest_runs(text: Ints, owner: Ints, count: int) -> Ints:
    starts = np.flatnonzero(np.diff(text, prepend=-1) | np.diff(owner, prepend=-1))
    runs = np.diff(starts, append=len(text))
    longest = np.zeros(count, dtype=np.int64)
    real = text[starts] < _OTHER
    np.maximum.at(longest, owner[starts][real], runs[real])
    return longest


def _low_complexity(text: Ints, owner: Ints) -> float:
    if len(text) < WINDOW:
        return 0.0
    seen = np.cumsum(text[:, None] == np.arange(_OTHER + 1), axis=0, dtype=np.int32)
    inside = seen[WINDOW - 1 :] - np.concatenate([np.zeros_like(seen[:1]), seen[:-WINDOW]])
    part = np.arange(WINDOW + 1) / WINDOW
    entropy = (-part * np.log2(np.maximum(part, 1e-300)))[inside].sum(axis=1)
    low = (entropy <= LOW_ENTROPY) & (owner[: len(entropy)] == owner[WINDOW - 1 :])
    covered = np.convolve(low, np.ones(WINDOW, dtype=np.int64)) > 0
    return float(covered.mean())
