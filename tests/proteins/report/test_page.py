"""The page says all, asks for nothing from elsewhere, escapes everything, and draws nothing that was not measured."""

from __future__ import annotations

import dataclasses
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from proteins.report.made import metrics, run, write_metrics
from typer.testing import CliRunner

from headway_apps.proteins.cli import app
from headway_apps.proteins.evaluate.evaluation import Evaluation, Likelihood
from headway_apps.proteins.evaluate.ngrams import Baseline
from headway_apps.proteins.report.figures import DARK, LIGHT, figures
from headway_apps.proteins.report.page import page, verdict
from headway_apps.proteins.report.run import Run
from headway_apps.proteins.report.write import write_report

VOID = {"meta", "link", "img", "source", "br"}
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`><svg onload=alert(3)>&<!--"
FIGURES = ["loss", "held-out", "rate", "speed", "kmers", "residues"]


class Reader(HTMLParser):
    """Tags in order, and the text; each tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("run"), rises=True)


@pytest.fixture(scope="module")
def written(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(whole, tmp_path_factory.mktemp("out") / "it.html")


def test_the_page_says_all(written: Path, whole: Path) -> None:
    text = " ".join(Reader(written.read_text()).text.split())
    found = Evaluation.load(whole / "evaluation.json")
    for said in (
        "a run", f"{found.likelihood.perplexity:.2f}", "4-gram", "uniform over 20", "real, whole", "3-mer distance",
        "MGSSHHHHHHSSGLVPRGSH", "made.fasta", "6 shorter than 30", "0 of 24 held-out sequences are like one of train",
        found.data["fingerprint"], found.attention[0].why[1:], "as in training, with gradients", "buckets", "128, 256",
        found.machine["torch"], "made <for> a test", "2,000",
    ):  # fmt: skip
        assert said in text, said


def test_it_asks_for_nothing_from_elsewhere(written: Path) -> None:
    text = written.read_text()
    reader = Reader(text)
    for tag, attrs in reader.tags:
        for name in ("src", "href", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
    assert "script" not in [tag for tag, _ in reader.tags]
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"url\(|@import", text)
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_each_figure_is_in_it_for_light_and_dark_and_beside_it(written: Path) -> None:
    tags = Reader(written.read_text()).tags
    images = [attrs["src"] for tag, attrs in tags if tag == "img"]
    darks = [attrs["srcset"] for tag, attrs in tags if tag == "source"]
    assert len(images) == len(darks) == len(set(images + darks)) // 2 == len(FIGURES)
    beside = sorted(path.name for path in (written.parent / f"{written.stem}-figures").iterdir())
    assert beside == sorted(f"{name}.png" for name in FIGURES)
    for name in FIGURES:
        content = (written.parent / f"{written.stem}-figures" / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", content[16:24]) == (936, 442)


def test_n_grams_are_beside_the_curve_only_where_they_are_of_the_same_sequences(whole: Path) -> None:
    """In a demo the curve was of 60 sequences, ended above the line of 1-grams of all, and was below it on all."""
    held = Run.open(whole)
    assert "Dashed" in caption(held)
    few = dataclasses.replace(held, config=held.config | {"look": {"part": "held_out", "sequences": 5}})
    assert "of up to 5 sequences held out" in caption(few)
    assert "The evaluation scored other sequences" in caption(few)
    assert "of up to 5 sequences, at step" in page(few, [])
    assert "Dashed" not in caption(dataclasses.replace(held, config={})), "who knows"
    assert held.evaluation is not None
    ours = dataclasses.replace(held.evaluation.likelihood, sequences=5)
    same = dataclasses.replace(few, evaluation=dataclasses.replace(held.evaluation, likelihood=ours))
    assert "Dashed" in caption(same)
    other = dataclasses.replace(held.evaluation, likelihood=dataclasses.replace(ours, seed=9))
    assert "Dashed" not in caption(dataclasses.replace(few, evaluation=other)), "drawn by another seed"
    assert "Dashed" not in caption(dataclasses.replace(held, evaluation=same.evaluation)), "the curve is of all"
    for data in ({"is_of_training": False}, {"is_of_training": None}, {"part": "test"}):
        elsewhere = dataclasses.replace(held.evaluation, data=held.evaluation.data | data)
        assert "Dashed" not in caption(dataclasses.replace(held, evaluation=elsewhere)), data


def test_a_run_that_is_not_there_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        done = CliRunner().invoke(app, ["report", str(tmp_path / name)])
        assert done.exit_code == 1
        assert f"{name}, which is no folder, takes that of a run" in done.stderr


def caption(run: Run) -> str:
    return next(each.caption for each in figures(run) if each.name == "held-out")


def test_under_a_curriculum_it_says_why_the_loss_may_rise(whole: Path, tmp_path: Path) -> None:
    said = "the training loss can rise while the model gets better"
    assert said in page(Run.open(whole), [])
    assert "from step 400 on" in page(Run.open(whole), [])
    assert said not in page(Run.open(run(tmp_path, evaluated=False)), [])


def test_everything_is_escaped(whole: Path) -> None:
    held = Run.open(whole)
    assert held.evaluation is not None
    assert held.data is not None
    evaluation = dataclasses.replace(
        held.evaluation,
        model=ATTACK, samples=ATTACK, first=[ATTACK], machine={ATTACK: ATTACK}, absent={ATTACK: ATTACK},
        baselines=[Baseline(ATTACK, 1.0, 2.0)],
        data=held.evaluation.data | {"part": ATTACK},
        attention=[dataclasses.replace(x, backend=ATTACK, why=ATTACK, whole=ATTACK) for x in held.evaluation.attention],
        statistics=[dataclasses.replace(x, name=ATTACK) for x in held.evaluation.statistics],
    )  # fmt: skip
    provenance = {
        "sources": [{"file": ATTACK, "bytes": 1, "sha256": ATTACK}], "note": ATTACK, "rules": {ATTACK: ATTACK},
        "counts": {"read": 1, "taken": 1, "rejected": {ATTACK: 1}, "mended": {ATTACK: 1}, "noted": {}},
        "split": {"by": {ATTACK: ATTACK}}, "written": ATTACK,
    }  # fmt: skip
    data = dataclasses.replace(
        held.data, provenance=provenance, fingerprint=ATTACK, parts={ATTACK: held.data.parts["train"]}
    )
    attacked = dataclasses.replace(
        held, name=ATTACK, config={ATTACK: {ATTACK: ATTACK}, "curriculum": {"kind": ATTACK, "steps": None}}, data=data,
        evaluation=evaluation, samples=[ATTACK], samples_from=ATTACK, absent={ATTACK: ATTACK},
    )  # fmt: skip
    reader, plain = Reader(page(attacked, [])), Reader(page(held, []))
    assert reader.text.count(ATTACK) > 25
    assert {tag for tag, _ in reader.tags} <= {tag for tag, _ in plain.tags}
    assert not [name for _, attrs in reader.tags for name in attrs if name.startswith("on")]


def test_what_is_absent_is_named_and_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    out = write_report(tmp_path / "empty", tmp_path / "it.html")
    reader = Reader(out.read_text())
    assert "img" not in [tag for tag, _ in reader.tags]
    assert [each.name for each in tmp_path.glob("*figures")] == []
    for said in ("No evaluation: there is no evaluation.json", "No metrics", "No config", "No data", "No samples"):
        assert said in reader.text
    assert "Perplexity" not in reader.text


def test_only_what_was_told_becomes_a_figure(tmp_path: Path) -> None:
    made = run(tmp_path, evaluated=False)
    write_metrics(
        made, [{"step": 1, "seconds": 1.0, "train/loss": 2.9}, {"step": 2, "seconds": 2.0, "val/loss": "NaN"}]
    )
    assert [each.name for each in figures(Run.open(made))] == ["loss"]
    write_metrics(made, metrics(steps=40))
    assert [each.name for each in figures(Run.open(made))] == ["loss", "rate", "speed"]


def test_a_figure_is_the_same_twice_another_in_the_dark_and_sets_nothing(whole: Path) -> None:
    before = dict(matplotlib.rcParams)
    figure = next(figures(Run.open(whole)))
    assert figure.png(LIGHT) == figure.png(LIGHT) != figure.png(DARK)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "nats, error, word, said",
    [
        (2.80, 0.005, "good", "Better than counting: perplexity 16.44 at most, against 17.46 of the 4-gram"),
        (2.855, 0.005, "warm", "by less than two standard errors"),
        (2.80, None, "warm", "Not clearly better"),
        (2.861, 0.0001, "bad", "No better than counting"),
    ],
)
def test_the_verdict_is_of_the_best_baseline(nats: float, error: float | None, word: str, said: str) -> None:
    ours = Likelihood("absorbing", nats, 2.718281828459045**nats, error, 0.0, 10, 10, 100, 1, 0)
    found = verdict(ours, [Baseline("uniform over 20", 2.9957, 20.0), Baseline("4-gram", 2.86, 17.4615)])
    assert found[0] == word
    assert said in found[1]


def test_the_command_writes_it_into_the_run(tmp_path: Path) -> None:
    made = run(tmp_path, evaluated=False)
    write_metrics(made, metrics(steps=20))
    done = CliRunner().invoke(app, ["report", str(made)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"written: {made / 'report.html'}, and its figures in {made / 'report-figures'}\n"
    assert (made / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("asked", [["/no/such/run"], ["{run}", "--out", "/no/such/folder/x.html"]])
def test_a_mistake_is_one_line(whole: Path, asked: list[str]) -> None:
    done = CliRunner().invoke(app, ["report", *(each.format(run=whole) for each in asked)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
