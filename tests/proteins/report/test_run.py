"""What a run's folder holds is read; what it lacks is named; what is damaged raises."""

from __future__ import annotations

from pathlib import Path

import pytest
from proteins.report.made import metrics, run, write_metrics

from headway_apps.proteins.errors import DataError
from headway_apps.proteins.report.run import Run
from headway_apps.training.errors import TrackerError


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return run(tmp_path)


def test_a_whole_run_lacks_nothing(whole: Path) -> None:
    found = Run.open(whole)
    assert found.absent == {}
    assert (found.name, found.checkpoints, found.curriculum) == ("a run", [2000], ("none", None))
    assert len(found.curve("train/loss")) == 100
    assert len(found.curve("val/loss")) == 10
    assert found.samples_from == "made by hand"
    assert found.data is not None
    assert found.data.parts["train"]["sequences"] == 60


@pytest.mark.parametrize(
    "lost, names",
    [
        ("config.yaml", {"config"}),
        ("metrics.jsonl", {"metrics"}),
        ("evaluation.json", {"evaluation"}),
        ("checkpoints/step-000002000", {"checkpoints"}),
    ],
)
def test_what_is_lost_is_named_and_the_rest_is_there(whole: Path, lost: str, names: set[str]) -> None:
    (whole / lost).rmdir() if (whole / lost).is_dir() else (whole / lost).unlink()
    assert Run.open(whole).absent.keys() == names


def test_a_folder_that_is_no_run_is_refused_and_one_that_has_just_begun_lacks_the_rest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run's folder: it has no config.yaml"):
        Run.open(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    found = Run.open(tmp_path)
    assert found.absent.keys() == {"config", "metrics", "evaluation", "checkpoints", "data", "samples"}


def test_without_an_evaluation_samples_are_those_of_training_and_data_those_of_the_config(tmp_path: Path) -> None:
    made = run(tmp_path, evaluated=False)
    found = Run.open(made)
    assert found.samples == ["MKTAYIAKQRQI", "MAAW"]
    assert found.samples_from == "samples/step-00002000.fasta"
    assert found.data is not None
    assert found.data.told_by == "its folder"
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "cannot be read here" in Run.open(made).absent["data"]


def test_numbers_that_are_none_are_counted_and_not_drawn(whole: Path) -> None:
    lines = metrics(steps=100, every=20)
    lines[2]["train/loss"] = "NaN"
    lines[3]["train/loss"] = "Infinity"
    write_metrics(whole, lines)
    found = Run.open(whole)
    assert [step for step, _ in found.curve("train/loss")] == [20, 40, 100]
    assert found.lost("train/loss") == 2


@pytest.mark.parametrize("name", ["config.yaml", "evaluation.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["{\n", "[1, 2]\n"])
def test_what_is_damaged_raises(whole: Path, name: str, text: str) -> None:
    (whole / name).write_text(text)
    with pytest.raises((DataError, TrackerError), match=name):
        Run.open(whole)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes that of a run"):
        Run.open(tmp_path / "absent")
