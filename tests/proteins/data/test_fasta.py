"""Files as people have them: each record is taken, or refused for a reason that is counted."""

from __future__ import annotations

import gzip
import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from proteins.families import ANY_LENGTH, protein, records

from headway import RequestError
from headway_apps.proteins.data.fasta import Counts, Record, Rules, clean, read, write
from headway_apps.proteins.errors import DataError

UNIREF = "UniRef50_Q6GZX4 Putative transcription factor 001R n=3 Tax=Frog virus 3 TaxID=10493 RepID=001R_FRG3G"


def taken(*sequences: str, rules: Rules = ANY_LENGTH) -> tuple[list[str], Counts]:
    counts = Counts()
    return [each.sequence for each in clean(records(sequences), rules, counts)], counts


@pytest.mark.parametrize(
    "text, expected",
    [
        (b">a\nMKT\nAYI\n>b\nACD", [("a", "MKTAYI"), ("b", "ACD")]),
        (b"\n\n>a\nMKT\n\n>b\n", [("a", "MKT"), ("b", "")]),
        (b"\xef\xbb\xbf>a\nMKT\n", [("a", "MKT")]),
        (b">\nMKT\n", [("", "MKT")]),
        (b"MKT\n\nACD\n", [("line1", "MKT"), ("line3", "ACD")]),
        (b"", []),
        (b"\n \n", []),
    ],
    ids=["FASTA", "blank lines, an empty record", "a byte order mark", "no name", "a list", "nothing", "blanks"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_reads(text: bytes, expected: list[tuple[str, str]], packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "sequences"
    path.write_bytes(gzip.compress(text) if packed else text)
    assert [(each.name, each.sequence) for each in read(path)] == expected


def test_gzip_members_one_after_another_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "both.fa.gz"
    path.write_bytes(gzip.compress(b">a\nMKT\n") + gzip.compress(b">b\nACD\n"))
    assert [each.name for each in read(path)] == ["a", "b"]


def test_knows_the_clusters_of_uniref50_alone(tmp_path: Path) -> None:
    path = tmp_path / "uniref.fasta"
    path.write_text(f">{UNIREF}\nMAFSAEDVLK\n>UniRef90_A0A009 x\nMKT\n>sp|P1|A_B\nMKT\n>XUniRef50_A\nMKT\n")
    first, *rest = read(path)
    assert first.name == first.family == "UniRef50_Q6GZX4"
    assert first.description == UNIREF.partition(" ")[2]
    assert [each.family for each in rest] == [None, None, None]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = records([protein(rng, length) for length in (1, 59, 60, 61, 300)])
    write(tmp_path / "out.fasta", made)
    assert list(read(tmp_path / "out.fasta")) == made
    assert max(map(len, (tmp_path / "out.fasta").read_text().splitlines())) == 60


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_gz_is_refused_after_what_it_holds(kept: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = gzip.compress("".join(f">{at}\n{protein(rng, 300)}\n" for at in range(300)).encode())
    (tmp_path / "cut.gz").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=r"cut\.gz, whose gzip data breaks off"):
        list(read(tmp_path / "cut.gz"))


def test_a_damaged_gz_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    damaged = bytearray(gzip.compress("".join(f">{at}\n{protein(rng, 300)}\n" for at in range(300)).encode()))
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "bad.gz").write_bytes(damaged)
    with pytest.raises(DataError, match="breaks off or is damaged"):
        list(read(tmp_path / "bad.gz"))


def test_a_file_that_is_not_there_or_not_fasta_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*absent.fa: No such file or directory"):
        list(read(tmp_path / "absent.fa"))
    with pytest.raises(DataError, match="cannot read .*: Is a directory"):
        list(read(tmp_path))
    (tmp_path / "reads.fq").write_text("@a\nMKT\n+\nIII\n")
    with pytest.raises(DataError, match="reads as FASTQ, takes FASTA or one sequence a line"):
        list(read(tmp_path / "reads.fq"))


@pytest.mark.parametrize(
    "line", ["sp|P12345|NAME_HUMAN a header that lost its >", "id,sequence", "# proteins", "{", "M\0K\0"]
)
def test_a_text_of_another_kind_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(f"\n{line}\nMKTAYI\n")
    with pytest.raises(DataError, match="line 2 is neither a header of FASTA, which begins with >, nor a sequence: '"):
        list(read(tmp_path / "table.csv"))


@pytest.mark.parametrize(
    "given, becomes, mended",
    [
        ("MKTAYI", "MKTAYI", {}),
        ("mktAYI", "MKTAYI", {"lower case raised": 1}),
        ("MKTAYI*", "MKTAYI", {"stop at the end removed": 1}),
        ("MKT\rAYI\r", "MKTAYI", {"carriage returns removed": 1}),
        ("MKT AYI\t", "MKTAYI", {"white space removed": 1}),
    ],
)
def test_mends_and_counts(given: str, becomes: str, mended: dict[str, int]) -> None:
    found, counts = taken(given)
    assert found == [becomes]
    assert (counts.taken, dict(counts.rejected), dict(counts.mended)) == (1, {}, mended)


@pytest.mark.parametrize(
    "given, why",
    [
        ("", "empty"),
        ("*", "empty"),
        (" \r", "empty"),
        ("MKT*AYI", "stop inside"),
        ("MKT-AYI", "gap inside"),
        ("MK.T*AYI", "not amino acids"),
        ("MKT1AYI", "not amino acids"),
        ("MKTßAYI", "not amino acids"),
        ("<html>", "not amino acids"),
        ("MKTXAYI", "too many ambiguous letters"),
        ("MKTBZUO", "too many ambiguous letters"),
        ("MKTJAYI", "too many ambiguous letters"),
        ("ACGTTGCANNACGTTGCAAC", "nucleotides"),
    ],
)
def test_rejects_and_counts(given: str, why: str) -> None:
    found, counts = taken(given)
    assert found == []
    assert (counts.read, counts.taken, dict(counts.rejected)) == (1, 0, {why: 1})


@pytest.mark.parametrize("byte", [b"\xe9", b"\xdf", b"\x00", b"\xc3\x9f"])
def test_a_foreign_byte_in_a_file_is_counted_and_not_lost(byte: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.fa").write_bytes(b">a\nMKT" + byte + b"AYI\n>b\nMKT\n")
    counts = Counts()
    assert [each.sequence for each in clean(read(tmp_path / "odd.fa"), ANY_LENGTH, counts)] == ["MKT"]
    assert dict(counts.rejected) == {"not amino acids": 1}


def test_lengths_outside_the_rules_are_rejected_and_never_cut() -> None:
    rng = np.random.default_rng(0)
    sequences = [protein(rng, length) for length in (29, 30, 510, 511)]
    found, counts = taken(*sequences, rules=Rules())
    assert found == sequences[1:3]
    assert dict(counts.rejected) == {"shorter than 30": 1, "longer than 510": 1}


@pytest.mark.parametrize("share, passes", [(0.09, False), (0.1, True)])
def test_a_share_of_ambiguous_letters_can_be_taken(share: float, passes: bool) -> None:
    found, counts = taken("MKTAYIAKQX", "MKTAYIAKQJ", rules=Rules(1, 100, ambiguous=share))
    assert found == ["MKTAYIAKQX"] * passes
    assert counts.rejected["too many ambiguous letters"] == 2 - passes


def test_duplicates_are_known_by_sequence_after_mending_and_names_are_noted() -> None:
    counts = Counts()
    given = [Record("a", "MKTAYI"), Record("b", "mktayi*"), Record("a", "MKTAYV")]
    assert [each.sequence for each in clean(given, ANY_LENGTH, counts)] == ["MKTAYI", "MKTAYV"]
    assert dict(counts.rejected) == {"duplicate sequence": 1}
    assert dict(counts.noted) == {"duplicate name": 1}


def test_duplicates_can_be_kept() -> None:
    found, counts = taken("MKT", "MKT", rules=Rules(1, 10, duplicates=True))
    assert (found, counts.taken) == (["MKT", "MKT"], 2)


def test_every_record_is_counted_once_in_a_file_with_all_of_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = [protein(rng, 50) for _ in range(3)]
    body = [good[0], good[1].lower(), good[0], "", "MK*T", protein(rng, 20), protein(rng, 600), good[2][:40] + "X"]
    (tmp_path / "mixed.fa").write_bytes("".join(f">p{at}\r\n{each}\r\n" for at, each in enumerate(body)).encode())
    counts = Counts()
    kept = [each.sequence for each in clean(read(tmp_path / "mixed.fa"), Rules(), counts)]
    assert kept == good[:2]
    assert counts.read == len(body) == counts.taken + counts.rejected.total()
    assert counts.rejected == {
        "duplicate sequence": 1, "empty": 1, "stop inside": 1, "shorter than 30": 1, "longer than 510": 1,
        "too many ambiguous letters": 1,
    }  # fmt: skip
    assert str(counts).startswith("8 read; 2 taken; 1 rejected: ")


@pytest.mark.parametrize("wrong", [{"shortest": 0}, {"shortest": 50, "longest": 40}, {"ambiguous": 1.5}])
def test_rules_that_take_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="takes"):
        Rules(**wrong)


def test_reading_holds_one_sequence_at_a_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    block = "".join(f">p{at}\n{protein(rng, 400)}\n" for at in range(500)).encode()
    peaks = []
    for blocks in (1, 8):
        with gzip.open(tmp_path / "many.gz", "wb", compresslevel=1) as file:
            file.writelines(itertools.repeat(block, blocks))
        tracemalloc.start()
        assert sum(1 for _ in clean(read(tmp_path / "many.gz"), Rules(duplicates=True), Counts())) == 500 * blocks
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
