"""How many residues new proteins have: drawn from a histogram, that of the training data or one that is asked for."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping

from headway import RequestError

LONGEST = 100_000
"""Residues: more than in any protein known, so what is above is a slip."""


def parse(text: str) -> dict[int, int]:
    """A histogram from words: one length, a range, or several of either.

    >>> parse("100"), parse("5-7"), parse("80,80,300")
    ({100: 1}, {5: 1, 6: 1, 7: 1}, {80: 2, 300: 1})
    """
    found: Counter[int] = Counter()
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", word.strip())
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most <= LONGEST:
            raise RequestError(
                f"got the length {word.strip()!r}, takes a number of residues from 1 to {LONGEST:,}, a range such as "
                "100-200, or several with commas between"
            )
        found.update(range(least, most + 1))
    return dict(found)


def draw(histogram: Mapping[int, int], count: int, seed: int) -> list[int]:
    """`count` lengths, each as likely as it is frequent; the same for the same seed, on any machine."""
    if count < 1:
        raise RequestError(f"got a count of {count}, takes 1 or more")
    lengths = sorted(histogram)
    weights = [histogram[each] for each in lengths]
    if not lengths or lengths[0] < 1 or min(weights) < 0 or not any(weights):
        raise RequestError(
            "got no lengths to draw from, takes a histogram of lengths of 1 or more; a model that knows none of its "
            "training data needs them given, such as 100-200"
        )
    return random.Random(seed).choices(lengths, weights, k=count)
