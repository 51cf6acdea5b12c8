"""The command line: `headway try`, `inspect`, `verify`, `doctor`, `explain`, `support`, `demo`; a file each."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headway import __version__
from headway.cli import demo, doctor, explain, inspect_, support, try_, verify


class _Commands(TyperGroup):
    """The library's own, and those of applications that are installed, which are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(each.name for each in entry_points(group="headway.commands"))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        entries = () if own is not None else entry_points(group="headway.commands", name=cmd_name)
        found = next((typer.main.get_command(entry.load()) for entry in entries), own)
        if found is None and _is_application(f"headway_apps.{cmd_name}"):
            typer.echo(
                f"got {cmd_name}, which is a command where headway is installed (pip install .), and here it is not;"
                f" python -m headway_apps.{cmd_name} does the same",
                err=True,
            )
            raise typer.Exit(2)
        return found


def _is_application(package: str) -> bool:
    if package.count(".") != 1 or find_spec(package.partition(".")[0]) is None:
        return False
    return find_spec(package) is not None and find_spec(f"{package}.__main__") is not None


app = typer.Typer(
    name="headway",
    cls=_Commands,
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
