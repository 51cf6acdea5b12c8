"""headway demo: `headway try` on a built-in model that has every kind of site, with its page written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli import try_

MODEL = "captioner"


def command(
    report: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("headway-demo.html"),
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Swap, prove, time and report a built-in model, forward and backward.

    Exits with 1 if a site fails the proof.
    """
    # On a busy machine, threads that wait for each other would make so small a model forty times slower.
    try_.command(MODEL, device=device, backward=True, report=report, threads=1)
