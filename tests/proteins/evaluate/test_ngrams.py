"""Baselines reach what is known of the source, sum to 1, and never look at what they score."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from proteins.families import LETTERS, prepared, protein

from headway import RequestError
from headway_apps.proteins.alphabet import STANDARD
from headway_apps.proteins.data.shards import Part
from headway_apps.proteins.evaluate import ngrams
from headway_apps.proteins.evaluate.ngrams import NGrams, baselines


def parts(folder: Path, train: list[str], held_out: list[str]) -> tuple[Part, Part]:
    found = prepared(folder, train, held_out=held_out)
    return found["train"], found["held_out"]


@pytest.fixture(scope="module")
def chain() -> tuple[np.ndarray, np.ndarray]:
    """Over four letters: how a residue follows another, and how often each comes in the long run."""
    step = np.random.default_rng(5).dirichlet(np.full(4, 0.5), 4)
    values, vectors = np.linalg.eig(step.T)
    often = np.real(vectors[:, np.argmax(np.real(values))])
    return step, often / often.sum()


def walks(chain: tuple[np.ndarray, np.ndarray], count: int, length: int, seed: int) -> list[str]:
    step, often = chain
    rng = np.random.default_rng(seed)
    at = rng.choice(4, count, p=often)
    places = [at]
    for _ in range(length - 1):
        at = (rng.random((count, 1)) > step.cumsum(axis=1)[at]).sum(axis=1).clip(max=3)
        places.append(at)
    return ["".join(LETTERS[each]) for each in np.stack(places, axis=1)]


def test_a_chain_of_known_entropy_is_reached_by_the_2_gram_and_not_by_the_1_gram(
    tmp_path: Path, chain: tuple[np.ndarray, np.ndarray]
) -> None:
    train, held_out = parts(tmp_path / "x", walks(chain, 1000, 200, 0), walks(chain, 500, 200, 1))
    found = {each.name: each.nats_per_residue for each in baselines(train, held_out)}
    step, often = chain
    marginal = -(often * np.log(often)).sum()
    conditional = -(often[:, None] * step * np.log(step)).sum()
    whole = (marginal + 199 * conditional) / 200
    assert marginal - conditional > 0.2
    assert found["uniform over 20"] == pytest.approx(math.log(20))
    assert found["1-gram"] == pytest.approx(marginal, abs=0.005)
    for name in ("2-gram", "3-gram", "4-gram"):
        assert found[name] == pytest.approx(whole, abs=0.01)


@pytest.mark.parametrize("at_once", [100, 1_000_000])
def test_probabilities_after_any_letters_sum_to_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(ngrams, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    train, _ = parts(tmp_path / "x", [protein(rng, 30) for _ in range(40)], ["MKT"])
    fitted = NGrams.fit(train, STANDARD, 3)
    for before in ["", "A", "AC", *("".join(rng.choice(LETTERS, 5)) for _ in range(20))]:
        whole = [np.frombuffer((before + letter).encode(), dtype=np.uint8) for letter in STANDARD]
        each = np.stack([fitted.probabilities(ngrams._text([one], STANDARD, 3))[:, -1] for one in whole])
        assert each.sum(axis=0) == pytest.approx(np.ones(4))
        assert (each > 0).all()


def test_what_stands_first_is_known_to_be_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = ["M" + protein(rng, 9).replace("M", "L") for _ in range(600)]
    train, held_out = parts(tmp_path / "x", sequences[:500], sequences[500:])
    found = {each.name: each.nats_per_residue for each in baselines(train, held_out)}
    assert found["1-gram"] - found["2-gram"] == pytest.approx(math.log(10) / 10, abs=0.1)


def test_a_residue_that_training_never_saw_costs_much_but_not_everything(tmp_path: Path) -> None:
    train, held_out = parts(tmp_path / "x", ["ACDEACDE"] * 50, ["ACWE"])
    assert all(math.isfinite(each.nats_per_residue) for each in baselines(train, held_out))


def test_counts_are_those_of_counting_by_hand(tmp_path: Path) -> None:
    train, _ = parts(tmp_path / "x", ["ACA", "CA", "AAA", "C"], ["A"])
    counts = NGrams.fit(train, STANDARD, 2).counts
    letters = STANDARD + "^"
    two = counts[1].reshape(21, 20)
    pairs = {(a, b): int(two[letters.index(a), letters.index(b)]) for a, b in itertools.product("AC^", "AC")}
    assert pairs == {("A", "A"): 2, ("A", "C"): 1, ("C", "A"): 2, ("C", "C"): 0, ("^", "A"): 2, ("^", "C"): 2}
    assert counts[0][:2].tolist() == [6, 3]


def test_a_bucket_that_the_slice_did_not_meet_gets_the_weight_of_the_next_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences together are counted after the weights are known; then a context has been seen more often."""
    monkeypatch.setattr(ngrams, "SLICE", 0.5)
    rng = np.random.default_rng(0)
    train, held_out = parts(tmp_path / "x", [protein(rng, 100) for _ in range(40)], [protein(rng, 100)])
    one, *_ = NGrams.fit(train, STANDARD, 1).weights
    assert one[11] > 0.9  # 2,000 others were counted, which is bucket 11; of all 4,000 it is 12
    assert one[12] == one[11]
    uniform, unigram = (each.nats_per_residue for each in baselines(train, held_out, orders=(1,)))
    assert unigram < uniform - 0.02


def test_refuses_what_has_no_meaning(tmp_path: Path) -> None:
    train, held_out = parts(tmp_path / "x", ["ACDEF"], ["ACD"])
    with pytest.raises(RequestError, match="takes rising whole numbers from 1"):
        baselines(train, held_out, orders=(2, 1))
    with pytest.raises(ValueError, match="takes 2 or more"):
        baselines(train, held_out)


def test_some_sequences_cost_their_share_of_all(tmp_path: Path, chain: tuple[np.ndarray, np.ndarray]) -> None:
    held_out = [each[: 20 + at] for at, each in enumerate(walks(chain, 60, 200, 1))]
    train, part = parts(tmp_path / "x", walks(chain, 100, 200, 0), held_out)
    halves = np.arange(0, 60, 2), np.arange(1, 60, 2)
    some = [[each.nats_per_residue for each in baselines(train, part, scored=half)] for half in halves]
    residues = [part.lengths()[half].sum() for half in halves]
    whole = [each.nats_per_residue for each in baselines(train, part)]
    assert np.average(some, axis=0, weights=residues) == pytest.approx(whole)
    assert some[0] != pytest.approx(some[1], abs=1e-6)
