"""Templates: what is given stays in its place, and what cannot be given is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway import RequestError
from headway_apps.proteins.alphabet import ESM, SEED, Alphabet
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.generate.templates import Template, read


@pytest.mark.parametrize(
    ("text", "sites"),
    [("_", "_"), ("MK__A", "MK__A"), ("_3", "___"), ("M_2G_1", "M__G_"), ("__2", "___"), ("A_12", "A" + 12 * "_")],
)
def test_a_number_repeats_a_free_residue(text: str, sites: str) -> None:
    template = Template.parse(text)
    assert template.sites == sites
    assert template.free == sites.count("_")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MKx_", "got 'x' as character 3"),
        ("_4XA", "got 'X' as character 3"),
        ("M12_", "got '1' as character 2"),
        ("M _", "got ' ' as character 2"),
        ("_²", "got '²' as character 2"),
        ("M<mask>", "got '<' as character 2"),
        ("MKT", "0 are free"),
        ("", "0 residues"),
        ("M_0", "0 are free"),
        ("_99999999999999", "100,000 in all"),
    ],
)
def test_what_cannot_be_given_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Template.parse(text)


@pytest.mark.parametrize("alphabet", [ESM, SEED], ids=lambda each: each.name)
def test_boundaries_and_given_residues_are_not_free(alphabet: Alphabet) -> None:
    ids, free = Template.parse("MK_2W").encode(alphabet)
    assert free == [False, False, False, True, True, False, False]
    assert (ids[0], ids[-1]) == (alphabet.begin, alphabet.end)
    given = [alphabet.symbols[each] for each, is_free in zip(ids, free, strict=True) if not is_free]
    assert given[1:-1] == ["M", "K", "W"]


@pytest.mark.parametrize(
    "protein, fits", [("MAW", True), ("MWW", True), ("KAW", False), ("MAWW", False), ("MA", False)]
)
def test_a_protein_fits_where_it_has_what_is_given(protein: str, fits: bool) -> None:
    assert Template("M_W").fits(protein) is fits


def test_templates_of_a_file_have_names(tmp_path: Path) -> None:
    path = tmp_path / "some.fasta"
    path.write_bytes(b">one first of two\r\nMK_\r\n3W\r\n>two\n_5\n")
    assert read(path) == [Template("MK___W", "one"), Template("_____", "two")]
    path.write_bytes(b"_12MK\nM_3W\n")
    assert [each.name for each in read(path)] == ["line1", "line2"]


@pytest.mark.parametrize(
    "text, said", [(">one\nM_\n>two\nMJ_\n", "two: got 'J' as character 2"), ("", "without a template")]
)
def test_a_file_is_refused_by_name_and_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "some.fasta").write_text(text)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "some.fasta")


def test_lower_case_is_raised_as_where_data_is_prepared() -> None:
    assert Template.parse("mkT_2g").sites == "MKT__G"
    with pytest.raises(RequestError, match="got 'ß'"):  # which would be two good letters
        Template.parse("Mß_")
