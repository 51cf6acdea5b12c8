"""headway verify: whether a certificate is one, and holds on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.errors import CertificateError
from headway.swap.verify import verify


def command(
    certificate: Annotated[
        Path, typer.Argument(metavar="CERTIFICATE", help="As `headway try --certificate` writes it.")
    ],
) -> None:
    """Check a certificate: its form, that its verdict follows from its numbers, and its edge deck, dealt again here.

    Exits with 1 if it does not hold, with 2 if it cannot be read.
    """
    try:
        verdict = verify(certificate)
    except CertificateError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(str(verdict))
    typer.echo("holds" if verdict.holds else "does not hold")
    if not verdict.holds:
        raise typer.Exit(1)
