"""The terminal table: every width, with and without colour."""

from __future__ import annotations

import io

import pytest
import torch
from report.made import Mixed, failed, named, real
from rich.console import Console
from torch import nn

from headway.report import Report, show, show_census
from headway.swap import inspect, swap


def printed(report: Report, width: int = 120, **options: object) -> str:
    out = io.StringIO()
    show(report, Console(file=out, width=width, **options))  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for report in (real(), failed()):
        assert all(len(line) <= width for line in printed(report, width).splitlines())


def test_says_all_of_a_site() -> None:
    text = printed(real(), 160)
    row = real().rows[0]
    (line,) = (line for line in text.splitlines() if line.startswith("layer.self_attn"))
    assert line.split()[:4] == ["layer.self_attn", "nn.MultiheadAttention", "auto", next(iter(row.chosen))]
    assert f"a  {row.why[0]}" in text
    assert "unused" in text
    assert "did not run with the example" in text
    assert "forward: faster: 2.00x  2 ms before, 1 ms now" in text
    assert "forward and backward: no gain: 1.00x" in text
    assert text.splitlines()[-1] == "proven: 2 of 3 sites swapped, and each errs no more than before"


def test_a_narrow_table_breaks_no_name() -> None:
    lines = [line.strip() for line in printed(real(), 80).splitlines()]
    at = next(at for at, line in enumerate(lines) if line.startswith("layer.self_attn "))
    assert lines[at + 1].split()[0] == "nn.MultiheadAttention"  # beside the second of the backends chosen


def test_runs_of_0_are_explained() -> None:
    said = "0 runs: chosen for a kind of call that only the proof made"
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(1, 4, 16)
    report = Report.of(swap(model, lambda model: model(x, x, x, need_weights=False)))
    assert said in printed(report)
    with torch.no_grad():
        model(x, x, x, need_weights=False)
    assert said not in printed(report)


def test_says_what_failed() -> None:
    text = printed(failed(), 160)
    assert "bad: gradient of input 0 errs 1e-05 at worst" in text
    assert "not proven: 1 of 2 sites swapped; 1 failed the proof" in text


def test_names_are_no_markup() -> None:
    assert "[red]x[/red]" in printed(named("[red]x[/red]"), 200)


def test_no_escape_sequences_where_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in printed(real())  # a file is no terminal
    assert "\x1b[" in printed(real(), force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    coloured = printed(real(), force_terminal=True)
    assert "\x1b[3" not in coloured.replace("\x1b[3m", "")


def test_a_planned_census_says_what_a_swap_would_do() -> None:
    out = io.StringIO()
    show_census(inspect(Mixed()), Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert lines[0] == "Mixed: 2 sites of attention, of which a swap would take 2"
    assert "swap it" in lines[3]
    assert lines[-1].startswith("note: calls of F.scaled_dot_product_attention")
