"""write_report: the page, and beside it each figure as a file."""

from __future__ import annotations

import os
from pathlib import Path

from headway_apps.proteins.generate import files
from headway_apps.proteins.report.figures import DARK, LIGHT, figures
from headway_apps.proteins.report.page import Drawn, page
from headway_apps.proteins.report.run import Run


def write_report(run: Path, out: Path) -> Path:
    """One HTML page that needs no other file, and beside it a folder with its light figures as PNG."""
    held, folder = Run.open(run), figures_of(out)
    files.check(out, force=True)
    drawn = [Drawn(each, each.png(LIGHT), each.png(DARK)) for each in figures(held)]
    text = page(held, drawn)
    for each in drawn:
        folder.mkdir(exist_ok=True)
        _write(folder / f"{each.figure.name}.png", each.light)
    _write(out, text.encode())
    return out


def figures_of(page: Path) -> Path:
    """The folder, of the page's own name, as several pages may lie in one place."""
    return page.with_name(f"{page.stem}-figures")


def _write(path: Path, content: bytes) -> None:
    """The whole file at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
