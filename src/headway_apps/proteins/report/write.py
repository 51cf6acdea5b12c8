"""write_report: the page, and beside it each figure as a file."""

from __future__ import annotations

import os
from pathlib import Path

from headway_apps.proteins.errors import DataError
from headway_apps.proteins.report.figures import DARK, LIGHT, figures
from headway_apps.proteins.report.page import Drawn, page
from headway_apps.proteins.report.run import Run

FIGURES = "figures"
"""Of the page's folder."""


def write_report(run: Path, out: Path) -> Path:
    """One HTML page that needs no other file, and the light figures of it as PNG in the folder `figures` beside it."""
    held = Run.open(run)
    if not out.absolute().parent.is_dir():
        raise DataError(f"got {out}, takes a file in a folder that is there; make {out.absolute().parent}")
    drawn = [Drawn(each, each.png(LIGHT), each.png(DARK)) for each in figures(held)]
    text = page(held, drawn)
    for each in drawn:
        (out.parent / FIGURES).mkdir(exist_ok=True)
        _write(out.parent / FIGURES / f"{each.figure.name}.png", each.light)
    _write(out, text.encode())
    return out


def _write(path: Path, content: bytes) -> None:
    """The whole file at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
