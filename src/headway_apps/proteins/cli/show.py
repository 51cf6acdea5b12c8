"""`headway proteins show`: what a config means, with all defaults, before anything is begun."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from headway_apps.proteins.cli.terminal import failures


def command(
    config: Annotated[Path, typer.Argument(help="a YAML file")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="a key and its value in place of the file's")] = None,
) -> None:
    """Print the effective config, and the size of its network."""
    with failures():
        from headway_apps.proteins.config import parameters, read

        found = read(config, set_ or ())
        network = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(found.network).items())
        typer.echo(f"# {parameters(found.network):,} parameters: {network}\n{found.to_yaml()}", nl=False)
