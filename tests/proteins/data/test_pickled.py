"""Lists that torch.save wrote: read, and never run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headway_apps.proteins.data.pickled import read_pickled
from headway_apps.proteins.errors import DataError


class Runs:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize(
    "items",
    [
        ["MKT", "ACD"],
        [{"protein_seq": "MKT", "prot_tokens": torch.zeros(512, dtype=torch.int64), "length": 3}, {"sequence": "ACD"}],
        [{"text": "MKT"}, OrderedDict(sequence="ACD", name="x")],
    ],
    ids=["strings", "the seed's dicts", "other keys"],
)
def test_reads_the_sequences_of(items: list[Any], tmp_path: Path) -> None:
    torch.save(items, tmp_path / "processed_uniref50.pt")
    found = list(read_pickled(tmp_path / "processed_uniref50.pt"))
    assert [each.sequence for each in found] == ["MKT", "ACD"]
    assert [each.name for each in found] == ["processed_uniref50:0", "processed_uniref50:1"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("force", [False, True], ids=["", "though the environment asks for it"])
def test_a_pickle_with_code_is_refused_and_not_run(
    legacy: bool, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof = tmp_path / "it ran"
    torch.save(["MKT", Runs(proof)], tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match=r"evil\.pt, which holds more than numbers.* write the sequences as FASTA"):
        list(read_pickled(tmp_path / "evil.pt"))
    assert not proof.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # or nothing was proved
    assert proof.exists()


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(["MKT", Runs(proof)], protocol=2))
    with pytest.raises(DataError, match=r"evil\.pt"):
        list(read_pickled(tmp_path / "evil.pt"))
    assert not proof.exists()


@pytest.mark.parametrize("kept", [0, 10, 200, -20])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    torch.save([{"sequence": "MKT" * 100}] * 50, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:kept])
    with pytest.raises(DataError, match=r"cut\.pt"):
        list(read_pickled(tmp_path / "cut.pt"))


def test_a_damaged_file_is_refused_or_read_whatever_was_damaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    torch.save([{"sequence": "MKT"}, "ACD"] * 5, tmp_path / "bad.pt", _use_new_zipfile_serialization=False)
    whole, refused = (tmp_path / "bad.pt").read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(30, len(damaged))] = rng.integers(256)
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:
            list(read_pickled(tmp_path / "bad.pt"))
        except DataError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "content, says",
    [
        ({"sequence": "MKT"}, "got a dict in .*, takes a list"),
        (["MKT", 7], "got a int as item 1 of .*, takes a string"),
        ([{"seq": "MKT"}], r"got a dict with \['seq'\] as item 0 .* under protein_seq, sequence, text"),
        ([{"sequence": None}], r"got a dict with \['sequence'\] as item 0"),
    ],
)
def test_a_file_of_something_else_is_refused(content: object, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(DataError, match=says):
        list(read_pickled(tmp_path / "other.pt"))


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*absent.pt: No such file"):
        list(read_pickled(tmp_path / "absent.pt"))
