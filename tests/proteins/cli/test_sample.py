"""`headway proteins sample`: FASTA of what was asked for; what cannot be is one line, exit code 1, and no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from proteins.generate import tiny
from typer.testing import CliRunner, Result

from headway_apps.proteins.alphabet import STANDARD
from headway_apps.proteins.cli import app
from headway_apps.proteins.data import fasta
from headway_apps.proteins.diffusion.samplers import Analytic, Euler
from headway_apps.proteins.trained import WEIGHTS

SRC = Path(__file__).parents[3] / "src"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    tiny.untrained().save(tmp_path / "model")
    return tmp_path / "model"


def sample(model: Path, *arguments: object, code: int = 0) -> Result:
    out = model.parent / "new.fasta"
    done = CliRunner().invoke(app, ["sample", str(model), "--out", str(out), *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def made(model: Path) -> list[fasta.Record]:
    return list(fasta.read(model.parent / "new.fasta"))


def test_lengths_are_those_of_the_training_data_unless_asked_otherwise(model: Path) -> None:
    done = sample(model)
    found = made(model)
    residues = sum(len(each.sequence) for each in found)
    assert len(found) == 100
    assert {len(each.sequence) for each in found} == set(tiny.LENGTHS)
    assert set("".join(each.sequence for each in found)) <= set(STANDARD)
    assert done.stderr == ""
    assert done.stdout == (
        f"written: {model.parent / 'new.fasta'}, 100 proteins of {residues:,} residues by first-hitting in 24 calls of "
        "model, with seed 0, in float32 on cpu\n"
    )


@pytest.mark.parametrize(
    "length, allowed", [("9", {9}), ("7-9", {7, 8, 9}), ("4,4,30", {4, 30})], ids=lambda each: str(each)
)
def test_lengths_as_asked(model: Path, length: str, allowed: set[int]) -> None:
    sample(model, "--length", length, "-n", 40)
    assert {len(each.sequence) for each in made(model)} == allowed


def test_templates_of_the_command_line_and_of_a_file_are_filled_in(model: Path, tmp_path: Path) -> None:
    (tmp_path / "some.fasta").write_text(">tail\n_5WW\n")
    sample(model, "--template", "MKT_3", "--templates", tmp_path / "some.fasta", "-n", 2, "--seed", 7)
    found = made(model)
    assert [each.sequence.startswith("MKT") and len(each.sequence) == 6 for each in found] == [True, True, False, False]
    assert [each.sequence.endswith("WW") and len(each.sequence) == 7 for each in found] == [False, False, True, True]
    assert [each.name for each in found] == ["seed7-1", "seed7-2", "seed7-3", "seed7-4"]
    assert found[0].description == "length=6 sampler=first-hitting template=MKT_3"
    assert found[3].description == "length=7 sampler=first-hitting template=tail"


@pytest.mark.parametrize("sampler, calls", [("first-hitting", 6), ("euler", 9), ("analytic", 9)])
def test_every_sampler_runs_by_its_name(model: Path, sampler: str, calls: int) -> None:
    steps = [] if sampler == "first-hitting" else ["--steps", 8]
    done = sample(model, "--length", 6, "-n", 3, "--sampler", sampler, *steps)
    assert f"in {calls} calls" in done.stdout
    assert [each.description for each in made(model)] == [
        f"length=6 sampler={sampler}{'-8' if steps else ''}" for _ in range(3)
    ]


def test_the_seed_and_the_budget_decide(model: Path) -> None:
    def drawn(*arguments: object) -> list[str]:
        sample(model, "--force", "-n", 6, *arguments)
        return [each.sequence for each in made(model)]

    one = drawn("--seed", 3)
    assert drawn("--seed", 3) == one
    assert [len(each) for each in drawn("--seed", 4)] != [len(each) for each in one]
    assert [len(each) for each in drawn("--seed", 3, "--tokens", 20)] == [len(each) for each in one]


def test_the_precision_is_told(model: Path) -> None:
    assert "in bfloat16 on cpu" in sample(model, "-n", 1, "--precision", "bfloat16", "--device", "cpu").stdout


def test_a_file_that_is_there_is_kept_unless_forced(model: Path) -> None:
    out = model.parent / "new.fasta"
    out.write_text("mine")
    (model / WEIGHTS).rename(model / "away")  # it is refused before the model is looked at
    assert "there already" in sample(model, code=1).stderr
    assert out.read_text() == "mine"
    (model / "away").rename(model / WEIGHTS)
    sample(model, "-n", 1, "--force")
    assert [each.name for each in made(model)] == ["seed0-1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--length", "long"], "got the length 'long'"),
        (["--length", "9", "--template", "M_"], "leave it out"),
        (["--template", "MX_"], "got 'X' as character 2"),
        (["--templates", "nowhere.fasta"], "cannot read nowhere.fasta"),
        (["--sampler", "ddpm"], "known: first-hitting, euler, analytic"),
        (["--steps", "0"], "takes 1 step or more"),
        (["--seed", "-1"], "got the seed -1"),
        (["--tokens", "0"], "budget of 0"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "gpu"], "gpu"),
        (["--precision", "bf16"], "bf16"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else None,
)
def test_what_cannot_be_is_one_line_and_no_file(model: Path, options: list[str], said: str) -> None:
    before = sorted(model.parent.iterdir())
    done = sample(model, *options, code=1)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert sorted(model.parent.iterdir()) == before


def test_a_model_that_is_none_or_broken_is_one_line(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-100])
    for path in (model, model.parent, model.parent / "no"):
        done = CliRunner().invoke(app, ["sample", str(path), "--out", str(model.parent / "new.fasta")])
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert str(path) in done.stderr


def test_steps_and_samplers_are_in_the_help_as_they_are() -> None:
    text = CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": "200"}).stdout
    assert f"{Euler().steps} of euler, {Analytic().steps} of analytic" in text


def test_it_runs_from_any_folder_and_asks_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "headway_apps.proteins", "sample", "../model", "--out", "new.fasta", "-n", "2"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(SRC)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(fasta.read(tmp_path / "elsewhere" / "new.fasta"))) == 2


def test_lengths_beyond_those_of_the_training_data_are_told(model: Path) -> None:
    known = max(tiny.LENGTHS)
    assert sample(model, "-n", 1, "--length", known).stderr == ""
    said = f"note: {known + 1} residues are more than the {known} of any protein it was trained on\n"
    assert sample(model, "-n", 1, "--force", "--template", f"M_{known}").stderr == said
