"""Made proteins for tests: residues as frequent as in nature, and families of one parent's mutants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headway_apps.proteins.alphabet import STANDARD
from headway_apps.proteins.data.fasta import Record, Rules
from headway_apps.proteins.data.shards import Prepared, Writer, appearing, write_manifest

LETTERS = np.array(list(STANDARD))
# Percent in UniProt, in the order of STANDARD.
FREQUENCY = np.array(
    [8.3, 1.4, 5.5, 6.7, 3.9, 7.1, 2.3, 5.9, 5.8, 9.7, 2.4, 4.1, 4.7, 3.9, 5.5, 6.6, 5.3, 6.9, 1.1, 2.9]
)
ANY_LENGTH = Rules(shortest=1, longest=10_000)


def protein(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(LETTERS, length, p=FREQUENCY / FREQUENCY.sum()))


def mutant(rng: np.random.Generator, parent: str, changed: float) -> str:
    letters = np.array(list(parent))
    at = rng.random(len(letters)) < changed
    letters[at] = rng.choice(LETTERS, at.sum())
    return "".join(letters)


def families(rng: np.random.Generator, count: int, members: int, length: int = 120, changed: float = 0.1) -> list[str]:
    """A parent and its mutants, family after family."""
    parents = [protein(rng, length) for _ in range(count)]
    return [each if at == 0 else mutant(rng, each, changed) for each in parents for at in range(members)]


def records(sequences: Sequence[str]) -> list[Record]:
    return [Record(f"sp|P{at:05d}|MADE_{at}", each, "Made protein OS=Nobody") for at, each in enumerate(sequences)]


def prepared(
    folder: Path, sequences: Sequence[str], *, provenance: dict[str, Any] | None = None, **others: Sequence[str]
) -> Prepared:
    """A folder with these in its part `train`, in this order, and others in theirs."""
    with appearing(folder) as partial:
        parts = {}
        for name, held in {"train": sequences, **others}.items():
            writer = Writer(partial, name)
            for each in records(held):
                writer.add(each)
            parts[name] = writer.finish()
        write_manifest(partial, parts, provenance or {})
    return Prepared(folder)
