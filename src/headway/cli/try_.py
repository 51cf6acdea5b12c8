"""headway try: a model swapped, proven, timed and reported, in one command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from headway.cli.models import MODEL_HELP, found, listed
from headway.cli.progress import told
from headway.errors import HeadwayError
from headway.report import Report, Times, measure, page, pictures, show
from headway.swap import Swap, inspect, swap

Only = Annotated[
    list[str] | None, typer.Option("--only", help="Swap only sites whose name matches this glob. Repeatable.")
]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", help="Leave out sites whose name matches this glob. Repeatable.")
]
BackendOption = Annotated[
    list[str] | None, typer.Option("--backend", help="A backend for all sites, or glob=backend for some. Repeatable.")
]


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model and its example.")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward too.")] = False,
    backend: BackendOption = None,
    only: Only = None,
    skip: Skip = None,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write census and certificate as JSON.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="Write the certificate, for `headway verify`.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and inputs.")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Timed rounds, at least 5; 0 times nothing.")] = 9,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves them to torch.")] = 0,
    list_: Annotated[bool, typer.Option("--list", help="List what MODEL may be, and stop.")] = False,
) -> None:
    """Swap a model's attention, prove each site against float64, time it, and report.

    Exits with 1 if a site fails the proof, or if nothing can be swapped.
    """
    if list_:
        typer.echo(listed())
        return
    if model is None:
        typer.echo(listed(), err=True)
        raise typer.BadParameter("takes one of the above", param_hint="MODEL")
    for path in (report, as_json, certificate):
        _check_folder(path)
    if threads:
        torch.set_num_threads(threads)
    module, example = found(model, device, dtype, seed)
    made = attempt(module, example, model, backend, only, skip, backward, rounds)
    written = save(made, report, as_json, certificate)  # before anything is printed: a pipe may close early
    show(made, Console())
    for line in written:
        typer.echo(line)
    if not made.proven:
        raise typer.Exit(1)


def attempt(
    model: nn.Module,
    example: Any,
    title: str,
    backend: list[str] | None = None,
    only: list[str] | None = None,
    skip: list[str] | None = None,
    backward: bool = False,
    rounds: int = 9,
) -> Report:
    """Swap, prove, draw and time. Exits with 1 where the swap as a whole is refused."""
    asked = backends(backend)
    try:
        inspect(model, example, only=only, skip=skip, backend=asked)  # what it refuses, the command line got wrong
    except HeadwayError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        with told("looking for attention"):
            swapped = swap(model, example, only=only, skip=skip, backend=asked)
        with told("timing it"):
            drawn = pictures(swapped, example)
            times = _times(swapped, example, backward, rounds)
    except HeadwayError as error:
        typer.echo(f"{title} is left as it was: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    return Report.of(swapped, title=title, times=times, pictures=drawn, command=_typed())


def _times(swapped: Swap, example: Any, backward: bool, rounds: int) -> Times | None:
    if not rounds or not swapped.census.swapped:
        return None
    return measure(swapped, example, backward=backward, rounds=rounds)


def backends(asked: list[str] | None) -> str | dict[str, str]:
    """`name` for all sites, `glob=name` for some; the last that matches counts.

    >>> backends(["flex", "decoder.*=sdpa-math"])
    {'*': 'flex', 'decoder.*': 'sdpa-math'}
    """
    if not asked:
        return "auto"
    pairs = (one.rpartition("=") for one in asked)
    return {pattern or "*": name for pattern, _, name in pairs}


def save(made: Report, report: Path | None, as_json: Path | None, certificate: Path | None) -> list[str]:
    """Write what was asked for, and say what was written where."""
    written = []
    if report is not None:
        report.write_text(page(made), "utf-8")
        written.append(f"report: {report}")
    if as_json is not None:
        written.append(f"json: {made.save(as_json)}")
    if certificate is not None and made.certificate is not None:
        written.append(f"certificate: {made.certificate.save(certificate)}")
    return written


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise typer.BadParameter(f"got {path}, but there is no folder {path.parent}")


def _typed() -> str:
    return shlex.join(["headway", *sys.argv[1:]])
