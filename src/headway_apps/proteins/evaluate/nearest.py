"""Novelty: how much of a protein stands in one training sequence.

The identity of a protein with a training sequence is 1 - edits / letters: the fewest letters that have to be put in,
taken out or changed to make all of the protein from any one stretch of that sequence, over the protein's letters. A
copy, and a copy of a piece, has 1. It is measured against the CANDIDATES training sequences that share most 5-mers with
the protein, and so can be too small where the nearest shares fewer than those do. Chance alone gives 0.25 to 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from headway_apps.proteins.data.clusters import Index, Ints, kmers

CANDIDATES = 8


def identities(
    proteins: Sequence[str], train: Sequence[str], progress: Callable[[int], None] = lambda _: None
) -> list[float]:
    """Of each protein, of one letter or more, with the nearest training sequence."""
    index = Index(train)
    found = []
    for at, protein in enumerate(proteins, 1):
        best = min(edits(protein, train[each]) for each in _candidates(index, protein))
        found.append(1 - best / len(protein))
        progress(at)
    return found


def _candidates(index: Index, protein: str) -> Ints:
    shared = index.shared(kmers(protein))
    return np.argsort(-shared, kind="stable")[:CANDIDATES]


def edits(protein: str, text: str) -> int:
    """The fewest edits that make the protein from any one stretch of the text, an empty one too.

    Myers 1999 (J. ACM 46, 395): a column of the table of distances as the bits where it rises and falls.

    >>> edits("MKTAY", "GGMKAYGG"), edits("MKTAY", "MKTAYIAK"), edits("MKT", "GGG")
    (1, 0, 3)
    """
    length = len(protein)
    every, last = (1 << length) - 1, 1 << (length - 1)
    places = {letter: sum(1 << at for at, each in enumerate(protein) if each == letter) for letter in set(protein)}
    rises, falls, score, best = every, 0, length, length
    for letter in text:
        same = places.get(letter, 0)
        diagonal = ((((same & rises) + rises) ^ rises) | same | falls) & every
        across_rises = falls | (~(diagonal | rises) & every)
        across_falls = rises & diagonal
        score += bool(across_rises & last) - bool(across_falls & last)
        best = min(best, score)
        across_rises = (across_rises << 1) & every  # a stretch may begin anywhere: the top row is all 0
        across_falls = (across_falls << 1) & every
        rises = across_falls | (~(diagonal | across_rises) & every)
        falls = across_rises & diagonal
    return best
