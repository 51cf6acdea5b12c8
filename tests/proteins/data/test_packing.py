"""Batches without padding: all of every sequence, once an epoch, in an order that can be taken up anywhere."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proteins.families import prepared, protein

from headway import RequestError
from headway_apps.proteins.alphabet import ESM, SEED, Alphabet
from headway_apps.proteins.data.packing import Batch, Batches, bins, pack, shuffled
from headway_apps.proteins.data.shards import Part
from headway_apps.proteins.errors import DataError

TOKENS = 1024


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    rng = np.random.default_rng(0)
    return [protein(rng, int(length)) for length in rng.integers(30, 300, 333)]


@pytest.fixture(scope="module")
def part(sequences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Part:
    return prepared(tmp_path_factory.mktemp("data") / "folder", sequences)["train"]


def told(batches: Iterable[Batch]) -> list[list[int]]:
    return [each.index.tolist() for each in batches]


def stream(part: Part, count: int, **asked: Any) -> list[list[int]]:
    return told(itertools.islice(Batches(part, ESM, TOKENS, **asked), count))


def packed(*sequences: str, alphabet: Alphabet = ESM) -> Batch:
    return pack([np.frombuffer(each.encode(), np.uint8) for each in sequences], range(len(sequences)), alphabet)


@pytest.mark.parametrize("alphabet", [ESM, SEED], ids=["esm", "seed"])
def test_a_batch_is_its_encoded_sequences_end_to_end(alphabet: Alphabet) -> None:
    batch = packed("MKT", "A", "ACDEF", alphabet=alphabet)
    assert batch.tokens.tolist() == [*alphabet.encode("MKT"), *alphabet.encode("A"), *alphabet.encode("ACDEF")]
    assert batch.lengths.tolist() == [5, 3, 7]
    assert batch.positions.tolist() == [*range(5), *range(3), *range(7)]
    assert batch.document.tolist() == [0] * 5 + [1] * 3 + [2] * 7
    assert batch.index.tolist() == [0, 1, 2]
    assert batch.residues == 9
    assert batch.free.tolist() == [each in alphabet.residues for each in batch.tokens.tolist()]
    tensors = (batch.tokens, batch.lengths, batch.positions, batch.document, batch.index)
    assert {each.dtype for each in tensors} == {torch.int64}


def test_an_empty_sequence_is_its_boundaries() -> None:
    batch = packed("", "A", "")
    assert batch.tokens.tolist() == [0, 2, *ESM.encode("A"), 0, 2]
    assert batch.residues == 1
    assert batch.free.tolist() == [False, False, False, True, False, False, False]


@pytest.mark.parametrize("letter", ["X", "a", "*", "\xff"])
def test_a_letter_outside_the_alphabet_raises(letter: str) -> None:
    text = np.frombuffer(f"MK{letter}".encode("latin-1"), np.uint8)
    with pytest.raises(DataError, match="at position 2"):
        pack([text], [0], SEED)


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(RequestError, match="takes at least one"):
        pack([], [], ESM)


def test_padded_rows_hold_the_same_tokens() -> None:
    batch = packed("MKT", "A", "ACDEF")
    rows, real = batch.padded(ESM.pad)
    assert rows.shape == real.shape == (3, 7)
    assert [ESM.decode(row[keep].tolist()) for row, keep in zip(rows, real, strict=True)] == ["MKT", "A", "ACDEF"]
    assert (rows[~real] == ESM.pad).all()
    assert real.sum() == batch.tokens.numel()


def test_moving_a_batch_keeps_its_values() -> None:
    batch = packed("MKT", "A").to("meta")
    assert batch.tokens.device.type == batch.index.device.type == "meta"


def test_an_epoch_has_every_sequence_whole_and_once(part: Part, sequences: list[str]) -> None:
    found = {}
    for batch in Batches(part, ESM, TOKENS, epochs=1):
        assert batch.tokens.numel() <= TOKENS
        for at, tokens in zip(batch.index.tolist(), batch.tokens.split(batch.lengths.tolist()), strict=True):
            assert at not in found
            found[at] = ESM.decode(tokens.tolist())
            assert tokens[0] == ESM.begin
            assert tokens[-1] == ESM.end
    assert [found[at] for at in range(len(sequences))] == sequences


@pytest.mark.parametrize("asked", [{}, {"per_step": 4}, {"per_step": 2, "buckets": (100, 200)}], ids=str)
def test_without_end_each_epoch_has_every_sequence_once(asked: dict[str, Any], part: Part) -> None:
    batches = Batches(part, ESM, TOKENS, **asked)
    seen = Counter[int]()
    while batches.epoch < 4:
        seen.update(next(batches).index.tolist())
    while not (set(seen.values()) <= {4, 5}):  # what one window has of the fifth epoch
        seen.update(next(batches).index.tolist())
        assert max(seen.values()) <= 6
    assert len(seen) == len(part)


def test_batches_are_nearly_full(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = prepared(tmp_path / "many", [protein(rng, int(length)) for length in rng.integers(30, 510, 3000)])["train"]
    sizes = [each.tokens.numel() for each in Batches(part, ESM, 8192, epochs=1)]
    assert sum(sizes) / (8192 * len(sizes)) > 0.97


def test_bins_hold_each_length_once_and_are_never_too_full() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    found = bins(lengths, 128)
    assert sorted(at for bin_ in found for at in bin_) == list(range(500))
    assert all(lengths[bin_].sum() <= 128 for bin_ in found)
    assert len(found) < 1.1 * lengths.sum() / 128
    with pytest.raises(RequestError, match="got a length of 129, takes at most 128"):
        bins([129], 128)


def test_the_order_is_that_of_the_seed_and_of_nothing_else(part: Part) -> None:
    assert stream(part, 100, seed=1) == stream(part, 100, seed=1)
    assert stream(part, 100, seed=1) != stream(part, 100, seed=2)
    torch.manual_seed(1)
    np.random.default_rng(1)
    state = torch.get_rng_state()
    assert stream(part, 100) == stream(part, 100)
    assert torch.equal(state, torch.get_rng_state())


def splitmix(state: int, count: int) -> list[int]:
    """As its authors have it in C."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        bits = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(bits ^ (bits >> 31))
    return found


