"""The command line: `headway try`, `inspect`, `verify`, `doctor`, `explain`, `support`, `demo`; a file each."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from headway import __version__
from headway.cli import demo, doctor, explain, inspect_, support, try_, verify

app = typer.Typer(
    name="headway",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The fastest attention that is right on this machine, in any PyTorch model.",
)

app.command("try")(try_.command)
app.command("inspect")(inspect_.command)
app.command("verify")(verify.command)
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)
app.command("explain")(explain.command)
app.command("support")(support.command)
for entry in sorted(entry_points(group="headway.commands")):
    app.add_typer(entry.load(), name=entry.name)  # applications that are installed, such as headway_apps.proteins


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"headway {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options that stand before any command."""
