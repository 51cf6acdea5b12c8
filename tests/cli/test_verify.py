"""headway verify: 0 for what holds, 1 for what does not, 2 for what is no certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headway.cli import app

RUN = CliRunner()


def checked(path: Path) -> tuple[int, str]:
    done = RUN.invoke(app, ["verify", str(path)], env={"COLUMNS": "200", "TERM": "dumb"})
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    options = ["--certificate", str(folder / "c.json"), "--json", str(folder / "r.json"), "--rounds", "0"]
    assert RUN.invoke(app, ["try", "vit", *options]).exit_code == 0
    return folder


@pytest.mark.parametrize("name", ["c.json", "r.json"])
def test_a_good_one_holds(saved: Path, name: str) -> None:
    code, text = checked(saved / name)
    assert code == 0, text
    assert "certificate of VisionTransformer: passed" in text
    assert text.splitlines()[-1] == "holds"


def test_numbers_of_a_failure_do_not_hold(saved: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = json.loads((saved / "c.json").read_text())
    data["proofs"][0]["errors"][0]["worst_now"] = 1.0
    data["passed"] = False
    path = tmp_path / "c.json"
    path.write_text(json.dumps(data))
    code, text = checked(path)
    assert code == 1
    assert text.splitlines()[-1] == "does not hold"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "headway report 1", "certificate": null}', "\xff"])
def test_no_certificate_is_exit_code_2(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    assert checked(path)[0] == 2


def test_a_changed_verdict_is_exit_code_2(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text((saved / "c.json").read_text().replace('"passed": true', '"passed": false', 1))
    code, text = checked(path)
    assert code == 2
    assert "its numbers say" in text


def test_a_missing_file_is_exit_code_2(tmp_path: Path) -> None:
    assert checked(tmp_path / "none.json")[0] == 2
