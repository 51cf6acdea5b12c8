"""A FASTA file of new proteins: whole or not there, and never in another's place unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway_apps.proteins.data import fasta
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.generate.files import check, save

PROTEINS = ["MKT" * 30, "W"]


def save_two(path: Path, force: bool = False) -> None:
    save(path, PROTEINS, seed=7, sampler="euler-12", templates=["one", ""], force=force)


def test_headers_say_how_each_was_made(tmp_path: Path) -> None:
    save_two(tmp_path / "new.fasta")
    assert list(fasta.read(tmp_path / "new.fasta")) == [
        fasta.Record("seed7-1", PROTEINS[0], "length=90 sampler=euler-12 template=one"),
        fasta.Record("seed7-2", "W", "length=1 sampler=euler-12"),
    ]


def test_what_is_there_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "new.fasta"
    path.write_text("mine")
    with pytest.raises(DataError, match="there already.*--force"):
        save_two(path)
    assert path.read_text() == "mine"
    save_two(path, force=True)
    assert path.read_text().startswith(">seed7-1")
    assert list(tmp_path.iterdir()) == [path]


def test_what_breaks_off_leaves_what_was_there_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new.fasta"
    path.write_text("mine")

    def full(partial: Path, records: object) -> None:
        partial.write_text(">half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fasta, "write", full)
    with pytest.raises(DataError, match=r"cannot write .*new\.fasta: No space left on device; nothing was kept"):
        save_two(path, force=True)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_without_a_folder_is_known_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="in a folder that is there"):
        check(tmp_path / "no" / "new.fasta")


@pytest.mark.parametrize("path", ["/dev/null", "."])
def test_what_is_no_file_is_never_replaced(path: str) -> None:
    with pytest.raises(DataError, match="is no file"):
        check(Path(path), force=True)
