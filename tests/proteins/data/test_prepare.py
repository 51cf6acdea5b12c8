"""The whole way: from files to a folder that says what it is."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proteins.families import families, protein, records

from headway import RequestError
from headway_apps.proteins.data import clusters
from headway_apps.proteins.data import prepare as room
from headway_apps.proteins.data.fasta import Record, Rules, write
from headway_apps.proteins.data.prepare import prepare
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.errors import DataError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def fasta(rng: np.random.Generator, tmp_path: Path) -> Path:
    """40 families of 3, and what is to be refused."""
    sequences = [*families(rng, 40, 3), "MKT", "", "MKTX" * 20]
    write(tmp_path / "some.fasta", records([*sequences, sequences[0].lower()]))
    return tmp_path / "some.fasta"


def sequences(folder: Prepared) -> dict[str, list[str]]:
    return {name: [each.sequence for each in folder[name]] for name in folder.parts}


def test_a_fasta_file_becomes_a_folder_with_its_provenance(fasta: Path, tmp_path: Path) -> None:
    found = prepare([fasta], tmp_path / "out", shares={"valid": 0.1, "test": 0.1}, seed=3, note="made for a test")
    told = found.provenance
    assert told["sources"] == [
        {"file": "some.fasta", "bytes": fasta.stat().st_size, "sha256": hashlib.sha256(fasta.read_bytes()).hexdigest()}
    ]
    assert told["note"] == "made for a test"
    assert told["rules"] == {"shortest": 30, "longest": 510, "ambiguous": 0.0, "duplicates": False}
    assert told["counts"] == {
        "read": 124, "taken": 120, "mended": {"lower case raised": 1}, "noted": {},
        "rejected": {"shorter than 30": 1, "empty": 1, "too many ambiguous letters": 1, "duplicate sequence": 1},
    }  # fmt: skip
    assert told["split"] == {
        "by": "kmers", "shares": {"valid": 0.1, "test": 0.1}, "seed": 3, "clusters": 40, "largest": 3,
        "likeness": {"part": 0.1, "at_least": 3},
    }  # fmt: skip
    assert (told["leakage"]["measured"], told["leakage"]["like"]) == (24, 0)
    assert datetime.fromisoformat(told["written"]) <= datetime.now(timezone.utc)
    assert {name: len(found[name]) for name in found.parts} == {"train": 96, "valid": 12, "test": 12}
    assert Prepared(tmp_path / "out").manifest == found.manifest


def test_every_sequence_taken_is_in_one_part_with_its_family(fasta: Path, tmp_path: Path) -> None:
    found = sequences(prepare([fasta], tmp_path / "out", shares={"held_out": 0.2}))
    everything = found["train"] + found["held_out"]
    assert len(everything) == len(set(everything)) == 120
    both = clusters.cluster(everything, clusters.Likeness())
    assert not set(both[: len(found["train"])]) & set(both[len(found["train"]) :])


def test_the_same_files_and_seed_make_the_same_folder(fasta: Path, tmp_path: Path) -> None:
    one, two, other = (
        prepare([fasta], tmp_path / name, seed=seed).fingerprint for name, seed in (("1", 0), ("2", 0), ("3", 1))
    )
    assert one == two != other


def test_several_files_of_any_kind_become_one_folder(rng: np.random.Generator, tmp_path: Path) -> None:
    many = [protein(rng, 60) for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(many[:20]))
    with gzip.open(tmp_path / "b.fa.gz", "wt") as file:
        file.writelines(f">{at}\n{each}\n" for at, each in enumerate(many[15:30]))
    torch.save([{"protein_seq": each} for each in many[30:]], tmp_path / "processed_uniref50.pt")
    sources = [tmp_path / "a.txt", tmp_path / "b.fa.gz", tmp_path / "processed_uniref50.pt"]
    found = prepare(sources, tmp_path / "out")
    assert sorted(itertools.chain(*sequences(found).values())) == sorted(many)
    assert found.provenance["counts"]["rejected"] == {"duplicate sequence": 5}
    assert [each["file"] for each in found.provenance["sources"]] == [each.name for each in sources]


def uniref(path: Path, rng: np.random.Generator, count: int = 400) -> Path:
    write(path, (Record(f"UniRef50_A{at}", protein(rng, 40), f"Made n={at} Tax=x") for at in range(count)))
    return path


def test_clusters_of_uniref50_can_be_trusted(rng: np.random.Generator, tmp_path: Path) -> None:
    source = uniref(tmp_path / "uniref50.fasta", rng)
    found = prepare([source], tmp_path / "out", by="uniref50", shares={"held_out": 0.1})
    assert found.provenance["split"] == {"by": "uniref50", "shares": {"held_out": 0.1}, "seed": 0}
    assert len(found["held_out"]) == pytest.approx(40, abs=20)
    assert found["train"][0].description.startswith("Made n=")


def test_other_headers_are_not_trusted(fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got the header 'sp\|P00000\|MADE_0', takes those of UniRef50"):
        prepare([fasta], tmp_path / "out", by="uniref50")
    assert not (tmp_path / "out").exists()


def test_leakage_is_measured_also_where_it_was_not_prevented(rng: np.random.Generator, tmp_path: Path) -> None:
    twins = families(rng, 200, 2)
    write(tmp_path / "in.fa", (Record(f"UniRef50_A{at}", each) for at, each in enumerate(twins)))
    told = prepare([tmp_path / "in.fa"], tmp_path / "out", by="uniref50").provenance["leakage"]
    assert told["like"] > 0.8 * told["measured"] > 0


def test_more_than_memory_holds_is_refused_or_not_looked_at(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = uniref(tmp_path / "uniref50.fasta", rng)
    monkeypatch.setattr(room, "MOST_RESIDUES", 15_999)
    with pytest.raises(DataError, match=r"got more than 15,999 residues, .* or find them by uniref50"):
        prepare([source], tmp_path / "out")
    assert prepare([source], tmp_path / "out", by="uniref50").provenance["leakage"] is None


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "<!DOCTYPE html>\n<p>404 Not Found</p>\n",
            "line 1 is neither a header of FASTA, which begins with >, nor a sequence: '<!DOCTYPE html>'",
        ),
        ("404\nNot Found.\n", r"the rules take \(2 read; 0 taken; 1 rejected: not"),
        ("", r"no sequence that the rules take \(0 read"),
        (">a\n" + "MKTAYIAKQR" * 5, "got no sequence for held_out out of 1"),
    ],
    ids=["an error page", "an error", "nothing", "one sequence"],
)
def test_a_download_that_failed_is_no_data_set(text: str, says: str, tmp_path: Path) -> None:
    """Nothing takes its place."""
    (tmp_path / "uniref50.fasta").write_text(text)
    with pytest.raises(DataError, match=says):
        prepare([tmp_path / "uniref50.fasta"], tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["uniref50.fasta"]


@pytest.mark.parametrize("name", ["absent.fasta", "absent.pt", "."])
def test_a_source_that_cannot_be_read_is_one_clear_line(name: str, fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot read .*{re.escape(tmp_path.name)}"):
        prepare([fasta, tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"by": "identity"}, "takes kmers or uniref50"),
        ({"shares": {"train": 0.5}}, "got train 0.5, takes shares above 0"),
    ],
)
def test_what_makes_no_split_is_refused_at_once(asked: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=says):
        prepare([tmp_path / "absent"], tmp_path / "out", **asked)


def test_progress_is_told(fasta: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    prepare([fasta], tmp_path / "out", Rules(), progress=lambda *each: told.append(each))
    assert told[-1] == ("sequences clustered", 120, 120)
    assert json.dumps(told)