def test_the_order_is_the_same_on_every_machine() -> None:
    assert splitmix(1234567, 2) == [6457827717110365317, 3203168211198807973]  # published
    for seed, draw in itertools.product((0, 1, -1, 2**63), (0, 7)):
        (start,) = splitmix((splitmix(seed % 2**64, 1)[0] + draw) % 2**64, 1)
        keys = splitmix(start, 50)
        assert shuffled(50, seed, draw).tolist() == sorted(range(50), key=keys.__getitem__)


def test_an_order_is_a_fair_shuffle() -> None:
    first = np.array([shuffled(10, seed, draw)[:2] for seed in range(-20, 20) for draw in range(50)])
    for place in first.T:
        counts = np.bincount(place, minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi², 9 degrees of freedom, 0.1 %
    assert sorted(shuffled(1000, 3, 4)) == list(range(1000))


def test_each_epoch_has_an_order_of_its_own(part: Part) -> None:
    batches = Batches(part, ESM, TOKENS, epochs=2)
    found = told(batches)
    sizes = list(itertools.accumulate(map(len, found)))
    second = sizes.index(len(part)) + 1
    assert sorted(itertools.chain(*found[second:])) == list(range(len(part)))
    together = [{frozenset(batch) for batch in epoch} for epoch in (found[:second], found[second:])]
    assert not together[0] & together[1]


def test_without_shuffling_sequences_come_in_their_order(tmp_path: Path) -> None:
    part = prepared(tmp_path / "alike", ["ACDEFGHIKL"] * 40)["train"]
    found = told(Batches(part, ESM, 48, epochs=1, shuffle=False))
    assert list(itertools.chain(*found)) == list(range(40))
    assert {len(each) for each in found} == {4}


@pytest.mark.parametrize("asked", [{}, {"epochs": 2}, {"per_step": 4, "buckets": (120,)}], ids=str)
@pytest.mark.parametrize("after", [0, 1, 37, 60])
def test_a_stream_goes_on_where_it_was_saved(after: int, asked: dict[str, Any], part: Part) -> None:
    whole = Batches(part, ESM, TOKENS, **asked)
    told(itertools.islice(whole, after))
    state = json.loads(json.dumps(whole.state_dict()))
    again = Batches(part, ESM, TOKENS, **asked)
    told(itertools.islice(again, 5))
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert told(itertools.islice(again, 90)) == told(itertools.islice(whole, 90))
    assert again.epoch == whole.epoch


def test_ranks_share_the_one_stream(part: Part) -> None:
    alone = stream(part, 96, per_step=4)
    for ranks in (2, 4):
        each = [stream(part, 96 // ranks, per_step=4, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert [batch for step in zip(*each, strict=True) for batch in step] == alone


def test_a_run_goes_on_with_another_number_of_ranks(part: Part) -> None:
    alone = stream(part, 60, per_step=4)
    two = Batches(part, ESM, TOKENS, per_step=4, rank=1, ranks=2)
    told(itertools.islice(two, 6))
    four = Batches(part, ESM, TOKENS, per_step=4, rank=3, ranks=4)
    four.load_state_dict(two.state_dict())
    assert next(four).index.tolist() == alone[12 + 3]
    told(itertools.islice(two, 1))
    with pytest.raises(RequestError, match="takes a multiple of the 4 ranks; .* save at the end of a step"):
        four.load_state_dict(two.state_dict())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_pass_by_several_ranks_has_every_sequence_once(ranks: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 50):
        part = prepared(tmp_path / f"of{count}", [protein(rng, 60) for _ in range(count)])["train"]
        found = [
            told(Batches(part, ESM, 64, epochs=1, per_step=ranks, rank=rank, ranks=ranks)) for rank in range(ranks)
        ]
        assert sorted(itertools.chain(*itertools.chain(*found))) == list(range(count))
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_steps_never_fall_short_even_when_each_batch_has_one_sequence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = prepared(tmp_path / "five", [protein(rng, 60) for _ in range(5)])["train"]
    four = [Batches(part, ESM, 64, per_step=4, rank=rank, ranks=4) for rank in range(4)]
    found = [[next(each).index.tolist() for each in four] for _ in range(30)]
    seen = Counter(itertools.chain(*itertools.chain(*found)))
    assert len(set(seen.values())) == 1
    assert len(seen) == 5


def test_batches_of_one_step_are_alike_in_tokens(part: Part) -> None:
    batches = Batches(part, ESM, TOKENS, per_step=4)
    sizes = torch.tensor([next(batches).tokens.numel() for _ in range(48)]).view(-1, 4)
    assert (sizes.amin(1) > 0.8 * sizes.amax(1)).float().mean() > 0.8


def test_a_batch_keeps_to_its_bucket(part: Part) -> None:
    for batch in Batches(part, ESM, TOKENS, epochs=1, buckets=(100, 200)):
        residues = batch.lengths - 2
        assert len({int(each) for each in torch.bucketize(residues, torch.tensor([100, 200]), right=True)}) == 1


@pytest.mark.parametrize(
    "change, names",
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"tokens": 2048}, "tokens was 1024, is 2048"),
        ({"alphabet": SEED}, "alphabet was 'esm', is 'seed'"),
        ({"per_step": 2}, "per_step was 1, is 2"),
        ({"buckets": (100,)}, "buckets was"),
        ({"shuffle": False}, "shuffle was True"),
        ({"epochs": 1}, "total was None"),
    ],
)
def test_the_place_in_another_stream_is_refused(change: dict[str, Any], names: str, part: Part) -> None:
    state = Batches(part, ESM, TOKENS).state_dict()
    other = Batches(part, **({"alphabet": ESM, "tokens": TOKENS} | change))
    with pytest.raises(RequestError, match=f"another stream of batches .*{names}"):
        other.load_state_dict(state)


