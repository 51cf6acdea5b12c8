"""Numbers of sets that can be worked out by hand, and the rows beside them."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from proteins.families import mutant, protein

from headway import RequestError
from headway_apps.proteins.alphabet import STANDARD
from headway_apps.proteins.evaluate.nearest import edits, identities
from headway_apps.proteins.evaluate.references import NAMES, references
from headway_apps.proteins.evaluate.statistics import kmer_counts, statistics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_of_a_set_made_by_hand() -> None:
    found = statistics("it", ["AAAW", "DDKK", "AAAW"], ["AAAW", "DDKK", "AAAWGG"], identities=[1.0, 0.5, 0.9])
    assert (found.count, found.residues, found.valid) == (3, 12, 1.0)
    assert (found.length_mean, found.length_std, found.length_min, found.length_max) == (4, 0, 4, 4)
    assert found.length_distance == pytest.approx(2 / 3)
    assert found.duplicates == pytest.approx(1 / 3)
    assert (found.longest_run, found.mean_longest_run) == (3, pytest.approx(8 / 3))
    assert found.distinct_residues == 2
    parts = {"hydrophobic": 8, "polar": 0, "positive": 2, "negative": 2, "aromatic": 2}
    assert found.groups == pytest.approx({group: number / 12 for group, number in parts.items()})
    assert found.frequencies == pytest.approx({x: {"A": 6, "W": 2, "D": 2, "K": 2}.get(x, 0) / 12 for x in STANDARD})
    assert found.nearness is not None
    assert (found.nearness.median, found.nearness.greatest) == (0.9, 1.0)
    assert found.nearness.copies == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_kmers_never_reach_from_one_protein_into_the_next_or_over_what_is_no_residue(
    k: int, rng: np.random.Generator
) -> None:
    proteins = ["AC", "", "D", protein(rng, 50), "ACXAC" * 3, protein(rng, 7)]
    by_hand = Counter(each[i : i + k] for each in proteins for i in range(len(each) - k + 1))
    by_hand = Counter({kmer: n for kmer, n in by_hand.items() if "X" not in kmer})
    counts = kmer_counts(proteins, k)
    assert counts.sum() == by_hand.total()
    for kmer, number in by_hand.items():
        assert counts[sum(STANDARD.index(letter) * 20**at for at, letter in enumerate(kmer))] == number


def test_distance_is_the_root_of_the_divergence_in_bits() -> None:
    found = statistics("it", ["AAAC"], ["AACC"])
    p, q, m = (0.75, 0.25), (0.5, 0.5), (0.625, 0.375)
    bits = sum(a * math.log2(a / c) / 2 for x in (p, q) for a, c in zip(x, m, strict=True))
    assert found.kmer_distance[1] == pytest.approx(math.sqrt(bits))


def test_low_complexity_is_a_window_of_few_letters(rng: np.random.Generator) -> None:
    every = STANDARD * 2
    assert statistics("it", [every], [every]).low_complexity == 0
    assert statistics("it", [every + "Q" * 12], [every]).low_complexity >= 12 / 52
    assert statistics("it", ["Q" * 6, "Q" * 6], [every]).low_complexity == 0, "a window lies in one protein"
    assert statistics("it", ["AC" * 6], [every]).low_complexity == 1
    assert statistics("it", ["AQ"], [every]).low_complexity == 0


def test_what_is_no_protein_is_counted() -> None:
    found = statistics("it", ["ACD", "AC?D", "", "acd"], ["ACD"])
    assert found.valid == 0.25
    assert (found.length_min, found.length_max) == (0, 4)
    assert found.longest_run == 1


@pytest.mark.parametrize("proteins, reference", [([], ["A"]), (["A"], []), (["??"], ["A"])])
def test_nothing_has_no_statistics(proteins: list[str], reference: list[str]) -> None:
    with pytest.raises(RequestError, match="takes"):
        statistics("it", proteins, reference)


# -- nearness ---------------------------------------------------------------------------------------------------------


def slow_edits(protein: str, text: str) -> int:
    row = [0] * (len(text) + 1)
    for i, one in enumerate(protein, 1):
        new = [i]
        for j, other in enumerate(text, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (one != other)))
        row = new
    return min(row)


def test_edits_are_those_of_the_whole_table() -> None:
    draw = random.Random(0)
    for _ in range(300):
        one, other = ("".join(draw.choices("ABCD", k=draw.randint(least, 90))) for least in (1, 0))
        assert edits(one, other) == slow_edits(one, other)


def test_identity_finds_copies_pieces_and_relatives_among_many(rng: np.random.Generator) -> None:
    train = [protein(rng, 200) for _ in range(300)]
    gapped = train[30][:60] + train[30][64:110]
    asked = [train[7], train[20][50:120], gapped, mutant(rng, train[5], 0.2), protein(rng, 200)]
    copy, piece, gap, relative, stranger = identities(asked, train)
    assert (copy, piece) == (1, 1)
    assert gap == pytest.approx(1 - 4 / 106)
    assert 0.75 < relative < 0.9
    assert stranger < 0.4


# -- references -------------------------------------------------------------------------------------------------------


def test_the_rows_are_as_many_and_as_long_as_the_samples(rng: np.random.Generator) -> None:
    held_out = [protein(rng, int(length)) for length in rng.integers(30, 200, 400)]
    lengths = [int(length) for length in rng.integers(30, 150, 100)]
    train = [protein(rng, int(length)) for length in rng.integers(30, 200, 150)]
    found = references(held_out, train, lengths, seed=3)
    assert tuple(found.rows) == NAMES
    assert len(found.compared_with) == len(found.rows["real, whole"]) == 200
    assert not set(found.compared_with) & set(found.rows["real, whole"])
    for name in NAMES[:5]:
        assert sorted(map(len, found.rows[name])) == sorted(lengths)
    ordered = references(held_out, train, sorted(lengths) * 9).rows["training"]
    assert len(ordered) == 150
    assert max(map(len, ordered)) > 140, "lengths are drawn, not taken from the first"
    for whole, mixed in (("real", "real, shuffled"), ("training", "training, shuffled")):
        assert [sorted(each) for each in found.rows[mixed]] == [sorted(each) for each in found.rows[whole]]
        assert found.rows[mixed] != found.rows[whole]
    for real in found.rows["real"]:
        assert any(each.startswith(real) for each in found.rows["real, whole"])
    assert all(any(each.startswith(cut) for each in train) for cut in found.rows["training"])
    assert found == references(held_out, train, lengths, seed=3)
    assert found != references(held_out, train, lengths, seed=4)


def test_more_or_longer_samples_than_there_are_real_proteins_get_what_there_is(rng: np.random.Generator) -> None:
    found = references([protein(rng, 20) for _ in range(10)], [protein(rng, 9)], [500] * 30)
    assert [len(each) for each in found.rows["real"]] == [20] * 5
    assert [len(each) for each in found.rows["training"]] == [9]
    assert [len(each) for each in found.rows["random"]] == [500] * 30


def test_the_rows_lie_as_they_should(rng: np.random.Generator) -> None:
    """Real proteins of a source that often repeats a letter are nearest to it, then shuffled ones, then random ones."""
    held_out = ["".join(each * (1 + (rng.random() < 0.2)) for each in protein(rng, 160)) for _ in range(300)]
    found = references(held_out, held_out[:9], [180] * 150)
    rows = {name: statistics(name, row, found.compared_with) for name, row in found.rows.items()}
    random, shuffled, real = (rows[name].kmer_distance for name in ("random", "real, shuffled", "real"))
    assert random[1] > 5 * shuffled[1]
    for k in (2, 3):
        assert random[k] > 1.05 * shuffled[k] > 1.1 * real[k]


@pytest.mark.parametrize("held_out, lengths", [(["A"], [3]), (["A", "C"], []), (["A", "C"], [0])])
def test_too_few_are_refused(held_out: list[str], lengths: list[int]) -> None:
    with pytest.raises(RequestError, match="takes"):
        references(held_out, ["A"], lengths)
