"""Families found, kept together by a split, and looked for across it by other means than those that made it."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from proteins.families import families, mutant, protein

from headway import RequestError
from headway_apps.proteins.alphabet import STANDARD
from headway_apps.proteins.data.clusters import Likeness, cluster, kmers, leakage, split, split_by_family

LIKENESS = Likeness()
Families = tuple[list[str], list[str]]


@cache
def words(sequence: str) -> set[str]:
    found = {sequence[at : at + 5] for at in range(len(sequence) - 4)}
    return {each for each in found if set(each) <= set(STANDARD)}


def shared(one: str, two: str) -> tuple[int, float]:
    """How many 5-mers two sequences share, and of the smaller's which part, by plain sets."""
    a, b = words(one), words(two)
    return len(a & b), len(a & b) / max(1, min(len(a), len(b)))


def like(one: str, two: str) -> bool:
    number, part = shared(one, two)
    return number >= LIKENESS.at_least and part >= LIKENESS.part


def linked(sequences: list[str]) -> list[int]:
    """Single linkage the slow way: all pairs, until nothing changes."""
    found = list(range(len(sequences)))
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if like(sequences[a], sequences[b])]
    while any(found[a] != found[b] for a, b in pairs):
        for a, b in pairs:
            found[a] = found[b] = min(found[a], found[b])
    return found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    "sequence, count", [("", 0), ("MKTA", 0), ("MKTAY", 1), ("AAAAAAAA", 1), ("MKTAYXMKTAYI", 2), ("ACDEFGHIKL", 6)]
)
def test_counts_distinct_5_mers_without_ambiguous_letters(sequence: str, count: int) -> None:
    assert len(kmers(sequence)) == count


def test_different_5_mers_have_different_numbers(rng: np.random.Generator) -> None:
    words = {protein(rng, 5) for _ in range(2000)}
    assert len({int(kmers(each)[0]) for each in words}) == len(words)


@pytest.mark.parametrize("changed", [0.1, 0.3, 0.4])
def test_clusters_are_those_of_all_pairs(changed: float, rng: np.random.Generator) -> None:
    sequences = families(rng, 12, 5, changed=changed)
    sequences += [sequences[0][:40], sequences[7][30:] + sequences[20], "MKTA", "", "X" * 50, protein(rng, 6)]
    order = rng.permutation(len(sequences))
    sequences = [sequences[at] for at in order]
    found = cluster(sequences, LIKENESS)
    assert found.tolist() == linked(sequences)
    assert 12 < len(set(found.tolist())) < len(sequences)  # some are linked, not all


def test_mutants_of_one_parent_are_one_cluster_and_strangers_are_not(rng: np.random.Generator) -> None:
    found = cluster(families(rng, 20, 10, changed=0.1), LIKENESS).reshape(20, 10)
    assert (found == found[:, :1]).all()
    assert len(np.unique(found)) == 20


def test_a_split_by_cluster_leaks_nothing_where_a_random_one_leaks_nearly_all(rng: np.random.Generator) -> None:
    sequences = families(rng, 60, 5)
    parts = split(cluster(sequences, LIKENESS), sequences, {"held_out": 0.1}, seed=0)
    chance = rng.permutation(parts).tolist()
    for found, leaks in ((parts, False), (chance, True)):
        train = [each for each, part in zip(sequences, found, strict=True) if part == "train"]
        held_out = [each for each, part in zip(sequences, found, strict=True) if part == "held_out"]
        report = leakage(train, held_out, LIKENESS)
        nearest = [max(shared(each, other)[1] for other in train) for each in held_out]
        assert report.like == sum(any(like(each, other) for other in train) for each in held_out)
        assert report.measured == len(held_out) == 30
        assert (report.median, report.most) == (pytest.approx(np.median(nearest)), pytest.approx(max(nearest)))
        assert (report.like > 25) if leaks else (report.like == 0)
    assert str(report).startswith(f"{report.like} of 30 held-out sequences are like one of train; ")


def test_a_hidden_mutant_shows_in_the_leakage(rng: np.random.Generator) -> None:
    train = [protein(rng, 200) for _ in range(50)]
    held_out = [protein(rng, 200) for _ in range(9)] + [mutant(rng, train[7], 0.05)]
    assert leakage(train, held_out, LIKENESS).like == 1


@pytest.mark.parametrize("shares", [{"held_out": 0.05}, {"valid": 0.1, "test": 0.2}])
def test_parts_have_their_shares_of_residues_in_whole_clusters(
    shares: dict[str, float], rng: np.random.Generator
) -> None:
    sequences = families(rng, 200, 3, length=60)
    clusters = np.repeat(np.arange(200), 3)
    parts = np.array(split(clusters, sequences, shares, seed=0)).reshape(200, 3)
    assert (parts == parts[:, :1]).all()
    for name, share in shares.items():
        assert share - 0.01 < (parts == name).mean() <= share
    assert set(np.unique(parts)) == {"train", *shares}


def test_a_split_depends_on_seed_and_sequences_not_on_their_order(rng: np.random.Generator) -> None:
    sequences = families(rng, 40, 3)
    clusters = cluster(sequences, LIKENESS)
    found = split(clusters, sequences, {"held_out": 0.2}, seed=1)
    order = rng.permutation(len(sequences))
    turned = [sequences[at] for at in order]
    again = split(cluster(turned, LIKENESS), turned, {"held_out": 0.2}, seed=1)
    assert again == [found[at] for at in order]
    assert split(clusters, sequences, {"held_out": 0.2}, seed=2) != found


def test_a_cluster_larger_than_a_part_stays_in_train(rng: np.random.Generator) -> None:
    sequences = families(rng, 1, 50) + [protein(rng, 100) for _ in range(50)]
    clusters = [0] * 50 + list(range(50, 100))
    for seed in range(20):
        parts = split(clusters, sequences, {"held_out": 0.1}, seed)
        assert parts[:50] == ["train"] * 50
        assert parts.count("held_out") >= 9


def test_known_families_are_split_by_name_alone() -> None:
    names = [f"UniRef50_P{at:05d}" for at in range(5000)]
    parts = [split_by_family(each, {"valid": 0.1, "test": 0.05}, seed=0) for each in names]
    assert parts.count("valid") == pytest.approx(500, abs=70)
    assert parts.count("test") == pytest.approx(250, abs=50)
    assert parts == [split_by_family(each, {"valid": 0.1, "test": 0.05}, seed=0) for each in names]
    assert parts != [split_by_family(each, {"valid": 0.1, "test": 0.05}, seed=1) for each in names]
    assert split_by_family("UniRef50_P00000", {"held_out": 0.5}, seed=-3) in ("train", "held_out")


@pytest.mark.parametrize("shares", [{"train": 0.5}, {"held_out": 0.0}, {"a": 0.5, "b": 0.5}, {"a": -0.1}])
def test_shares_that_make_no_split_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="takes shares above 0, of less than 1 in all, for parts other than train"):
        split([0], ["MKT"], shares, seed=0)


@pytest.mark.parametrize("wrong", [{"part": 0.0}, {"part": 1.1}, {"at_least": 0}])
def test_a_likeness_that_likens_all_or_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="takes a part in"):
        Likeness(**wrong)


def test_nothing_has_no_clusters_and_no_leakage() -> None:
    assert cluster([], LIKENESS).tolist() == []
    assert leakage([], [], LIKENESS).measured == 0
    assert leakage([], ["MKTAYI"], LIKENESS).like == 0
