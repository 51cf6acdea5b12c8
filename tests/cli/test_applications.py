"""Commands of applications: part of `headway` where it is installed, and told of where it is only on the path."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from headway import cli

RUN = CliRunner()


def test_an_application_is_a_command_where_headway_is_installed() -> None:
    assert "prepare" in RUN.invoke(cli.app, ["proteins", "-h"]).output


def test_without_an_install_it_says_how_else_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda **_: ())
    done = RUN.invoke(cli.app, ["proteins", "prepare"])
    assert done.exit_code == 2
    assert "python -m headway_apps.proteins does the same" in done.output


@pytest.mark.parametrize("name", ["training", "bogus", "no.such"])
def test_what_is_no_application_is_an_unknown_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda **_: ())
    done = RUN.invoke(cli.app, [name])
    assert done.exit_code == 2
    assert "No such command" in done.output
