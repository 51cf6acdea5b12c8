"""The report as data: verdict, levels, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
from report.made import Mixed, errors, failed, real

from headway.report import Report
from headway.report.report import Level, level
from headway.swap import swap
from headway.swap.verify import read


def test_a_swap_that_holds() -> None:
    report = real()
    assert report.proven
    assert report.verdict == "proven: 2 of 3 sites swapped, and each errs no more than before"
    assert [(row.site, row.state) for row in report.rows] == [
        ("layer.self_attn", "swapped"), ("unused", "left alone"), ("causal", "swapped"),
    ]  # fmt: skip
    row = report.rows[0]
    assert sum(row.chosen.values()) == 1
    assert row.forward is not None
    assert 0 < row.forward.now < 1e-5
    assert row.why[0].startswith("first in order")
    assert report.rows[1].why == (f"left alone, because {report.census.tickets[1].because}",)


def test_a_site_that_failed_is_named() -> None:
    report = failed()
    assert not report.proven
    assert report.verdict == "not proven: 1 of 2 sites swapped; 1 failed the proof"
    assert report.failures == ("bad: gradient of input 0 errs 1e-05 at worst, 2.5e-06 rms; before 1e-07, 2.5e-08",)
    assert [row.state for row in report.rows] == ["swapped", "failed"]
    assert report.rows[1].gradients == Level(1e-7, 1e-5)


def test_nothing_swapped_is_not_proven() -> None:
    report = Report.of(swap(torch.nn.Linear(2, 2), torch.randn(1, 2)))
    assert not report.proven
    assert report.verdict == "nothing swapped: no attention was found"
    alone = dataclasses.replace(real(), census=dataclasses.replace(real().census, tickets=real().census.tickets[1:2]))
    assert alone.verdict == "nothing swapped: every site is left alone"
    assert not alone.proven


def test_without_an_example_nothing_is_proven() -> None:
    report = Report.of(swap(Mixed()))
    assert not report.proven
    assert report.verdict == "not proven: 2 of 2 sites swapped, and no example was given"


def test_json_holds_census_and_certificate(tmp_path: Path) -> None:
    report = real()
    data = json.loads(report.save(tmp_path / "report.json").read_text())
    assert (data["format"], data["proven"]) == ("headway report 1", True)
    assert [site["name"] for site in data["census"]["sites"]] == ["layer.self_attn", "unused", "causal"]
    decision = data["census"]["sites"][0]["decisions"][0]
    refusal = decision["refusals"]["flash4"][0]
    assert refusal == {"got": "cpu tensors", "takes": "cuda", "remedy": "move q, k and v to cuda"}
    assert data["times"]["passes"][0]["claim"] == "faster: 2.00x"
    assert {mask["words"] for mask in data["masks"]} == {picture.words for picture in report.pictures}
    certificate = tmp_path / "certificate.json"
    certificate.write_text(json.dumps(data["certificate"]))
    assert read(certificate).passed


def test_json_of_a_nan_is_still_json(tmp_path: Path) -> None:
    report = failed()
    assert report.certificate is not None
    proof = dataclasses.replace(report.certificate.proofs[0], errors=(errors("forward", 1e-7, math.inf),))
    broken = dataclasses.replace(report, certificate=dataclasses.replace(report.certificate, proofs=(proof,)))
    json.loads(broken.save(tmp_path / "report.json").read_text(), parse_constant=lambda word: 1 / 0)


def test_the_level_is_the_worst_of_several() -> None:
    assert level([]) is None
    assert level([errors("a", 1e-7, 2e-7), errors("b", 3e-7, 1e-7)]) == Level(3e-7, 2e-7)
    # Its truth is 0, so it is set against the others.
    zero = dataclasses.replace(errors("c", 1e-9, 4e-7), largest=0.0)
    assert level([errors("a", 1e-7, 2e-7), zero]) == Level(1e-7, 4e-7)
    # A truth that judges nothing says nothing.
    assert level([dataclasses.replace(errors("d", 1.0, 1.0), judged=0.0)]) is None
