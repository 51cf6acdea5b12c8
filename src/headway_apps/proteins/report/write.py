"""write_report: the page, and beside it each figure as a file."""

from __future__ import annotations

from pathlib import Path

from headway_apps.proteins.generate import files
from headway_apps.proteins.report.figures import DARK, LIGHT, figures
from headway_apps.proteins.report.page import Drawn, page
from headway_apps.proteins.report.run import Run
from headway_apps.training import folders


def write_report(run: Path, out: Path) -> Path:
    """One HTML page that needs no other file, and beside it a folder with its light figures as PNG."""
    held, folder = Run.open(run), figures_of(out)
    files.check(out, force=True)
    drawn = [Drawn(each, each.png(LIGHT), each.png(DARK)) for each in figures(held)]
    text = page(held, drawn)
    for each in drawn:
        folder.mkdir(exist_ok=True)
        with folders.replacing(folder / f"{each.figure.name}.png") as partial:
            partial.write_bytes(each.light)
    folders.replace(out, text)
    return out


def figures_of(page: Path) -> Path:
    """The folder, of the page's own name, as several pages may lie in one place."""
    return page.with_name(f"{page.stem}-figures")
