"""Letters to tokens and back: nothing is guessed, nothing is dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway_apps.proteins.alphabet import ALPHABETS, ESM, SEED, STANDARD, Alphabet
from headway_apps.proteins.errors import DataError

BOTH = pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)


def test_the_ids_are_those_of_esm() -> None:
    assert ESM.size == 33
    assert ESM.encode("LAGVSERTIDPKQNFYMHWCXBUZO") == [0, *range(4, 29), 2]
    named = {"<cls>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3, ".": 29, "-": 30, "<null_1>": 31, "<mask>": 32}
    assert {symbol: ESM.id_of(symbol) for symbol in named} == named
    assert (ESM.begin, ESM.pad, ESM.end, ESM.unknown, ESM.mask) == (0, 1, 2, 3, 32)


def test_the_ids_are_those_the_seed_wrote() -> None:
    assert SEED.size == 25
    assert SEED.encode("ACDEFGHIKLMNPQRSTVWY") == [0, *range(5, 25), 2]
    assert [SEED.id_of(each) for each in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    assert (SEED.begin, SEED.pad, SEED.end, SEED.unknown, SEED.mask) == (0, 1, 2, 3, 4)


@BOTH
def test_a_new_protein_may_hold_the_twenty_residues_and_no_other_token(alphabet: Alphabet) -> None:
    assert len(alphabet.residues) == 20
    assert {alphabet.symbols[each] for each in alphabet.residues} == set(STANDARD)


@BOTH
@given(data=st.data())
def test_decoding_undoes_encoding_and_boundary_tokens_are_there(alphabet: Alphabet, data: st.DataObject) -> None:
    sequence = data.draw(st.text(alphabet.letters))
    ids = alphabet.encode(sequence)
    assert (ids[0], ids[-1], len(ids)) == (alphabet.begin, alphabet.end, len(sequence) + 2)
    assert alphabet.decode(ids) == alphabet.decode(ids[1:-1]) == sequence
    assert alphabet.is_protein(ids) == bool(sequence)


@BOTH
@pytest.mark.parametrize("letter", ["a", "*", "-", ".", " ", "J", "1", "ß", "\n"])
def test_what_is_no_letter_raises_with_its_place(alphabet: Alphabet, letter: str) -> None:
    with pytest.raises(DataError, match="at position 2, takes the letters"):
        alphabet.encode(f"MK{letter}T")


def test_the_seeds_alphabet_has_no_ambiguous_letters() -> None:
    assert ESM.decode(ESM.encode("BOUXZ")) == "BOUXZ"
    with pytest.raises(DataError, match="got 'X' at position 1"):
        SEED.encode("MX")


@BOTH
@pytest.mark.parametrize("special", ["mask", "pad", "unknown", "begin", "end"])
def test_a_special_token_inside_makes_a_sequence_invalid(alphabet: Alphabet, special: str) -> None:
    ids = alphabet.encode("MKT")
    ids.insert(2, getattr(alphabet, special))
    assert not alphabet.is_protein(ids)
    with pytest.raises(DataError, match="inside a sequence at position 1, takes letters only"):
        alphabet.decode(ids)


@pytest.mark.parametrize("ids", [[], [0], [2], [0, 2], [0, 4, 2, 1], [0, 33, 2], [0, -1, 2], [29], [30], [31]])
def test_no_letters_or_others_beside_them_are_no_protein(ids: list[int]) -> None:
    assert not ESM.is_protein(ids)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"symbols": (*SEED.symbols, "A")}, "a symbol twice"),
        ({"mask": 25}, "takes five different ids below 25"),
        ({"mask": 1}, "takes five different ids"),
        ({"symbols": tuple("?" if each == "W" else each for each in SEED.symbols)}, "without W"),
    ],
)
def test_an_alphabet_that_contradicts_itself_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        replace(SEED, **change)


def test_an_unknown_symbol_is_named_with_those_that_are() -> None:
    with pytest.raises(DataError, match="got the symbol '<bos>', takes those of esm: <cls> <pad>"):
        ESM.id_of("<bos>")
