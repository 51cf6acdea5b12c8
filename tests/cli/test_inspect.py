"""headway inspect: what a swap would do, as a table and as JSON."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from headway.cli import app

RUN = CliRunner()


def test_prints_the_census() -> None:
    done = RUN.invoke(app, ["inspect", "captioner"], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    assert done.output.startswith("Captioner: 7 sites of attention, of which a swap would take 6")
    assert "leave it, because it is written by hand at" in done.output


def test_prints_json_and_nothing_else() -> None:
    done = RUN.invoke(app, ["inspect", "decoder", "--json", "--skip", "blocks.0.*", "--backend", "sdpa-math"])
    assert done.exit_code == 0
    sites = json.loads(done.output)["sites"]
    assert [site["swapped"] for site in sites] == [False, True, True, True]
    assert {site["asked"] for site in sites} == {"sdpa-math"}
    assert all(site["runs"] == {} and site["decisions"] == [] for site in sites)


def test_a_wrong_command_line_is_exit_code_2() -> None:
    assert RUN.invoke(app, ["inspect", "decoder", "--only", "nothing"]).exit_code == 2
    assert RUN.invoke(app, ["inspect", "nothing"]).exit_code == 2
