"""headway verify: whether a certificate is one, and holds on this machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from headway.cli.progress import told
from headway.errors import CertificateError
from headway.report.report import FORMAT
from headway.swap.verify import Verdict, verify


def command(
    certificate: Annotated[
        Path, typer.Argument(metavar="CERTIFICATE", help="As `headway try` writes it with --certificate or --json.")
    ],
) -> None:
    """Check a certificate: its form, that its verdict follows from its numbers, and its edge deck, dealt again here.

    Exits with 1 if it does not hold, with 2 if it cannot be read or contradicts itself.
    """
    try:
        with told("reading it"):
            verdict = _checked(certificate)
    except CertificateError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(str(verdict))
    typer.echo("holds" if verdict.holds else "does not hold")
    if not verdict.holds:
        raise typer.Exit(1)


def _checked(path: Path) -> Verdict:
    """Of a report, the certificate inside it."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise CertificateError(f"got {path}, which is no text ({error}); takes a certificate") from error
    except (OSError, json.JSONDecodeError):
        return verify(path)  # which says what is wrong with it
    if not (isinstance(data, dict) and data.get("format") == FORMAT and data.get("certificate")):
        return verify(path)
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "certificate.json"
        inside.write_text(json.dumps(data["certificate"]), "utf-8")
        return verify(inside)
