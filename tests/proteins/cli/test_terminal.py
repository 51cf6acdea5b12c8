"""A failure is one line and exit code 1, a mistake of ours keeps its traceback; progress needs no terminal."""

from __future__ import annotations

import sys

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from headway_apps.proteins.cli import terminal
from headway_apps.proteins.errors import DataError


def run(error: BaseException) -> Result:
    app = typer.Typer()

    @app.command()
    @terminal.failures()
    def command(number: int = 3) -> None:
        raise error

    return CliRunner().invoke(app, ["--number", "4"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("got a, takes b\n  asked  c"), "got a, takes b asked c"),
        (
            FileNotFoundError(2, "No such file or directory", "x.fasta"),
            "cannot read or write x.fasta: No such file or directory",
        ),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            ModuleNotFoundError("No module named 'pyarrow.lib'", name="pyarrow.lib"),
            "got no package pyarrow.lib, which this command takes; pip install '.[proteins]' in Headway's folder",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"),
            "CUDA out of memory; give fewer tokens in a batch, or a smaller model",
        ),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_failure_is_one_line_and_exit_code_1(error: Exception, line: str) -> None:
    done = run(error)
    assert (done.exit_code, done.stderr, done.stdout) == (1, f"error: {line}\n", "")


@pytest.mark.parametrize("error", [KeyError("x"), ModuleNotFoundError("x", name="headway_apps.no"), RuntimeError("x")])
def test_a_mistake_of_ours_is_not_hidden(error: Exception) -> None:
    assert run(error).exception is error


def test_without_a_terminal_a_line_is_told_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    tell = terminal._lines(lambda: now)
    for now in (1.0, 9.9, 10.0, 11.0, 19.9, 25.0):
        tell("network calls", int(1000 * now), None if now == 25.0 else 30_000)
    assert capsys.readouterr().err == "network calls: 10,000 of 30,000\nnetwork calls: 25,000\n"


def test_what_is_quick_is_quiet_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal.told() as tell:
        tell("network calls", 1, 2)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_bars_on_stderr_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.told() as tell:
        tell("sequences clustered", 1, 2)
        tell("sequences clustered", 2, 2)
        tell("sequences taken", 7, None)
    out, err = capsys.readouterr()
    assert out == ""
    assert "sequences clustered" in err
    assert "2/2" in err
    assert "7/?" in err