def test_the_place_in_other_data_is_refused(part: Part, sequences: list[str], tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", [*sequences[:-1], sequences[-1] + "A"])["train"]
    with pytest.raises(RequestError, match="data was"):
        Batches(other, ESM, TOKENS).load_state_dict(Batches(part, ESM, TOKENS).state_dict())


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"tokens": 100}, "takes at least 3.., the longest of train with its 2 boundary tokens"),
        ({"rank": 1}, "takes a rank below ranks"),
        ({"ranks": 2}, "a number of batches that ranks divide"),
        ({"per_step": 0}, "takes a rank below ranks"),
        ({"buckets": (200, 100)}, "takes lengths that rise"),
        ({"epochs": 0}, "takes 1 epoch or more"),
    ],
)
def test_what_makes_no_stream_is_refused(asked: dict[str, Any], says: str, part: Part) -> None:
    with pytest.raises(RequestError, match=says):
        Batches(part, ESM, **({"tokens": TOKENS} | asked))


def test_letters_that_the_alphabet_lacks_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    part = prepared(tmp_path / "x", ["MKTAYI", "MKXXAYI"])["train"]
    assert ESM.decode(next(Batches(part, ESM, 64, shuffle=False)).tokens[8:].tolist()) == "MKXXAYI"
    with pytest.raises(DataError, match="got 2 X in train, takes the letters ACDEFGHIKLMNPQRSTVWY of seed"):
        Batches(part, SEED, 64)


def test_a_part_without_sequences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no sequences in train"):
        Batches(prepared(tmp_path / "none", [])["train"], ESM, 64)
