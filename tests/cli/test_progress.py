"""Progress on stderr: on a terminal, and as lines where it is asked for; never among what is printed."""

from __future__ import annotations

import logging

import pytest
from typer.testing import CliRunner

from headway.choice import child
from headway.cli import app

RUN = CliRunner()
TRY = ["try", "vit", "--rounds", "0"]


def test_a_terminal_is_told_what_a_proof_is_at() -> None:
    on_a_terminal = RUN.invoke(app, TRY, env={"FORCE_COLOR": "1", "COLUMNS": "200"})
    piped = RUN.invoke(app, TRY, env={"COLUMNS": "200"})
    assert "proving the whole model" in on_a_terminal.stderr
    assert "proving" not in on_a_terminal.stdout
    assert piped.exit_code == 0
    assert piped.stderr == ""
    assert logging.getLogger("headway").level == logging.NOTSET
    assert not logging.getLogger("headway").handlers


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_doctor_says_what_it_does_where_nobody_sees_a_spinner(form: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "run", lambda *_, **__: child.Outcome(None))  # which is seconds
    done = RUN.invoke(app, ["doctor", "--backend", "reference", *form])
    assert done.stderr.splitlines() == ["running each backend once, in a process of its own", "trying reference on cpu"]
    assert "trying" not in done.stdout
