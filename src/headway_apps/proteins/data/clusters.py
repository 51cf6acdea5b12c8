"""Families of like sequences, so that a split keeps each on one side; and a measure of what leaks across all the same.

Two sequences are like when they share enough of their 5-mers. Where a part p of two proteins' residues is the same,
they share some p⁵ of them: 3 % at one half, 10 % at 63 %. By chance alone the nearest of 12,794 proteins has 3 % of a
shuffled one's, so a bound much below 10 % links what is not related, and chains of links make one cluster of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from headway import RequestError
from headway_apps.proteins.alphabet import STANDARD

K = 5
_CODES = len(STANDARD) ** K
_DIGIT = np.full(256, -1, dtype=np.int64)
_DIGIT[np.frombuffer(STANDARD.encode(), dtype=np.uint8)] = np.arange(len(STANDARD))

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Likeness:
    """Like sequences share this part of the 5-mers of the one that has fewer, and so many at least."""

    part: float = 0.1
    at_least: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1 or self.at_least < 1:
            raise RequestError(f"got {self}, takes a part in (0, 1] and at_least of 1 or more")


def kmers(sequence: str) -> Ints:
    """The distinct 5-mers as numbers, in order; those with an ambiguous letter are left out."""
    digits = _DIGIT[np.frombuffer(sequence.encode("latin-1"), dtype=np.uint8)]
    if len(digits) < K:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(digits, K)
    whole = windows[(windows >= 0).all(axis=1)]
    return np.unique(whole @ (len(STANDARD) ** np.arange(K)))


class Index:
    """For each 5-mer, which sequences have it. Holds 16 bytes or so a residue."""

    def __init__(self, sequences: Sequence[str]) -> None:
        found = [kmers(each) for each in sequences]
        self.counts = np.array([len(each) for each in found], dtype=np.int64)
        self.codes = np.concatenate([np.empty(0, dtype=np.int64), *found])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        owners = np.repeat(np.arange(len(found), dtype=np.int32), self.counts)
        self.posted = owners[np.argsort(self.codes, kind="stable")]
        self.first = np.concatenate([[0], np.cumsum(np.bincount(self.codes, minlength=_CODES))])

    def __getitem__(self, at: int) -> Ints:
        """The 5-mers of one sequence."""
        return self.codes[self.starts[at] : self.starts[at + 1]]

    def shared(self, codes: Ints) -> Ints:
        """How many of these 5-mers each sequence has."""
        sizes = self.first[codes + 1] - self.first[codes]
        before = np.cumsum(sizes) - sizes
        places = np.arange(sizes.sum()) + np.repeat(self.first[codes] - before, sizes)
        return np.bincount(self.posted[places], minlength=len(self.counts))


def cluster(sequences: Sequence[str], likeness: Likeness, progress: Callable[[int], None] = lambda _: None) -> Ints:
    """For each sequence, the number of its cluster: that of the cluster's first sequence.

    Single linkage over all pairs, so that no two sequences of different clusters are like.
    """
    index = Index(sequences)
    parent = np.arange(len(sequences))
    for at in range(len(sequences)):
        for other in _like(index, index[at], likeness):
            one, two = _root(parent, at), _root(parent, int(other))
            parent[max(one, two)] = min(one, two)
        progress(at + 1)
    return np.array([_root(parent, at) for at in range(len(sequences))], dtype=np.int64)


def _like(index: Index, codes: Ints, likeness: Likeness) -> Ints:
    shared = index.shared(codes)
    fewer = np.minimum(index.counts, len(codes))
    return np.flatnonzero((shared >= likeness.at_least) & (shared >= likeness.part * fewer))


def _root(parent: Ints, at: int) -> int:
    while parent[at] != at:
        parent[at] = parent[parent[at]]
        at = int(parent[at])
    return at


def digest(text: str, seed: int) -> int:
    """A number from 0 to 2⁶⁴ that is the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")


def split(
    clusters: Sequence[int] | Ints, sequences: Sequence[str], shares: Mapping[str, float], seed: int
) -> list[str]:
    """For each sequence the part it goes to: `train`, or one of `shares`, each of which gets that share of residues.

    Whole clusters are drawn, in an order that depends on the seed and on the sequences, and not on their order. One
    that would make a part larger than asked goes elsewhere, so a part can be a little smaller.
    """
    check(shares)
    residues: dict[int, int] = {}
    keys: dict[int, int] = {}
    for each, sequence in zip(map(int, clusters), sequences, strict=True):
        residues[each] = residues.get(each, 0) + len(sequence)
        keys[each] = min(keys.get(each, 1 << 64), digest(sequence, seed))
    room = {name: share * sum(residues.values()) for name, share in shares.items()}
    part: dict[int, str] = {}
    for each in sorted(keys, key=lambda each: keys[each]):
        part[each] = next((name for name, left in room.items() if residues[each] <= left), "train")
        if part[each] in room:
            room[part[each]] -= residues[each]
    return [part[int(each)] for each in clusters]


def split_by_family(family: str, shares: Mapping[str, float], seed: int) -> str:
    """The part of a sequence whose family is known, from the family's name alone: for more than memory holds."""
    check(shares)
    drawn = digest(family, seed) / 2**64
    for name, share in shares.items():
        if drawn < share:
            return name
        drawn -= share
    return "train"


def check(shares: Mapping[str, float]) -> None:
    """Raise where no split can be made so."""
    if "train" in shares or not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        given = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise RequestError(
            f"got {given}, takes shares above 0, of less than 1 in all, for parts other than train, which gets the rest"
        )


@dataclass(frozen=True)
class Leakage:
    """How near the held-out sequences are to those trained on: the greatest share of 5-mers with any of them."""

    measured: int
    like: int
    median: float
    most: float

    def __str__(self) -> str:
        return (
            f"{self.like:,} of {self.measured:,} held-out sequences are like one of train; 5-mers shared with the "
            f"nearest: median {self.median:.1%}, most {self.most:.1%}"
        )


def leakage(train: Sequence[str], held_out: Sequence[str], likeness: Likeness) -> Leakage:
    """Of a split, however it was made."""
    index = Index(train)
    found = [_nearest(index, kmers(each), likeness) for each in held_out]
    parts = np.array([part for part, _ in found])
    return Leakage(
        measured=len(found),
        like=sum(like for _, like in found),
        median=float(np.median(parts)) if found else 0.0,
        most=float(parts.max()) if found else 0.0,
    )


def _nearest(index: Index, codes: Ints, likeness: Likeness) -> tuple[float, bool]:
    parts: Floats = index.shared(codes) / np.maximum(1, np.minimum(index.counts, len(codes)))
    return float(parts.max(initial=0.0)), len(_like(index, codes, likeness)) > 0
