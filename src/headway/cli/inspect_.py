"""headway inspect: the census that a swap would make, with nothing changed."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from headway.cli.models import MODEL_HELP, found
from headway.cli.try_ import BackendOption, Only, Skip, backends
from headway.errors import HeadwayError
from headway.report import show_census
from headway.swap import inspect


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model and its example.")] = "float32",
    backend: BackendOption = None,
    only: Only = None,
    skip: Skip = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Of random weights and inputs.")] = 0,
) -> None:
    """List every place where a model computes attention, and what a swap would do there. Changes nothing."""
    module, example = found(model, device, dtype, seed)
    try:
        census = inspect(module, example, only=only, skip=skip, backend=backends(backend))
    except HeadwayError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps(census.as_dict(), indent=1))
    else:
        show_census(census, Console())
