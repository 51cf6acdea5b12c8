"""headway proteins report: one HTML page of a run, with its figures beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway_apps.proteins.cli.terminal import failures


@failures()
def command(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The page to write.", show_default="report.html in the run's folder")
    ] = None,
) -> None:
    """Write one page of a run: what was trained on what, how it went, and how good it is.

    What was not measured is named as absent: `headway proteins evaluate` measures.
    """
    from headway_apps.proteins.report.write import figures_of, write_report

    out = write_report(run, run / "report.html" if out is None else out)
    figures = f", and its figures in {figures_of(out)}" if figures_of(out).is_dir() else ""
    typer.echo(f"written: {out}{figures}")
