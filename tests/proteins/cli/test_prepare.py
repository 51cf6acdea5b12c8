"""`headway proteins prepare`: what was rejected and why is printed and kept; nothing takes a missing file's place."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from proteins.families import families, records
from typer.testing import CliRunner, Result

from headway_apps.proteins.cli import app
from headway_apps.proteins.data.fasta import write
from headway_apps.proteins.data.shards import Prepared

SRC = Path(__file__).parents[3] / "src"


@pytest.fixture(scope="module")
def good() -> list[str]:
    """40 families of 2."""
    return families(np.random.default_rng(0), 40, 2, length=60, changed=0.2)


@pytest.fixture
def fasta(good: list[str], tmp_path: Path) -> Path:
    write(tmp_path / "some.fasta", records(good))
    return tmp_path / "some.fasta"


def prepare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


def test_every_kind_of_record_is_taken_or_rejected_with_its_count(good: list[str], tmp_path: Path) -> None:
    one = good[0]
    odd = [
        one, one[:20], one * 20, "", one[:35].lower(), one[1:] + "*", one[:9] + "*" + one[9:], one[:9] + "-" + one[9:],
        *(letter * 2 + one for letter in "XBZUOJ"), "ACGT" * 10, "2" + one, one[2:] + "\r",
    ]  # fmt: skip
    with gzip.open(tmp_path / "packed", "wt", newline="") as file:
        file.writelines(f">{number}\n{each}\n" for number, each in enumerate(good))
        file.writelines(f">{number}\n{each}\n" for number, each in enumerate(odd))
    done = prepare(tmp_path / "packed", "--out", tmp_path / "out", "--max-length", 100)
    assert done.exit_code == 0, done.output
    kept = Prepared(tmp_path / "out").provenance["counts"]
    assert kept == {
        "read": 97, "taken": 83,
        "rejected": {
            "duplicate sequence": 1, "shorter than 30": 1, "longer than 100": 1, "empty": 1, "stop inside": 1,
            "gap inside": 1, "too many ambiguous letters": 6, "nucleotides": 1, "not amino acids": 1,
        },
        "mended": {"lower case raised": 1, "stop at the end removed": 1, "carriage returns removed": 1},
        "noted": {"duplicate name": 3},
    }  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "97 sequences read, 83 taken"
    for kind in ("rejected", "mended", "noted"):
        assert [each for each in lines if f" {kind}: " in each] == [
            f"  {number:>10,} {kind}: {what}"
            for what, number in sorted(kept[kind].items(), key=lambda item: (-item[1], item[0]))
        ]


def test_families_leakage_and_parts_are_told_as_they_were_written(fasta: Path, tmp_path: Path) -> None:
    done = prepare(fasta, "--out", tmp_path / "out", "--held-out", 0.2)
    kept = Prepared(tmp_path / "out")
    assert done.stdout.splitlines() == [
        "80 sequences read, 80 taken",
        *(f"{name}: {len(kept[name]):,} sequences, {kept[name].residues:,} residues" for name in ("train", "held_out")),
        "families: 40, the largest of 2 sequences",
        f"leakage: 0 of 16 held-out sequences are like one of train; 5-mers shared with the nearest: median "
        f"{kept.provenance['leakage']['median']:.1%}, most {kept.provenance['leakage']['most']:.1%}",
        f"written: {tmp_path / 'out'}",
    ]
    assert len(kept["held_out"]) == 16


def test_every_option_takes_effect(good: list[str], tmp_path: Path) -> None:
    odd = [good[0], "X" + good[0][1:]]
    headers = [f">UniRef50_{number} some\n{each}\n" for number, each in enumerate([*good, *odd])]
    (tmp_path / "some.fasta").write_text("".join(headers))
    options = ["--min-length", 35, "--max-length", 60, "--ambiguous", 0.1, "--duplicates", "--held-out", 0.3]
    options += ["--by", "uniref50", "--seed", 5, "--note", "from nowhere"]
    assert prepare(tmp_path / "some.fasta", "--out", tmp_path / "out", *options).exit_code == 0
    told = Prepared(tmp_path / "out").provenance
    assert told["rules"] == {"shortest": 35, "longest": 60, "ambiguous": 0.1, "duplicates": True}
    assert told["split"] == {"by": "uniref50", "shares": {"held_out": 0.3}, "seed": 5}
    assert (told["note"], told["counts"]["taken"]) == ("from nowhere", 82)


def test_the_folder_says_which_files_it_is_of(fasta: Path, tmp_path: Path) -> None:
    prepare(fasta, "--out", tmp_path / "out", "--note", "UniProt 2014_01")
    told = Prepared(tmp_path / "out").provenance
    found = hashlib.sha256(fasta.read_bytes()).hexdigest()
    assert told["sources"] == [{"file": "some.fasta", "bytes": fasta.stat().st_size, "sha256": found}]
    assert told["note"] == "UniProt 2014_01"


def test_nothing_stands_in_for_a_file_that_is_missing_or_broken(fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gz").write_bytes(gzip.compress(fasta.read_bytes())[:-20])
    (tmp_path / "empty.fasta").touch()
    before = sorted(tmp_path.iterdir())
    for name, said in (("no.fasta", "cannot read"), ("broken.gz", "breaks off"), ("empty.fasta", "got no sequence")):
        files = [tmp_path / name] if name == "empty.fasta" else [fasta, tmp_path / name]
        done = prepare(*files, "--out", tmp_path / "out")
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min-length", 0], "lengths 0 to 510"),
        (["--min-length", 40, "--max-length", 39], "lengths 40 to 39"),
        (["--ambiguous", 1.5], "share of 1.5"),
        (["--held-out", 0], "got held_out 0.0, takes shares above 0"),
        (["--held-out", 1], "got held_out 1.0, takes shares above 0"),
        (["--by", "uniref50"], "find them by kmers"),
    ],
)
def test_what_makes_no_sense_is_one_line(fasta: Path, tmp_path: Path, options: list[object], said: str) -> None:
    done = prepare(fasta, "--out", tmp_path / "out", *options)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = prepare(fasta, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "there already" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_it_runs_from_any_folder(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fasta.parent / "elsewhere").mkdir()
    monkeypatch.chdir(fasta.parent / "elsewhere")
    assert prepare("../some.fasta", "--out", "out").exit_code == 0
    assert len(Prepared(fasta.parent / "elsewhere" / "out")["train"]) == 76


def test_the_process_itself_fails_and_asks_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headway_apps.proteins", "prepare", "no.fasta", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: cannot read no.fasta: No such file or directory\n"
    assert not list(tmp_path.iterdir())
