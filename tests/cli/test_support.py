"""headway support: the page in the docs is the command's output."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from headway.backends.registry import BACKENDS, NAMES
from headway.cli import app
from headway.cli.support import title

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def test_the_page_is_what_the_command_prints() -> None:
    done = CliRunner().invoke(app, ["support"])
    assert done.exit_code == 0
    assert done.stdout == PAGE.read_text(), "run: headway support > docs/support.md"


def test_every_backend_has_its_section() -> None:
    text = PAGE.read_text()
    assert {name for name in NAMES if name in text} == set(NAMES)
    assert all(f"## {title(backend)}\n" in text for backend in BACKENDS)
