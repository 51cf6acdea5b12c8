"""The whole of it in one file that comes back as it was, and the same by the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from proteins.evaluate.made import prepared, trained
from rich.console import Console
from typer.testing import CliRunner

from headway import RequestError
from headway_apps.proteins.cli import app
from headway_apps.proteins.cli.evaluate import show
from headway_apps.proteins.data.shards import Prepared
from headway_apps.proteins.errors import DataError, WeightsError
from headway_apps.proteins.evaluate.attention import attention_of
from headway_apps.proteins.evaluate.evaluation import Evaluation, Samples, evaluate
from headway_apps.proteins.evaluate.likelihood import chosen
from headway_apps.proteins.evaluate.ngrams import baselines
from headway_apps.proteins.model.config import DiTConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("data") / "x")


def test_every_number_is_there_or_its_absence_has_a_reason(data: Prepared, tmp_path: Path) -> None:
    found = evaluate(trained(), data, model="made", samples=Samples(["MKT" * 12, "MAY" * 11, ""], "a test"))
    assert [each.name for each in found.baselines][:2] == ["uniform over 20", "1-gram"]
    assert [each.name for each in found.statistics] == [
        "samples",
        "random",
        "training, shuffled",
        "training",
        "real, shuffled",
        "real",
        "real, whole",
    ]
    assert found.statistics[0].valid == pytest.approx(2 / 3)
    assert [each.name for each in found.statistics if each.nearness is None] == ["training"], "which are copies"
    assert found.likelihood.sequences == found.likelihood.of_sequences == 24
    assert [each.gradients for each in found.attention] == [False, True]
    assert all(each.whole.startswith(each.backend) for each in found.attention)
    assert found.absent == {}
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found
    assert [each.name for each in tmp_path.iterdir()] == ["evaluation.json"]


def test_it_needs_no_network_and_no_other_model(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    for name in ("transformers", "huggingface_hub", "esm", "rdkit"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(socket, "socket", refused)
    found = evaluate(trained(), data, model="made", samples=Samples(["MKT" * 12], "a test"))
    assert found.likelihood.residues == data["held_out"].residues
    assert found.statistics[0].nearness is not None


def test_what_was_not_asked_for_is_named_as_absent(data: Prepared) -> None:
    found = evaluate(trained(), data, model="made", sequences=1)
    assert found.absent == {
        "statistics": "no samples were given or drawn", "standard_error": "one sequence has none",
    }  # fmt: skip
    assert (found.statistics, found.samples, found.likelihood.standard_error) == ([], None, None)


def test_too_many_training_residues_are_not_compared_with_and_that_is_said(
    data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headway_apps.proteins.evaluate.evaluation.MOST_RESIDUES", 10)
    found = evaluate(trained(), data, model="made", samples=Samples(["MKT"], "a test"))
    assert all(each.nearness is None for each in found.statistics)
    assert "are more than the 10 that are held" in found.absent["nearness"]


def test_the_part_that_was_trained_on_is_refused(data: Prepared) -> None:
    with pytest.raises(RequestError, match="got the part train, takes one that was held out"):
        evaluate(trained(), data, model="made", part="train")


def test_n_grams_are_scored_on_what_the_model_was(data: Prepared) -> None:
    found = evaluate(trained(), data, model="made", sequences=5, seed=3)
    assert found.likelihood.sequences == 5
    scored = chosen(data["held_out"], 3, 5)
    assert found.baselines == baselines(data["train"], data["held_out"], scored=scored, seed=3)
    assert found.baselines != baselines(data["train"], data["held_out"], seed=3)


def test_samples_that_are_nucleotides_are_noted(data: Prepared) -> None:
    samples = Samples(["ACGT" * 9, "GATTACA" * 4, "MKT"], "a test")
    notes = evaluate(trained(), data, model="made", samples=samples).notes
    assert any(note.startswith("2 samples are of A, C, G, T, U and N alone: nucleotides") for note in notes)
    assert not any("nucleotides" in each for each in evaluate(trained(), data, model="made").notes)


@pytest.mark.parametrize("change", [{"version": 7}, {"likelihood": None}, {"more": 1}])
def test_another_file_is_refused(data: Prepared, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "evaluation.json"
    evaluate(trained(), data, model="made").save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="evaluate again"):
        Evaluation.load(path)


@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
def test_the_command_prints_the_table_and_writes_the_file(data: Prepared, tmp_path: Path, graph: str) -> None:
    trained(graph).save(tmp_path)
    (tmp_path / "it.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMAAAAAAAAAAAW\n")
    asked = ["--samples", str(tmp_path / "it.fasta")] if graph == "uniform" else ["--count", "3"]
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--data", str(data.folder), "--device", "cpu", *asked])
    assert done.exit_code == 0, done.output
    found = Evaluation.load(tmp_path / "evaluation.json")
    assert f"{found.likelihood.nats_per_residue:.4f}" in done.stdout
    assert "4-gram" in done.stdout
    assert "training, shuffled" in done.stdout
    assert f"written: {tmp_path / 'evaluation.json'}" in done.stdout.replace("\n", "")
    assert found.statistics[0].count == (2 if graph == "uniform" else 3)
    again = dataclasses.replace(found, written="")
    CliRunner().invoke(app, ["evaluate", str(tmp_path), "--data", str(data.folder), "--device", "cpu", *asked])
    assert dataclasses.replace(Evaluation.load(tmp_path / "evaluation.json"), written="") == again


def test_statistics_of_samples_are_not_lost_to_an_evaluation_without(data: Prepared, tmp_path: Path) -> None:
    trained().save(tmp_path)
    asked = ["evaluate", str(tmp_path), "--data", str(data.folder), "--device", "cpu"]
    assert CliRunner().invoke(app, [*asked, "--count", "3"]).exit_code == 0
    before = (tmp_path / "evaluation.json").read_text()
    refused = CliRunner().invoke(app, [*asked, "--sequences", "5"])
    assert refused.exit_code == 1
    told = " ".join(refused.stderr.split())
    assert "which has statistics of samples (drawn by first-hitting in" in told
    assert "give --samples or --count, another --out, or --force" in told
    assert (tmp_path / "evaluation.json").read_text() == before
    assert CliRunner().invoke(app, [*asked, "--sequences", "5", "--force"]).exit_code == 0
    assert Evaluation.load(tmp_path / "evaluation.json").samples is None
    assert CliRunner().invoke(app, [*asked, "--sequences", "6"]).exit_code == 0, "there is nothing to lose"
    (tmp_path / "evaluation.json").write_text(json.dumps(json.loads(before) | {"version": 1}))
    assert "which has statistics of samples" in " ".join(CliRunner().invoke(app, asked).stderr.split())
    (tmp_path / "notes.txt").write_text("mine")
    refused = CliRunner().invoke(app, [*asked, "--count", "3", "--out", str(tmp_path / "notes.txt")])
    assert "which is there and is no evaluation; give another --out, or --force" in " ".join(refused.stderr.split())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("width", [60, 80, 101, 140, 300])
@pytest.mark.parametrize("nearness", [True, False])
def test_tables_are_whole_in_a_console_of_any_width(data: Prepared, width: int, nearness: bool) -> None:
    found = evaluate(trained(), data, model="[b]run[/b]", samples=Samples(["MKT" * 12, "MAY" * 11], "[i]x[/i]"))
    kept = {} if nearness else {"nearness": None}
    rows = [dataclasses.replace(row, residues=12_345_678, **kept) for row in found.statistics]
    told_to = io.StringIO()
    show(dataclasses.replace(found, statistics=rows), Console(file=told_to, width=width))
    told = told_to.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in told
    assert all(f" {row.name} " in told for row in rows), "no name is cut"
    assert told.count("12,345,678") == len(rows) + told.count(" samples ") - 1, "the samples stand in each table"
    assert "[b]run[/b]" in told
    assert "[i]x[/i]" in told


@pytest.mark.parametrize(
    "asked, says",
    [
        (["--samples", "x", "--count", "2"], "takes one of them"),
        (["--part", "other"], "got the part 'other', takes one of train, held_out"),
        (["--device", "cuda:7"], "got device cuda:7, takes what is here"),
        (["--out", "/no/such/folder/x.json"], "takes a file in a folder that is there"),
        (["--out", "/tmp"], "got /tmp, which is no file, takes the name of one"),
    ],
)
def test_a_mistake_is_one_line(data: Prepared, tmp_path: Path, asked: list[str], says: str) -> None:
    trained().save(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--data", str(data.folder), *asked])
    assert (done.exit_code, done.stdout) == (1, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_without_a_model_is_refused(data: Prepared, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--data", str(data.folder)])
    assert done.exit_code == 1
    assert "takes a folder of a trained model, or of a run" in done.stderr


def test_the_averaged_weights_of_a_runs_last_checkpoint_or_its_best_are_what_is_evaluated(tmp_path: Path) -> None:
    from headway_apps.proteins.cli.opened import opened
    from headway_apps.proteins.config import parse
    from headway_apps.proteins.model.dit import DiT
    from headway_apps.training.checkpoints import Checkpoints

    config = parse(
        "data: {folder: x}\nrun: {steps: 10}\noptim: {warmup: 1}\nmodel: {width: 32, blocks: 1, heads: 2, cond: 8}"
    )
    kept = Checkpoints(tmp_path / "checkpoints")
    for step, score in ((1, None), (2, 3.0), (3, 3.5)):
        if step == 2:
            with pytest.raises(WeightsError, match="of which no checkpoint was scored"):
                opened(tmp_path, best=True)
        weights = DiT(config.network).state_dict()
        average = {name: torch.full_like(each, step) for name, each in weights.items()}
        state = {"config": config.model_dump(), "trained": trained().told(), "data": "a fingerprint"}
        kept.save(step, {"model": weights, "average": average}, state, score=score)
    for best, step in ((False, 3), (True, 2)):
        model, name, data = opened(tmp_path, best=best)
        assert (name, data) == (f"{tmp_path.name}, step {step}", "a fingerprint")
        assert all((each == step).all() for each in model.model.parameters())
        assert not model.model.training
    trained().save(tmp_path)
    with pytest.raises(RequestError, match="got --best .* one trained model"):
        opened(tmp_path, best=True)


def test_what_may_mislead_is_noted(data: Prepared, tmp_path: Path) -> None:
    here = evaluate(trained(), data, model="made", trained_on=data["train"].fingerprint, sequences=2)
    assert here.notes == []
    there = evaluate(
        trained(), data, model="made", trained_on="other", sequences=2, samples=Samples(["MKT" * 12, "M.T" * 12], "")
    )
    assert there.notes == [
        f"the model was trained on other data than {data.folder.name}, and may have seen what is held out there",
        "50.0% of the samples are empty, or have letters that no protein has",
    ]
    many = evaluate(trained(), data, model="made", sequences=2, samples=Samples(["MKT" * 12] * 99, ""))
    half = many.statistics[-1].count
    assert many.notes == [
        f"99 samples are more than the {half} proteins of other rows, and k-mers of fewer proteins lie further from any"
        f" others: compare {half} samples"
    ]
    there.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json").notes == there.notes


def test_a_model_that_is_not_there_is_told_as_that(data: Prepared, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "none"), "--data", str(data.folder)])
    assert done.exit_code == 1
    assert "none, which is no folder, takes that of a trained model, or of a run" in done.stderr
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--data", str(data.folder)])
    assert ", which has neither trained.json nor a checkpoint" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    "text, told",
    [
        ("Dear reader,\nthis is no protein.\n", "line 1 is neither a header of FASTA, which begins with >, nor"),
        (">a\nM1T\n>b\nM2T\n", "notes.txt, each of whose 2 sequences has letters that no protein has, takes FASTA"),
    ],
)
def test_a_text_is_no_file_of_samples(data: Prepared, tmp_path: Path, text: str, told: str) -> None:
    trained().save(tmp_path)
    (tmp_path / "notes.txt").write_text(text)
    asked = ["--data", str(data.folder), "--samples", str(tmp_path / "notes.txt")]
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), *asked])
    assert done.exit_code == 1
    assert told in done.stderr


@pytest.mark.usefixtures("flex_uncompiled")
def test_attention_is_told_for_a_kernel_that_takes_filler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "flex")
    config = DiTConfig(width=64, blocks=1, heads=2, cond=8, embedded=33, scored=33, mask=32)
    told = attention_of(config, [400, 5, 256], "cpu")
    assert (told.backend, told.layout) == ("flex", "packed end to end")
    assert "length 768" in told.whole
